"""Builds the compiled deformable attention of csrc/ beside ops.py: `python setup.py build_ext --inplace`.

It works from any directory. The CPU op is always built, the CUDA op where torch has CUDA and there is an nvcc, for the
architectures of TORCH_CUDA_ARCH_LIST, else of the GPUs present, else for all from 7.5 (CUDA 12: 7.0) on. Neither is
needed: without them the model runs in plain PyTorch, so a build that fails says so in one line and is no error.
"""

import logging
import os
import shutil
import sys
from pathlib import Path

if "build_ext" not in sys.argv:
    sys.exit("setup.py only builds the op, with: python setup.py build_ext --inplace. Programs run from this folder")
try:
    import torch
    from setuptools import Extension, setup
except ImportError as error:
    sys.exit(f"setup.py: {error}; install it: {sys.executable} -m pip install -r requirements.txt 'setuptools>=65'")

INSTEAD = "the model runs in plain PyTorch instead"


def cuda_home():
    """The folder of a CUDA toolkit: the user's, the system's, or one that pip installed beside torch. None without."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = [Path(nvcc).resolve().parent.parent for nvcc in [shutil.which("nvcc")] if nvcc]
    from_pip = (Path(torch.__file__).parent.parent / "nvidia").glob("cu[0-9]*")
    for folder in [Path(name).absolute() for name in named if name] + on_path + sorted(from_pip):
        if all((folder / file).exists() for file in ("bin/nvcc", "include/cuda_runtime.h", "include/nv/target")):
            return folder


version, home = torch.version.cuda, None
if version and not (home := cuda_home()):
    advice = f"install NVIDIA's CUDA toolkit {version} and set CUDA_HOME"
    if version >= "13":  # pip has no nvcc of CUDA 12; of a later one, it takes the newest nvvm and crt unless told
        names = [f'"nvidia-{name}=={version}.*"' for name in ("cuda-nvcc", "cuda-cccl", "cuda-crt", "nvvm")]
        advice = f"set CUDA_HOME, or: {sys.executable} -m pip install {' '.join(names)}"
    print(f"setup.py: there is no nvcc, so csrc is built for the CPU; on a GPU {INSTEAD}. {advice}")
elif version:
    os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported, which looks in fewer places
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        oldest = "7.5" if version >= "13" else "7.0"  # that nvcc compiles for
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{oldest};8.0;9.0+PTX"  # 8.0 serves 8.x, PTX what comes after 9.0
        print(f"setup.py: no GPU here; the CUDA op is for all from {oldest} on, TORCH_CUDA_ARCH_LIST names others")
os.chdir(Path(__file__).resolve().parent)  # setuptools takes every path from the working directory
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no GPU, no ninja: all this is no trouble
from torch.utils import cpp_extension  # noqa: E402


class BuildOp(cpp_extension.BuildExtension):
    def run(self):
        """Builds a library; that one fails, for its version of CUDA say, does not stop the other."""
        try:
            super().run()
        except (Exception, SystemExit) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            name = self.extensions[0].name
            old = Path(self.get_ext_filename(name)).exists() and "the one built before stays in use"
            print(f"setup.py: {name} is not built ({reason}); {old or INSTEAD}")

    def build_extensions(self):
        compiler = getattr(self.compiler, "compiler_cxx", ["c++"])[0]
        if not shutil.which(compiler):
            raise FileNotFoundError(f"there is no C++ compiler {compiler}; set CXX to one")
        super().build_extensions()

    def get_ext_filename(self, name):
        """ops.py loads a library only if its name tells the torch it was built for; it depends on no Python."""
        return f"{name}.torch-{torch.__version__}.so"


def build(name, pattern, **options):
    """Builds a library of the sources that fit the pattern."""
    paths = {"include_dirs": cpp_extension.include_paths(), "library_dirs": cpp_extension.library_paths()}
    sources, headers = (sorted(map(str, Path("csrc").glob(files))) for files in (pattern, "*.h"))
    extension = Extension(name, sources, depends=headers, language="c++", **paths, **options)
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildOp})


openmp = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for has one thread
flags = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *openmp]
torch_cpu = ["c10", "torch_cpu"]
build("_C", "*.cpp", libraries=torch_cpu, extra_compile_args=flags, extra_link_args=openmp)
if home:  # the CUDA runtime comes with torch's libraries
    flags = {"nvcc": ["-O3", "--threads", str(os.cpu_count())]}
    build("_C_cuda", "*.cu", libraries=[*torch_cpu, "c10_cuda"], extra_compile_args=flags)
