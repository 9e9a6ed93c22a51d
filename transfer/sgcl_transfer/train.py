"""Training a detector and looking with it. Every draw is of the seed and the trial."""
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from . import Refused
from .model import detector
from .weights import WIDTH

# Of its own side, what must be left of a nucleus in a crop to be learnt from; less is ignored.
VISIBLE = 0.25
# Batches that BatchNorm's statistics are taken over when training has ended.
PRECISE = 100


@dataclass(frozen=True)
class Settings:
    """How a detector is trained and looks."""

    iterations: int
    batch: int
    lr: float
    crop: int
    scale: float
    regions: int
    proposals: int
    detections: int
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: int = 100

    def rate(self, step):
        """Learning rate of a step: a linear start, then a tenth at 3/4 and at 11/12, as MoCo's protocol has it."""
        warmup = min(self.warmup, self.iterations // 10)
        rate = self.lr * (min(1.0, (step + 1) / (warmup + 1)))
        return rate * 0.1 ** sum(step >= share * self.iterations for share in (3 / 4, 11 / 12))


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(network, arch, classes, fields, settings, seed, tick):
    """A detector of `network`, trained on `fields`. `tick()` is called after every step."""
    torch.manual_seed(int(np.random.SeedSequence([*seed, 0]).generate_state(1)[0]))
    draws = np.random.default_rng([*seed, 1])
    model = detector(network, WIDTH[arch], classes, settings.scale, settings.regions, settings.proposals, settings.detections)
    model.to(device()).train()
    optimiser = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    batches = stream(fields, settings, draws)
    for step in range(settings.iterations):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate(step)
        losses = model(*next(batches))
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise Refused(f"training diverged: the loss is no number at step {step + 1}; lower --lr", 1)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        tick()
    precise(model, batches, min(PRECISE, settings.iterations))
    return model.eval()


def precise(model, batches, count):
    """BatchNorm's statistics anew, over `count` batches of the trained weights: the running ones lag behind."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for _ in range(count):
            model(*next(batches))


def stream(fields, settings, draws):
    """Batches without end: pictures (3, H, W) in 0..1 and targets, on the device. Each round has every field once."""
    waiting = []
    while True:
        while len(waiting) < settings.batch:
            waiting += [fields[at] for at in draws.permutation(len(fields))]
        batch, waiting = waiting[: settings.batch], waiting[settings.batch :]
        pictures, targets = zip(*(view(field, settings, draws) for field in batch))
        yield list(pictures), list(targets)


def view(field, settings, draws):
    """A crop of a field at a random place, flipped at random, enlarged."""
    wide, high = min(settings.crop, field.width), min(settings.crop, field.height)
    left, top = (int(draws.integers(0, room + 1)) for room in (field.width - wide, field.height - high))
    pixels = field.pixels()[top : top + high, left : left + wide]
    whole = field.boxes - np.array([left, top, left, top], dtype=np.float32)
    boxes = np.clip(whole, 0, np.array([wide, high, wide, high], dtype=np.float32))
    flip_x, flip_y = draws.random(2) < 0.5
    if flip_x:
        pixels, boxes = pixels[:, ::-1], np.stack([wide - boxes[:, 2], boxes[:, 1], wide - boxes[:, 0], boxes[:, 3]], 1)
    if flip_y:
        pixels, boxes = pixels[::-1], np.stack([boxes[:, 0], high - boxes[:, 3], boxes[:, 2], high - boxes[:, 1]], 1)
    share = area(boxes) / np.maximum(area(whole), 1e-6)
    there = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
    learnt = there & (field.labels > 0) & (share >= VISIBLE)
    scaled = torch.from_numpy(boxes.astype(np.float32)) * settings.scale
    target = {"boxes": scaled[learnt], "labels": torch.from_numpy(field.labels[learnt]), "ignore": scaled[there & ~learnt]}
    return enlarged(pixels, settings.scale), {name: value.to(device()) for name, value in target.items()}


def enlarged(pixels, scale):
    """(3, H, W) in 0..1, `scale` times as large, on the device."""
    picture = torch.from_numpy(np.array(pixels)).to(device()).permute(2, 0, 1).float().div(255)
    if scale == 1:
        return picture
    high, wide = (max(round(side * scale), 1) for side in picture.shape[1:])
    return functional.interpolate(picture[None], size=(high, wide), mode="bilinear", align_corners=False)[0]


def area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@torch.no_grad()
def look(model, fields, settings, tick):
    """Detections in each field: boxes (N, 4) in its own pixels, labels (N,), scores (N,), the surest first."""
    found = []
    for field in fields:
        (one,) = model([enlarged(field.pixels(), settings.scale)])
        boxes, labels, scores = (one[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
        found.append((boxes / settings.scale, labels, scores))
        tick()
    return found
