"""scikit-learn's answers on a small problem."""
import json
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

out, seed = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(seed)
n, d, classes, slides = 900, 20, 4, 15
y = rng.choice(classes, n, p=(0.5, 0.25, 0.15, 0.1))
centers = rng.normal(0, 0.8, (classes, d))
x = (centers[y] + rng.normal(0, 1, (n, d))) * rng.uniform(0.1, 10, d) + rng.normal(0, 1, d)
x[:, 3] = 2.0
slide = rng.integers(0, slides, n)
test = slide < 5
labels = np.where(rng.random(n) < 0.1, -1, y)
known = labels >= 0
train, test = ~test & known, test & known


def scores(predicted, probabilities):
    truth = labels[test]
    return {"accuracy": accuracy_score(truth, predicted), "balanced": balanced_accuracy_score(truth, predicted),
            "f1": f1_score(truth, predicted, average="macro"),
            "auc": roc_auc_score(truth, probabilities, multi_class="ovr", average="macro"),
            "confusion": confusion_matrix(truth, predicted, labels=range(classes)).tolist()}


answer = {}
x = x.astype(np.float32)
for k in (10, 20):
    knn = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda dist: np.exp((1 - dist) / 0.07))
    knn.fit(x[train].astype(np.float64), labels[train])
    queries = x[test].astype(np.float64)
    answer[f"knn{k}"] = scores(knn.predict(queries), knn.predict_proba(queries))
scaler = StandardScaler().fit(x[train].astype(np.float64))
a, b = scaler.transform(x[train].astype(np.float64)), scaler.transform(x[test].astype(np.float64))
model = LogisticRegression(C=1.0, tol=1e-9, max_iter=20_000).fit(a, labels[train])
log_p = model.predict_log_proba(a)
answer["linear"] = scores(model.predict(b), model.predict_proba(b))
answer["loss"] = (-log_p[np.arange(len(a)), labels[train]].sum() + 0.5 * (model.coef_ ** 2).sum()) / len(a)
save_file({"x": torch.from_numpy(x), "labels": torch.from_numpy(labels.astype(np.int64)),
           "slides": torch.from_numpy(slide.astype(np.int64))}, f"{out}/data.safetensors")
json.dump(answer, open(f"{out}/answer.json", "w"))
