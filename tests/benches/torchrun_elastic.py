"""What users of PyTorch write today: DDP under torchrun elastic, a checkpoint every K steps, resumed from after a restart.

  torchrun --nnodes=1:2 --nproc-per-node=2 --rdzv-backend=c10d … torchrun_elastic.py FOLDER --every K --px SIDE --views COUNT --batch COUNT

ResNet-18 and a projector on as many views a sample as sgcl has, SIDE pixels each. The samples are random pixels made once: no file is read or
decoded. It trains until it is killed; whoever is rank 0 appends a line of JSON to FOLDER/steps.jsonl at the end of each step.
"""
import argparse
import ctypes
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SAMPLES = 512


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        kept = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + kept, inplace=True)


class Net(nn.Module):
    """torchvision's ResNet-18 and a two-layer head. Written out: importing torchvision would make every restart slower."""

    def __init__(self, dim=128):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
        width = 64
        for outputs, stride in [(64, 1), (128, 2), (256, 2), (512, 2)]:
            layers += [Block(width, outputs, stride), Block(outputs, outputs, 1)]
            width = outputs
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(True), nn.Linear(width, dim))

    def forward(self, x):
        return F.normalize(self.projector(self.backbone(x)), dim=1)


PR_SET_PDEATHSIG = 1


def main():
    began = time.time()
    # A rank without its agent would train for nobody.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ["every", "px", "views", "batch"]:
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    checkpoint = args.folder / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        net.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    pixels = torch.randn(SAMPLES, args.views, 3, args.px, args.px)
    log = open(args.folder / "steps.jsonl", "a") if rank == 0 else None
    while True:
        generator = torch.Generator().manual_seed(step * world + rank)
        picked = torch.randint(SAMPLES, (args.batch,), generator=generator)
        pictures = pixels[picked].transpose(0, 1).reshape(-1, 3, args.px, args.px)
        features = net(pictures).view(args.views, args.batch, -1)
        logits = features @ features[0].T / 0.2
        target = torch.arange(args.batch).repeat(args.views)
        loss = F.cross_entropy(logits.reshape(-1, args.batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if log:
            log.write(json.dumps({"step": step, "time": time.time(), "world": world, "began": began}) + "\n")
            log.flush()
        if rank == 0 and step % args.every == 0:
            state = {"model": net.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, args.folder / "checkpoint.draft")
            os.replace(args.folder / "checkpoint.draft", checkpoint)


if __name__ == "__main__":
    main()
