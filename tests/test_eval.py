"""eval.py: COCO's numbers against an independent computation, results files, classes, and the program on its flags."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from programs import program as start_program
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval as evaluation
from config import InputError
from data import CocoInstances
from formats.coco import coco_results, encode_masks
from formats.images import DataError
from shapes import make_shapes

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]  # COCO's order


# RLE and results


def test_encode_masks_is_pycocotools_encode():
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(7, *size, generator=generator) < share for size in ((5, 9), (64, 48), (1, 7), (7, 1), (1, 1))
             for share in (0.02, 0.5, 0.98)]  # fmt: skip
    plain = torch.zeros(3, 20, 30, dtype=torch.bool)
    plain[1] = plain[2, :, :3] = True
    for masks in [*noise, plain, torch.zeros(0, 4, 6, dtype=torch.bool)]:
        expected = mask_utils.encode(np.asfortranarray(masks.numpy().transpose(1, 2, 0).astype(np.uint8)))
        assert [r | {"counts": r["counts"].encode()} for r in encode_masks(masks)] == expected


def some_detections():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 5:15, 10:20] = True
    boxes = torch.tensor([[10.0, 5.0, 20.0, 15.0], [-1.5, 0.0, 4.0, 8.25]])
    return {"scores": torch.tensor([0.75, 0.5]), "labels": torch.tensor([1, 0]), "boxes": boxes, "masks": masks}


def test_coco_results():
    first, second = coco_results(some_detections(), "a7", [3, 90])
    assert first["image_id"] == "a7" and first["category_id"] == 90 and first["score"] == 0.75
    assert first["bbox"] == [10, 5, 10, 10] and second["bbox"] == [-1.5, 0, 5.5, 8.25]
    assert mask_utils.toBbox(first["segmentation"]).tolist() == [10, 5, 10, 10]
    assert json.loads(json.dumps(second)) == second and second["category_id"] == 3
    encoded = some_detections() | {"masks": encode_masks(some_detections()["masks"])}
    assert coco_results(encoded, "a7", [3, 90]) == [first, second]


@pytest.mark.parametrize("name", ["scores", "boxes"])
def test_nan_is_an_error(name):
    detections = some_detections()
    detections[name][1] = float("nan")
    with pytest.raises(InputError, match="image 5: .*NaN"):
        coco_results(detections, 5, [3, 90])


# COCO's numbers, computed again


def pairwise_iou(kind, detection, truth):
    """IoU of two {"box": xywh, "mask": bool}; with a crowd the share of the detection inside it. Computed once."""
    known = detection.setdefault(kind + " IoU", {})
    if id(truth) not in known:
        known[id(truth)] = compute_iou(kind, detection, truth)
    return known[id(truth)]


def compute_iou(kind, detection, truth):
    if kind == "mask":
        overlap, a, b = (x.sum() for x in (detection["mask"] & truth["mask"], detection["mask"], truth["mask"]))
    else:
        (x, y, w, h), (u, v, s, t) = detection["box"], truth["box"]
        overlap = max(0, min(x + w, u + s) - max(x, u)) * max(0, min(y + h, v + t) - max(y, v))
        a, b = w * h, s * t
    return overlap / (a if truth["crowd"] else a + b - overlap) if overlap else 0.0


def match(kind, truths, detections, threshold, low, high):
    """[(score, right?)] of one image and class: greedy by score, those on what does not count left out."""
    counts = [not truth["crowd"] and low <= truth["area"] <= high for truth in truths]
    free, outcome = set(range(len(truths))), []
    for detection in detections:
        found = {i: pairwise_iou(kind, detection, truths[i]) for i in range(len(truths))
                 if i in free or truths[i]["crowd"]}  # fmt: skip
        found = {i: iou for i, iou in found.items() if iou >= threshold}
        best = max(found, key=lambda i: (counts[i], found[i]), default=None)
        if best is not None:
            free.discard(best)
            if counts[best]:
                outcome.append((detection["score"], True))
        elif low <= (detection["mask"].sum() if kind == "mask" else np.prod(detection["box"][2:])) <= high:
            outcome.append((detection["score"], False))
    return outcome, sum(counts)


def curve(kind, images, category, threshold, limit, low, high):
    """(AP over 101 recalls, largest recall) of a class over all images; None without an instance."""
    outcome, total = [], 0
    for truths, detections in images:
        ours = [d for d in detections if d["category"] == category]
        ours = sorted(ours, key=lambda d: -d["score"])[:limit]
        found, count = match(kind, [t for t in truths if t["category"] == category], ours, threshold, low, high)
        outcome, total = outcome + found, total + count
    if not total:
        return None
    right = np.array([hit for _, hit in sorted(outcome, key=lambda pair: -pair[0])], dtype=float)
    recall, precision = right.cumsum() / total, right.cumsum() / np.arange(1, len(right) + 1)
    at_least = [precision[recall >= r].max(initial=0.0) for r in np.linspace(0, 1, 101)]
    return np.mean(at_least), recall.max(initial=0.0)


def own_numbers(kind, images, categories, limit):
    """The twelve numbers in percent and AP per category."""
    thresholds = np.linspace(0.5, 0.95, 10)
    sizes = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
    cache = {}

    def number(which, limit, size="", some=thresholds, category=None):
        values = []
        for c in categories if category is None else [category]:
            for t in some:
                if (key := (c, t, limit, size)) not in cache:
                    cache[key] = curve(kind, images, c, t, limit, *sizes[size])
                values += [cache[key][which]] if cache[key] else []
        return 100 * np.mean(values) if values else None

    numbers = {"AP": number(0, limit), "AP50": number(0, limit, some=[thresholds[0]])}
    numbers["AP75"] = number(0, limit, some=[thresholds[5]])
    for name, which in (("AP", 0), ("AR", 1)):
        numbers |= {f"{name}{size}": number(which, limit, size) for size in "sml"}
    numbers |= {f"AR{n}": number(1, n) for n in sorted({min(1, limit), min(10, limit), limit})}
    return numbers, [number(0, limit, category=c) for c in categories]


CATEGORIES = {4: "nut", 7: "bolt", 11: "never there", 90: "large"}


def random_set(seed, image_ids, per_image, only=None):
    """COCO file, [(truths, detections)] per image, results: crowds, an empty image, misses, duplicates and mistakes.

    per_image: detections; only: the one category of all instances.
    """
    rng = np.random.default_rng(seed)
    height, width = 170, 200

    def instance(category, side):
        x, y = rng.uniform(0, (width - side, height - side))
        w, h = side * rng.uniform(0.7, 1, 2)
        mask = np.zeros((height, width), bool)
        mask[round(y) : round(y + h) + 1, round(x) : round(x + w) + 1] = True
        mask &= rng.random((height, width)) < 0.97
        return {"category": only or category, "box": [x, y, w, h], "mask": mask}

    def blurred(truth):
        moved = np.roll(truth["mask"], rng.integers(-3, 4, 2), (0, 1))
        return truth | {"box": (np.array(truth["box"]) + rng.normal(0, 2, 4)).clip(1).tolist(), "mask": moved}

    images, annotations, results = [], [], []
    for number, image_id in enumerate(image_ids):
        truths = [instance(c, side) for c, side in ((4, 12), (4, 25), (7, 30), (7, 60), (4, 80), (90, 130), (7, 40))]
        truths = [t | {"crowd": i == 6, "area": t["mask"].sum()} for i, t in enumerate(truths)] if number != 1 else []
        found = [blurred(t) for t in truths for _ in range(2) if rng.random() < 0.8]
        found += [instance(rng.choice([4, 7, 11, 90]), rng.uniform(5, 120)) for _ in range(per_image - len(found))]
        scores = rng.permutation(len(found)) + rng.random()
        found = [entry | {"score": float(score)} for entry, score in zip(found, scores, strict=True)]
        images.append((truths, found))
        masks = encode_masks(torch.from_numpy(np.stack([entry["mask"] for entry in truths + found])))
        for entry, rle in zip(truths + found, masks, strict=True):
            fields = {"image_id": image_id, "category_id": int(entry["category"]), "bbox": entry["box"],
                      "segmentation": rle}  # fmt: skip
            if "score" in entry:
                results.append(fields | {"score": entry["score"]})
            else:
                fields |= {"id": len(annotations) + 1, "iscrowd": int(entry["crowd"])}
                annotations.append(fields | {"area": int(entry["area"])})
    entries = [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in image_ids]
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}, images, results


def test_only_images_of_one_size_share_a_batch(squares, monkeypatch):
    seen, detect = [], evaluation.detect
    spy = lambda model, images, sizes, *rest: seen.append(sizes) or detect(model, images, sizes, *rest)
    monkeypatch.setattr(evaluation, "detect", spy)
    evaluation.find_results(*oracle_and_data(squares))
    assert seen == [[(64, 64)] * 4, [(128, 128)]]


def test_split_test(squares, monkeypatch):
    content = json.loads((squares / "val.json").read_text())
    del content["annotations"]
    (squares / "annotations").mkdir()
    (squares / "annotations/image_info_test-dev2017.json").write_text(json.dumps(content))
    (squares / "images").rename(squares / "test2017")
    oracle = lambda path, device: (Oracle(squares / "val.json", NAMES), {"classes": NAMES})
    monkeypatch.setattr(evaluation, "load_model", oracle)
    flags = ["--checkpoint", "c.pt", "--data-root", squares, "--split", "test", "--results", squares / "r.json"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags), "--workers", "0", "--device", "cpu"])
    evaluation.main()
    assert {r["image_id"] for r in json.loads((squares / "r.json").read_text())} == {40, 3, 20, 1, 17}


def indexed(content):
    """pycocotools' COCO of the dictionary of an annotation file."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def assert_numbers(content, images, results, limit):
    """`average_precision` finds what the computation above finds; returns it."""
    image_ids = [image["id"] for image in content["images"]]
    scores = evaluation.average_precision(indexed(content), results, image_ids, limit)
    for kind in ("box", "mask"):
        numbers, per_class = own_numbers(kind, images, list(CATEGORIES), limit)
        assert scores[kind] == pytest.approx(numbers, abs=1e-9), kind
        assert [entry[kind] for entry in scores["classes"]] == pytest.approx(per_class, abs=1e-9)
        assert 1 < scores[kind]["AP"] < 99 and scores[kind]["APs"] != scores[kind]["APl"]
    assert [entry["name"] for entry in scores["classes"]] == list(CATEGORIES.values())
    assert scores["classes"][2] == {"name": "never there", "box": None, "mask": None}
    return scores


@pytest.mark.parametrize("limit", [1, 4, 10, 100])
def test_numbers_against_an_independent_computation(limit):
    assert_numbers(*random_set(1, [7, 1, 0], per_image=25), limit)


def test_numbers_of_text_ids():
    assert_numbers(*random_set(1, ["b", "a", "10"], per_image=25), 100)


def test_numbers_of_more_than_a_hundred_detections():
    """Of one class in an image, so that COCO's own limit of 100 would cut them off."""
    sample = random_set(1, [7, 1, 0], per_image=140, only=4)
    scores = assert_numbers(*sample, 130)
    assert scores["box"]["AR130"] > assert_numbers(*sample, 100)["box"]["AR100"]


def summary(coco, results, kind):
    """COCO's own numbers of a list of results, or of a file of them, in percent; None for -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(coco, coco.loadRes(results), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: None if s < 0 else 100 * float(s) for name, s in zip(METRICS, run.stats, strict=True)}


def test_numbers_are_those_of_summarize(tmp_path):
    """Both results files, scored as COCO does, hold exactly the numbers that are printed."""
    content, _, results = random_set(2, [7, 1, 0, 12], per_image=30)
    results = [result for result in results if result["image_id"] != 12]
    coco = indexed(content)
    scores = evaluation.average_precision(coco, results, [7, 1, 0, 12])
    assert list(scores["box"]) == METRICS
    evaluation.write_results(results, coco, tmp_path / "out.json", tmp_path / "out.segm.json")
    assert summary(coco, str(tmp_path / "out.json"), "bbox") == scores["box"]
    assert summary(coco, str(tmp_path / "out.segm.json"), "segm") == scores["mask"]
    of_both = summary(coco, str(tmp_path / "out.json"), "segm")  # it takes the boxes' areas for the masks'
    assert {k: v for k, v in of_both.items() if k not in ("APs", "APm", "APl")} == {
        k: v for k, v in scores["mask"].items() if k not in ("APs", "APm", "APl")
    }


def test_results_have_the_ids_of_the_annotation_file(tmp_path):
    """Where reading has numbered texts, the file's own ids come back."""
    content = {"images": [{"id": 1, "file_id": "front/7"}, {"id": 2, "file_id": 2.0}], "annotations": []}
    content["categories"] = [{"id": 1, "file_id": "nut", "name": "nut"}, {"id": 2, "name": "bolt"}]
    found = [result for i in (1, 2) for result in coco_results(some_detections(), i, [1, 2])]
    evaluation.write_results(found, indexed(content), tmp_path / "r.json", tmp_path / "m.json")
    for name, keys in (("r.json", {"bbox"}), ("m.json", set())):
        results = json.loads((tmp_path / name).read_text())
        assert [result["image_id"] for result in results] == ["front/7", "front/7", 2.0, 2.0]
        assert [result["category_id"] for result in results] == [2, "nut", 2, "nut"]
        assert results[0].keys() == {"image_id", "category_id", "score", "segmentation"} | keys


def test_without_a_detection():
    content, _, _ = random_set(3, [1, 2], per_image=14)
    scores = evaluation.average_precision(indexed(content), [], [1, 2])
    assert set(scores["box"].values()) == {0.0} and scores["classes"][0] == {"name": "nut", "box": 0, "mask": 0}


# Models whose predictions are known


class Oracle(torch.nn.Module):
    """Finds the instances of image number 255 * (its first pixel) of a data set, less well in the decoder's input.

    classes: names of its labels. Every query also bets on its last label, with a low score.
    """

    def __init__(self, path, classes):
        super().__init__()
        self.config = SimpleNamespace(decoder_layers=1, test_size=(64, 64))
        self.encoder = SimpleNamespace(level_embed=torch.zeros(1))  # says which device the model is on
        self.coco, self.classes = indexed(json.loads(Path(path).read_text())), classes

    def forward(self, images):
        first, last = (self.predict(images, shift) for shift in (3, 0))
        return last | {"aux_outputs": [first]}

    def predict(self, images, shift):
        size, queries = images[0].shape[1], 6
        logits = torch.full((len(images), queries, len(self.classes)), -9.0)
        logits[..., -1] = -2
        boxes, masks = torch.full((len(images), queries, 4), 0.5), torch.full((len(images), queries, size, size), -9.0)
        for b, image in enumerate(images):
            entry = self.coco.dataset["images"][round(image[0, 0, 0].item() * 255)]
            for q, annotation in enumerate(self.coco.imgToAnns[entry["id"]]):
                logits[b, q, self.classes.index(self.coco.cats[annotation["category_id"]]["name"])] = 3 - 0.5 * q
                x, y, w, h = annotation["bbox"]
                boxes[b, q] = torch.tensor([x + w / 2 + 2 * q * (q % 2) + shift, y + h / 2, w, h]) / entry["height"]
                mask = torch.from_numpy(self.coco.annToMask(annotation)).roll(2 * q * (q > 1) + shift, 0)
                masks[b, q][mask[:: len(mask) // size, :: len(mask) // size] > 0] = 9
        masks = torch.nn.functional.avg_pool2d(masks, 4)
        # Each query's mask is a channel of its own.
        factors = {"mask_embeddings": torch.eye(queries).repeat(len(images), 1, 1), "pixel_features": masks}
        predictions = {"pred_logits": logits, "pred_boxes": boxes} | factors
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32  # which has these numbers exactly
        return {name: value.to(dtype) for name, value in predictions.items()}


NAMES = ["nut", "bolt", "cog"]


@pytest.fixture
def squares(tmp_path):
    """Folder of val.json, squares of three classes, and images/, of 64 x 64 and 128 x 128; the model sees 64 x 64."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for number, image_id in enumerate([40, 3, 20, 1, 17]):
        size = 128 if number == 2 else 64
        images.append({"id": image_id, "file_name": f"{number}.png", "width": size, "height": size})
        Image.new("RGB", (size, size), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        for i in range(3 if number != 3 else 0):
            (x, y), side = rng.integers(0, size // 2, 2).tolist(), int(rng.integers(8, 30))
            polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": [5, 6, 9][i],
                                "segmentation": [polygon], "bbox": [x, y, side, side], "area": side * side,
                                "iscrowd": 0})  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in zip([5, 6, 9], NAMES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def run(squares, monkeypatch, capsys):
    """eval.py on `squares` in this process, with an oracle for a checkpoint; returns what it prints."""

    def program(*flags, classes=NAMES):
        oracle = lambda path, device: (Oracle(squares / "val.json", list(classes)), {"classes": list(classes)})
        monkeypatch.setattr(evaluation, "load_model", oracle)
        data = ["--val-json", squares / "val.json", "--val-images", squares / "images"]
        flags = ["--checkpoint", "c.pt", *data, "--workers", 0, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        evaluation.main()
        return capsys.readouterr().out

    return program


def test_results_hold_what_is_printed(squares, run):
    printed = run("--results", squares / "new" / "r.json", "--output", squares / "s.json", "--batch-size", 3)
    scores = json.loads((squares / "s.json").read_text())
    assert scores.keys() == {"box", "mask"} and 10 < scores["box"]["AP"] < 95 and 10 < scores["mask"]["AP"] < 95
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(squares / "val.json"))
    assert summary(coco, str(squares / "new" / "r.json"), "bbox") == scores["box"]
    assert summary(coco, str(squares / "new" / "r.segm.json"), "segm") == scores["mask"]
    lines = printed.splitlines()
    assert lines[0].split() == METRICS
    assert [float(n) if n != "-" else None for n in lines[1].split()[1:]] == [
        n if n is None else pytest.approx(n, abs=0.051) for n in scores["box"].values()
    ]
    results = json.loads((squares / "new" / "r.json").read_text())
    assert list(dict.fromkeys(r["image_id"] for r in results)) == [40, 3, 20, 1, 17]  # the file's ids, in its order
    assert {r["category_id"] for r in results} == {5, 6, 9}
    assert {tuple(r["segmentation"]["size"]) for r in results if r["image_id"] == 20} == {(128, 128)}


def test_fewer_detections(squares, run):
    """With two detections an image, the same as scoring no more than the two best of each image."""
    flags = ["--output", squares / "s.json", "--results", squares / "r.json"]
    run(*flags)
    results = json.loads((squares / "r.json").read_text())
    run(*flags, "--max-detections", 2)
    few = json.loads((squares / "r.json").read_text())
    assert len(few) == 10 and all(result in results for result in few)
    scores = json.loads((squares / "s.json").read_text())["box"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(squares / "val.json"))
    expected = summary(coco, str(squares / "r.json"), "bbox")
    assert "AR10" not in scores and scores["AR2"] == expected["AR100"] and scores["AP"] == expected["AP"] > 0


def test_tables_and_pictures(squares, run):
    pytest.importorskip("matplotlib")
    printed = run("--per-layer", "--per-class", "--output", squares / "s.json")
    scores = json.loads((squares / "s.json").read_text())
    assert [entry["layer"] for entry in scores["layers"]] == [0, 1]
    assert scores["layers"][1]["box"] == scores["box"] and scores["layers"][0]["box"]["AP"] < scores["box"]["AP"]
    assert [entry["name"] for entry in scores["classes"]] == NAMES
    for kind in ("box", "mask"):
        assert np.mean([entry[kind] for entry in scores["classes"]]) == pytest.approx(scores[kind]["AP"])
    assert f"bolt    {scores['classes'][1]['box']:5.1f}" in printed and "box - mask" in printed
    for name in ("s.png", "s.classes.png"):
        assert_bars(squares / name)
    run("--per-layer", "--per-class", "--output", squares / "s.json")  # its own charts are replaced
    for name, flag in (("s.png", "--per-layer"), ("s.classes.png", "--per-class")):
        Image.new("RGB", (9, 9)).save(squares / name)
        with pytest.raises(InputError, match=f"{name}: would be overwritten by a chart, but is not one"):
            run(flag, "--output", squares / "s.json")


def test_a_file_that_cannot_be_written_costs_nothing_else(squares, run, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "r.json")

    monkeypatch.setattr(evaluation, "write_results", full)
    with pytest.raises(OSError, match="File too large"):
        run("--results", squares / "r.json", "--output", squares / "s.json")
    assert json.loads((squares / "s.json").read_text())["box"]["AP"] > 50 and "AP50" in capsys.readouterr().out


def assert_bars(path):
    with Image.open(path) as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((255, 127, 14), (31, 119, 180)):  # of box and mask
        assert (colours == colour).all(1).sum() > 1000


def test_picture_of_many_classes(tmp_path):
    """Eighty classes, one of them without an instance, have a line each."""
    pytest.importorskip("matplotlib")
    classes = [{"name": f"class {i}", "box": 90.0 - i, "mask": 80.0 - i / 2} for i in range(79)]
    evaluation.save_classes({"classes": [*classes, {"name": "none", "box": None, "mask": None}]}, tmp_path / "c.png")
    assert_bars(tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.height > 80 * 20


def test_classes_are_matched_by_name(squares, run):
    """A model of more classes, in another order; its last label is of none of the data set's, and does not count."""
    run("--results", squares / "a.json", "--output", squares / "s.json", classes=["nut", "bolt", "cog", "screw"])
    more = ["cog", "other", "nut", "bolt", "screw"]
    run("--results", squares / "b.json", "--output", squares / "t.json", "--max-detections", 18, classes=more)
    assert json.loads((squares / "b.json").read_text()) == json.loads((squares / "a.json").read_text())
    with pytest.raises(InputError, match="has the classes 'cog', but the model was trained for 'nut', 'bolt'; "):
        run(classes=["nut", "bolt"])


def oracle_and_data(folder):
    data = CocoInstances(folder / "val.json", folder / "images", training=False, test_size=(64, 64))
    return Oracle(folder / "val.json", NAMES), data


def evaluate_squares(folder, **settings):
    """The numbers of all layers, None in another process than the first."""
    model, data = oracle_and_data(folder)
    results = evaluation.find_results(model, data, **settings)
    return evaluation.score(data, results) if results and results[0] else None


def test_half_precision_is_the_models_alone(squares):
    """Under autocast, scores and masks are put together in single precision from what the model gives."""
    model, data = oracle_and_data(squares)
    assert evaluation.find_results(model, data, autocast=torch.bfloat16) == evaluation.find_results(model, data)


def evaluate_share(folder, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    scores = [evaluate_squares(folder, per_layer=True)]
    results = evaluation.find_results(*oracle_and_data(folder), per_layer=True, batch_size=1)
    scores += [results, evaluate_squares(folder, batch_size=1, stopping=lambda: rank == 1)]
    (folder / f"{rank}.json").write_text(json.dumps(scores))
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(squares):
    """The first has all results, the other none, and all leave off where one is told to."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=evaluate_share, args=(squares, rank)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (first, results, stopped), second = (json.loads((squares / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == evaluate_squares(squares, per_layer=True) and second == [None, [[], []], None] and stopped is None
    assert results == evaluation.find_results(*oracle_and_data(squares), per_layer=True)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--split", "test"], "--split test: .*--data-root"),
        (["--output", "DIR/val.json"], "val.json: exists and is another kind of file"),
        (["--results", "DIR/val.json"], "val.json: exists and is another kind of file"),
        (["--results", "DIR/list.json"], "list.json: exists and is another kind of file"),
        (["--results", "DIR/images/0.png"], "0.png: is to be a JSON file"),
        (["--output", "DIR/images/0.png/s.json"], "s.json: cannot be written"),
        (["--output", "DIR/s.json", "--results", "DIR/images/../s.json"], "give two names"),
        (["--output", "DIR/s.segm.json", "--results", "DIR/s.json"], "give two names"),
    ],
)
def test_wrong_flags(squares, run, flags, says):
    (squares / "list.json").write_text('[\n  {"image_id": 1}\n]\n')
    before = {path: path.read_bytes() for path in squares.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=says):
        run(*(flag.replace("DIR", str(squares)) for flag in flags))
    assert {path: path.read_bytes() for path in squares.rglob("*") if path.is_file()} == before


def test_training_files_alone(monkeypatch):
    flags = ["--checkpoint", "c.pt", "--train-json", "t.json", "--train-images", "t"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
    with pytest.raises(InputError, match="--val-json"):
        evaluation.main()


# The program as a user starts it


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of a generated data set and of checkpoint.pt, a model of random weights for it."""
    root = tmp_path_factory.mktemp("tiny")
    make_shapes(root / "data", train=1, val=4, size=64)
    categories = json.loads((root / "data/annotations/instances_val2017.json").read_text())["categories"]
    toys.save_untrained(root / "checkpoint.pt", [category["name"] for category in categories])
    return root


def test_program(tiny, tmp_path):
    data = ["--data", "coco", "--data-root", tiny / "data", "--workers", 0, "--device", "cpu"]
    files = ["--output", tmp_path / "s.json", "--results", tmp_path / "r.json"]
    flags = ["--checkpoint", tiny / "checkpoint.pt", *data, "--per-layer", "--per-class", *files]
    process = start_program("eval", *flags, output=tmp_path / "eval")
    assert process.wait() == 0, process.err
    scores = json.loads((tmp_path / "s.json").read_text())
    assert [entry["layer"] for entry in scores["layers"]] == [0, 1, 2, 3] and len(scores["classes"]) == 10
    assert list(scores["mask"]) == METRICS == list(scores["layers"][0]["box"])
    assert len(json.loads((tmp_path / "r.segm.json").read_text())) == 400
    assert "class" in process.out and "r.segm.json" in process.out


def test_weights_of_nan(tiny, tmp_path, monkeypatch):
    checkpoint = torch.load(tiny / "checkpoint.pt", weights_only=True)
    checkpoint["model"] = {k: v * float("nan") if "class_head" in k else v for k, v in checkpoint["model"].items()}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    flags = ["--checkpoint", tmp_path / "checkpoint.pt", "--data", "coco", "--data-root", tiny / "data", "--workers", 0]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    with pytest.raises(InputError, match="NaN"):
        evaluation.main()


@pytest.mark.parametrize("ids", ["from 0", "missing", "text", "all the same"])
def test_annotation_ids_mean_nothing(squares, run, ids):
    """pycocotools takes an annotation of id 0 for none at all, and those of one id for one."""
    run("--output", squares / "a.json", "--per-class")
    content = json.loads((squares / "val.json").read_text())
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = {"from 0": number, "text": f"a{number}"}.get(ids, 5)
        if ids == "missing":
            del annotation["id"]
    (squares / "other.json").write_text(json.dumps(content))
    run("--output", squares / "b.json", "--per-class", "--val-json", squares / "other.json")
    assert (squares / "a.json").read_text() == (squares / "b.json").read_text()


def test_a_size_that_differs_is_said_before_the_first_image(squares, run, monkeypatch):
    content = json.loads((squares / "val.json").read_text())
    content["images"][-1]["width"] = 65
    (squares / "other.json").write_text(json.dumps(content))
    monkeypatch.setattr(evaluation, "find_results", None)
    with pytest.raises(DataError, match=r"4\.png: the image is 64x64, its annotation file says 65x64"):
        run("--results", squares / "r.json", "--val-json", squares / "other.json")


def test_file_without_annotations(squares, run):
    """As for test-dev: results with the file's image ids, and no number."""
    content = json.loads((squares / "val.json").read_text())
    del content["annotations"]
    for image, image_id in zip(content["images"], ["e", "d", "c", "b", "a"], strict=True):
        image["id"] = image_id
    (squares / "info.json").write_text(json.dumps(content))
    printed = run("--results", squares / "r.json", "--val-json", squares / "info.json")
    assert "no annotations" in printed and "AP50" not in printed
    assert list(dict.fromkeys(r["image_id"] for r in json.loads((squares / "r.json").read_text()))) == list("edcba")
