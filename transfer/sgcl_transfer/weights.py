"""Reading backbone weights. Nothing in a file is ever executed, and none is taken for what it is not."""
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import torchvision

from . import Refused

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
# Blocks of each stage tell the architectures apart; of two with the same, the third convolution of a block does.
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
WIDTH = {"resnet18": 512, "resnet34": 512, "resnet50": 2048}
COUNTER = "num_batches_tracked"
MAX_BYTES = 4 << 30


@dataclass
class Report:
    """What was taken from a file, and what was not."""

    matched: int = 0
    prefix: str = ""
    missing: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)


def read(path):
    """Every tensor of a `.pth` or `.safetensors` file by its path in it: nested dictionaries join with a dot. Content tells the format."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise Refused(f"cannot read weights {path}: {error.strerror}; check the path") from error
    if size == 0:
        raise Refused(f"{path} is empty; fetch it again")
    if size > MAX_BYTES:
        raise Refused(f"{path} has {size} bytes, more than any backbone; give the exported backbone alone")
    try:
        if head[8:9] == b"{":
            return dict(safetensors.torch.load_file(path))
        return flat(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        # torch names what the pickle wanted to call; with weights_only it was not called.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"its pickle calls `{asked.group(1)}`, which is not tensor data" if asked else "it is not a file of tensors"
        raise Refused(f"{path} is refused: {what}; save `model.state_dict()` alone, where you trust it") from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError, safetensors.SafetensorError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise Refused(f"{path} holds no weights that can be read ({first}); give a .pth or .safetensors file") from error


def flat(value, prefix="", depth=0):
    """Tensors of nested dictionaries; everything else is left out."""
    if isinstance(value, torch.Tensor):
        return {prefix.rstrip("."): value}
    found = {}
    if isinstance(value, dict) and depth < 8:
        for key, inner in value.items():
            if isinstance(key, str):
                found.update(flat(inner, f"{prefix}{key}.", depth + 1))
    return found


def architecture(source):
    """Which of ours the keys are of, by their blocks; None where they are of none."""
    own = best_prefix(source, backbone("resnet18").state_dict())
    if own is None:
        return None
    keys = [key[len(own) :] for key in source if key.startswith(own)]
    blocks = tuple(
        len({match.group(1) for key in keys if (match := re.match(rf"layer{stage}\.(\d+)\.", key))}) for stage in range(1, 5)
    )
    if f"{own}layer1.0.conv3.weight" in source:
        return "resnet50" if blocks == BLOCKS["resnet50"] else None
    return next((name for name in ("resnet18", "resnet34") if BLOCKS[name] == blocks), None)


def backbone(arch):
    """torchvision's network without its classifier."""
    network = getattr(torchvision.models, arch)(weights=None)
    network.fc = torch.nn.Identity()
    return network


def load(network, source, name, arch):
    """Copies weights into `network`, of architecture `arch`, whatever stands before their keys. Says what matched; `name` is for messages."""
    target = network.state_dict()
    prefix = best_prefix(source, target)
    if prefix is None:
        some = ", ".join(f"`{key}`" for key in sorted(source)[:3]) or "no tensors at all"
        raise Refused(f"{name}: no weight matches: expected keys such as `conv1.weight`, found {some}; is it a ResNet backbone?")
    own = {key[len(prefix) :]: tensor for key, tensor in source.items() if key.startswith(prefix)}
    report = Report(prefix=prefix)
    # Another depth shares many keys and shapes: what tells is whole blocks that are there or not.
    blocks = {found for keys in (own, target) for key in keys if (found := block(key)) and sides(found, own, target) == 1}
    if blocks:
        raise Refused(f"{name} is no {arch}: only one of the two has {', '.join(sorted(blocks)[:3])}; name its architecture with --arch")
    taken = {}
    for key, ours in target.items():
        theirs = own.get(key)
        if theirs is None:
            report.missing.append(key)
        elif theirs.shape != ours.shape:
            shapes = f"shape {list(theirs.shape)}, expected {list(ours.shape)}"
            raise Refused(f"{name}: weight `{prefix}{key}` has {shapes}; name its architecture with --arch")
        else:
            taken[key] = theirs.to(ours.dtype)
    report.matched = len(taken)
    report.unexpected = sorted(key for key in source if not key.startswith(prefix) or key[len(prefix) :] not in target)
    if not all(torch.isfinite(tensor).all() for tensor in taken.values() if tensor.is_floating_point()):
        raise Refused(f"{name} has weights that are no numbers; the run that wrote it diverged")
    network.load_state_dict(taken, strict=False)
    return report


def block(key):
    match = re.match(r"layer[1-4]\.\d+\.", key)
    return match and match.group(0)


def sides(found, *states):
    return sum(any(key.startswith(found) for key in state) for state in states)


def best_prefix(source, target):
    """The prefix under which most of our keys are found; of equals the online network goes before a momentum copy. None without any."""
    first = [key for key in target if not key.endswith(COUNTER)][:2]
    prefixes = {key[: -len(name)] for name in first for key in source if key.endswith(name)}

    def rank(prefix):
        copy = any(word in prefix for word in ("encoder_k", "momentum", "teacher", "target", "ema"))
        return sum(prefix + key in source for key in target), not copy, -len(prefix)

    return max(sorted(prefixes), key=rank, default=None)
