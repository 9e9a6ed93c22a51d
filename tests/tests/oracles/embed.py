"""What torch, torchvision, h5py and a CLAM-shaped reader make of embedded slides: python embed.py COMMAND ARGUMENTS… (JSON on stdout)."""
import json
import sys

import h5py
import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms as T

torch.set_num_threads(2)


def network(arch, seed):
    """A seeded network whose running statistics are not the initial ones."""
    torch.manual_seed(int(seed))
    net = getattr(torchvision.models, arch)()
    net.train()
    with torch.no_grad():
        net(torch.rand(4, 3, 64, 64))
    net.fc = torch.nn.Identity()
    return net.eval()


def weights(path, arch, seed):
    """Weights as a user has them: under a prefix in a .pth, plain in a .safetensors."""
    state = network(arch, seed).state_dict()
    if path.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)


def png(tif, path):
    Image.open(tif).convert("RGB").save(path)


class Bag(torch.utils.data.Dataset):
    """Reads a folder as CLAM's `Generic_MIL_Dataset` does, with and without coordinates."""

    def __init__(self, folder, slides):
        self.folder, self.slides = folder, slides

    def __len__(self):
        return len(self.slides)

    def __getitem__(self, at):
        slide = self.slides[at]
        features = torch.load(f"{self.folder}/pt_files/{slide}.pt", weights_only=True)
        with h5py.File(f"{self.folder}/h5_files/{slide}.h5", "r") as file:
            return features, torch.from_numpy(file["features"][:]), file["coords"][:]


def read(path):
    """As TRIDENT's `read_coords` and `load_h5` do."""
    with h5py.File(path, "r") as file:
        attributes = {key: value for key, value in file["coords"].attrs.items()}
        names = {key: value for key, value in file["features"].attrs.items()}
        return file["features"][:], file["coords"][:], attributes, names


def embedded(image, coords, side, net, px):
    transform = T.Compose([
        T.Resize(px), T.CenterCrop(px), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])
    patches = [transform(image.crop((x, y, x + side, y + side))) for x, y in coords.tolist()]
    with torch.inference_mode():
        return torch.cat([net(torch.stack(patches[i:i + 32])) for i in range(0, len(patches), 32)]).numpy()


def plain(value):
    return value.decode() if isinstance(value, bytes) else value.item() if hasattr(value, "item") else value


def check(h5, image, arch, seed, side, px):
    """Features against an independent computation from the image that was embedded."""
    features, coords, attributes, names = read(h5)
    assert features.dtype == np.float32 and coords.dtype == np.int64, (features.dtype, coords.dtype)
    expected = embedded(Image.open(image), coords, int(side), network(arch, seed), int(px))
    print(json.dumps({
        "shape": features.shape, "coords": coords.tolist(),
        "apart": float(np.abs(features - expected).max()), "largest": float(np.abs(expected).max()),
        "attributes": {key: plain(value) for key, value in attributes.items()},
        "features_attributes": {key: plain(value) for key, value in names.items()},
    }))


def clam(folder, trident, *slides):
    """The bags that CLAM reads hold what TRIDENT's files hold."""
    for slide, (bag, features, coords) in zip(slides, Bag(folder, slides)):
        theirs, at, _, _ = read(f"{trident}/{slide}.h5")
        assert bag.dtype == torch.float32 and bag.dim() == 2
        assert torch.equal(bag, features) and np.array_equal(bag.numpy(), theirs) and np.array_equal(coords, at)
        print(json.dumps({"slide": slide, "shape": list(bag.shape)}))


def same(first, second):
    """How far two files are apart."""
    one, two = read(first), read(second)
    print(json.dumps({
        "apart": float(np.abs(one[0] - two[0]).max()), "coords": bool(np.array_equal(one[1], two[1])), "patches": len(one[1]),
        "attributes": [{key: plain(value) for key, value in each[2].items()} for each in (one, two)],
    }))


def evil(path):
    """A pickle that would run a program."""
    class Runs:
        def __reduce__(self):
            import os
            return os.system, (f"touch {path}.ran",)

    torch.save({"state_dict": Runs()}, path)


globals()[sys.argv[1]](*sys.argv[2:])
