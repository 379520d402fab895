#!/usr/bin/env bash
# Runs the tests of the CPU op, NaN, infinite and huge locations and empty levels among them, with AddressSanitizer and
# UndefinedBehaviorSanitizer compiled in: once with the AVX2 kernels, once without. Needs g++; python is .venv's or $PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

mkdir "$folder/tests"
cp attention.py pyproject.toml "$folder"
cp tests/conftest.py tests/test_attention.py "$folder/tests"
version=$("$python" -c "import torch; print(torch.__version__)")
torch=$("$python" -c "import torch; print(torch.__path__[0])")

# The sanitizers and the C++ library whose exceptions they follow must be loaded before Python.
preload=""
for name in asan ubsan stdc++; do preload+="$(g++ -print-file-name=lib$name.so) "; done
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
for kernels in avx2 baseline; do
  flags=()
  if [ "$kernels" = baseline ]; then flags=("-D__builtin_cpu_supports(feature)=false"); fi
  g++ -std=c++20 -O1 -g -shared -fPIC -fno-math-errno -fno-trapping-math -Wno-psabi "${flags[@]}" \
    -fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all \
    csrc/*.cpp -isystem "$torch/include" -L "$torch/lib" -lc10 -ltorch_cpu -o "$folder/_C.torch-$version.so"
  (
    cd "$folder"
    LD_PRELOAD=$preload "$python" attention.py | grep "cpu: compiled op"  # or the tests would be skipped
    LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider tests/test_attention.py \
      -k "cpu and not compiles and not opcheck or threads"
  )
  echo "tests/sanitize.sh: no report from the $kernels kernels"
done
