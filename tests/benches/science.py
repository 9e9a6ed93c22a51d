#!/usr/bin/env python3
"""What the methods of the family are worth under an equal budget: make bench-science ARGS="--seeds 1 --methods sgcl,npid".

For each seed, phantom slides are drawn and ingested; every method trains on the same patches for the same number of epochs with the
same encoder, views, batch and optimiser (configs/demo.yaml and what the method changes, below); encoders are judged on slides that
no method saw, beside random weights and a colour histogram. One run a method and seed: the table has each seed's figure with its
95 % interval over slides, the mean and the standard deviation over seeds. Everything is a command that a user would type.

Columns are judged apart (--columns): `probe`, nearest neighbours and a linear classifier; `labels`, everything fine-tuned on 1 % and 10 % of
the labels; `segmentation` (mean IoU) and `detection` (AP and AP50), on pictures drawn for the seed in the layouts of BCSS and NuCLS. A colour
histogram has no network to fine-tune, and is judged by `probe` alone.

What is finished is kept in --out, one JSON file a seed, method and column, and is not computed again: a call that was cut short goes on
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
# How each column is judged. Small enough for a laptop's processor: trainings are short, so compare within the table alone.
LABELS = ["--protocol", "finetune", "--labels", "1%,10%", "--epochs", 20]
SEGMENTATION = ["--tile-px", 128, "--steps", 150, "--batch", 4, "--trials", 1]
DETECTION = ["--iterations", 150, "--batch", 2, "--lr", 0.02, "--crop", 128, "--scale", 2, "--regions", 32, "--proposals", 200, "--trials", 1]
COLUMNS = ["probe", "labels", "segmentation", "detection"]


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(1, args.seeds + 1):
        patches = patch_set(args, seed)
        for method in args.methods:
            trained(args, seed, method, patches)
        for weights in [*args.methods, *BASELINES]:
            for column in columns(args, weights):
                judged(args, seed, weights, column, patches)
    report(args)


def columns(args, weights):
    return [column for column in args.columns if column == "probe" or weights != "colour-histogram"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("science"), help="folder of slides, runs and figures")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this")
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--slide-px", type=int, default=1536)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--columns", default="probe", help="of " + ", ".join(COLUMNS))
    args = parser.parse_args()
    for option, known_ones in (("methods", METHODS), ("columns", COLUMNS)):
        asked = getattr(args, option).split(",")
        unknown = [one for one in asked if one not in known_ones]
        if unknown:
            parser.error(f"--{option} {','.join(unknown)}: choose among {', '.join(known_ones)}")
        setattr(args, option, asked)
    if args.seeds < 1:
        parser.error("--seeds starts at 1")
    target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    args.sgclctl = os.path.join(os.environ.get("SGCL_BIN", f"{target}/release"), "sgclctl")
    args.budget = {key: getattr(args, key) for key in ("epochs", "slides", "slide_px", "ranks")}
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


def drawn(args, seed, layout, *more):
    """Pictures in another layout, of slides of their own."""
    folder = args.out / f"seed-{seed}" / layout
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        call(args, "phantom", "--layout", layout, "--out", folder, "--seed", seed, *more)
        (folder / "complete").touch()
    return folder


def trained(args, seed, method, patches):
    """Trains, where that was not done."""
    runs = bucket(args, seed)
    if known(args, seed, method, "run") is not None:
        return
    # A run that was cut short was not this budget's share of anything: it begins anew, and what was judged of it counts no more.
    shutil.rmtree(runs / "runs" / method, ignore_errors=True)
    for column in COLUMNS:
        path(args, seed, method, column).unlink(missing_ok=True)
    sets = [f"seed={seed}", f"epochs={args.epochs}", *METHODS[method]]
    began = time.monotonic()
    call(
        args, "run", "--local", "--ranks-per-node", args.ranks, "--data", patches, "--bucket", runs, "--name", method,
        "-f", ROOT / "configs" / "demo.yaml", *(part for value in sets for part in ("--set", value)),
    )
    keep(args, seed, method, "run", {"seconds": time.monotonic() - began})


def judged(args, seed, weights, column, patches):
    if known(args, seed, weights, column) is not None:
        return
    # A baseline is judged beside a run, which says what was held out and how large views are.
    beside = [args.methods[0]] if weights in BASELINES and column in ("probe", "labels") else []
    words = ["--bucket", bucket(args, seed), "--weights", *beside, weights, "--seed", seed, "--output", "json"]
    if column == "segmentation":
        words = ["segmentation", "--data", drawn(args, seed, "bcss", "--slides", 18, "--size", 512), *words, *SEGMENTATION]
    elif column == "detection":
        words = ["detection", "--data", drawn(args, seed, "nucls", "--slides", 10), *words, *DETECTION]
    else:
        words = ["--data", patches, *words, *(LABELS if column == "labels" else [])]
    out = call(args, "eval", *words, capture=True)
    found = next(line for line in map(json.loads, out.splitlines()) if line["weights"] == weights)
    if column == "segmentation":
        figures = {"mean IoU": found["mean_iou"]}
    elif column == "detection":
        figures = {"AP": found["protocols"][0]["ap"], "AP50": found["protocols"][0]["ap50"]}
    else:
        figures = {part["protocol"]: part["accuracy"] for part in found["protocols"]}
    keep(args, seed, weights, column, {"figures": {name: {key: of[key] for key in ("value", "low", "high")} for name, of in figures.items()}})


def path(args, seed, weights, what):
    folder = args.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{weights}.{what}.json"


def keep(args, seed, weights, what, found):
    path(args, seed, weights, what).write_text(json.dumps({"budget": args.budget, **found}, indent=1))


def known(args, seed, weights, what):
    file = path(args, seed, weights, what)
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
    table = {row: [figures(args, seed, row) for seed in range(1, args.seeds + 1)] for row in rows}
    names = list(dict.fromkeys(name for cells in table.values() for cell in cells for name in cell))
    for name in names:
        print(f"{name}, %")
        for row, cells in table.items():
            found = [cell[name] for cell in cells if name in cell]
            if not found:
                continue
            values = [100 * one["value"] for one in found]
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
            shown = f"{mean:5.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
            print(f"  {row:<18}{shown:<14}" + "".join(f"{interval(one):<22}" for one in found))
            intervals = [[one["low"], one["high"]] for one in found]
            summary.setdefault(row, {})[name] = {"mean": mean, "sd": spread, "seeds": values, "intervals": intervals}
    over = {
        row: {name: found["mean"] - summary["random"][name]["mean"] for name, found in of.items()}
        for row, of in summary.items()
        if row not in BASELINES
    }
    print(f"mean ± standard deviation over {args.seeds} seed(s), then each seed's figure and its 95 % interval over slides; budget {args.budget}")
    print(json.dumps({"budget": args.budget, "seeds": args.seeds, "figures": summary, "points_over_random": over}))


def figures(args, seed, weights):
    found = [known(args, seed, weights, column) for column in columns(args, weights)]
    return {name: figure for one in found for name, figure in one["figures"].items()}


def interval(figure):
    if figure["low"] is None:
        return f"{100 * figure['value']:.1f}"
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


main()
