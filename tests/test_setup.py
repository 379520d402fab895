"""Tests of setup.py, which builds csrc, run as a user runs it."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import Process

import ops

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, env=environment)


def build(folder):
    """In a process of its own: setup.py, called from a folder below its own, where no nvcc is found."""
    exists = Path.exists
    Path.exists = lambda path: path.name != "target" and exists(path)  # a header of every CUDA toolkit
    os.chdir(folder)
    sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
    runpy.run_path("../setup.py", run_name="__main__")


@pytest.mark.skipif(not shutil.which("c++"), reason="there is no c++")
def test_the_op_is_built_where_there_is_a_compiler():
    """A build that fails is no error of setup.py, and all tests of the op would be left out."""
    assert ops.WITHOUT_OP["cpu"] is None


@pytest.mark.parametrize(
    "compiler, said",
    [
        ("/no/compiler", ["no nvcc", "no C++ compiler /no/compiler"]),
        ("false", ["no nvcc", "_C is not built"]),
        pytest.param("c++", ["no nvcc"], marks=pytest.mark.skipif(not shutil.which("c++"), reason="there is no c++")),
    ],
)
def test_a_build_from_another_directory_says_what_is_not_built_and_is_no_error(compiler, said, tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "small.cpp").write_text("int small;\n")
    shutil.copy(ROOT / "setup.py", tmp_path)
    process = Process(build, tmp_path / "csrc", output=tmp_path / "build", CXX=compiler, CC=compiler)
    assert process.wait() == 0 and "Traceback" not in process.out + process.err, process.err
    said = [part for part in said if part != "no nvcc" or torch.version.cuda]
    lines = [line for line in process.out.splitlines() if line.startswith("setup.py: ")]  # beside what compilers say
    for line, part in zip(lines, said, strict=True):
        assert part in line and "the model runs in plain PyTorch instead" in line
        assert part != "no nvcc" or torch.version.cuda < "13" or f'"nvidia-nvvm=={torch.version.cuda}.*"' in line
    built = [f"_C.torch-{torch.__version__}.so"] if compiler == "c++" else []
    assert [path.name for path in tmp_path.rglob("*.so") if "build" not in path.parts] == built


def test_there_is_nothing_to_install():
    process = run("setup.py", "install", cwd=ROOT)
    assert process.returncode == 1 and process.stdout == ""
    assert "python setup.py build_ext --inplace" in process.stderr and len(process.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_cuda_sources_compile(tmp_path):
    """Wherever there is an nvcc. What `setup.py build_ext --inplace` has built from these sources counts."""
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("there is no nvcc")
    name = f"_C_cuda.torch-{torch.__version__}.so"
    sources = [ROOT / "csrc" / "ms_deform_attn_cuda.cu", ROOT / "csrc" / "checks.h"]
    if (ROOT / name).exists() and (ROOT / name).stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return
    folders = ["--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    process = run("setup.py", "build_ext", *folders, cwd=ROOT, TORCH_CUDA_ARCH_LIST="8.0")
    assert (tmp_path / name).exists(), process.stdout + process.stderr
