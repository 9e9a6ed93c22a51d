"""scikit-learn's metrics on drawn predictions, and the bootstrap done slowly: rows of the drawn slides laid end to end.

Arguments: a folder that holds cases.json, [{classes, truth, predicted, probabilities, slides, draws}]; writes answers.json.
"""
import json
import sys
import warnings

import numpy as np
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score, roc_curve

warnings.simplefilter("ignore", UndefinedMetricWarning)
warnings.filterwarnings("ignore", message=".*y_pred contains classes.*")
folder = sys.argv[1]


def area(truth, probabilities, classes):
    if classes == 2:
        return roc_auc_score(truth, probabilities[:, 1]) if 0 < truth.sum() < len(truth) else float("nan")
    areas = [roc_auc_score(truth == c, probabilities[:, c]) for c in range(classes) if 0 < (truth == c).sum() < len(truth)]
    return np.mean(areas) if areas else float("nan")


def figures(truth, predicted, probabilities, classes):
    return [accuracy_score(truth, predicted), balanced_accuracy_score(truth, predicted),
            f1_score(truth, predicted, average="macro"), area(truth, probabilities, classes)]


answers = []
for case in json.load(open(f"{folder}/cases.json")):
    classes = case["classes"]
    truth, slides = np.array(case["truth"]), np.array(case["slides"])
    trials = [(np.array(t["predicted"]), np.array(t["probabilities"]).reshape(-1, classes)) for t in case["trials"]]
    predicted, probabilities = trials[0]
    names = np.unique(slides)
    drawn = []
    for times in case["draws"]:
        rows = np.concatenate([np.flatnonzero(slides == name) for name, n in zip(names, times) for _ in range(n)])
        drawn.append(np.mean([figures(truth[rows], p[rows], q[rows], classes) for p, q in trials], axis=0))
    drawn = np.array(drawn)
    answer = {"figures": figures(truth, predicted, probabilities, classes),
              "confusion": confusion_matrix(truth, predicted, labels=range(classes)).tolist(),
              "low": [np.percentile(c[~np.isnan(c)], 2.5) for c in drawn.T],
              "high": [np.percentile(c[~np.isnan(c)], 97.5) for c in drawn.T],
              "resamples": [int((~np.isnan(c)).sum()) for c in drawn.T]}
    if len(np.unique(truth)) == classes and classes > 2:
        answer["sklearn_ovr"] = roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    wrong, right, _ = roc_curve(truth == classes - 1, probabilities[:, classes - 1], drop_intermediate=False)
    answer["curve"] = [wrong.tolist(), right.tolist()]
    answers.append(answer)
json.dump(answers, open(f"{folder}/answers.json", "w"))
