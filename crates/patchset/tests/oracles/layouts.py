"""Files in the layouts that others publish: python layouts.py COMMAND ARGUMENTS…"""
import io
import json
import sys
import tarfile

import h5py
import numpy as np
from PIL import Image


def save(path, coords, attributes):
    """As CLAM's `save_hdf5` and TRIDENT's `save_h5` do: a chunk a row, rows without end."""
    with h5py.File(path, "w") as file:
        values = np.array(coords)
        dataset = file.create_dataset(
            "coords", shape=values.shape, maxshape=(None, *values.shape[1:]), chunks=(1, *values.shape[1:]), dtype=values.dtype)
        dataset[:] = values
        for key, value in attributes.items():
            dataset.attrs[key] = value


def trident(path, size, size_level0, overlap, coords):
    save(path, json.loads(coords), {
        "patch_size": int(size), "patch_size_level0": int(size_level0), "level0_magnification": 40,
        "target_magnification": 40 * int(size) // int(size_level0), "overlap": int(overlap), "name": "a", "savetodir": "/job",
    })


def clam(path, size, level, downsample, coords):
    save(path, np.array(json.loads(coords), dtype=np.int32), {
        "patch_size": np.int64(size), "patch_level": np.int64(level), "downsample": (float(downsample), float(downsample)),
        "downsampled_level_dim": (256, 256), "level_dim": (256, 256), "name": "a", "save_path": "/patches",
    })


def other(path):
    with h5py.File(path, "w") as file:
        file["coords"] = np.zeros((3, 2), dtype=np.int64)


def tiles(root, seed):
    """NCT-CRC-HE-100K: nine class folders of 224-pixel TIFFs called by class and eight letters."""
    rng = np.random.default_rng(int(seed))
    for at, label in enumerate("ADI BACK DEB LYM MUC MUS NORM STR TUM".split()):
        for _ in range(3):
            name = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 8))
            noise = rng.integers(0, 60, (224, 224, 3)) + np.array([20 * at, 60, 120])
            Image.fromarray(noise.astype(np.uint8)).save(f"{root}/{label}/{label}-{name}.tif")


def encoded(colour, kind="JPEG"):
    """A tile of 32 px in one colour, which says which one it is."""
    out = io.BytesIO()
    Image.new("RGB", (32, 32), tuple(colour)).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


def webdataset(path, samples):
    """A shard as webdataset's TarWriter makes it; samples are lists of (name, what): a colour, an object for .json, text for the rest."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as shard:
        for name, what in json.loads(samples):
            kind = name.rsplit(".", 1)[-1]
            data = {"jpg": lambda: encoded(what), "png": lambda: encoded(what, "PNG")}.get(
                kind, lambda: (json.dumps(what) if kind == "json" else str(what)).encode())()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o444
            shard.addfile(entry, io.BytesIO(data))


def jpegs(folder, colours):
    """Encoded tiles as files 0, 1, …"""
    for at, colour in enumerate(json.loads(colours)):
        with open(f"{folder}/{at}", "wb") as file:
            file.write(encoded(colour, "PNG" if at % 2 else "JPEG"))


globals()[sys.argv[1]](*sys.argv[2:])
