"""PyTorch's answers to what the supervised protocols train, from the same initial weights and the same batches.

Arguments: a folder with task.json and data.safetensors; writes answers.safetensors and answers.json.
"""
import json
import sys

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import balanced_accuracy_score
from torch.nn.functional import cross_entropy

torch.set_num_threads(1)
folder = sys.argv[1]
task, data = json.load(open(f"{folder}/task.json")), load_file(f"{folder}/data.safetensors")
answers, said = {}, {}


def head(name):
    weight, bias = data[f"{name}.weight"], data[f"{name}.bias"]
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def eva():
    settings, x, y = task["eva"], data["x"], data["labels"]
    layer = head("eva")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=settings["lr"])
    steps, best, kept, waited = 0, -1.0, None, 0
    for batches in settings["batches"]:
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()
            steps += 1
            if steps == settings["steps"]:
                break
        with torch.no_grad():
            score = balanced_accuracy_score(y[settings["validation"]], layer(x[settings["validation"]]).argmax(1))
        if score > best:
            best, kept, waited = score, {k: v.clone() for k, v in layer.state_dict().items()}, 0
        else:
            waited += 1
        if waited == settings["patience"] or steps == settings["steps"]:
            break
    layer.load_state_dict(kept)
    answers["eva"] = layer(x[task["test"]]).softmax(1).detach()
    said["eva"] = {"steps": steps, "validation": best}


def sgd(model, inputs, settings):
    optimizer = torch.optim.SGD(model.parameters(), settings["lr"], 0.9, weight_decay=settings["weight_decay"])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, settings["milestones"], settings["factor"])
    model.train()
    for batches in settings["batches"]:
        for batch in batches:
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), data["labels"][batch]).backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return model(inputs[task["test"]]).softmax(1)


def finetune():
    net = torchvision.models.resnet18(num_classes=task["classes"])
    state = {k.removeprefix("net."): v for k, v in data.items() if k.startswith("net.")}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected, (missing, unexpected)
    net.fc = head("net_head")
    answers["finetune"] = sgd(net, data["images"], task["finetune"])


eva()
answers["linear"] = sgd(head("linear"), data["x"], task["linear"])
finetune()
picture = data["picture"].numpy()
image = Image.fromarray(picture)
for name, (resize, px) in {"central": (256, 224), "small": (73, 64)}.items():
    cut = torchvision.transforms.CenterCrop(px)(torchvision.transforms.Resize(resize)(image))
    answers[name] = torch.from_numpy(np.array(cut).copy())
counts, _ = np.histogramdd(picture.reshape(-1, 3).astype(np.float64), bins=8, range=[(0, 256)] * 3)
answers["histogram"] = torch.from_numpy((counts / counts.sum()).reshape(-1))
save_file({k: v.contiguous() for k, v in answers.items()}, f"{folder}/answers.safetensors")
json.dump(said, open(f"{folder}/answers.json", "w"))
