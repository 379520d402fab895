"""Builds the compiled deformable attention of csrc/: `python setup.py build_ext --inplace`.

The CPU op is always built, the CUDA op where torch has CUDA and there is an nvcc, for the architectures of
TORCH_CUDA_ARCH_LIST, else of the GPUs present, else for 8.0 to 9.0. Neither is needed: without them the model runs in
plain PyTorch, so a build that fails says so in one line and is no error.
"""

import logging
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
except ImportError:  # pip builds apart from the environment unless told --no-build-isolation
    print("setup.py: torch is not installed here, so csrc is not built; the model runs in plain PyTorch instead")
    torch = None


def cuda_home():
    """The folder of a CUDA toolkit: the user's, the system's, or one that pip installed beside torch. None without."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = [Path(nvcc).resolve().parent.parent for nvcc in [shutil.which("nvcc")] if nvcc]
    from_pip = (Path(torch.__file__).parent.parent / "nvidia").glob("cu[0-9]*")
    for home in [Path(name) for name in named if name] + on_path + sorted(from_pip):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home


if torch:
    home = cuda_home() if torch.version.cuda else None
    if home:  # before cpp_extension is imported, which looks in fewer places
        os.environ["CUDA_HOME"] = str(home)
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0+PTX")
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU is no trouble
    from torch.utils import cpp_extension


@contextmanager
def output_in(file):
    """Sends to the open file what this process and its children print, compilers and ninja among them."""
    terminal = os.dup(1), os.dup(2)
    try:
        for number in (1, 2):
            sys.stdout.flush()
            os.dup2(file.fileno(), number)
        yield
    finally:
        for number, saved in zip((1, 2), terminal, strict=True):
            sys.stdout.flush()
            os.dup2(saved, number)
            os.close(saved)


def complaints(output):
    """What compilers said, without the command lines, which are longer."""
    lines = [line for line in output.splitlines() if not re.match(r"\[\d+/\d+\]|FAILED: |ninja: |.* -[co] ", line)]
    return "\n".join(lines[:60])


class BuildOps(cpp_extension.BuildExtension if torch else build_ext):
    def build_extensions(self):
        """Builds one library after the other, so that what fails for one does not stop the next."""
        instead = "the model runs in plain PyTorch instead"
        compiler = getattr(self.compiler, "compiler_cxx", ["c++"])[0]
        if not shutil.which(compiler):
            print(f"setup.py: csrc is not built, there is no C++ compiler {compiler} (set CXX to one); {instead}")
            return
        if torch.version.cuda and not home:
            print(f"setup.py: there is no nvcc (set CUDA_HOME), so csrc is built for the CPU; on a GPU {instead}")
        extensions, compile_all, compile_one = self.extensions, self.compiler.compile, self.compiler._compile
        for extension in extensions:
            self.extensions, self.compiler.compile, self.compiler._compile = [extension], compile_all, compile_one
            extension.optional = False  # or setuptools would only warn
            with tempfile.TemporaryFile("w+", errors="replace") as output:
                try:
                    with output_in(output):
                        super().build_extensions()
                except (Exception, SystemExit) as error:
                    output.seek(0)
                    print(complaints(output.read()), file=sys.stderr)
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    print(f"setup.py: {extension.name} is not built ({reason}); {instead}")
            extension.optional = True
        self.extensions = extensions

    def get_ext_filename(self, name):
        """attention.py loads a library only if its name tells the torch it was built for; it depends on no Python."""
        return f"{name}.torch-{torch.__version__}.so"


def library(name, pattern, **options):
    """A library of the sources that fit the pattern. `optional`: what is not there is not copied in place."""
    sources = [str(path) for path in sorted(Path("csrc").glob(pattern))]
    headers = [str(path) for path in sorted(Path("csrc").glob("*.h"))]
    return Extension(name, sources, depends=headers, language="c++", optional=True, **options)


libraries = []
if torch:
    paths = {"include_dirs": cpp_extension.include_paths(), "library_dirs": cpp_extension.library_paths()}
    flags = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for has one thread
    cpu = {"extra_compile_args": flags + openmp, "extra_link_args": openmp}
    libraries.append(library("_C", "*.cpp", libraries=["c10", "torch_cpu"], **cpu, **paths))
    if home:  # the CUDA runtime comes with torch's libraries
        flags = {"nvcc": ["-O3", "--threads", str(os.cpu_count())]}
        cuda = ["c10", "torch_cpu", "c10_cuda"]
        libraries.append(library("_C_cuda", "*.cu", libraries=cuda, extra_compile_args=flags, **paths))
setup(ext_modules=libraries, cmdclass={"build_ext": BuildOps})
