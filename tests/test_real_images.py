"""experiments.real_images on a few generated images: runs, scores, tables and pictures of the three systems."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from programs import NARROW
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

import experiments.real_images.__main__ as real_images
import train
from data import CocoInstances, collate
from experiments.real_images import mask_rcnn, scoring
from formats.coco import coco_paths
from shapes import make_shapes


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Checkpoints of Mask R-CNN would have 400 MB, and need not reach the disk; 400 random masks are slow."""
    monkeypatch.setattr("checkpoint.os.fsync", lambda file: None)
    build = mask_rcnn.build_mask_rcnn

    def build_small(classes, backbone=NARROW, samples=4):
        model = build(classes, backbone, samples)
        model.roi_heads.detections_per_img = 9
        model.roi_heads.box_head = TwoMLPHead(256 * 7 * 7, 32)
        model.roi_heads.box_predictor = FastRCNNPredictor(32, classes + 1)
        return model

    monkeypatch.setattr(mask_rcnn, "build_mask_rcnn", build_small)


PROGRAMS = {"train.py": train.main, "mask_rcnn": mask_rcnn.main, "scoring": scoring.main}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=50, val=2)
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """So few images that whole trainings take seconds."""
    root = tmp_path_factory.mktemp("few")
    make_shapes(root, train=6, val=1)
    return root


def test_mask_rcnn_learns_a_batch(shapes):
    dataset = CocoInstances(*coco_paths(shapes, "train"), True, (64, 64))
    images, targets = collate([dataset[0]])
    [rcnn] = mask_rcnn.rcnn_targets(targets, 64, 64)
    torch.testing.assert_close(rcnn["boxes"], dataset[0][1]["boxes"])
    assert torch.equal(rcnn["labels"], targets[0]["labels"] + 1) and rcnn["masks"].dtype == torch.uint8
    torch.manual_seed(0)
    model = mask_rcnn.build_mask_rcnn(10, samples=16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    losses = [mask_rcnn.step(model, optimizer, images, targets)["loss"] for _ in range(5)]
    assert all(np.isfinite(losses)) and losses[-1] < 0.9 * losses[0]


def test_mask_rcnn_sees_images_of_their_size_and_detects_in_output_pixels(monkeypatch):
    model = mask_rcnn.build_mask_rcnn(2)
    seen = []

    def roi_heads(features, proposals, sizes):
        seen.append((sizes, features["0"].shape[-2:]))
        masks = torch.ones(1, 1, 28, 28)
        return [{"boxes": torch.tensor([[10.0, 20, 30, 28]]), "labels": torch.tensor([2]), "scores": torch.ones(1),
                 "masks": masks}], {}  # fmt: skip

    monkeypatch.setattr(model.roi_heads, "forward", roi_heads)
    [found] = mask_rcnn.detect(model, [torch.rand(3, 40, 60)], [(80, 120)])
    assert seen == [([(40, 60)], (16, 16))]  # padded to 64 x 64, stride 4, and not resized
    assert found["boxes"].tolist() == [[20, 40, 60, 56]] and found["labels"].tolist() == [1]
    rows, columns = found["masks"][0].nonzero().T
    assert abs(rows.min() - 40) <= 1 and abs(rows.max() - 55) <= 1 and found["masks"].shape == (1, 80, 120)
    assert abs(columns.min() - 20) <= 1 and abs(columns.max() - 59) <= 1


@pytest.fixture
def in_process(monkeypatch):
    """The studies' programs run in this process; returns the commands."""
    ran = []

    def run_all(runs, jobs, launcher=()):
        for folder, file, command in runs:
            if not (folder / file).exists():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "commit.txt").write_text("abc\n")
                words = list(map(str, command))
                ran.append(words)
                [program] = [main for name, main in PROGRAMS.items() if words[words[0] == "-m"].endswith(name)]
                monkeypatch.setattr(sys, "argv", ["program", *words[1 + (words[0] == "-m") :]])
                program()
                assert (folder / file).exists()

    monkeypatch.setattr(real_images, "run_all", run_all)
    monkeypatch.setattr(real_images, "CALIBRATION", 4)
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    return ran


def test_study(few, tmp_path, in_process, monkeypatch, capsys):
    common = "--train-size 32 --train-scale 1 1 --test-size 32 64"
    flags = ["--data-root", few, "--minutes", 0.001, "--seeds", 1, "--jobs", 1, "--backbone-weights", "none"]
    flags += ["--flags", f"{common} --batch-size 2 --selections 40,20 --loss-points 32 --backbone {NARROW} "
              "--encoder-layers 1 --hidden-dim 64 --num-heads 4"]  # fmt: skip
    flags += ["--mask-rcnn-flags", "--samples 4 --batch-size 2"]
    flags = list(map(str, [*flags, "--output", tmp_path / "runs", "--results", tmp_path]))
    (tmp_path / "runs").mkdir()
    known = {system: {"epochs": 1, "speed": 3} for system in ("mask-dino", "mask-rcnn")}
    (tmp_path / "runs" / "epochs.json").write_text(json.dumps(known))
    times = iter([0, 10, 10, 24])  # 10 s for one iteration, 14 s for five
    monkeypatch.setattr(real_images, "cpu_seconds", lambda: next(times))
    monkeypatch.setattr(sys, "argv", ["real_images", *flags])
    real_images.main()
    first = len(in_process)
    assert first == 8  # the speed of one system, whose epochs are not known; training and scores of all three
    assert json.loads((tmp_path / "runs" / "epochs.json").read_text())["di-maskdino"] == {"epochs": 1, "speed": 2}
    [rcnn] = [words for words in in_process if words[1].endswith("mask_rcnn")]
    for flag in ("--backbone", NARROW), ("--train-size", "32"), ("--test-size", "32"), ("--backbone-weights", "none"):
        assert rcnn[rcnn.index(flag[0]) + 1] == flag[1]  # as of the other systems
    results = tmp_path / f"{few.name}_0.001min.json"
    content = json.loads(results.read_text())
    assert [run["system"] for run in content["runs"]] == ["di-maskdino", "mask-dino", "mask-rcnn"]
    for run in content["runs"]:
        assert len(run["scores"]) == (1 if run["system"] == "mask-rcnn" else 5)
        assert run["epochs"] == 1 and run["hours"] > 0 and len(run["curve"]) == 1 and run["commit"] == "abc"
    text = capsys.readouterr().out
    assert "| box, Mask R-CNN |" in text and "| DI-MaskDINO minus Mask DINO | 1 |" in text
    with Image.open(results.with_suffix(".jpg")) as picture, Image.open(results.with_suffix(".png")) as plot:
        assert picture.height == 4 * 258 and plot.width > 1000  # a row each: the ground truth, three systems
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 300
    assert "rows: ground truth, DI-MaskDINO, Mask DINO, Mask R-CNN; columns: " in text
    monkeypatch.setattr(real_images, "plot", lambda *_: (_ for _ in ()).throw(ImportError))
    flags += ["--pictures", "none.jpg"]
    monkeypatch.setattr(sys, "argv", ["real_images", *flags])
    real_images.main()
    said = capsys.readouterr().err
    assert "not drawn, as matplotlib" in said and "no held-out image has a name like none.jpg" in said
    assert len(in_process) == first and json.loads(results.read_text())["runs"] == content["runs"]
    # Nor are they trained again where only the results are.
    monkeypatch.setattr(sys, "argv", ["real_images", *flags, "--output", str(tmp_path / "elsewhere")])
    real_images.main()
    assert len(in_process) == first and json.loads(results.read_text())["runs"] == content["runs"]
    # What another command writes meanwhile is kept.
    more = content | {"runs": [*content["runs"], content["runs"][0] | {"system": "bato"}]}
    monkeypatch.setattr(real_images, "run_all", lambda *_: results.write_text(json.dumps(more)))
    real_images.main()
    assert json.loads(results.read_text())["runs"] == more["runs"]
    monkeypatch.setattr(sys, "argv", ["real_images", *flags, "--flags", "--lr 1"])
    with pytest.raises(ValueError, match="settings.json: its runs have other settings; choose another --output"):
        real_images.main()
    monkeypatch.setattr(sys, "argv", ["real_images", *flags, "--flags", "--lr 1", "--output", str(tmp_path / "new")])
    with pytest.raises(ValueError, match=f"{results.name}: its runs have other settings; choose another --results"):
        real_images.main()
    assert json.loads(results.read_text())["runs"] == more["runs"]


def test_mask_rcnn_goes_on_where_it_was_stopped(few, tmp_path, monkeypatch):
    """The same weights, and every evaluation once, as without interruption."""
    monkeypatch.setattr(mask_rcnn, "LOG_EVERY", 1)
    flags = ["--data-root", few, "--epochs", 1, "--batch-size", 2, "--samples", 4, "--train-size", 32]
    flags += ["--train-scale", 1, 1, "--test-size", 32, 32, "--backbone", NARROW, "--optimizer", "sgd", "--lr", 0.001]
    for name, stops in (("whole", [9]), ("parts", [1, 9])):
        for stop in stops:
            argv = ["mask_rcnn", *map(str, flags), "--output", str(tmp_path / name), "--max-iterations", str(stop)]
            monkeypatch.setattr(sys, "argv", argv)
            mask_rcnn.main()
    whole, parts = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "parts"))
    assert whole["iteration"] == parts["iteration"] == 3
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "parts")
    ]
    assert [entry["iteration"] for entry in logs[0]] == [1, 2, 3, 3]
    assert [entry["loss"] for entry in logs[0] if "loss" in entry] == [e["loss"] for e in logs[1] if "loss" in e]
    assert (tmp_path / "parts" / "eval.json").exists()


def test_split_for_the_choice_of_settings(shapes, tmp_path):
    args = real_images.parse_arguments(["--data-root", str(shapes), "--choose"])
    root = real_images.split_training_images(args, tmp_path)
    files = {split: json.loads(coco_paths(root, split)[0].read_text()) for split in ("train", "val")}
    names = {split: {image["file_name"] for image in content["images"]} for split, content in files.items()}
    original = json.loads(coco_paths(shapes, "train")[0].read_text())
    assert len(names["train"]) == 40 and len(names["val"]) == 10 and not names["train"] & names["val"]
    assert sum(len(content["annotations"]) for content in files.values()) == len(original["annotations"])
    for split in files:
        assert len(CocoInstances(*coco_paths(root, split), True, (64, 64))[0]) == 2


def made_up(system, seed, box):
    scores = {kind: {metric: box + (kind == "mask") for metric in real_images.METRICS} for kind in ("box", "mask")}
    layers = 1 if system == "mask-rcnn" else 3
    low = [{k: {m: v - 5 * (layers - 1 - i) for m, v in s.items()} for k, s in scores.items()} for i in range(layers)]
    for entry in low:
        entry["classes"] = [{"name": "cat", "box": 2 * box, "mask": None}]
    return {"system": system, "seed": seed, "epochs": 9, "speed": 3.21, "hours": 1.0 + seed,
            "curve": [{"minutes": 5.0, "box": 3.0, "mask": 4.0}], "scores": low}  # fmt: skip


def test_tables():
    runs = [made_up(*run) for run in [("di-maskdino", 0, 20.0), ("di-maskdino", 1, 24.0), ("mask-dino", 0, 19.0),
                                      ("mask-dino", 1, 21.0), ("mask-rcnn", 1, 26.0), ("bato", 0, 22.0)]]  # fmt: skip
    lines = real_images.markdown(runs).splitlines()
    assert "| DI-MaskDINO | 2 | 9 | 3.21 | 1.5 ± 0.7 |" in lines
    assert "| box, DI-MaskDINO" + " | 22.0 ± 2.8" * 6 + " |" in lines
    assert {"| AP | cat |", "| box, DI-MaskDINO | 44.0 ± 5.7 |", "| mask, Mask DINO | - |"} <= set(lines)
    assert "| mask AP, Mask DINO | 11.0 ± 1.4 | 16.0 ± 1.4 | 21.0 ± 1.4 |" in lines
    assert "| box AP - mask AP, Mask DINO" + " | -1.0 ± 0.0" * 3 + " |" in lines
    # 1 and 3: 2 ± 12.706; against Mask R-CNN a single pair.
    whole = " | +2.0 [-10.7, +14.7]" * 2 + " | +0.0 [+0.0, +0.0]" * 2
    assert f"| DI-MaskDINO minus Mask DINO | 2{whole} |" in lines
    assert "| DI-MaskDINO minus Mask R-CNN | 1" + " | -2.0" * 2 + " |  |  |" in lines
    assert "| BATO alone minus Mask DINO | 1" + " | +3.0" * 2 + " | +0.0" * 2 + " |" in lines
    assert not any(line.startswith("| DI alone") for line in lines)
