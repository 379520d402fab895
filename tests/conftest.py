"""Paths and threads for all tests, a small data set, and training on it."""

import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "golden")]
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start: runs are equal bit for bit at equal threads
torch.set_num_threads(1)  # small tensors are slower with more; tests/test_golden.py takes more for its large ones
# Files that take longest come first: at the end, no worker of pytest-xdist is left alone with one of them.
SLOW = ["golden", "train", "export", "training_steps", "backbone", "convert", "attention", "model", "ablations"]

from config import PRESETS  # noqa: E402
from model import DIMaskDINO  # noqa: E402


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small generated data set in COCO's layout: 12 images to train on."""
    from shapes import make_shapes

    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=12, val=4, size=64)
    return root


@pytest.fixture(scope="session")
def run(shapes):
    """train.py's main with these flags, in this process; arguments and the handlers of signals are put back."""

    import train

    def main(*flags):
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", "--data-root", str(shapes), *map(str, flags)])
            try:
                train.main()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return main


@pytest.fixture(scope="session")
def uninterrupted(run, tmp_path_factory):
    """The folder of a run of 12 iterations, three to an epoch."""
    from programs import SMALL

    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    run("--output", output, *SMALL, "--save-every", 2)
    return output


def save_untrained(path, **settings):
    """Write a checkpoint of an untrained model of ten classes for images of 64 pixels; returns its path."""
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], test_size=(64, 64), **settings)
    classes = [f"kind {i}" for i in range(10)]
    torch.save({"model": DIMaskDINO(config).state_dict(), "config": asdict(config), "classes": classes}, path)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The path of a checkpoint of `tiny`, of 47 MB."""
    return save_untrained(tmp_path_factory.mktemp("tiny") / "checkpoint.pt")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """The path of one with a backbone of a few channels, for the programs in this process and in forked ones."""
    from programs import NARROW

    return save_untrained(tmp_path_factory.mktemp("small") / "checkpoint.pt", backbone=NARROW)
