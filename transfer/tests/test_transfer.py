"""`python -m unittest discover -s transfer/tests`, in an environment of sgcl_transfer's."""
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sgcl_transfer import Refused, detection, model, nucls, score, train, weights  # noqa: E402

SEED = int(os.environ.get("SGCL_SEED", "0"))
HEADER = ",raw_classification,main_classification,super_classification,type,xmin,ymin,xmax,ymax,coords_x,coords_y\n"


class Folder(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self):
        held = tempfile.TemporaryDirectory()
        self.addCleanup(held.cleanup)
        self.folder = Path(held.name)

    def refuses(self, words, call, *arguments):
        with self.assertRaises(Refused) as caught:
            call(*arguments)
        self.assertIn(words, str(caught.exception))
        self.assertIn("; ", str(caught.exception), "no remedy")


class Layout(Folder):
    def table(self, *lines, header=HEADER):
        path = self.folder / "field.csv"
        path.write_text(header + "".join(f"{line}\n" for line in lines))
        return path

    def boxes(self, *lines, header=HEADER, classes=nucls.CLASSES):
        return nucls.boxes_of(self.table(*lines, header=header), 100, 80, classes)

    def test_lines_become_boxes_inside_the_picture_with_super_classes(self):
        boxes, labels = self.boxes(
            '0,tumor,tumor_nonMitotic,tumor_any,polyline,10,20,30,45,"10,30,30","20,20,45"',
            '1,macrophage,macrophage,nonTIL_stromal,rectangle,-5,60,8,95,"-5,8","60,95"',
            '2,plasma_cell,plasma_cell,sTIL,rectangle,90,70,100,80,"90,100","70,80"',
            '3,eosinophil,other_nucleus,other_nucleus,rectangle,1,1,9,9,"1,9","1,9"',
            '4,unlabeled,AMBIGUOUS,AMBIGUOUS,rectangle,50,50,60,60,"50,60","50,60"',
            '5,fov_basic,,,rectangle,0,0,100,80,"0,100","0,80"',
            '6,tumor,tumor_nonMitotic,tumor_any,polyline,120,20,130,45,"120,130","20,45"',
        )
        self.assertEqual(boxes.tolist(), [[10, 20, 30, 45], [0, 60, 8, 80], [90, 70, 100, 80], [1, 1, 9, 9], [50, 50, 60, 60]])
        self.assertEqual(labels.tolist(), [1, 2, 3, 0, 0])

    def test_other_nuclei_are_a_class_where_asked_for(self):
        line = '0,eosinophil,other_nucleus,other_nucleus,rectangle,1,1,9,9,"1,9","1,9"'
        self.assertEqual(self.boxes(line, classes=(*nucls.CLASSES, nucls.OTHER))[1].tolist(), [4])

    def test_finer_classifications_lead_to_the_same_super_class(self):
        header = "raw_classification,xmin,ymin,xmax,ymax\n"
        for raw, main in nucls.RAW_TO_MAIN.items():
            wanted = nucls.MAIN_TO_SUPER[main]
            self.assertEqual(nucls.super_class({"raw_classification": raw}, ""), wanted)
            self.assertEqual(nucls.super_class({"raw_classification": f"correction_{raw}", "main_classification": main}, ""), wanted)
        self.assertEqual(self.boxes("mitotic_figure,1,2,9,9", header=header)[1].tolist(), [1])

    def test_what_does_not_fit_is_refused_with_its_place(self):
        good = '0,tumor,tumor_nonMitotic,tumor_any,rectangle,1,1,9,9,"1","1"'
        for bad, words in [
            ('1,tumour,tumour,tumour,rectangle,1,1,9,9,"1","1"', "line 3: super_classification 'tumour'"),
            ('1,tumor,tumor_nonMitotic,tumor_any,rectangle,1,one,9,9,"1","1"', "line 3: a corner"),
            ('1,tumor,tumor_nonMitotic,tumor_any,rectangle,1,1,nan,9,"1","1"', "is no box"),
            ('1,tumor,tumor_nonMitotic,tumor_any,rectangle,9,1,1,9,"1","1"', "is no box"),
            ('1,,,,rectangle,1,1,9,9,"1","1"', "no classification"),
        ]:
            self.refuses(words, self.boxes, good, bad)
        self.refuses("lacks the column ymax", nucls.boxes_of, self.table(header="xmin,ymin,xmax\n"), 9, 9, nucls.CLASSES)
        self.refuses("NuCLS's layout", nucls.read, self.folder)
        for name in ("rgb", "csv"):
            (self.folder / name).mkdir()
        self.refuses("no .png", nucls.read, self.folder)
        (self.folder / "rgb/a_id-1.png").write_bytes(b"no picture")
        self.refuses("has no", nucls.read, self.folder)
        (self.folder / "csv/a_id-1.csv").write_text(HEADER)
        self.refuses("cannot be read as a picture", nucls.read, self.folder)

    def test_published_folds_decide_who_is_tested_on(self):
        box, label = np.array([[1, 1, 9, 9]], np.float32), np.array([1])
        fields = [nucls.Field(f"{slide}_id-1", slide, Path(slide), 10, 10, box, label) for slide in "abcd"]
        learnt, tested, _ = nucls.split(self.folder, fields, 1, 0.3, SEED)
        self.assertEqual((len(learnt), len(tested)), (3, 1))
        self.assertEqual(nucls.split(self.folder, fields, 1, 0.3, SEED)[1], tested)
        splits = self.folder / "train_test_splits"
        splits.mkdir()
        (splits / "fold_2_train.csv").write_text(",slide_name,hospital,type,fold\n0,a,x,train,2\n1,b,x,train,2\n")
        (splits / "fold_2_test.csv").write_text(",slide_name,hospital,type,fold\n0,d,x,test,2\n")
        learnt, tested, remarks = nucls.split(self.folder, fields, 2, 0.3, SEED)
        self.assertEqual(("".join(f.slide for f in learnt), "".join(f.slide for f in tested)), ("ab", "d"))
        self.assertIn("1 fields are of slides in neither", remarks[0])
        self.refuses("fold_1_train.csv cannot be read", nucls.split, self.folder, fields, 1, 0.3, SEED)
        (splits / "fold_2_test.csv").write_text(",slide_name\n0,a\n")
        self.refuses("trains and tests on a", nucls.split, self.folder, fields, 2, 0.3, SEED)


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.place,)


class Weights(Folder):
    def saved(self, value, name="w.pth"):
        path = self.folder / name
        torch.save(value, path)
        return path

    def loaded(self, path, arch="resnet18"):
        network = weights.backbone(arch)
        return network, weights.load(network, weights.read(path), path.name, arch)

    def test_every_key_arrives_whatever_stands_before_it(self):
        torch.manual_seed(SEED)
        state = torchvision.models.resnet18().state_dict()
        momentum = {f"encoder_k.{key}": torch.zeros_like(value) for key, value in state.items()}
        for prefix in ("", "module.", "encoder_q."):
            path = self.saved({"state_dict": {prefix + key: value for key, value in state.items()} | momentum, "author": "test"})
            network, report = self.loaded(path)
            self.assertEqual(weights.architecture(weights.read(path)), "resnet18")
            self.assertEqual((report.prefix, report.missing), (f"state_dict.{prefix}", []))
            self.assertEqual(report.matched, len(state) - 2)
            self.assertIn(f"state_dict.{prefix}fc.weight", report.unexpected)
            for key, value in network.state_dict().items():
                self.assertTrue(torch.equal(value, state[key]), key)

    def test_safetensors_are_told_by_content(self):
        import safetensors.torch

        state = weights.backbone("resnet34").state_dict()
        path = self.folder / "model.pth"
        safetensors.torch.save_file(state, path)
        network, report = self.loaded(path, "resnet34")
        self.assertEqual((report.matched, report.unexpected), (len(state), []))
        self.assertTrue(torch.equal(network.layer4[2].conv2.weight, state["layer4.2.conv2.weight"]))

    def test_missing_keys_are_listed(self):
        state = weights.backbone("resnet18").state_dict()
        del state["layer4.1.conv2.weight"]
        self.assertEqual(self.loaded(self.saved(state))[1].missing, ["layer4.1.conv2.weight"])

    def test_what_is_no_backbone_of_ours_is_refused(self):
        self.refuses("no weight matches", self.loaded, self.saved({"head.weight": torch.zeros(3)}))
        for theirs, ours in [("resnet50", "resnet18"), ("resnet34", "resnet18"), ("resnet18", "resnet34")]:
            path = self.saved(weights.backbone(theirs).state_dict())
            self.assertEqual(weights.architecture(weights.read(path)), theirs)
            self.refuses("--arch", self.loaded, path, ours)
        broken = weights.backbone("resnet18").state_dict()
        broken["conv1.weight"][0] = float("nan")
        self.refuses("no numbers", self.loaded, self.saved(broken))

    def test_what_is_no_weights_is_refused_and_never_executed(self):
        Evil.place = str(self.folder / "executed")
        path = self.saved({"state_dict": Evil()}, "evil.pth")
        self.refuses("mkdir", weights.read, path)
        self.assertFalse((self.folder / "executed").exists())
        (self.folder / "empty.pth").touch()
        self.refuses("empty", weights.read, self.folder / "empty.pth")
        (self.folder / "text.pth").write_text("no weights at all, but text")
        self.refuses("text.pth", weights.read, self.folder / "text.pth")
        whole = self.saved(weights.backbone("resnet18").state_dict(), "cut.pth")
        whole.write_bytes(whole.read_bytes()[:100_000])
        self.refuses("cut.pth", weights.read, whole)
        self.refuses("check the path", weights.read, self.folder / "none.pth")


def field(number, boxes, labels, slide=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return nucls.Field(f"f{number}", slide or f"s{number}", Path(f"f{number}.png"), 100, 100, boxes, np.array(labels, np.int64))


def independent(truth, found, most):
    """AP, AP50 and AP75 by pycocotools, from files, as anybody would call it; AP of each class too."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for name, value in [("truth", truth), ("found", found)]:
            Path(folder, name).write_text(json.dumps(value))
        reference = COCO(str(Path(folder, "truth")))
        evaluation = COCOeval(reference, reference.loadRes(str(Path(folder, "found"))), "bbox")
        evaluation.params.maxDets = [1, 10, most]
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, :, 0, 2]
        if most == 100:
            evaluation.summarize()
            return evaluation.stats[:3]
    return [values[values > -1].mean() for values in (precision, precision[0], precision[5])]


class Precision(unittest.TestCase):
    def test_a_case_by_hand(self):
        # One class. Sure and right, then wrong, then right with an IoU of 0.8: precision 1 up to half the recall, then 2/3.
        fields = [field(0, [[0, 0, 10, 10], [50, 50, 60, 60]], [1, 1])]
        found = [(np.array([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 58]], float), np.ones(3, int), np.array([0.9, 0.8, 0.7]))]
        figures = score.Scores(score.truth(fields, ["tumor_any"]), found, 100).figures()
        above = (51 + 50 * 2 / 3) / 101
        self.assertAlmostEqual(figures["ap50"], above, places=9)
        self.assertAlmostEqual(figures["ap75"], above, places=9)
        # Of ten thresholds seven are 0.8 or less.
        self.assertAlmostEqual(figures["ap"], (7 * above + 3 * 51 / 101) / 10, places=9)

    def test_what_lies_on_an_ignored_nucleus_counts_neither_for_nor_against(self):
        boxes = np.array([[70, 70, 80, 80], [0, 0, 10, 10]], float)
        found = [(boxes, np.ones(2, int), np.array([0.9, 0.8]))]
        with_it = score.truth([field(0, [[0, 0, 10, 10], [70, 70, 80, 80]], [1, 0])], ["tumor_any"])
        without = score.truth([field(0, [[0, 0, 10, 10]], [1])], ["tumor_any"])
        self.assertAlmostEqual(score.Scores(with_it, found, 100).figures()["ap"], 1.0, places=9)
        self.assertAlmostEqual(score.Scores(without, found, 100).figures()["ap"], 0.5, places=9)

    def test_figures_are_those_of_pycocotools(self):
        for seed in range(SEED, SEED + 5):
            draws = random.Random(seed)
            fields, found = drawn(draws)
            truth = score.truth(fields, nucls.CLASSES)
            for most in (100, 7):
                ours = score.Scores(truth, found, most).figures()
                theirs = independent(truth, score.detections(found), most)
                np.testing.assert_allclose([ours[name] for name in score.FIGURES], theirs, atol=1e-12, err_msg=f"seed {seed}")

    def test_a_resample_is_the_fields_drawn_again(self):
        fields, found = drawn(random.Random(SEED))
        chosen = [3, 0, 0, 5]
        ours = score.Scores(score.truth(fields, nucls.CLASSES), found, 100).figures(chosen)
        again = score.truth([fields[at] for at in chosen], nucls.CLASSES)
        theirs = independent(again, score.detections([found[at] for at in chosen]), 100)
        np.testing.assert_allclose([ours[name] for name in score.FIGURES], theirs, atol=1e-12, err_msg=f"seed {SEED}")

    def test_intervals_are_over_slides_and_hold_the_mean(self):
        fields, found = drawn(random.Random(SEED))
        slides = [field.slide for field in fields]
        trials = [score.Scores(score.truth(fields, nucls.CLASSES), found, 100)] * 2
        figures = score.summary(trials, slides, 50, SEED)
        ap = figures["ap"]
        self.assertEqual((ap["std"], len(ap["trials"]), len(figures["by_class"])), (0.0, 2, 3))
        self.assertTrue(ap["low"] <= ap["value"] <= ap["high"] and ap["low"] < ap["high"], ap)
        self.assertEqual(figures, score.summary(trials, slides, 50, SEED))
        self.assertNotIn("low", score.summary(trials, ["one"] * len(slides), 50, SEED)["ap"])

    def test_nothing_found_is_an_average_precision_of_nothing(self):
        nothing = (np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
        figures = score.Scores(score.truth([field(0, [[0, 0, 10, 10]], [1])], nucls.CLASSES), [nothing], 100).figures()
        self.assertEqual(figures["ap"], 0.0)
        self.assertTrue(np.isnan(figures["classes"][1]))


def drawn(draws, count=8):
    """Fields with nuclei, some ignored, and detections near them, some wrong."""
    fields, found = [], []
    for number in range(count):
        boxes, labels, seen, called, scores = [], [], [], [], []
        for _ in range(draws.randint(4, 12)):
            x, y = draws.uniform(0, 80), draws.uniform(0, 80)
            boxes.append([x, y, x + draws.uniform(6, 20), y + draws.uniform(6, 20)])
            labels.append(draws.choice([0, 1, 1, 2, 2, 3]))
            if draws.random() < 0.8:
                seen.append([corner + draws.uniform(-1.5, 1.5) for corner in boxes[-1]])
                called.append(labels[-1] if labels[-1] and draws.random() < 0.8 else draws.randint(1, 3))
                scores.append(draws.random())
        fields.append(field(number, boxes, labels, slide=f"s{number // 2}"))
        found.append((np.array(seen).reshape(-1, 4), np.array(called, int), np.array(scores)))
    return fields, found


class Training(Folder):
    settings = train.Settings(iterations=20, batch=2, lr=0.02, crop=48, scale=2, regions=16, proposals=40, detections=50)

    def test_a_crop_keeps_boxes_on_their_nuclei_and_ignores_what_is_cut(self):
        picture = self.folder / "a.png"
        pixels = np.zeros((100, 100, 3), np.uint8)
        pixels[30:50, 40:60] = 255
        Image.fromarray(pixels).save(picture)
        one = nucls.Field("a", "a", picture, 100, 100, np.array([[40, 30, 60, 50]], np.float32), np.array([2]))
        draws = np.random.default_rng(SEED)
        seen = set()
        for _ in range(60):
            image, target = train.view(one, self.settings, draws)
            self.assertEqual(tuple(image.shape), (3, 96, 96))
            self.assertEqual(len(target["boxes"]), len(target["labels"]))
            for kind in ("boxes", "ignore"):
                for x0, y0, x1, y1 in target[kind].round().int().tolist():
                    # All white inside, all black outside.
                    inside = image[0, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
                    self.assertTrue((inside == 1).all(), f"seed {SEED}")
                    white = (image[0] > 0.5).sum().item()
                    self.assertLess(abs(white - (x1 - x0) * (y1 - y0)), 2 * (x1 - x0 + y1 - y0), f"seed {SEED}")
                    seen.add(kind)
        self.assertIn("boxes", seen)

    def test_regions_on_ignored_nuclei_are_not_ground(self):
        target = {"boxes": torch.tensor([[0.0, 0, 20, 20]]), "labels": torch.tensor([3]), "ignore": torch.tensor([[50.0, 50, 70, 70]])}
        places = torch.tensor([[0.0, 0, 20, 20], [51.0, 51, 71, 70], [80.0, 80, 99, 99]])
        torch.manual_seed(SEED)
        found = model.detector(weights.backbone("resnet18"), 512, 3, 2, 16, 40, 50)
        labels, _ = found.rpn.assign_targets_to_anchors([places], [target])
        self.assertEqual(labels[0].tolist(), [1, -1, 0])
        found.roi_heads.targets = [target]
        _, labels = found.roi_heads.assign_targets_to_proposals([places], [target["boxes"]], [target["labels"]])
        self.assertEqual(labels[0].tolist(), [3, -1, 0])

    def test_the_head_is_the_fifth_stage_with_a_norm_and_weights_arrive_in_it(self):
        network = weights.backbone("resnet50")
        found = model.detector(network, 2048, 3, 4, 16, 40, 50)
        self.assertIs(found.roi_heads.box_head.res5, network.layer4)
        self.assertEqual(found.roi_heads.box_head.norm.num_features, 2048)
        self.assertEqual(found.backbone.out_channels, 1024)
        self.assertTrue(all(p.requires_grad for p in found.parameters()), "something is frozen")
        # Torchvision strides in the 3 x 3 convolution.
        self.assertEqual(network.layer4[0].conv2.stride, (2, 2))

    def test_the_rate_falls_where_the_protocol_says(self):
        settings = train.Settings(1200, 4, 1.0, 64, 1, 16, 40, 50)
        rates = [settings.rate(step) for step in (0, 100, 899, 900, 1099, 1100)]
        np.testing.assert_allclose(rates, [1 / 101, 1, 1, 0.1, 0.1, 0.01])

    def test_unseparable_arguments_are_refused(self):
        for wrong in (["--trials", "0"], ["--lr", "nan"], ["--scale", "x"], ["--arch", "vit"]):
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                detection.parser().parse_args(["--data", "d", "--weights", "random", *wrong])
        words = io.StringIO()
        with contextlib.redirect_stderr(words):
            code = detection.main(["--data", str(self.folder), "--weights", "a/w.pth", "b/w.pth"])
        self.assertEqual(code, 64)
        self.assertIn("same files", words.getvalue())


if __name__ == "__main__":
    unittest.main()
