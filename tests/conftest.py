"""Paths and threads for all tests, a small data set, and training on it.

Fixtures import what they need: the op's tests also run beside ops.py and attention.py alone (tests/sanitizers.sh).
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "golden")]
# Small tensors are slower with more threads; tests/test_golden.py takes more for its large ones. The programs that
# tests start have as many: runs are equal bit for bit at equal threads. TEST_THREADS tries the suite with others.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Files that take longest come first: at the end, no worker of pytest-xdist is left alone with one of them.
SLOW = "export train golden compile training_steps convert attention backbone predict small".split()


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
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The path of a checkpoint of `tiny`, of 47 MB."""
    from toys import save_untrained

    return save_untrained(tmp_path_factory.mktemp("tiny") / "checkpoint.pt")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """The path of one with a backbone of a few channels, for the programs in this process and in forked ones."""
    from toys import NARROW, save_untrained

    return save_untrained(tmp_path_factory.mktemp("small") / "checkpoint.pt", backbone=NARROW)
