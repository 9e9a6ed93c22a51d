"""Average precision as COCO has it, by pycocotools, with bootstrap intervals over slides.

Against COCO's defaults: as many detections a field count as the detector keeps (300; COCO's 100 would cut dense fields off), and of sizes
only `all`. Nuclei that are ignored are COCO's crowds, in every class: what is detected there counts neither for nor against.
"""
import contextlib
import copy
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

FIGURES = ("ap", "ap50", "ap75")


def truth(fields, classes):
    """The nuclei as COCO writes them: boxes as x, y, width, height; pictures and classes numbered from 1."""
    annotations = []
    for image, field in enumerate(fields, 1):
        for (x0, y0, x1, y1), label in zip(field.boxes.astype(float), field.labels):
            for category in [int(label)] if label > 0 else range(1, len(classes) + 1):
                box = [x0, y0, x1 - x0, y1 - y0]
                crowd = int(label == 0)
                annotations.append(
                    # pycocotools takes number 0 for none.
                    {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
                )
    images = [{"id": at, "file_name": f.picture.name, "width": f.width, "height": f.height} for at, f in enumerate(fields, 1)]
    names = [{"id": at, "name": name} for at, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": names}


def detections(found):
    """What was found, as COCO writes it; `found` as `train.look` gives it."""
    return [
        {"image_id": image, "category_id": int(label), "bbox": [float(v) for v in (x0, y0, x1 - x0, y1 - y0)], "score": float(score)}
        for image, (boxes, labels, scores) in enumerate(found, 1)
        for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores)
    ]


class Scores:
    """A trial's detections matched with the truth once; figures of any choice of its fields."""

    def __init__(self, truth, found, most):
        with silence():
            reference = COCO()
            reference.dataset = copy.deepcopy(truth)
            reference.createIndex()
            # An empty list is not a result to pycocotools.
            answer = reference.loadRes(detections(found)) if detections(found) else empty(reference)
            self.evaluation = COCOeval(reference, answer, "bbox")
            self.evaluation.params.maxDets = [most]
            self.evaluation.params.areaRng, self.evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            self.evaluation.evaluate()
        self.matches = self.evaluation.evalImgs
        self.fields = len(truth["images"])
        self.classes = len(truth["categories"])

    def figures(self, chosen=None):
        """AP, AP50 and AP75 of these fields (numbers from 0, with repetition; all when none), and AP of each class; NaN without any nucleus."""
        chosen = range(self.fields) if chosen is None else chosen
        self.evaluation.evalImgs = [self.matches[of * self.fields + at] for of in range(self.classes) for at in chosen]
        # As many pictures as were chosen, told apart by their place.
        for params in (self.evaluation.params, self.evaluation._paramsEval):
            params.imgIds = list(range(len(chosen)))
        with silence():
            self.evaluation.accumulate()
        # (thresholds, recalls, classes, 1, 1); -1 where a class has no nucleus.
        precision = self.evaluation.eval["precision"][..., 0, 0]
        at = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}
        figures = {name: mean(precision[rows]) for name, rows in at.items()}
        return figures | {"classes": [mean(precision[:, :, of]) for of in range(self.classes)]}


def summary(trials, slides, resamples, seed):
    """Mean, standard deviation and 95 % interval of each figure over trials (a list of `Scores`); `slides` names each field's slide.

    A resample draws slides with replacement, the same for all trials, and takes the trials' mean: the interval is over slides.
    """
    each = [scores.figures() for scores in trials]
    names = sorted(set(slides))
    of = {name: [at for at, slide in enumerate(slides) if slide == name] for name in names}
    drawn = []
    if len(names) > 1:
        draws = np.random.default_rng([seed, 2])
        for _ in range(resamples):
            chosen = [at for pick in draws.integers(0, len(names), len(names)) for at in of[names[pick]]]
            drawn.append([scores.figures(chosen) for scores in trials])

    def figure(pick):
        values = [pick(found) for found in each]
        result = {"value": number(np.mean(values)), "trials": [number(value) for value in values]}
        if len(values) > 1:
            result["std"] = number(np.std(values, ddof=1))
        means = [np.mean([pick(found) for found in sample]) for sample in drawn]
        means = [value for value in means if not np.isnan(value)]
        if means:
            low, high = np.percentile(means, [2.5, 97.5])
            result |= {"low": number(low), "high": number(high)}
        return result

    return {name: figure(lambda found, name=name: found[name]) for name in FIGURES} | {
        "by_class": [figure(lambda found, of=of: found["classes"][of]) for of in range(trials[0].classes)]
    }


def mean(precision):
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")


def number(value):
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def empty(reference):
    answer = COCO()
    answer.dataset = {**reference.dataset, "annotations": []}
    answer.createIndex()
    return answer


def silence():
    """pycocotools prints on standard output, which is the results'."""
    return contextlib.redirect_stdout(io.StringIO())
