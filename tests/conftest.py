"""Paths and threads for all tests: modules lie in the root, the golden data's recipe in tests/golden."""

import os
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "golden")]
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start: runs are equal bit for bit at equal threads
torch.set_num_threads(1)  # small tensors are slower with more; tests/test_golden.py takes more for its large ones
