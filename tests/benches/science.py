#!/usr/bin/env python3
"""What the methods of the family are worth under an equal budget: make bench-science ARGS="--seeds 1 --methods sgcl,npid".

For each seed, phantom slides are drawn and ingested; every method trains on the same patches for the same number of epochs with the
same encoder, views, batch and optimiser (configs/demo.yaml and what the method changes, below); encoders are judged on slides that
no method saw, beside random weights and a colour histogram. One run a method and seed: the table has each seed's figure, the mean
and the standard deviation over seeds. Everything is a command that a user would type.

What is finished is kept in --out, one JSON file a method and seed, and is not computed again: a call that was cut short goes on
where it was. The last line is one JSON object.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A queue follows slowly where steps are thousands; here they are hundreds.
KEYS = ["bank.momentum=0", "objective.key_momentum=0.98"]
METHODS = {
    "npid": ["method=npid"],
    "npid-mcrop": ["method=npid-mcrop"],
    "sslp": ["method=sslp", "projector.layers=1", "objective.t_instance=0.07"],
    "moco-v2": ["method=moco-v2", *KEYS],
    "densecl": ["method=densecl", *KEYS],
    "sgcl-released": ["variant=released"],
    "sgcl": [],
    # What the bank's storage costs.
    "sgcl-bf16": ["bank.dtype=bf16"],
    "sgcl-fp16": ["bank.dtype=fp16"],
}
BASELINES = ["random", "colour-histogram"]


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(1, args.seeds + 1):
        patches = patch_set(args, seed)
        for method in args.methods:
            one(args, seed, method, patches)
        for baseline in BASELINES:
            judged(args, seed, baseline, patches, bucket(args, seed))
    report(args)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("science"), help="folder of slides, runs and figures")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this")
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--slide-px", type=int, default=1536)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--labels", default="", help="also fine-tune, on these shares of the labels (1%%,10%%)")
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown or args.seeds < 1:
        parser.error(f"--methods {','.join(unknown)}: choose among {', '.join(METHODS)}" if unknown else "--seeds starts at 1")
    target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    args.sgclctl = os.path.join(os.environ.get("SGCL_BIN", f"{target}/release"), "sgclctl")
    args.budget = {key: getattr(args, key) for key in ("epochs", "slides", "slide_px", "ranks", "labels")}
    return args


def bucket(args, seed):
    return args.out / f"seed-{seed}" / "bucket"


def patch_set(args, seed):
    folder = args.out / f"seed-{seed}-{args.slides}x{args.slide_px}"
    patches = folder / "patches"
    if not (patches / "patchset.json").exists():
        call(args, "phantom", "--out", folder / "slides", "--slides", args.slides, "--size", args.slide_px, "--seed", seed)
        slides = sorted((folder / "slides").glob("*.tif"))
        call(args, "ingest", *slides, "--to", patches, "--patch-px", 128, "--level", 0)
    return patches


def one(args, seed, method, patches):
    """Trains, where that was not done, and judges."""
    if known(args, seed, method) is not None:
        return
    runs = bucket(args, seed)
    # A run that was cut short was not this budget's share of anything: it begins anew.
    shutil.rmtree(runs / "runs" / method, ignore_errors=True)
    sets = [f"seed={seed}", f"epochs={args.epochs}", *METHODS[method]]
    began = time.monotonic()
    call(
        args, "run", "--local", "--ranks-per-node", args.ranks, "--data", patches, "--bucket", runs, "--name", method,
        "-f", ROOT / "configs" / "demo.yaml", *(part for value in sets for part in ("--set", value)),
    )
    judged(args, seed, method, patches, runs, time.monotonic() - began)


def judged(args, seed, weights, patches, runs, seconds=None):
    if known(args, seed, weights) is not None:
        return
    protocols = ["knn", "linear"] + (["finetune"] if args.labels and weights != "colour-histogram" else [])
    shares = ["--labels", args.labels] if "finetune" in protocols else []
    # A baseline is judged beside a run, which says what was held out and how large views are.
    beside = [args.methods[0]] if weights in BASELINES else []
    out = call(
        args, "eval", "--data", patches, "--bucket", runs, "--weights", *beside, weights, "--seed", seed,
        "--protocol", ",".join(protocols), *shares, "--output", "json", capture=True,
    )
    found = next(line for line in map(json.loads, out.splitlines()) if line["weights"] == weights)
    figures = {part["protocol"]: part["accuracy"] for part in found["protocols"]}
    save = {"budget": args.budget, "training_seconds": seconds, "accuracy": figures, "test": found["test_patches"]}
    path(args, seed, weights).write_text(json.dumps(save, indent=1))


def path(args, seed, weights):
    folder = args.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{weights}.json"


def known(args, seed, weights):
    file = path(args, seed, weights)
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    # Of another budget: not comparable.
    return found if found["budget"] == args.budget else None


def call(args, *words, capture=False):
    words = [str(word) for word in (args.sgclctl, *words)]
    print("$", " ".join(words), file=sys.stderr, flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE if capture else sys.stderr, text=True)
    if done.returncode:
        sys.exit(f"{words[1]} ended with {done.returncode}; what was finished is kept in {args.out}")
    return done.stdout


def report(args):
    summary = {}
    rows = [*args.methods, *BASELINES]
    table = {row: [known(args, seed, row) for seed in range(1, args.seeds + 1)] for row in rows}
    protocols = list(dict.fromkeys(name for cells in table.values() for cell in cells for name in cell["accuracy"]))
    print(f"{'accuracy, %':<18}" + "".join(f"{name:^34}" for name in protocols))
    for row, cells in table.items():
        line = f"{row:<18}"
        for name in protocols:
            values = [100 * cell["accuracy"][name]["value"] for cell in cells if name in cell["accuracy"]]
            if not values:
                line += f"{'':<34}"
                continue
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
            shown = f"{mean:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
            line += f"{shown + '  (' + ', '.join(f'{value:.1f}' for value in values) + ')':<34}"
            summary.setdefault(row, {})[name] = {"mean": mean, "sd": spread, "seeds": values}
        print(line)
    over = {
        row: {name: found["mean"] - summary["random"][name]["mean"] for name, found in of.items()}
        for row, of in summary.items()
        if row not in BASELINES
    }
    print(f"{args.seeds} seed(s), one run each; budget {args.budget}")
    print(json.dumps({"budget": args.budget, "seeds": args.seeds, "accuracy": summary, "points_over_random": over}))


main()
