"""Builds the compiled deformable attention of csrc/: `python setup.py build_ext --inplace`.

The CPU op is always built, the CUDA op where torch has CUDA and there is an nvcc, for the architectures of
TORCH_CUDA_ARCH_LIST, else of the GPUs present, else for 8.0 to 9.0. Neither is needed: without them the model runs in
plain PyTorch, so a build that fails says so in one line and is no error.
"""

import os
import shutil
import sys
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
    from torch.utils import cpp_extension


class BuildOps(cpp_extension.BuildExtension if torch else build_ext):
    def build_extensions(self):
        """Builds one library after the other, so that what fails for one does not stop the next."""
        extensions, compile_all, compile_one = self.extensions, self.compiler.compile, self.compiler._compile
        for extension in extensions:
            self.extensions, self.compiler.compile, self.compiler._compile = [extension], compile_all, compile_one
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"setup.py: {extension.name} is not built ({reason}); the model runs in plain PyTorch instead")
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
