#!/usr/bin/env bash
# Runs the CUDA kernels without a GPU: compiles csrc/ms_deform_attn_cuda.cu for the CPU (tests/cuda_on_cpu.h), with
# AddressSanitizer and UndefinedBehaviorSanitizer, in the place of the CPU op, and runs the op's tests. What it cannot
# show is speed, and what the order of atomics does. Needs g++; python is .venv's or $PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/sanitizers.sh

"$python" - "$folder/emulated.cpp" <<'PYTHON'
import re, sys
source = open("csrc/ms_deform_attn_cuda.cu").read()
source = re.sub(r"#include <c10/cuda/.*>\n", "", source)
source, includes = re.subn(r'(#include "checks.h"\n)', r'\1#include "cuda_on_cpu.h"\n', source)
launch = r"emulated::launch([&](auto... arguments) { \1(arguments...); }, \2)("
source, launches = re.subn(r"(\w+_kernel<[^;{]*?>)\s*<<<([^;{]*?)>>>\(", launch, source)
source, keys = re.subn("TORCH_LIBRARY_IMPL[(]dimaskdino, CUDA", "TORCH_LIBRARY_IMPL(dimaskdino, CPU", source)
assert (includes, launches, keys) == (1, 2, 1), "tests/emulate_gpu.sh: the source has changed; adapt the patterns"
open(sys.argv[1], "w").write(source)
PYTHON
compile csrc/*.cpp -o "$folder/_C.torch-$version.so"
for architecture in 800 900; do  # without and with vector atomics
  compile -O2 "$folder/emulated.cpp" "-DARCHITECTURE=$architecture" -Itests -Icsrc -Wno-unknown-pragmas \
    -o "$folder/_C_cuda.torch-$version.so"
  run_tests "cpu and not (compiles or float16_on_cpu)"
  echo "tests/emulate_gpu.sh: no report from the CUDA kernels of architecture $architecture"
done
