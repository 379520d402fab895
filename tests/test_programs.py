"""train.py and eval.py, run as a user runs them, on good and on bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shapes import make_shapes

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--train-size", "64", "--test-size", "64", "64", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


def run(*command, cwd=None, ok=True):
    """Run one of the programs; check its exit status, and that a failure is one line without a traceback."""
    result = subprocess.run(
        [sys.executable, ROOT / command[0], *map(str, command[1:])], cwd=cwd or ROOT, capture_output=True, text=True
    )
    if ok:
        assert result.returncode == 0, result.stderr
        return result.stdout
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small generated data set in COCO's layout."""
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=8, val=4, size=64)
    return root


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """The output folder of two epochs of training."""
    output = tmp_path_factory.mktemp("run") / "out"
    run("train.py", "--data", "coco", "--data-root", shapes, "--output", output, "--epochs", 2, *SMALL)
    return output


def edit(shapes, folder, change):
    """A copy of a data set whose annotation files went through `change`."""
    shutil.copytree(shapes, folder)
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return folder


def test_training_leaves_checkpoint_log_and_pictures(trained):
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log if "box" in entry] == [1, 2]
    assert all(np.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    assert Image.open(trained / "epoch_001.png").size[1] >= 2 * 320
    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["iteration"] == 4
    assert checkpoint["config"]["num_classes"] == len(checkpoint["classes"]) == 10


def test_existing_run_is_not_overwritten(trained, shapes):
    before = (trained / "checkpoint.pt").read_bytes()
    error = run("train.py", "--data", "coco", "--data-root", shapes, "--output", trained, *SMALL, ok=False)
    assert "--resume" in error and (trained / "checkpoint.pt").read_bytes() == before


def test_images_without_annotations(shapes, tmp_path):
    """A data set trains and evaluates when some images have no annotation."""

    def drop(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 2]

    root = edit(shapes, tmp_path / "data", drop)
    run("train.py", "--data", "coco", "--data-root", root, "--output", tmp_path / "out", "--epochs", 1, *SMALL)
    assert "box" in json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])


def test_bad_files_are_named(trained, shapes, tmp_path):
    """What tests/test_damaged.py has not: it runs the programs in its own process."""
    data, checkpoint = ["--data", "coco", "--data-root"], trained / "checkpoint.pt"

    def fails(*command, naming):
        assert naming in run(*command, ok=False)

    weights = ["--output", tmp_path / "o", "--backbone-weights", tmp_path / "swin.pth"]
    fails("train.py", *data, shapes, *weights, *SMALL, naming="swin.pth")

    def rename(content):
        content["categories"][3]["name"] = "zebra"

    other = edit(shapes, tmp_path / "other", rename)
    fails("eval.py", "--checkpoint", checkpoint, *data, other, naming="zebra")
    image = sorted((other / "images" / "val2017").iterdir())[-1]
    image.write_bytes(image.read_bytes()[:300])
    flags = [*data, other, "--output", tmp_path / "o", *SMALL, "--workers", 1, "--epochs", 1]
    fails("train.py", *flags, naming=image.name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(tmp_path):
    assert "cuda" in run("train.py", "--output", tmp_path / "out", "--device", "cuda", ok=False)


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_ends_well(program):
    assert "--device" in run(program, "--help")
