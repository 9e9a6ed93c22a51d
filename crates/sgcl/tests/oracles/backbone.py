"""Writes, for each architecture, torchvision's weights, an input and what the network makes of it in eval and train mode."""
import sys

import torch
import torchvision
from safetensors.torch import save_file

out, seed = sys.argv[1], int(sys.argv[2])
for arch in ("resnet18", "resnet34", "resnet50"):
    torch.manual_seed(seed)
    net = getattr(torchvision.models, arch)(weights=None)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif "bn" in name and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
    before = {f"before.{k}": v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(6, 3, 128, 96)
    net.eval()
    with torch.no_grad():
        evaluated = net(x)
    net.train()
    with torch.no_grad():
        trained = net(x)
    # Gradients in float64: in float32 another order of sums flips a ReLU here and there.
    after = {f"after.{k}": v.clone() for k, v in net.state_dict().items()}
    probe = torch.randn(6, evaluated.shape[1], dtype=torch.float64)
    net.double()
    wide = net(x.double())
    (wide * probe).sum().backward()
    grads = {f"grad.{k}": p.grad for k, p in net.named_parameters()}
    save_file({"x": x, "eval": evaluated, "train": trained, "wide": wide.detach(), "probe": probe, **before, **after, **grads},
              f"{out}/{arch}.safetensors")
    with open(f"{out}/{arch}.keys", "w") as f:
        f.write("\n".join(net.state_dict()))
    with open(f"{out}/{arch}.params", "w") as f:
        f.write("\n".join(k for k, _ in net.named_parameters()))
