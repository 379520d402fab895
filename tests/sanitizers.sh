# What tests/sanitize.sh and tests/emulate_gpu.sh share: a folder with copies of attention.py and its tests, in which
# they put libraries compiled with AddressSanitizer and UndefinedBehaviorSanitizer.
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/tests"
cp attention.py ops.py pyproject.toml "$folder"
cp tests/conftest.py tests/test_attention.py "$folder/tests"
version=$("$python" -c "import torch; print(torch.__version__)")
torch=$("$python" -c "import torch; print(torch.__path__[0])")

compile() {  # arguments of g++
  g++ -std=c++20 -O1 -g -shared -fPIC -fopenmp -fno-math-errno -fno-trapping-math -Wno-psabi \
    -fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all \
    "$@" -isystem "$torch/include" -L "$torch/lib" -lc10 -ltorch_cpu
}

run_tests() {  # pytest's expression
  # The sanitizers and the C++ library whose exceptions they follow must be loaded before Python.
  local preload=""
  for name in asan ubsan stdc++; do preload+="$(g++ -print-file-name=lib$name.so) "; done
  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
  (
    cd "$folder"
    LD_PRELOAD=$preload "$python" ops.py | grep "cpu: compiled op"  # or the tests would be skipped
    LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider tests/test_attention.py -k "$1"
  )
}
