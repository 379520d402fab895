"""The README's blocks of Python run as they stand, beside a checkpoint, an image and the clone that they name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_of_the_readme(block, tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint, tmp_path / "checkpoint.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    (tmp_path / "dimaskdino").symlink_to(ROOT)  # the clone
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, f"{block}\n{result.stderr}"
