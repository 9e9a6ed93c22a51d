"""Loads an export of sgcl into timm, key by key, and shows a patch's features.

  python timm_load.py WEIGHTS [PICTURE]

WEIGHTS is the folder that `sgclctl pull` writes. Every key must fit: a key that lacks, or that the network does not have, is an error.
"""
import argparse
import json
from pathlib import Path

import safetensors.torch
import timm
import torch


def encoder(folder):
    """The network with its weights, ready to look, and how its pictures must be made."""
    config = json.loads((folder / "config.json").read_text())
    network = timm.create_model(config["architecture"], num_classes=0)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    network.load_state_dict(state, strict=True)
    wanted = config["pretrained_cfg"]
    transform = timm.data.create_transform(
        input_size=tuple(wanted["input_size"]),
        interpolation=wanted["interpolation"],
        mean=wanted["mean"],
        std=wanted["std"],
        crop_pct=wanted["crop_pct"],
    )
    return network.eval(), transform


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder of an export")
    parser.add_argument("picture", type=Path, nargs="?", help="a patch")
    args = parser.parse_args()
    network, transform = encoder(args.weights)
    print(f"{len(network.state_dict())} keys, every one of them matched")
    if args.picture:
        from PIL import Image

        with Image.open(args.picture) as picture, torch.no_grad():
            features = network(transform(picture.convert("RGB"))[None])
        print(f"features {tuple(features.shape)}, norm {features.norm():.3f}")


if __name__ == "__main__":
    main()
