"""Multi-scale deformable attention (Deformable DETR, Sec. 4.1) and the sine position embeddings of points and boxes."""

import math
import shlex
import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

BUILD = shlex.join([sys.executable or "python", str(Path(__file__).with_name("setup.py")), "build_ext", "--inplace"])


def load_op():
    """Loads the libraries of csrc, which lie beside this file and bear the version of the torch they were built for.

    Returns {device type: None, or why the compiled op does not serve that device}.
    """
    folder, version = Path(__file__).resolve().parent, torch.__version__
    reasons = {}
    for device, name in (("cpu", "_C"), ("cuda", "_C_cuda")):
        path = folder / f"{name}.torch-{version}.so"
        others = [other.stem.removeprefix(f"{name}.torch-") for other in folder.glob(f"{name}.torch-*.so")]
        if path.exists():
            try:
                torch.ops.load_library(path)
                reasons[device] = None
            except OSError as error:
                reasons[device] = f"does not load ({str(error).splitlines()[0]})"
        elif others:
            reasons[device] = f"was built for torch {others[0]} and not for this one, {version}"
        else:
            reasons[device] = "is not built"
    reasons["cuda"] = reasons["cpu"] or reasons["cuda"]  # the operators are declared in the CPU library
    return reasons


WITHOUT_OP = load_op()

if WITHOUT_OP["cpu"] is None:

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
    dtype = value.dtype
    if dtype in (torch.float16, torch.bfloat16):
        value, sampling_locations, attention_weights = (
            x.float() for x in (value, sampling_locations, attention_weights)
        )
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
    return out.view(B, M * D, Q).transpose(1, 2).to(dtype)


def ms_deform_attn(value, level_shapes, sampling_locations, attention_weights):
    """Weighted sum of bilinear samples of the value maps (Deformable DETR, Eq. 3, without the projections).

    value               (B, S, M, D): S tokens of all levels, row-major one level after the other, M heads of D channels
    level_shapes        [(H, W), ...] of the L levels, host integers, sum of H*W = S
    sampling_locations  (B, Q, M, L, P, 2): (x, y) relative to the map, [0, 1] inside. What lies outside counts as zero:
                        corners of a cell, whole samples, infinite and NaN locations; these get no gradient
    attention_weights   (B, Q, M, L, P)

    float32, float64, bfloat16 or float16; with a half-precision value the locations and the weights may
    be float32. Returns (B, Q, M*D) in the dtype of `value`. Raises RuntimeError for shapes, dtypes or devices that do
    not go together. Runs the compiled op of csrc, or plain PyTorch where that is not built and in what is made to run
    elsewhere, by torch.export, torch.onnx.export and torch.jit.trace. Sizes may be symbolic, as these make them.
    """
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()
    if exporting or not has_op(value.device):
        return ms_deform_attn_pytorch(value, level_shapes, sampling_locations, attention_weights)
    if value.dtype == torch.float16 and value.device.type == "cpu":  # which computes in it no faster
        sampling_locations, attention_weights = sampling_locations.float(), attention_weights.float()
        return ms_deform_attn(value.float(), level_shapes, sampling_locations, attention_weights).half()
    sizes = [size for shape in level_shapes for size in shape]
    return torch.ops.dimaskdino.ms_deform_attn(value, sizes, sampling_locations, attention_weights)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections.

    dim, num_heads, num_levels, num_points: channels C, heads M, feature levels L, sampling points P per head and level.
    """

    def __init__(self, dim, num_heads, num_levels, num_points):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self):
        """Head m looks in the m-th compass direction, point p at p + 1 cells; all samples weigh the same."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # (M, 2)
        points = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * points[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(self, query, reference, tokens, level_shapes, level_sizes=None):
        """query (B, Q, C), its position included; tokens (B, S, C); reference (B or 1, Q, 2) points or (B, Q, 4)
        cxcywh boxes, in [0, 1]; level_shapes [(H, W), ...], and level_sizes what `sizes_of` makes of them, where it is
        at hand. Returns (B, Q, C).

        Offsets are in cells of each level around a point, and in units of size / (2 P) around a box.
        """
        B, Q, _ = query.shape
        shape = (B, Q, self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(tokens).view(B, tokens.shape[1], self.num_heads, -1)
        both = self.sampling_offsets, self.attention_weights  # in one projection: autocast casts the query once
        weight, bias = torch.cat([p.weight for p in both]), torch.cat([p.bias for p in both])
        offsets, weights = F.linear(query, weight, bias).split([p.out_features for p in both], -1)
        offsets, reference = offsets.view(*shape, 2), reference[:, :, None, None, None]  # (B, Q, 1, 1, 1, 2 or 4)
        if reference.shape[-1] == 2:
            sizes = sizes_of(level_shapes, reference) if level_sizes is None else level_sizes
            locations = torch.addcdiv(reference, offsets, sizes[:, None])
        else:
            locations = torch.addcmul(reference[..., :2], offsets, reference[..., 2:], value=0.5 / self.num_points)
        # Under autocast `value` is in half precision, `locations` and with them the weights in the reference's float32.
        weights = weights.view(*shape[:3], -1).softmax(-1, dtype=locations.dtype).view(shape)
        return self.output_proj(ms_deform_attn(value, level_shapes, locations, weights))


def sizes_of(level_shapes, like):
    """Width and height of all levels, (L, 2), in dtype and device of `like`; made there: no copy to wait for."""
    return torch.stack([torch.stack([like.new_full((), n) for n in (w, h)]) for h, w in level_shapes])


def sine_embedding(values, dim, temperature=10000):
    """`dim` channels for every value: sin (even channels) and cos (odd) of value * 2 pi at dim / 2 frequencies.

    values of any shape (...), in [0, 1]. Returns (..., dim) in their dtype.
    """
    frequencies = temperature ** (torch.arange(0, dim, 2, device=values.device, dtype=values.dtype) / dim)
    angles = values[..., None] * (2 * math.pi) / frequencies  # (..., dim / 2)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def sine_position(height, width, dim, like):
    """2-D sine position of every cell of a map, row-major: half the channels for y, half for x.

    Cells count from 1 and the last one is 1. Returns (height * width, dim), dtype and device as the tensor `like`.
    """
    y, x = (torch.arange(1, n + 1, device=like.device, dtype=like.dtype) / (n + 1e-6) for n in (height, width))
    y, x = sine_embedding(y, dim // 2), sine_embedding(x, dim // 2)
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1).flatten(0, 1)


def sine_box(boxes, dim):
    """Sine embedding of boxes: dim / 2 channels each for cy, cx, w, h, in this order.

    boxes (..., 4) cxcywh in [0, 1]. Returns (..., 2 * dim).
    """
    x, y, w, h = boxes.unbind(-1)
    return sine_embedding(torch.stack([y, x, w, h], -1), dim // 2).flatten(-2)


def inverse_sigmoid(x, eps=1e-5):
    """Logit of x, any shape; x and 1 - x are kept at `eps` or above, so the logits lie within about +-11.5."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def full_precision(x):
    """The tensor, in float32 if it is of a half-precision dtype."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_full_precision(function, *args):
    """function(*args) without autocast, if it is on, and with half-precision tensors among the arguments in float32.

    For boxes, and for the scores that decide a selection, which half precision would round to a few values.
    """
    device = next(x for x in tree_leaves(args) if torch.is_tensor(x)).device
    if not torch.is_autocast_enabled(device.type):
        return function(*args)
    with torch.autocast(device.type, enabled=False):
        return function(*tree_map_only(torch.Tensor, full_precision, args))


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim, hidden_dim, out_dim, num_layers):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The second half of every transformer layer here: LayerNorm(x + W2 ReLU(W1 x)), (..., dim) -> (..., dim)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(self.unnormed(x))

    def after_norm(self, norm, x):
        """self(norm(x)). In training the backward pass computes the inner activations, the widest of all, once more.

        On a CPU some tokens at a time, for which 8 MB suffice: large blocks of memory come slowly from the system.
        """
        if not self.training:
            return self(norm(x))
        rows = x.flatten(0, -2)
        pieces = rows.split(max(1, 2**21 // self.linear1.out_features)) if x.device.type == "cpu" else [rows]
        inner = lambda x: self.unnormed(norm(x))  # noqa: E731
        inner = [checkpoint(inner, piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        return self.norm(torch.cat(inner)).view_as(x)

    def unnormed(self, x):
        """x + W2 ReLU(W1 x). On a matrix: the gradient of a ReLU in place on a view of one would be copied twice."""
        return x + self.linear2(self.linear1(x.flatten(0, -2)).relu_()).view_as(x)


def xavier_matrices_(module):
    """Xavier-uniform values for every matrix below `module`, as transformer layers start; the rest stays as it is."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if isinstance(child, MSDeformAttn):
            child.reset_parameters()


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
