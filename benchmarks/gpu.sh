#!/usr/bin/env bash
# All that a GPU is needed for, in one call: the tests of the compiled deformable attention for every dtype, some of them
# under compute-sanitizer, its benchmark, and training steps. Writes benchmarks/results/gpu_NAME.txt. Python is .venv's or
# $PYTHON; compute-sanitizer comes with the CUDA toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
"$python" - <<'END_OF_CHECK'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no GPU")
END_OF_CHECK
"$python" setup.py --quiet build_ext --inplace
"$python" - <<'END_OF_CHECK'
import sys
from attention import WITHOUT_OP
if WITHOUT_OP["cuda"]:
    sys.exit(f"benchmarks/gpu.sh: the compiled op for GPUs {WITHOUT_OP['cuda']}")
END_OF_CHECK

name=$("$python" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_'))")
output=benchmarks/results/gpu_$name.txt
mkdir -p benchmarks/results
echo "commit $(git rev-parse --short HEAD), torch $("$python" -c "import torch; print(torch.__version__)")" | tee "$output"
failed=0
step() {  # title, command ...: its output goes to the terminal and to the file; a failure does not stop the next step
  echo "== $1" | tee -a "$output"
  shift
  "$@" 2>&1 | tee -a "$output" || { failed=1; echo "FAILED" | tee -a "$output"; }
}
pytest=("$python" -m pytest -q -p no:cacheprovider tests/test_attention.py)
step "tests" "${pytest[@]}" -rs -k cuda
# Without the caching allocator every tensor is an allocation of its own, and memcheck sees what passes its end.
step "compute-sanitizer memcheck" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --error-exitcode 1 \
  "${pytest[@]}" -k "cuda and (reference or wild or edges or empty or contiguous or deterministic)"
step "compute-sanitizer racecheck" compute-sanitizer --tool racecheck --error-exitcode 1 \
  "${pytest[@]}" -k "cuda and (equals_reference and float32 or deterministic)"
step "benchmark of the op" "$python" -m benchmarks.ms_deform_attn --device cuda
for preset in dimaskdino_r50 maskdino_r50 dimaskdino_swin_l; do
  step "training step, $preset" "$python" -m benchmarks.train_step --device cuda --preset $preset --batch-size 2
done
step "training step, dimaskdino_swin_l, checkpointing" \
  "$python" -m benchmarks.train_step --device cuda --preset dimaskdino_swin_l --batch-size 2 --grad-checkpoint
echo "written: $output"
exit $failed
