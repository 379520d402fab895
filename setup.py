"""Builds the compiled deformable attention of csrc/ beside ops.py: `python setup.py build_ext --inplace`.

Works from any directory, with setuptools 65 or newer. The CPU op is always built, the CUDA op where torch has CUDA and
there is an nvcc, for the architectures of TORCH_CUDA_ARCH_LIST, else of the GPUs present, else for 7.5 (CUDA 12: 7.0)
and all later ones. Neither is needed: without them the model runs in plain PyTorch, so a build that fails says so in
one line and is no error.
"""

import logging
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

if "build_ext" not in sys.argv:
    sys.exit("setup.py only builds the op, with: python setup.py build_ext --inplace. Programs run from this folder")
try:
    import torch
    from setuptools import Extension, setup
except ImportError as error:
    sys.exit(f"setup.py: {error}; install it: {sys.executable} -m pip install -r requirements.txt 'setuptools>=65'")


def cuda_home():
    """The folder of a CUDA toolkit: the user's, the system's, or one that pip installed beside torch. None without."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = [Path(nvcc).resolve().parent.parent for nvcc in [shutil.which("nvcc")] if nvcc]
    from_pip = (Path(torch.__file__).parent.parent / "nvidia").glob("cu[0-9]*")
    for folder in [Path(name).absolute() for name in named if name] + on_path + sorted(from_pip):
        if all((folder / file).exists() for file in ("bin/nvcc", "include/cuda_runtime.h", "include/nv/target")):
            return folder


def cuda_advice():
    """How to get the toolkit that fits this torch."""
    version = torch.version.cuda
    if int(version.split(".")[0]) < 13:  # pip's packages for CUDA 12 have no nvcc in them
        return f"install NVIDIA's CUDA toolkit {version} and set CUDA_HOME"
    # pip would pair this nvcc with the newest nvvm and crt, which do not go together
    names = [f'"nvidia-{name}=={version}.*"' for name in ("cuda-nvcc", "cuda-cccl", "cuda-crt", "nvvm")]
    return f"set CUDA_HOME, or: {sys.executable} -m pip install {' '.join(names)}"


home = cuda_home() if torch.version.cuda else None
if home:  # before cpp_extension is imported, which looks in fewer places
    os.environ["CUDA_HOME"] = str(home)
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        oldest = "7.5" if int(torch.version.cuda.split(".")[0]) >= 13 else "7.0"  # that nvcc compiles for
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{oldest};8.0;9.0+PTX"  # 8.0 serves 8.x, PTX what comes after 9.0
        print(f"setup.py: no GPU here, so the CUDA op is for all from {oldest} on; TORCH_CUDA_ARCH_LIST names others")
os.chdir(Path(__file__).resolve().parent)  # setuptools takes every path from the working directory
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no GPU, no ninja: all this is no trouble
from torch.utils import cpp_extension  # noqa: E402


@contextmanager
def output_in(file):
    """Sends to the open file what this process and its children print, compilers and ninja among them."""
    terminal = {number: os.dup(number) for number in (1, 2)}
    try:
        sys.stdout.flush()
        for number in terminal:
            os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        for number, saved in terminal.items():
            os.dup2(saved, number)
            os.close(saved)


def complaints(output):
    """What compilers said, without the command lines, which are longer."""
    lines = [line for line in output.splitlines() if not re.match(r"\[\d+/\d+\]|FAILED: |ninja: |.* -[co] ", line)]
    return "\n".join(lines[:60])


class BuildOps(cpp_extension.BuildExtension):
    def build_extensions(self):
        """Builds one library after the other: what fails for one, its CUDA version say, does not stop the next."""
        instead = "the model runs in plain PyTorch instead"
        compiler = getattr(self.compiler, "compiler_cxx", ["c++"])[0]
        if not shutil.which(compiler):
            print(f"setup.py: csrc is not built, there is no C++ compiler {compiler} (set CXX to one); {instead}")
            return
        if torch.version.cuda and not home:
            print(f"setup.py: there is no nvcc, so csrc is built for the CPU; on a GPU {instead}. {cuda_advice()}")
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
                    if said := complaints(output.read()):
                        print(said, file=sys.stderr)
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    print(f"setup.py: {extension.name} is not built ({reason}); {instead}")
            extension.optional = True
        self.extensions = extensions

    def get_ext_filename(self, name):
        """ops.py loads a library only if its name tells the torch it was built for; it depends on no Python."""
        return f"{name}.torch-{torch.__version__}.so"


def library(name, pattern, **options):
    """A library of the sources that fit the pattern. `optional`: what is not there is not copied in place."""
    paths = {"include_dirs": cpp_extension.include_paths(), "library_dirs": cpp_extension.library_paths()}
    sources, headers = (sorted(map(str, Path("csrc").glob(files))) for files in (pattern, "*.h"))
    return Extension(name, sources, depends=headers, language="c++", optional=True, **paths, **options)


openmp = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for has one thread
flags = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *openmp]
torch_cpu = ["c10", "torch_cpu"]
libraries = [library("_C", "*.cpp", libraries=torch_cpu, extra_compile_args=flags, extra_link_args=openmp)]
if home:  # the CUDA runtime comes with torch's libraries
    flags = {"nvcc": ["-O3", "--threads", str(os.cpu_count())]}
    libraries.append(library("_C_cuda", "*.cu", libraries=[*torch_cpu, "c10_cuda"], extra_compile_args=flags))
setup(ext_modules=libraries, cmdclass={"build_ext": BuildOps})
