"""Detection transfer on NuCLS: Faster R-CNN (C4, extra norm) on each of the weights, COCO's AP, mean of trials, 95 % intervals over slides.

  python -m sgcl_transfer.detection --data NuCLS/QC --weights backbone.pth random --out results

Weights are a .pth or .safetensors file of a ResNet, or `random`. The folder has rgb/ and csv/; train_test_splits/ decides who is tested
on, else a share of the slides by seed. On a GPU where there is one. The same seed gives the same figures on a CPU with as many threads.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from . import Refused, nucls, score, train, weights

USAGE, CANNOT_CREATE = 64, 73


def main(arguments=None):
    args = parser().parse_args(arguments)
    try:
        results = list(run(args, Voice(args.json)))
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return refused.code
    if not args.json:
        print(table(results))
    return 0


def parser():
    parser = argparse.ArgumentParser(prog="sgcl_transfer.detection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder in NuCLS's layout")
    add("--weights", nargs="+", required=True, metavar="FILE|random", help="what to start the backbone from")
    add("--names", nargs="+", metavar="NAME", help="what to call each of the weights [default: as given]")
    add("--out", type=Path, help="folder for results and detections, in COCO's format")
    add("--arch", choices=weights.ARCHITECTURES, help="architecture [default: a file's own; that of the first file for random, else resnet18]")
    add("--fold", type=whole(0, 10_000), default=1, help="published fold to use [default: 1]")
    add("--holdout-fraction", type=real(0.01, 0.99), default=0.3, help="share of slides to test on where no folds are published [default: 0.3]")
    add("--with-other", action="store_true", help="score other_nucleus as a class, instead of ignoring it")
    add("--trials", type=whole(1, 100), default=3, help="trainings, each with draws of its own [default: 3]")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="seed of all that is drawn [default: 0]")
    add("--iterations", type=whole(1, 10_000_000), default=16_000, help="steps of a training [default: 16000, as published with NuCLS]")
    add("--batch", type=whole(1, 1024), default=4, help="crops a step [default: 4]")
    add("--lr", type=real(1e-8, 10), default=0.005, help="learning rate, a tenth at 3/4 and 11/12 of the steps [default: 0.005]")
    add("--crop", type=whole(32, 4096), default=300, help="side of a crop in a field's pixels [default: 300]")
    add("--scale", type=real(0.25, 16), default=4.0, help="times that pictures are enlarged; a cell of the backbone has 16 pixels [default: 4]")
    add("--regions", type=whole(8, 4096), default=512, help="regions of a crop that are trained on [default: 512]")
    add("--proposals", type=whole(8, 10_000), default=1000, help="regions of a field that are looked at [default: 1000]")
    add("--detections", type=whole(1, 10_000), default=300, help="detections a field that count [default: 300]")
    add("--resamples", type=whole(0, 100_000), default=1000, help="resamples of the test slides for intervals [default: 1000]")
    add("--threads", type=whole(1, 1024), help="CPU threads [default: torch's choice]")
    add("--json", action="store_true", help="progress and results as JSON lines on standard output")
    return parser


def run(args, voice):
    """Yields a result for each of the weights."""
    names = args.names or args.weights
    if len(names) != len(args.weights):
        raise Refused(f"{len(args.weights)} weights have {len(names)} names; give each one", USAGE)
    if len(set(map(plain, names))) < len(names):
        raise Refused("two of the weights would write the same files; tell them apart with --names", USAGE)
    if args.threads:
        torch.set_num_threads(args.threads)
    # All that can be refused is refused before hours are spent.
    sources = [None if name == "random" else weights.read(name) for name in args.weights]
    archs = architectures(args, sources, names)
    reports = [None if source is None else weights.load(weights.backbone(arch), source, name, arch) for source, arch, name in zip(sources, archs, names)]
    classes = (*nucls.CLASSES, nucls.OTHER) if args.with_other else nucls.CLASSES
    learnt, tested, remarks = nucls.split(args.data, nucls.read(args.data, classes), args.fold, args.holdout_fraction, args.seed)
    for remark in remarks:
        voice.remark(remark)
    settings = train.Settings(args.iterations, args.batch, args.lr, args.crop, args.scale, args.regions, args.proposals, args.detections)
    truth = score.truth(tested, classes)
    keep(args.out, "ground-truth.json", truth)
    for source, arch, name, report in zip(sources, archs, names, reports):
        trials = []
        for trial in range(args.trials):
            # The same draws for all weights: what differs is the weights.
            seed = (args.seed, trial)
            torch.manual_seed(int(np.random.SeedSequence([*seed, 3]).generate_state(1)[0]))
            network = weights.backbone(arch)
            if source is not None:
                weights.load(network, source, name, arch)
            what = f"{name}: trial {trial + 1} of {args.trials}"
            model = train.train(network, arch, len(classes), learnt, settings, seed, voice.bar(f"{what}, training", args.iterations))
            found = train.look(model, tested, settings, voice.bar(f"{what}, looking", len(tested)))
            keep(args.out, f"detections-{plain(name)}-{trial}.json", score.detections(found))
            trials.append(score.Scores(truth, found, args.detections))
        voice.bar(f"{name}: intervals", 1)
        figures = score.summary(trials, [field.slide for field in tested], args.resamples, args.seed)
        result = {
            "weights": name,
            "arch": arch,
            "classes": list(classes),
            "train_fields": len(learnt),
            "test_fields": len(tested),
            "train_slides": len({field.slide for field in learnt}),
            "test_slides": len({field.slide for field in tested}),
            "train_nuclei": sum(int((field.labels > 0).sum()) for field in learnt),
            "test_nuclei": sum(int((field.labels > 0).sum()) for field in tested),
            "bootstrap": {"slides": len({field.slide for field in tested}), "resamples": args.resamples},
            "keys": report and vars(report),
            "protocols": [{"protocol": "detection", "trials": args.trials, **figures}],
            "settings": vars(settings),
        }
        keep(args.out, f"{plain(name)}.json", result)
        voice.result(result)
        yield result


def architectures(args, sources, names):
    own = []
    for source, name in zip(sources, names):
        found = None if source is None else weights.architecture(source)
        if source is not None and found is None and args.arch is None:
            # Says what is wrong with it, by the nearest of ours.
            weights.load(weights.backbone("resnet18"), source, name, "resnet18")
        own.append(args.arch or found)
    first = next((arch for arch in own if arch), "resnet18")
    return [arch or first for arch in own]


def keep(folder, name, value):
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{name}.draft"
        draft.write_text(json.dumps(value))
        draft.replace(folder / name)
    except OSError as error:
        raise Refused(f"cannot write {folder / name}: {error.strerror}; choose another --out", CANNOT_CREATE) from error


def plain(name):
    """A name as a file name."""
    last = name.rsplit("/", 1)[-1]
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in last)[:100]


class Voice:
    """Progress, remarks and results, for programs or for people."""

    def __init__(self, as_json):
        self.json = as_json

    def bar(self, what, total):
        done = 0
        self.progress(what, 0, total)

        def tick():
            nonlocal done
            done += 1
            # A line for every hundredth.
            if done == total or done * 100 // total != (done - 1) * 100 // total:
                self.progress(what, done, total)

        return tick

    def progress(self, what, done, total):
        if self.json:
            print(json.dumps({"progress": {"what": what, "done": done, "total": total}}), flush=True)
        elif sys.stderr.isatty():
            print(f"\r\033[K{what} {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done == total:
            print(f"{what}: done", file=sys.stderr, flush=True)

    def remark(self, text):
        print(f"WARN transfer: {text}", file=sys.stderr, flush=True)

    def result(self, result):
        if self.json:
            print(json.dumps({"result": result}), flush=True)


def table(results):
    lines = [("weights", "AP", "AP50", "AP75")]
    for result in results:
        found = result["protocols"][0]
        lines.append((result["weights"], *(figure(found[name]) for name in score.FIGURES)))
    wide = [max(len(line[at]) for line in lines) for at in range(4)]
    return "\n".join("  ".join(cell.ljust(wide[at]) for at, cell in enumerate(line)).rstrip() for line in lines)


def figure(found):
    """`41.3 ± 0.8 (38.0–44.1)`, percent."""
    if found["value"] is None:
        return "–"
    text = f"{100 * found['value']:.1f}"
    if found.get("std") is not None:
        text += f" ± {100 * found['std']:.1f}"
    if "low" in found:
        text += f" ({100 * found['low']:.1f}–{100 * found['high']:.1f})"
    return text


def whole(low, high):
    return bounded(int, low, high)


def real(low, high):
    return bounded(float, low, high)


def bounded(kind, low, high):
    def value(text):
        try:
            found = kind(text)
        except ValueError:
            found = None
        if found is None or not low <= found <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not between {low} and {high}")
        return found

    return value


if __name__ == "__main__":
    sys.exit(main())
