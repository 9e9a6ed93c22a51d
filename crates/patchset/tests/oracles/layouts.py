"""Files in the layouts that CLAM, TRIDENT and ASAP publish: python layouts.py COMMAND ARGUMENTS…"""
import json
import sys

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


globals()[sys.argv[1]](*sys.argv[2:])
