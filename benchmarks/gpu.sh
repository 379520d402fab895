#!/usr/bin/env bash
# All that a GPU is measured for, in one call: inference and training steps of the presets in float32, TF32 and bfloat16,
# the benchmark of the compiled deformable attention, and 100 iterations of `tiny`.
# With --tests also the op's tests for every dtype, some of them under compute-sanitizer, which comes with the CUDA
# toolkit. Writes benchmarks/results/gpu_NAME.txt. Python is .venv's or $PYTHON. With DEVICE=cpu and a SIZE of 64 it shows
# on any machine whether the commands are right.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
device=${DEVICE:-cuda}
if [ "$device" = cuda ]; then
  "$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("benchmarks/gpu.sh: torch sees no GPU")'
  rm -f _C_cuda.torch-*.so  # else one of older sources would be measured where the build fails
  "$python" setup.py --quiet build_ext --inplace
fi
"$python" - "$device" <<'END_OF_CHECK'
import sys
from ops import WITHOUT_OP
if reason := WITHOUT_OP[sys.argv[1]]:
    sys.exit(f"benchmarks/gpu.sh: the compiled op for {sys.argv[1]} {reason}")
END_OF_CHECK

name=$("$python" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_') if '$device' == 'cuda' else 'none')")
output=benchmarks/results/gpu_$name.txt
mkdir -p benchmarks/results
echo "commit $(git rev-parse --short HEAD), torch $("$python" -c "import torch; print(torch.__version__)")" | tee "$output"
failed=0
step() {  # title, command ...: its output goes to the terminal and to the file; a failure does not stop the next step
  echo "== $1" | tee -a "$output"
  shift
  "$@" 2>&1 | tee -a "$output" || { failed=1; echo "FAILED" | tee -a "$output"; }
}
if [ "${1:-}" = --tests ]; then
  pytest=("$python" -m pytest -q -p no:cacheprovider tests/test_attention.py)
  step "tests" "${pytest[@]}" -rs -k cuda
  # Without the caching allocator every tensor is an allocation of its own, and memcheck sees what passes its end.
  step "compute-sanitizer memcheck" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool memcheck --error-exitcode 1 \
    "${pytest[@]}" -k "cuda and (reference or wild or edges or empty or contiguous or deterministic)"
  step "compute-sanitizer racecheck" compute-sanitizer --tool racecheck --error-exitcode 1 \
    "${pytest[@]}" -k "cuda and (equals_reference and float32 or deterministic)"
fi
step "benchmark of the op" "$python" -m benchmarks.ms_deform_attn --device "$device" ${RUNS:+--rounds "$RUNS"}
inference=("$python" -m benchmarks.inference --device "$device" --size ${SIZE:-800} ${SIZE:-1088} --runs "${RUNS:-10}")
training=("$python" -m benchmarks.train_step --device "$device" --size "${SIZE:-1024}" --runs "${RUNS:-10}")
for precision in float32 tf32 bfloat16; do
  step "inference, dimaskdino_r50, $precision" "${inference[@]}" --precision $precision
  step "training step, dimaskdino_r50, $precision" "${training[@]}" --precision $precision --batch-size 2
done
step "inference, dimaskdino_r50, bfloat16, compiled" "${inference[@]}" --precision bfloat16 --compile
for preset in maskdino_r50 dimaskdino_swin_l; do
  step "inference, $preset, bfloat16" "${inference[@]}" --precision bfloat16 --preset $preset
  step "training step, $preset, bfloat16" "${training[@]}" --precision bfloat16 --preset $preset
done
runs=$(mktemp -d)
for precision in float32 bfloat16; do
  step "100 iterations of tiny, $precision" "$python" train.py --device "$device" --precision $precision --no-eval \
    --max-iterations "${ITERATIONS:-100}" --output "$runs/$precision"
  step "its log" tail -n 1 "$runs/$precision/log.jsonl"
done
rm -r "$runs"
echo "written: $output"
exit $failed
