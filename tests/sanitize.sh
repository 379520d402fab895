#!/usr/bin/env bash
# Runs the tests of the CPU op, NaN, infinite and huge locations and empty levels among them, with AddressSanitizer and
# UndefinedBehaviorSanitizer compiled in: once with the AVX2 kernels, once without. Needs g++; python is .venv's or $PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/sanitizers.sh

for kernels in avx2 baseline; do
  flags=()
  if [ "$kernels" = baseline ]; then flags=("-D__builtin_cpu_supports(feature)=false"); fi
  compile "${flags[@]}" csrc/*.cpp -o "$folder/_C.torch-$version.so"
  run_tests "cpu and not compiles and not opcheck or threads"
  echo "tests/sanitize.sh: no report from the $kernels kernels"
done
