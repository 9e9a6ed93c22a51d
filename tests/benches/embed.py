#!/usr/bin/env python3
"""Feature extraction beside timm's, on the same device and patches: make bench-embed ARGS="--arch resnet50 --patches 1000".

Ours is the whole way, from JPEGs in a patch set to the HDF5 file: decode, resize, normalise, forward, write. timm's is measured as
its forward pass alone, on batches that lie ready in memory, in both memory formats, and as the whole way with PIL, torchvision and
h5py in a DataLoader. With --device cuda batches that lie ready do so in the GPU's memory. Runs alternate; medians are reported. The
last line is one JSON object.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

import h5py
import timm
import torch
from PIL import Image
from torchvision import transforms as T

PATCH = 256


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        args.set = args.set or draw(args, Path(folder))
        patches = jpegs(args.set)
        net = timm.create_model(args.arch, num_classes=0).eval().to(args.device)
        weights = f"{folder}/weights.pth"
        torch.save({name: tensor.cpu() for name, tensor in net.state_dict().items()}, weights)
        views = [view(args, jpeg) for jpeg in patches]
        ready = [torch.stack(views[i:i + args.batch]).to(args.device) for i in range(0, len(views), args.batch)]
        fast = timm.create_model(args.arch, num_classes=0).eval().to(args.device, memory_format=torch.channels_last)
        ways = {
            "sgclctl embed": lambda: ours(args, folder, weights),
            "timm, whole way": lambda: whole(args, folder, net, patches),
            "timm, forward alone": lambda: forward(args, net, ready),
            "timm, forward alone, channels last": lambda: forward(args, fast, [b.contiguous(memory_format=torch.channels_last) for b in ready]),
        }
        seconds = {name: [] for name in ways}
        for turn in range(args.repeats + 1):
            for name, way in ways.items():
                took = way()
                # The first turn warms caches up.
                if turn:
                    seconds[name].append(took)
    report(args, len(patches), seconds)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--patches", type=int, default=600)
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", type=Path, help=f"a patch set of {PATCH}-px patches that is there (default: one is drawn)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def sgclctl(*arguments):
    folder = os.environ.get("SGCL_BIN") or Path(os.environ.get("CARGO_TARGET_DIR", "target")) / "release"
    # Python's libtorch is not the worker's.
    done = subprocess.run([Path(folder) / "sgclctl", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}:\n{done.stderr}")
    return done.stdout


def draw(args, folder):
    """A patch set of a drawn slide, with at least as many patches as asked for."""
    side = PATCH * (int((args.patches * 1.6) ** 0.5) + 1)
    sgclctl("phantom", "--out", folder / "slides", "--slides", 1, "--size", side, "--seed", args.seed)
    sgclctl("ingest", folder / "slides", "--to", folder / "set", "--level", 0, "--patch-px", PATCH)
    return folder / "set"


def jpegs(patch_set):
    patches = []
    for shard in sorted((patch_set / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            patches += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    return patches


def view(args, jpeg):
    transform = T.Compose([
        T.Resize(args.px), T.CenterCrop(args.px), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])
    return transform(Image.open(BytesIO(jpeg)).convert("RGB"))


def ours(args, folder, weights):
    """Seconds from the first patch to the written file, without starting the program and loading the encoder."""
    with tempfile.TemporaryDirectory(dir=folder) as to:
        told = sgclctl("embed", args.set, "--weights", weights, "--arch", args.arch, "--to", to, "--px", args.px,
                       "--batch", args.batch, "--device", args.device, "--output", "json")
    return sum(json.loads(line)["slide"]["seconds"] for line in told.splitlines() if "seconds" in json.loads(line).get("slide", {}))


class Patches(torch.utils.data.Dataset):
    def __init__(self, args, patches):
        self.args, self.patches = args, patches

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, at):
        return view(self.args, self.patches[at])


def whole(args, folder, net, patches):
    loader = torch.utils.data.DataLoader(
        Patches(args, patches), batch_size=args.batch, num_workers=args.threads, pin_memory=args.device == "cuda")
    began = time.perf_counter()
    with torch.inference_mode():
        features = torch.cat([net(batch.to(args.device, non_blocking=True)) for batch in loader]).cpu()
    with h5py.File(f"{folder}/theirs.h5", "w") as file:
        file["features"] = features.numpy()
    return time.perf_counter() - began


def forward(args, net, batches):
    through = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    through()
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            net(batch)
    through()
    return time.perf_counter() - began


def report(args, patches, seconds):
    print(f"{args.arch}, {patches} patches of {PATCH} px seen at {args.px} px, batches of {args.batch}, {args.threads} threads, {args.device}")
    rates = {name: patches / statistics.median(took) for name, took in seconds.items()}
    ours = rates["sgclctl embed"]
    for name, took in seconds.items():
        each = ", ".join(f"{patches / one:.0f}" for one in took)
        print(f"  {name:36} {rates[name]:7.1f} patches/s   ratio {ours / rates[name]:.2f}   ({each})")
    print(json.dumps({
        "bench": "embed", "arch": args.arch, "patches": patches, "threads": args.threads, "device": args.device, "patches_per_second": rates,
        "ratio_to_forward": ours / rates["timm, forward alone"],
        "ratio_to_channels_last": ours / rates["timm, forward alone, channels last"],
        "ratio_to_whole_way": ours / rates["timm, whole way"],
    }))


if __name__ == "__main__":
    main()
