"""Figures of a segmentation by NumPy alone, from masks and predictions on disk; and fixtures that are wrong on purpose."""
import json
import pathlib
import sys

import numpy as np
from PIL import Image

# Code by code, 0 to 21: what SGCL publishes, written out.
CLASSES = np.array([255, 1, 2, 3, 4, 0, 0, 0, 0, 0, 3, 3, 0, 0, 3, 0, 0, 0, 0, 1, 1, 0])
VALIDATION = ("OL", "LL", "E2", "EW", "GM", "S3")


def iou(confusion):
    hits = np.diag(confusion)
    either = confusion.sum(0) + confusion.sum(1) - hits
    return [h / e if e else None for h, e in zip(hits.tolist(), either.tolist())]


def mean(values):
    return float(np.mean([value for value in values if value is not None]))


def scores(data, encoder):
    """One line a trial, and what guessing would reach: every class equally often, or always the most frequent one."""
    masks = sorted(p for p in pathlib.Path(data, "masks").glob("*.png") if p.name[5:7] in VALIDATION)
    for trial in sorted(pathlib.Path(encoder).glob("trial-*")):
        assert sorted(p.name for p in trial.iterdir()) == [p.name for p in masks]
        confusion = np.zeros((5, 5), dtype=np.int64)
        for mask in masks:
            truth = CLASSES[np.array(Image.open(mask))]
            found = np.array(Image.open(trial / mask.name)).astype(np.int64)
            assert truth.shape == found.shape and found.max() < 5
            counted = truth != 255
            confusion += np.bincount(5 * truth[counted] + found[counted], minlength=25).reshape(5, 5)
        share = confusion.sum(1) / confusion.sum()
        guess = mean([p * 0.2 / (p + 0.2 - p * 0.2) for p in share])
        print(json.dumps({"confusion": confusion.tolist(), "iou": iou(confusion), "mean_iou": mean(iou(confusion)),
                          "accuracy": np.diag(confusion).sum() / confusion.sum(), "guess": guess, "most": share.max() / 5}))


def paint(data, seed):
    """Paints the pictures by the classes of their masks, with noise: what a short training on few processors can learn."""
    rng = np.random.default_rng(int(seed))
    colours = np.zeros((256, 3))
    colours[[0, 1, 2, 3, 4, 255]] = [[240, 240, 240], [200, 40, 60], [60, 170, 80], [50, 60, 200], [230, 180, 40], [128, 128, 128]]
    for mask in sorted(pathlib.Path(data, "masks").glob("*.png")):
        pixels = colours[CLASSES[np.array(Image.open(mask))]]
        noisy = pixels + rng.normal(0, 25, pixels.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(pathlib.Path(data, "rgbs_colorNormalized", mask.name))


def spoil(data, how):
    """Makes one file of a data set wrong; prints its name."""
    masks = sorted(pathlib.Path(data, "masks").glob("*.png"))
    victim = masks[1]
    mask = np.array(Image.open(victim))
    if how == "size":
        Image.fromarray(mask[:-3]).save(victim)
    elif how == "class":
        mask[5, 7] = 22
        Image.fromarray(mask).save(victim)
    elif how == "colour":
        Image.fromarray(np.stack([mask] * 3, -1)).save(victim)
    elif how == "truncated":
        victim.write_bytes(victim.read_bytes()[:200])
    elif how == "missing":
        victim.unlink()
    elif how == "empty":
        for path in masks:
            Image.fromarray(np.zeros_like(mask)).save(path)
    elif how == "sixteen":
        for path in masks:
            Image.fromarray(np.array(Image.open(path)).astype(np.uint16)).save(path)
    elif how == "palette":
        for path in masks:
            image = Image.fromarray(np.array(Image.open(path)), mode="P")
            image.putpalette([v for i in range(256) for v in (i * 37 % 256, i * 91 % 256, i * 53 % 256)])
            image.save(path)
    print(json.dumps({"file": victim.name}))


globals()[sys.argv[1]](*sys.argv[2:])
