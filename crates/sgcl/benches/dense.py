"""One step as the method reads, dense: every (B, N) matrix, gathered negatives, autograd through the bank, the exact variant.

Works on the tensors that the benchmark `objective` wrote down; prints one JSON object: the median of as many steps as asked for
after a first one that warms up, or with none asked for the first one's time.
"""
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

CORNERS = ("tl", "tr", "bl", "br")
T_INSTANCE, T_SPATIAL, RADIUS, TOP, MOMENTUM = 0.2, 0.07, 3.0, 0.2, 0.5


def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def instance(queries, own_rows, negative_rows, hit):
    own = (queries * own_rows).sum(1, keepdim=True)
    others = torch.einsum("bd,bkd->bk", queries, negative_rows).masked_fill(hit, -torch.inf)
    logits = torch.cat([own, others], 1) / T_INSTANCE
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long, device=logits.device))


def step(t, q, ql):
    ids, bank, b, n = t["ids"], t["global"], len(t["ids"]), len(t["global"])
    dots = q @ bank.T
    with torch.no_grad():
        own = F.one_hot(ids, n).bool()
        place = torch.stack([t["x_at"], t["y_at"]], 1).double()
        distance = (place[ids][:, None] - place[None]).square().sum(-1)
        spatial = (t["slide"][ids][:, None] == t["slide"][None]) & (distance > 0) & (distance < RADIUS**2)
        near = dots.masked_fill(~spatial, -torch.inf)
        auxiliary = near.argmax(1)
        usable = spatial.any(1)
        semantic = torch.zeros_like(own)
        for owner, features, counts in ((ids, q, torch.ones_like(usable)), (auxiliary, bank[auxiliary], usable)):
            scores = (features @ bank.T).scatter(1, owner[:, None], -torch.inf)
            nearest = scores.topk(int(t["nearest"]), 1).indices
            agree = (t["clusters"][nearest] == t["clusters"][owner][:, None]) & counts[:, None]
            semantic |= torch.zeros_like(own).scatter(1, nearest, agree)
        positive = (spatial | semantic) & ~own
        ranking = (t["x"] @ t["backbone"].T).masked_fill(positive | own, -torch.inf)
        hard = ranking.topk(int(TOP * n), 1).indices[:, t["ranks"]]
    s = dots / T_SPATIAL
    pos = s.masked_fill(~positive, -torch.inf)
    has = positive.any(1)
    inter = F.softplus(s.gather(1, hard)[has].logsumexp(1) - pos[has].logsumexp(1)).mean()

    negatives = t["negatives"].expand(b, -1)
    intra = instance(q, bank[ids], bank[negatives], negatives == ids[:, None])
    quarter = t["negatives"][: len(t["negatives"]) // 4].expand(4 * b, -1)
    rows = torch.cat([t[corner][quarter] for corner in CORNERS], 1)
    own_rows = torch.cat([t[corner][ids] for corner in CORNERS])
    inner = instance(ql, own_rows, rows, (quarter == ids.repeat(4)[:, None]).repeat(1, 4))
    return intra, inter, inner


def update(bank, ids, features):
    bank[ids] = F.normalize((1 - MOMENTUM) * bank[ids] + MOMENTUM * F.normalize(features, dim=1), dim=1)


def whole_step(t, q, ql):
    """Forward, backward and bank update; the losses."""
    q.grad = ql.grad = None
    intra, inter, inner = step(t, q, ql)
    (intra + inter + inner).backward()
    with torch.no_grad():
        update(t["global"], t["ids"], q)
        update(t["backbone"], t["ids"], t["x"])
        for corner, features in zip(CORNERS, ql.chunk(4)):
            update(t[corner], t["ids"], features)
    return intra, inter, inner


def main():
    path, threads, device, repeat = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(threads)
    t = load_file(path, device=device)
    q, ql = t["q"].requires_grad_(), t["ql"].requires_grad_()
    through = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds, first = [], None
    for _ in range(repeat + 1):
        through()
        began = time.perf_counter()
        losses = whole_step(t, q, ql)
        through()
        seconds.append(time.perf_counter() - began)
        first = first or [loss.item() for loss in losses]
    took = statistics.median(seconds[1:] or seconds)
    print(json.dumps({"seconds": took, "peak_bytes": peak(), **dict(zip(("intra", "inter", "inner"), first))}))


main()
