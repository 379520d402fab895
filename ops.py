"""The op of deformable attention: the compiled one of csrc and which devices it serves, and its plain PyTorch form."""

import filecmp
import math
import shlex
import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

BUILD = shlex.join([sys.executable or "python", str(Path(__file__).with_name("setup.py")), "build_ext", "--inplace"])


def load_library(name):
    """Loads a library of csrc, which lies beside this file and bears the version of the torch it was built for.

    Returns None, or why the compiled op does not serve the device of this library.
    """
    version = torch.__version__
    path = Path(__file__).resolve().with_name(f"{name}.torch-{version}.so")
    if not path.exists():
        others = [other.stem.removeprefix(f"{name}.torch-") for other in path.parent.glob(f"{name}.torch-*.so")]
        return f"was built for torch {others[0]} and not for this one, {version}" if others else "is not built"
    loaded = [other for other in torch.ops.loaded_libraries if Path(other).name == path.name]  # by another clone
    if loaded:  # the same operators twice would abort the process
        same = filecmp.cmp(path, loaded[0], shallow=False)
        return None if same else f"is another one than this process uses already ({loaded[0]})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"does not load ({str(error).splitlines()[0]})"


REGISTERED = hasattr(torch.ops.dimaskdino, "ms_deform_attn")  # by another clone of this repository in the process
WITHOUT_OP = {"cpu": load_library("_C"), "cuda": load_library("_C_cuda")}  # {device type: None, or why not}
WITHOUT_OP["cuda"] = WITHOUT_OP["cpu"] or WITHOUT_OP["cuda"]  # the operators are declared in the CPU library

if WITHOUT_OP["cpu"] is None and not REGISTERED:

    @torch.library.register_fake("dimaskdino::ms_deform_attn")
    def _output_like(value, level_shapes, sampling_locations, attention_weights):
        return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])

    @torch.library.register_fake("dimaskdino::ms_deform_attn_backward")
    def _grads_like(grad_output, value, level_shapes, sampling_locations, attention_weights):
        return tuple(x.new_empty(x.shape) for x in (value, sampling_locations, attention_weights))

    def _setup_context(ctx, inputs, output):
        value, ctx.level_shapes, sampling_locations, attention_weights = inputs
        ctx.save_for_backward(value, sampling_locations, attention_weights)

    def _backward(ctx, grad_output):
        value, sampling_locations, attention_weights = ctx.saved_tensors
        grad_value, grad_locations, grad_weights = torch.ops.dimaskdino.ms_deform_attn_backward(
            grad_output, value, ctx.level_shapes, sampling_locations, attention_weights
        )
        return grad_value, None, grad_locations, grad_weights

    def _no_second_derivative(ctx, *grads):
        raise RuntimeError("ms_deform_attn has no second derivative; ms_deform_attn_pytorch has one")

    torch.library.register_autograd("dimaskdino::ms_deform_attn", _backward, setup_context=_setup_context)
    torch.library.register_autograd("dimaskdino::ms_deform_attn_backward", _no_second_derivative)

    @register_flop_formula(torch.ops.dimaskdino.ms_deform_attn)
    def _flops(value, level_shapes, sampling_locations, attention_weights, **_):
        return 8 * math.prod(attention_weights) * value[3]  # a multiply-add per corner of every sample and channel

    @register_flop_formula(torch.ops.dimaskdino.ms_deform_attn_backward)
    def _backward_flops(grad_output, *inputs, **_):
        return 2 * _flops(*inputs)  # for the values, and for locations and weights


@cache
def gpu_lacks_code(index):
    """Whether the CUDA library holds neither code for this GPU nor any that its driver could compile for it."""
    return torch.cuda.is_available() and not torch.ops.dimaskdino.gpu_has_code(index)  # no GPU: tensors are fake


def without_op(device):
    """Why the compiled op does not serve tensors of this torch.device, or None."""
    name = "cpu" if device.type == "meta" else device.type
    reason = WITHOUT_OP.get(name, f"does not exist for {name}")
    if name == "cuda" and not reason and gpu_lacks_code(device.index or 0):
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return f"was built without code for this GPU (add {capability} to TORCH_CUDA_ARCH_LIST)"
    return reason


warned = set()  # device types for which the line below has been printed


@torch.compiler.assume_constant_result  # called while torch.compile traces, so that the line is printed there too
def has_op(device):
    """Whether the compiled op serves tensors of this torch.device. Where it does not, says so once."""
    reason = without_op(device)
    if reason and device.type not in warned:
        warned.add(device.type)
        message = f"the compiled op {reason}; running slower, in plain PyTorch. Build it: {BUILD}"
        print(f"ms_deform_attn on {device.type}: {message}", file=sys.stderr)
    return not reason


def ms_deform_attn_pytorch(value, level_shapes, sampling_locations, attention_weights):
    """Multi-scale deformable attention in plain PyTorch: the fallback of the op and its reference.

    Same arguments and result as `ms_deform_attn`; half types are computed in float32.
    """
    B, _, M, D = value.shape
    Q = sampling_locations.shape[1]
    if value.dtype in (torch.float16, torch.bfloat16):
        inputs = value.float(), level_shapes, sampling_locations.float(), attention_weights.float()
        return ms_deform_attn_pytorch(*inputs).to(value.dtype)
    grids = 2 * sampling_locations - 1
    grids = grids.where(grids.abs() < 3, 3)  # outside every map; grid_sample makes NaN of NaN and infinite ones
    grids = grids.permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # (B*M, L, P, Q, 2)
    weights = attention_weights.permute(0, 2, 3, 4, 1).flatten(0, 1)  # (B*M, L, P, Q)
    out = value.new_zeros(B * M, D, Q)
    sizes = [height * width for height, width in level_shapes]
    for level, (tokens, (height, width)) in enumerate(zip(value.split(sizes, dim=1), level_shapes, strict=True)):
        if height * width == 0:
            continue
        maps = tokens.permute(0, 2, 3, 1).reshape(B * M, D, height, width)
        samples = F.grid_sample(maps, grids[:, level], padding_mode="zeros", align_corners=False)  # (B*M, D, P, Q)
        out = out + (samples * weights[:, level, None]).sum(2)
    return out.view(B, M * D, Q).transpose(1, 2)


def ms_deform_attn(value, level_shapes, sampling_locations, attention_weights):
    """Weighted sum of bilinear samples of the value maps (Deformable DETR, Eq. 3, without the projections).

    value               (B, S, M, D): S tokens of all levels, row-major one level after the other, M heads of D channels
    level_shapes        [(H, W), ...] of the L levels, host integers, sum of H*W = S
    sampling_locations  (B, Q, M, L, P, 2): (x, y) relative to the map, [0, 1] inside. What lies outside counts as zero:
                        corners of a cell, whole samples, infinite and NaN locations; these get no gradient
    attention_weights   (B, Q, M, L, P)

    float32, float64, bfloat16 or float16; with a half-precision value the locations and the weights may
    be float32. Returns (B, Q, M*D) in the dtype of `value`. Runs the compiled op of csrc, which raises RuntimeError for
    shapes, dtypes or devices that do not go together; or plain PyTorch where that is not built and in what is made to
    run elsewhere, by torch.export, torch.onnx.export and torch.jit.trace. Sizes may be symbolic, as these make them.
    """
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()
    if exporting or not has_op(value.device):
        return ms_deform_attn_pytorch(value, level_shapes, sampling_locations, attention_weights)
    if value.dtype == torch.float16 and value.device.type == "cpu":  # which computes in it no faster
        sampling_locations, attention_weights = sampling_locations.float(), attention_weights.float()
        return ms_deform_attn(value.float(), level_shapes, sampling_locations, attention_weights).half()
    sizes = [size for shape in level_shapes for size in shape]
    return torch.ops.dimaskdino.ms_deform_attn(value, sizes, sampling_locations, attention_weights)


if __name__ == "__main__":
    for device in WITHOUT_OP:
        if device == "cuda" and torch.version.cuda is None:
            print("cuda: this torch has none")
            continue
        reason = without_op(torch.device(device))
        absent = " (torch sees no GPU here)" if device == "cuda" and not torch.cuda.is_available() else ""
        print(f"{device}: " + (f"plain PyTorch, the compiled op {reason}" if reason else "compiled op") + absent)
        if reason:
            print(f"  build it: {BUILD}")
