"""What torchvision's transforms make of PIL images: pixels for fixed parameters, and draws of the random ones."""
import json
import random
import sys

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms as T

out, seed = sys.argv[1], int(sys.argv[2])
rng, nrng = random.Random(seed), np.random.default_rng(seed)
torch.manual_seed(seed)

# Every colour there is, three shifts of the hue.
every = np.arange(1 << 24, dtype=np.uint32)
every = np.stack([every >> 16, every >> 8 & 255, every & 255], -1).astype(np.uint8).reshape(4096, 4096, 3)
for i, turns in enumerate((-0.4, 0.137, 0.4)):
    np.asarray(F.adjust_hue(Image.fromarray(every), turns)).tofile(f"{out}/hue{i}.raw")


def picture(w, h):
    """A smooth pattern in stain colours, with noise."""
    y, x = np.mgrid[0:h, 0:w] / 40.0
    waves = [np.sin(x * nrng.uniform(0.3, 3) + y * nrng.uniform(0.3, 3) + nrng.uniform(0, 6)) for _ in range(3)]
    base = np.stack([190 + 50 * waves[0], 130 + 70 * waves[1], 180 + 50 * waves[2]], -1)
    return np.clip(base + nrng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)


OPS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
tensors, cases = {}, []
for i in range(40):
    w, h = (256, 256) if i % 2 else (rng.randint(60, 400), rng.randint(60, 400))
    array = picture(w, h)
    cw, ch = rng.randint(20, w), rng.randint(20, h)
    top, left, px = rng.randint(0, h - ch), rng.randint(0, w - cw), rng.choice((32, 96, 97, 224))
    order = rng.sample(range(4), 4)
    factors = [rng.uniform(0.6, 1.4) for _ in range(3)] + [rng.uniform(-0.4, 0.4)]
    gray, flip = rng.random() < 0.3, rng.random() < 0.5
    resized = F.resized_crop(Image.fromarray(array), top, left, ch, cw, [px, px], T.InterpolationMode.BILINEAR)
    view = F.to_grayscale(resized, 3) if gray else resized
    for op in order:
        view = OPS[op](view, factors[op])
    final = F.hflip(view) if flip else view
    final = F.normalize(F.to_tensor(final), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    tensors |= {f"image{i}": torch.from_numpy(array), f"resized{i}": torch.from_numpy(np.array(resized)),
                f"colored{i}": torch.from_numpy(np.array(view)), f"final{i}": final.contiguous()}
    cases.append({"crop": [left, top, cw, ch], "px": px, "order": order, "factors": factors, "gray": gray, "flip": flip})
square = picture(256, 256)
tensors["eval_image"] = torch.from_numpy(square)
tensors["eval"] = F.normalize(F.to_tensor(T.CenterCrop(96)(T.Resize(96)(Image.fromarray(square)))),
                              [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).contiguous()

draws = 20_000
for name, (w, h), scale in (("global", (256, 256), (0.2, 1.0)), ("local", (128, 128), (0.2, 0.56)), ("wide", (300, 60), (0.2, 1.0))):
    image = torch.empty(3, h, w)
    rows = [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(draws)]
    tensors[f"crops_{name}"] = torch.tensor([[j, i, ww, hh] for i, j, hh, ww in rows])
jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.4)
rows = [T.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(draws)]
tensors["factors"] = torch.tensor([[b, c, s, h] for _, b, c, s, h in rows], dtype=torch.float64)
tensors["first_op"] = torch.stack([order[0] for order, *_ in rows])
save_file(tensors, f"{out}/cases.safetensors")
json.dump(cases, open(f"{out}/cases.json", "w"))
