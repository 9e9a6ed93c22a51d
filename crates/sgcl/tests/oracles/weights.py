"""Weights files as people have them, small and whole, good and bad."""
import argparse
import collections
import os
import pickle
import sys

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file

out = sys.argv[1]
torch.manual_seed(0)
net = torchvision.models.resnet18(weights=None)
state = net.state_dict()
state["bn1.num_batches_tracked"] += 7
save_file({k: v.contiguous() for k, v in state.items()}, f"{out}/truth.safetensors")
torch.save(state, f"{out}/plain.pth")
torch.save(state, f"{out}/legacy.pth", _use_new_zipfile_serialization=False)
momentum = {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in state.items()}
online = {f"module.encoder_q.{k}": v for k, v in state.items()}
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9).state_dict()
torch.save({"epoch": 3, "arch": "resnet18", "state_dict": {**momentum, **online}, "optimizer": optimizer,
            "args": argparse.Namespace(lr=0.1, path="x"), "best": np.float64(0.5), "dtype": torch.float32}, f"{out}/moco.pth")
torch.save({"state_dict": {f"backbone.{k}": v.half() for k, v in state.items()}, "author": "someone"}, f"{out}/half.pth")
torch.save(torchvision.models.resnet34(weights=None).state_dict(), f"{out}/resnet34.pth")
torch.save(torchvision.models.resnet50(weights=None).state_dict(), f"{out}/resnet50.pth")
torch.save({"head.weight": torch.ones(2, 2)}, f"{out}/none.pth")

base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
small = collections.OrderedDict(
    whole=base, turned=base.t(), part=base[1:3, 2:5], same=base, scalar=torch.tensor(5), empty=torch.zeros(0, 3),
    parameter=torch.nn.Parameter(base[:, 0]), double=base.double(), brain=base.bfloat16(), long=base.long(),
    nested={"inner": base + 1, 5: base}, steps=[1, 2], name="x", big=1 << 80, text=b"abc")
for name, zipped in (("small.pth", True), ("small_legacy.pth", False)):
    torch.save(small, f"{out}/{name}", _use_new_zipfile_serialization=zipped)
save_file({k: v.contiguous() for k, v in small.items() if isinstance(v, torch.Tensor) and k not in ("same", "whole", "part")},
          f"{out}/small.safetensors")


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {out}/executed",)


torch.save({"state_dict": state, "x": Evil()}, f"{out}/evil.pth")
torch.save({"x": Evil()}, f"{out}/evil_legacy.pth", _use_new_zipfile_serialization=False)
torch.save(torch.nn.Linear(2, 2), f"{out}/module.pth")
pickle.dump({"a": np.ones(3)}, open(f"{out}/numpy.pth", "wb"))
torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), f"{out}/script.pth")
