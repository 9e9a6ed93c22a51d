"""NuCLS as it is published: fields as pictures, nuclei as boxes in one CSV a field, folds by slide.

  rgb/<field>.png    <field> = <slide>_id-<id>_left-…_top-…_bottom-…_right-…
  csv/<field>.csv    raw_classification, main_classification, super_classification, type, xmin, ymin, xmax, ymax, coords_x, coords_y;
                     pixels of the picture
  train_test_splits/fold_<k>_train.csv, fold_<k>_test.csv    a column slide_name

The super-classes are NuCLS's own: tumour (mitotic or not), stromal (with macrophages), sTIL (lymphocytes and plasma cells). What is
AMBIGUOUS is ignored: a detection there counts neither for nor against. So is `other_nucleus` (few, and of many kinds) unless asked for.
"""
import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from . import Refused

CLASSES = ("tumor_any", "nonTIL_stromal", "sTIL")
OTHER = "other_nucleus"
AMBIGUOUS = "AMBIGUOUS"

# As published with the data, from what annotators wrote to what is learnt.
RAW_TO_MAIN = {
    "tumor": "tumor_nonMitotic",
    "mitotic_figure": "tumor_mitotic",
    "fibroblast": "nonTILnonMQ_stromal",
    "vascular_endothelium": "nonTILnonMQ_stromal",
    "macrophage": "macrophage",
    "lymphocyte": "lymphocyte",
    "plasma_cell": "plasma_cell",
    "neutrophil": OTHER,
    "eosinophil": OTHER,
    "myoepithelium": OTHER,
    "ductal_epithelium": OTHER,
    "apoptotic_body": AMBIGUOUS,
    "unlabeled": AMBIGUOUS,
}
MAIN_TO_SUPER = {
    "tumor_nonMitotic": "tumor_any",
    "tumor_mitotic": "tumor_any",
    "nonTILnonMQ_stromal": "nonTIL_stromal",
    "macrophage": "nonTIL_stromal",
    "lymphocyte": "sTIL",
    "plasma_cell": "sTIL",
    OTHER: OTHER,
    AMBIGUOUS: AMBIGUOUS,
}
SUPER = {name: name for name in (*CLASSES, OTHER, AMBIGUOUS)}
COLUMNS = {
    "super_classification": SUPER,
    "main_classification": MAIN_TO_SUPER,
    "raw_classification": {raw: MAIN_TO_SUPER[main] for raw, main in RAW_TO_MAIN.items()},
}

MAX_CSV_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
csv.field_size_limit(16 << 20)


@dataclass(frozen=True)
class Field:
    """One picture with its nuclei."""

    name: str
    slide: str
    picture: Path
    width: int
    height: int
    # (N, 4) float32: x0, y0, x1, y1 in pixels, inside the picture.
    boxes: np.ndarray
    # (N,) int64: 1 and up, in the order of the classes; 0 is ignored.
    labels: np.ndarray

    def pixels(self):
        """(height, width, 3) uint8."""
        return pixels(self.picture)


@functools.lru_cache(maxsize=512)
def pixels(path):
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as a picture: {error}; fetch it again") from error


def super_class(row, where):
    """The super-class of a CSV's row, by the first column that has one; None for the outline of a field."""
    for column, names in COLUMNS.items():
        value = (row.get(column) or "").strip()
        if not value:
            continue
        if value.startswith("fov"):
            return None
        plain = value.removeprefix("correction_")
        if plain not in names:
            raise Refused(f"{where}: {column} {value!r} is none of NuCLS's; known are {', '.join(names)}")
        return names[plain]
    raise Refused(f"{where}: no classification; the columns {', '.join(COLUMNS)} are looked at")


def boxes_of(path, width, height, classes):
    """Boxes (N, 4) and labels (N,) of a CSV; parts outside the picture are cut off, boxes without any part inside are left out."""
    boxes, labels = [], []
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise Refused(f"{path} is larger than any field's; check it")
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            wanted = ("xmin", "ymin", "xmax", "ymax")
            lacking = [name for name in wanted if name not in (reader.fieldnames or [])]
            if lacking:
                raise Refused(f"{path} lacks the column {lacking[0]}; NuCLS's csv/ has it")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                name = super_class(row, where)
                if name is None:
                    continue
                try:
                    x0, y0, x1, y1 = (float(row[key]) for key in wanted)
                except (TypeError, ValueError) as error:
                    raise Refused(f"{where}: a corner is no number; mend or remove the line") from error
                if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 < x0 or y1 < y0:
                    raise Refused(f"{where}: {x0}, {y0}, {x1}, {y1} is no box; mend or remove the line")
                x0, x1 = (min(max(x, 0.0), float(width)) for x in (x0, x1))
                y0, y1 = (min(max(y, 0.0), float(height)) for y in (y0, y1))
                if x1 - x0 >= 1 and y1 - y0 >= 1:
                    boxes.append((x0, y0, x1, y1))
                    labels.append(classes.index(name) + 1 if name in classes else 0)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path} cannot be read: {error}; fetch it again") from error
    return np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(labels, dtype=np.int64)


def read(folder, classes=CLASSES):
    """All fields of a folder, in order of name."""
    folder = Path(folder)
    rgb = next((folder / name for name in ("rgb", "rgbs") if (folder / name).is_dir()), None)
    if rgb is None or not (folder / "csv").is_dir():
        raise Refused(f"{folder} does not have NuCLS's layout: rgb/ and csv/ are looked for; give the folder that holds both")
    pictures = sorted(rgb.glob("*.png"))
    if not pictures:
        raise Refused(f"{rgb} holds no .png; fetch the data again")
    fields = []
    for picture in pictures:
        table = folder / "csv" / f"{picture.stem}.csv"
        if not table.is_file():
            raise Refused(f"{picture.name} has no {table}; fetch it, or remove the picture")
        try:
            with Image.open(picture) as image:
                width, height = image.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise Refused(f"{picture} cannot be read as a picture: {error}; fetch it again") from error
        if width * height > MAX_PIXELS:
            raise Refused(f"{picture} has {width} x {height} pixels, more than a field; cut it")
        boxes, labels = boxes_of(table, width, height, classes)
        fields.append(Field(picture.stem, picture.stem.split("_id")[0], picture, width, height, boxes, labels))
    return fields


def split(folder, fields, fold, holdout, seed):
    """(training fields, test fields, remarks): the published fold where there is one, else slides held out by seed."""
    splits = Path(folder) / "train_test_splits"
    if splits.is_dir():
        train, test = (slides_of(splits / f"fold_{fold}_{part}.csv") for part in ("train", "test"))
        if both := train & test:
            raise Refused(f"{splits}: fold {fold} trains and tests on {min(both)}; a slide must be in one of the two")
    else:
        slides = sorted({field.slide for field in fields})
        if len(slides) < 2:
            raise Refused(f"{folder} has one slide; to learn and to test two are needed")
        order = np.random.default_rng([seed, 1]).permutation(len(slides))
        test = {slides[at] for at in order[: min(max(round(holdout * len(slides)), 1), len(slides) - 1)]}
        train = set(slides) - test
    parts = [[field for field in fields if field.slide in part] for part in (train, test)]
    remarks = []
    if rest := len(fields) - sum(map(len, parts)):
        remarks.append(f"{rest} fields are of slides in neither part of fold {fold}: left out")
    for part, of in zip(parts, ("train", "test")):
        if not any((field.labels > 0).any() for field in part):
            raise Refused(f"{folder}: fold {fold} has no nucleus to {of} with; choose another --fold")
    return *parts, remarks


def slides_of(path):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            names = [row.get("slide_name") for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"{path} cannot be read: {error}; --fold names another") from error
    if not names or not all(names):
        raise Refused(f"{path} has no column slide_name with a name in every row; fetch it again")
    return set(names)
