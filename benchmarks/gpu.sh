#!/usr/bin/env bash
# All that a GPU is needed for, in one call: the tests of the compiled deformable attention for every dtype, the same under
# compute-sanitizer's memcheck, and its benchmark. Writes benchmarks/results/ms_deform_attn_GPU.txt. Python is .venv's or
# $PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" setup.py --quiet build_ext --inplace
"$python" - <<'END'
import sys, torch
from attention import WITHOUT_OP
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no GPU")
if WITHOUT_OP["cuda"]:
    sys.exit(f"benchmarks/gpu.sh: the compiled op for GPUs {WITHOUT_OP['cuda']}")
END

name=$("$python" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_'))")
output=benchmarks/results/ms_deform_attn_$name.txt
mkdir -p benchmarks/results
: >"$output"
failed=0
step() {  # title, command ...: its output goes to the terminal and to the file; a failure does not stop the next step
  echo "== $1" | tee -a "$output"
  shift
  "$@" 2>&1 | tee -a "$output" || { failed=1; echo "FAILED" | tee -a "$output"; }
}
step "tests" "$python" -m pytest -q -rs tests/test_attention.py -k cuda
# Without the caching allocator every tensor is an allocation of its own, and memcheck sees what passes its end.
step "compute-sanitizer memcheck" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --error-exitcode 1 \
  "$python" -m pytest -q tests/test_attention.py -k "cuda and (reference or wild or edges or empty or contiguous or deterministic)"
step "benchmark" "$python" -m benchmarks.ms_deform_attn --device cuda
echo "written: $output"
exit $failed
