"""The README's blocks of Python run as they stand, beside a checkpoint, an image and the clone that they name."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import Process

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)


def run_block(block, folder):
    os.chdir(folder)
    exec(block, {})


@pytest.mark.parametrize("block", BLOCKS)
def test_python_of_the_readme(block, tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint, tmp_path / "checkpoint.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    (tmp_path / "dimaskdino").symlink_to(ROOT)  # the clone
    process = Process(run_block, block, tmp_path, output=tmp_path / "block")
    assert process.wait() == 0, f"{block}\n{process.err}"
