"""Paths and threads for all tests: modules lie in the root, the golden data's recipe in tests/golden."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "golden")]
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start: runs are equal bit for bit at equal threads
torch.set_num_threads(1)  # small tensors are slower with more; tests/test_golden.py takes more for its large ones

from config import PRESETS  # noqa: E402
from model import DIMaskDINO  # noqa: E402


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The path of a checkpoint of an untrained model of ten classes for images of 64 pixels."""
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], test_size=(64, 64))
    classes = [f"kind {i}" for i in range(10)]
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    torch.save({"model": DIMaskDINO(config).state_dict(), "config": asdict(config), "classes": classes}, path)
    return path
