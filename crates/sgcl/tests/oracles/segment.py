"""Dilated backbones of timm and torchvision, and a fully convolutional head trained by PyTorch, for the same weights and inputs."""
import sys

import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


def lively(net):
    """Statistics and scales that say something: those of a new network are zeros and ones."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif ("bn" in name or "downsample.1" in name) and name.endswith("weight"):
                tensor.uniform_(0.5, 1.0)
    return net.eval()


def maps(out, seed):
    """timm's maps at output strides 8 and 16, and torchvision's where it dilates."""
    for arch in ("resnet18", "resnet34", "resnet50"):
        torch.manual_seed(int(seed))
        net = lively(timm.create_model(arch, num_classes=0))
        state = net.state_dict()
        x = torch.randn(2, 3, 104, 72)
        found = {"x": x}
        with torch.no_grad():
            for stride in (8, 16, 32):
                other = timm.create_model(arch, num_classes=0, output_stride=stride).eval()
                other.load_state_dict(state)
                found[f"timm.{stride}"] = other.forward_features(x)
            if arch == "resnet50":
                for stride, dilate in ((8, [False, True, True]), (16, [False, False, True])):
                    other = torchvision.models.resnet50(replace_stride_with_dilation=dilate).eval()
                    other.fc = nn.Identity()
                    other.load_state_dict(state)
                    body = nn.Sequential(*list(other.children())[:-2])
                    found[f"torchvision.{stride}"] = body(x)
        weights = {f"w.{name}": tensor.clone() for name, tensor in state.items()}
        save_file({**found, **weights}, f"{out}/{arch}.safetensors")


class Block(nn.Module):
    """ResNet-18's basic block, written out with the dilation of each convolution."""

    def __init__(self, i, o, stride, first, rest):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, first, first, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, rest, rest, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class Segmenter(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, 64, 1, 1, 1), Block(64, 64, 1, 1, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2, 1, 1), Block(128, 128, 1, 1, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 1, 1, 2), Block(256, 256, 1, 2, 2))
        self.layer4 = nn.Sequential(Block(256, 512, 1, 2, 4), Block(512, 512, 1, 4, 4))
        unit = lambda i: nn.ModuleDict({"conv": nn.Conv2d(i, 128, 3, 1, 1, bias=False), "bn": nn.BatchNorm2d(128)})
        self.decode_head = nn.ModuleDict({
            "convs": nn.ModuleList([unit(512), unit(128)]), "conv_cat": unit(640), "conv_seg": nn.Conv2d(128, classes, 1)})

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        run = lambda unit, z: F.relu(unit["bn"](unit["conv"](z)))
        head = self.decode_head
        z = y
        for unit_ in head["convs"]:
            z = run(unit_, z)
        z = head["conv_seg"](run(head["conv_cat"], torch.cat([y, z], 1)))
        return F.interpolate(z, x.shape[2:], mode="bilinear", align_corners=False)


def train(folder, steps, batch):
    """Three things of a training that begins with our weights: first loss, weights at the end, what is then predicted."""
    given = load_file(f"{folder}/given.safetensors")
    net = Segmenter(5).double()
    state = {k.removeprefix("w."): v.double() for k, v in given.items() if k.startswith("w.")}
    missing = net.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(k.endswith("num_batches_tracked") for k in missing.missing_keys), missing
    x, y, order = given["x"].double(), given["y"], given["order"].tolist()
    steps, batch = int(steps), int(batch)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step in range(steps):
        for group in sgd.param_groups:
            group["lr"] = 1e-4 + (0.01 - 1e-4) * (1 - step / steps) ** 0.9
        rows = order[step * batch:(step + 1) * batch]
        loss = F.cross_entropy(net(x[rows]), y[rows], ignore_index=255)
        losses.append(loss.item())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    net.eval()
    with torch.no_grad():
        logits = net(x)
    after = {f"w.{k}": v for k, v in net.state_dict().items() if "num_batches" not in k}
    save_file({"losses": torch.tensor(losses), "logits": logits, **after}, f"{folder}/torch.safetensors")


globals()[sys.argv[1]](*sys.argv[2:])
