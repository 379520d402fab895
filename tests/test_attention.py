"""Tests of multi-scale deformable attention, compiled and in plain PyTorch, and of the sine embeddings."""

import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ops
from attention import MSDeformAttn, sine_box, sine_embedding, sine_position
from ops import ms_deform_attn, ms_deform_attn_pytorch

ROOT = Path(__file__).resolve().parent.parent

DEVICES = [
    pytest.param(
        device,
        marks=pytest.mark.skipif(
            bool(ops.WITHOUT_OP[device]) or (device == "cuda" and not torch.cuda.is_available()),
            reason=f"the compiled op for {device} {ops.WITHOUT_OP[device] or 'has no GPU to run on'}",
        ),
    )
    for device in ("cpu", "cuda")
]
PATHS = [  # the op on every device, and its fallback
    *(pytest.param(ms_deform_attn, *device.values, marks=device.marks, id=device.values[0]) for device in DEVICES),
    pytest.param(ms_deform_attn_pytorch, "cpu", id="plain"),
]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def reference(value, level_shapes, locations, weights):
    """The op by its definition, from a list of every sample's four corners. Differentiable, float64."""
    B, _, M, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    out = value.new_zeros(B, Q, M, D)
    image = torch.arange(B)[:, None, None, None]
    head = torch.arange(M)[:, None]
    start = 0
    for level, (height, width) in enumerate(level_shapes):
        finite = locations[:, :, :, level].isfinite().all(-1)
        x = locations[:, :, :, level, :, 0] * width - 0.5
        y = locations[:, :, :, level, :, 1] * height - 0.5
        finite = finite & (x.abs() < 1e9) & (y.abs() < 1e9)
        x, y = x.where(finite, -9), y.where(finite, -9)
        part_x, part_y = x - x.detach().floor(), y - y.detach().floor()
        for dy, dx in itertools.product((0, 1), (0, 1)):
            column, row = x.detach().floor() + dx, y.detach().floor() + dy
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            token = (start + row * width + column).where(inside, 0).long()
            share = (part_x if dx else 1 - part_x) * (part_y if dy else 1 - part_y)
            if height * width:
                samples = value[image, token, head].where(inside[..., None], 0)  # (B, Q, M, P, D)
                out = out + (samples * (share * weights[:, :, :, level])[..., None]).sum(3)
        start += height * width
    return out.flatten(2)


def make_inputs(B, Q, M, D, P, level_shapes, *, low=-0.5, high=1.5, dtype=torch.float64, device="cpu", seed=0):
    """value, level_shapes, locations in [low, high], weights; the same numbers for every dtype that holds them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in level_shapes)
    value = torch.randn(B, tokens, M, D, generator=generator, dtype=torch.float64)
    locations = torch.rand(B, Q, M, len(level_shapes), P, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(B, Q, M, len(level_shapes), P, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum((-2, -1), keepdim=True)
    value, locations, weights = (x.to(dtype).to(device) for x in (value, low + (high - low) * locations, weights))
    return value, level_shapes, locations, weights


def with_gradients(function, value, level_shapes, locations, weights, grad_output):
    """[output, grad_value, grad_locations, grad_weights]"""
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    output = function(leaves[0], level_shapes, *leaves[1:])
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_like_reference(inputs, tolerance, function=ms_deform_attn):
    """Output and gradients of the op equal the float64 reference's on the same numbers, relative to their largest."""
    value, level_shapes, locations, weights = inputs
    grad_output = torch.randn(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3], dtype=torch.float64)
    grad_output = grad_output.to(value.dtype)
    exact = with_gradients(
        reference, value.double().cpu(), level_shapes, locations.double().cpu(), weights.double().cpu(),
        grad_output.double(),
    )  # fmt: skip
    found = with_gradients(function, *inputs, grad_output.to(value.device))
    for ours, theirs, like in zip(found, exact, (value, value, locations, weights), strict=True):
        assert ours.dtype == like.dtype and ours.device == like.device
        assert ours.shape == theirs.shape
        if ours.numel():
            error = (ours.double().cpu() - theirs).abs().max() / theirs.abs().max().clamp(min=1)
            assert error <= tolerance


SHAPES = {  # B, Q, M, D, P, level shapes
    "encoder, D = 32": (2, 100, 8, 32, 4, [(8, 10), (4, 5), (2, 3), (1, 1)]),
    "D = 16": (3, 70, 4, 16, 4, [(7, 9), (4, 5)]),
    "D = 64": (1, 33, 2, 64, 4, [(6, 5), (3, 3), (2, 2), (1, 2)]),
    "D = 1, P = 1, L = 1": (2, 5, 3, 1, 1, [(5, 4)]),
    "D = 7, P = 3, L = 5": (2, 11, 3, 7, 3, [(9, 4), (3, 8), (4, 4), (2, 2), (1, 1)]),
    "D = 48, P = 8, L = 3": (1, 9, 5, 48, 8, [(11, 6), (5, 3), (3, 2)]),
    "D = 160, P = 2": (2, 6, 1, 160, 2, [(4, 4), (3, 5)]),
    "few queries": (2, 2, 4, 32, 4, [(30, 40), (15, 20)]),
    "many queries": (2, 1030, 8, 32, 4, [(20, 30), (7, 9)]),  # enough for blocks of 256 threads on a GPU
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_reference(shape, dtype, device):
    assert_like_reference(make_inputs(*shape, dtype=dtype, device=device), DTYPES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(20))
def test_equals_reference_on_random_shapes(seed, device):
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(1, high + 1, (), generator=generator))

    level_shapes = [(draw(12), draw(12)) for _ in range(draw(5))]
    shape = (draw(3), draw(40), draw(9), draw(70), draw(8), level_shapes)
    for dtype in (torch.float64, torch.float32):
        assert_like_reference(make_inputs(*shape, dtype=dtype, device=device, seed=seed), DTYPES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_reference_on_cell_edges(dtype, device):
    """Cell centres and edges, also of the ring around the map, in numbers that every dtype holds exactly."""
    value, level_shapes, locations, weights = make_inputs(2, 60, 3, 32, 4, [(8, 4), (2, 16)], dtype=dtype)
    half_cells = torch.tensor([(width, height) for height, width in level_shapes], dtype=dtype)[:, None] * 2
    locations = (locations * half_cells).round() / half_cells
    assert_like_reference((value.to(device), level_shapes, locations.to(device), weights.to(device)), DTYPES[dtype])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain_pytorch_equals_reference(shape):
    inputs = make_inputs(*shape)
    grad_output = torch.randn_like(reference(*inputs))
    exact = with_gradients(reference, *inputs, grad_output)
    for ours, theirs in zip(with_gradients(ms_deform_attn_pytorch, *inputs, grad_output), exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_plain_pytorch_computes_half_types_in_float32():
    value, level_shapes, locations, weights = make_inputs(1, 20, 2, 8, 4, [(5, 6)], dtype=torch.float32)
    exact = ms_deform_attn_pytorch(value.bfloat16().float(), level_shapes, locations, weights)
    half = ms_deform_attn_pytorch(value.bfloat16(), level_shapes, locations, weights)
    assert torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("device", DEVICES)
def test_samples_of_one_cell(device):
    """A cell's centre gives its value; half a cell outside gives half of it, a whole cell or more outside nothing."""
    value = torch.tensor([3.0], device=device).reshape(1, 1, 1, 1)
    x = [0.5, 0.0, 1.0, -0.25, -0.5, 1.5, -7.0]
    locations = torch.tensor([[at, 0.5] for at in x], device=device).reshape(1, len(x), 1, 1, 1, 2)
    out = ms_deform_attn(value, [(1, 1)], locations, torch.ones(1, len(x), 1, 1, 1, device=device))
    assert out.flatten().tolist() == [3.0, 1.5, 1.5, 0.75, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("function, device", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, -(2.0**63), 3e38])
def test_wild_locations_contribute_nothing(bad, dtype, function, device):
    value, level_shapes, locations, weights = make_inputs(2, 40, 2, 20, 3, [(5, 6), (0, 3), (1, 1)], dtype=dtype)
    wild = torch.rand(locations.shape) < 0.3
    locations[wild] = bad
    inputs = value.to(device), level_shapes, locations.to(device), weights.to(device)
    assert_like_reference(inputs, DTYPES[dtype], function)
    grad_output = torch.ones(2, 40, 40, dtype=dtype, device=device)
    output, _, grad_locations, _ = with_gradients(function, *inputs, grad_output)
    assert output.isfinite().all()
    assert (grad_locations[wild.any(-1).to(device)] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_values_that_are_not_sampled_do_not_matter(device):
    """Not even infinite ones: a corner outside the map is left out, it does not count with weight zero."""
    value, level_shapes, locations, weights = make_inputs(1, 200, 1, 8, 4, [(4, 4)], dtype=torch.float32, device=device)
    value[:, 5] = math.inf  # cell (1, 1)
    cells = locations * 4 - 0.5
    locations[((cells > 0) & (cells < 2)).all(-1)] = 2.0
    assert ms_deform_attn(value, level_shapes, locations, weights).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("empty", range(5))
def test_empty(empty, device):
    B, Q, M, D, P = (0 if i == empty else size for i, size in enumerate((2, 3, 2, 4, 4)))
    inputs = make_inputs(B, Q, M, D, P, [(3, 4), (2, 2)], dtype=torch.float32, device=device)
    gradients = with_gradients(ms_deform_attn, *inputs, torch.ones(B, Q, M * D, device=device))
    assert gradients[0].shape == (B, Q, M * D) and (gradients[0] == 0).all()
    for gradient, like in zip(gradients[1:], (inputs[0], *inputs[2:]), strict=True):
        assert gradient.shape == like.shape and (gradient == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_levels(device):
    out = ms_deform_attn(
        torch.ones(2, 0, 3, 4, device=device), [],
        torch.ones(2, 5, 3, 0, 4, 2, device=device), torch.ones(2, 5, 3, 0, 4, device=device),
    )  # fmt: skip
    assert torch.equal(out.cpu(), torch.zeros(2, 5, 12))


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_need_not_be_contiguous(device):
    value, level_shapes, locations, weights = make_inputs(2, 30, 4, 16, 4, [(6, 5), (3, 3)], device=device)
    grad_output = torch.randn(30, 64, 2, dtype=torch.float64, device=device).permute(2, 0, 1)
    expected = with_gradients(ms_deform_attn, value, level_shapes, locations, weights, grad_output.contiguous())
    strided = [
        value.transpose(1, 3).contiguous().transpose(1, 3),
        locations.transpose(0, 5).contiguous().transpose(0, 5),
        weights.flip(1).flip(1).transpose(1, 2).contiguous().transpose(1, 2),
    ]
    assert not any(x.is_contiguous() for x in strided)
    found = with_gradients(ms_deform_attn, strided[0], level_shapes, *strided[1:], grad_output)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    broadcast = weights[:1, :1].expand_as(weights)
    torch.testing.assert_close(
        ms_deform_attn(value, level_shapes, locations, broadcast),
        ms_deform_attn(value, level_shapes, locations, broadcast.contiguous()),
    )


WRONG = {
    "value": [
        lambda v, s, x, w: (v.flatten(2), s, x, w),
        lambda v, s, x, w: (v[:, :-1], s, x, w),
        lambda v, s, x, w: (v.long(), s, x, w),
    ],
    "level_shapes": [
        lambda v, s, x, w: (v, s[:1], x, w),
        lambda v, s, x, w: (v, [(5, 5), (-1, -9)], x, w),
        lambda v, s, x, w: (v, [(2**40, 2**40), (0, 0)], x, w),
        lambda v, s, x, w: (v, [(5, 6), (2, 3)], x, w),
    ],
    "sampling_locations": [
        lambda v, s, x, w: (v, s, x[..., :1], w),
        lambda v, s, x, w: (v, s, x[:1], w),
        lambda v, s, x, w: (v, s, x[:, :, :1], w),
        lambda v, s, x, w: (v, s, x.double(), w),
    ],
    "attention_weights": [
        lambda v, s, x, w: (v, s, x, w[:, :1]),
        lambda v, s, x, w: (v, s, x, w.flatten(3)),
        lambda v, s, x, w: (v, s, x, w.bfloat16()),
    ],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("argument, change", [(name, change) for name, changes in WRONG.items() for change in changes])
def test_wrong_arguments_are_named(argument, change, device):
    inputs = make_inputs(2, 6, 2, 4, 2, [(5, 5), (3, 3)], dtype=torch.float32, device=device)
    with pytest.raises(RuntimeError, match=argument):
        torch.ops.dimaskdino.ms_deform_attn(*flat(*change(*inputs)))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_tensors_on_other_devices_are_named(device):
    value, level_shapes, locations, weights = make_inputs(2, 6, 2, 4, 2, [(5, 5), (3, 3)], device=device)
    with pytest.raises(RuntimeError, match="sampling_locations"):
        ms_deform_attn(value, level_shapes, locations.cpu(), weights)
    with pytest.raises(RuntimeError, match="attention_weights"):
        ms_deform_attn(value, level_shapes, locations, weights.cpu())


def flat(value, level_shapes, locations, weights):
    """The arguments of the operator, whose level shapes are one list of numbers."""
    return value, [size for shape in level_shapes for size in shape], locations, weights


@pytest.mark.parametrize("device", DEVICES)
def test_float16_on_cpu_and_wrong_grad_output(device):
    inputs = flat(*make_inputs(2, 6, 2, 4, 2, [(5, 5), (3, 3)], dtype=torch.float32, device=device))
    for grad_output in (torch.zeros(2, 6, 7), torch.zeros(2, 6, 8).double()):
        with pytest.raises(RuntimeError, match="grad_output"):
            torch.ops.dimaskdino.ms_deform_attn_backward(grad_output.to(device), *inputs)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="value must be Float, Double or BFloat16"):
            torch.ops.dimaskdino.ms_deform_attn(*(x.half() if torch.is_tensor(x) else x for x in inputs))


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    value, level_shapes, locations, weights = make_inputs(2, 3, 2, 5, 2, [(3, 4), (2, 2)], device=device)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, level_shapes, x, w), leaves)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivative_is_refused(device):
    value, level_shapes, locations, weights = make_inputs(1, 3, 2, 4, 2, [(3, 4)], device=device)
    value.requires_grad_()
    output = ms_deform_attn(value, level_shapes, locations, weights)
    (gradient,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, device):
    value, level_shapes, locations, weights = make_inputs(2, 6, 2, 8, 4, [(4, 5), (2, 3)], dtype=dtype, device=device)
    leaves = [x.requires_grad_() for x in (value, locations.float(), weights.float())]
    arguments = flat(leaves[0], level_shapes, *leaves[1:])
    torch.library.opcheck(torch.ops.dimaskdino.ms_deform_attn.default, arguments)
    grad_output = torch.randn(2, 6, 16, device=device).to(dtype)
    detached = [x.detach() if torch.is_tensor(x) else x for x in arguments]
    torch.library.opcheck(torch.ops.dimaskdino.ms_deform_attn_backward.default, (grad_output, *detached))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_and_exports_without_a_graph_break(device):
    module = MSDeformAttn(16, 2, 2, 4).to(device)
    level_shapes = [(5, 4), (3, 2)]
    query, reference_points = torch.randn(2, 7, 16, device=device), torch.rand(2, 7, 2, device=device)
    tokens = torch.randn(2, 26, 16, device=device, requires_grad=True)
    expected = module(query, reference_points, tokens, level_shapes)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), tokens)

    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    found = compiled(query, reference_points, tokens, level_shapes)
    (gradient,) = torch.autograd.grad(found.square().sum(), tokens)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    others = torch.randn(3, 9, 16), torch.rand(3, 9, 2), torch.randn(3, 42, 16)
    others = [*(x.to(device) for x in others), [(6, 5), (4, 3)]]
    torch.testing.assert_close(compiled(*others), module(*others))

    exported = torch.export.export(module, (query, reference_points, tokens.detach(), level_shapes))
    assert "dimaskdino" not in str(exported.graph)  # programs that run it do not have the op
    torch.testing.assert_close(
        exported.module()(query, reference_points, tokens.detach(), level_shapes), expected.detach()
    )


class TwoLevels(torch.nn.Module):
    """Every cell of two maps (B, 16, H, W) samples both, at places and with weights made of its channels."""

    def forward(self, first, second):
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in (first, second)], 1)
        heads = tokens.unflatten(2, (2, 8))
        locations = heads.unflatten(3, (2, 2, 2)).sigmoid()
        return ms_deform_attn(heads, [first.shape[2:], second.shape[2:]], locations, locations[..., 0])


TWO_SIZES = [
    (torch.randn(2, 16, 6, 8, generator=torch.manual_seed(0)), torch.randn(2, 16, 3, 4)),
    (torch.randn(3, 16, 5, 11), torch.randn(3, 16, 2, 7)),
]
DYNAMIC = [{0: torch.export.Dim("B"), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}] * 2


@pytest.mark.skipif(bool(ops.WITHOUT_OP["cpu"]), reason="the compiled op is not built")
def test_sizes_may_be_symbolic():
    module, graphs = TwoLevels(), []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    exported = torch.export.export(module, TWO_SIZES[0], dynamic_shapes=DYNAMIC)
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for maps in TWO_SIZES:
        torch.testing.assert_close(exported.module()(*maps), module(*maps))
        assert torch.equal(compiled(*maps), module(*maps))
    assert "dimaskdino" not in str(exported.graph)  # programs that run it do not have the op
    assert len(graphs) == 1 and "dimaskdino.ms_deform_attn" in graphs[0]


@pytest.mark.filterwarnings("ignore")  # that tracing meets Python numbers, and the exporter's own
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_portable_formats_hold_plain_operators(format, tmp_path):
    module, path = TwoLevels(), tmp_path / "file"
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        program = torch.onnx.export(module, TWO_SIZES[0], dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
        program.save(path)
        session = onnxruntime.InferenceSession(path)
        results = [session.run(None, {"first": a.numpy(), "second": b.numpy()})[0] for a, b in TWO_SIZES]
    else:
        torch.jit.trace(module, TWO_SIZES[0]).save(path)
        loaded = torch.jit.load(path)
        assert "dimaskdino" not in str(loaded.inlined_graph)
        results = [loaded(*maps) for maps in TWO_SIZES]
    for found, maps in zip(results, TWO_SIZES, strict=True):
        torch.testing.assert_close(torch.as_tensor(found), module(*maps), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_flops_are_counted(device):
    """Four multiply-adds for every sample and channel, and twice that for the backward."""
    inputs = make_inputs(2, 7, 3, 8, 4, [(5, 6), (2, 3)], device=device)
    with FlopCounterMode(display=False) as counter:
        with_gradients(ms_deform_attn, *inputs, torch.ones(2, 7, 24, dtype=torch.float64, device=device))
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    forward = 2 * 4 * (2 * 7 * 3 * 2 * 4) * 8
    assert counts == {"dimaskdino.ms_deform_attn": forward, "dimaskdino.ms_deform_attn_backward": 2 * forward}


@pytest.mark.skipif(bool(ops.WITHOUT_OP["cpu"]), reason="the compiled op is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, Q", [(1, 300), (3, 300), (1, 4)])
def test_result_does_not_depend_on_the_number_of_threads(B, Q, dtype):
    """Bit for bit; many samples per token and few, few heads and many."""
    inputs = make_inputs(B, Q, 4, 32, 4, [(20, 30), (10, 15), (5, 8)], dtype=dtype)
    grad_output = torch.randn(B, Q, 128).to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            results.append(with_gradients(ms_deform_attn, *inputs, grad_output))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_backward(device):
    """Many samples of few tokens, twice; on a GPU under torch.use_deterministic_algorithms."""
    inputs = make_inputs(2, 2000, 2, 32, 4, [(3, 3), (2, 2)], dtype=torch.float32, device=device)
    grad_output = torch.randn(2, 2000, 64).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(ms_deform_attn, *inputs, grad_output) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert_like_reference(inputs, 2e-5)  # a sum of 4,000 terms
    finally:
        torch.use_deterministic_algorithms(False)


class Recorder(TorchDispatchMode):
    """Records the dtypes of the op's tensors, and of every cast of a tensor with as many numbers as the values have."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.op, self.casts = numbers, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "ms_deform_attn" in str(function):
            self.op.append([x.dtype for x in args if torch.is_tensor(x)])
        elif "_to_copy" in str(function) and args[0].numel() == self.numbers:
            self.casts.append((args[0].dtype, (kwargs or {}).get("dtype")))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_keeps_values_in_half_precision_and_locations_in_float32(device):
    module = MSDeformAttn(64, 4, 2, 4).to(device)
    level_shapes = [(9, 8), (5, 4)]
    query, points = torch.randn(2, 7, 64, device=device), torch.rand(2, 7, 2, device=device)
    tokens = torch.randn(2, 92, 64, device=device)
    exact = module(query, points, tokens, level_shapes)
    with torch.autocast(device, dtype=torch.bfloat16), Recorder(tokens.numel()) as recorder:
        half = module(query, points, tokens, level_shapes)
        gradient = torch.autograd.grad(half.float().sum(), module.value_proj.weight)[0]
    assert half.dtype == torch.bfloat16
    assert recorder.op[0] == [torch.bfloat16, torch.float32, torch.float32]
    assert recorder.op[1] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]  # the backward
    assert (torch.bfloat16, torch.float32) not in recorder.casts
    assert (half - exact).abs().max() < 0.03 * exact.abs().max()
    assert gradient.isfinite().all()


# Loading


def run(*command, cwd, **environment):
    """The finished process of a Python program, run as a user runs it."""
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


USE = """
import torch
from attention import MSDeformAttn
module = MSDeformAttn(16, 2, 1, 4)
for _ in range(2):
    out = module(torch.randn(1, 3, 16), torch.rand(1, 3, 4), torch.randn(1, 20, 16), [(5, 4)])
    out.sum().backward()
print(tuple(out.shape))
"""


@pytest.mark.parametrize(
    "library, reason",
    [
        (None, "is not built"),
        ("_C.torch-1.0.0.so", "was built for torch 1.0.0"),
        (f"_C.torch-{torch.__version__}.so", "does not load"),
    ],
)
def test_status_says_why_the_op_is_not_used(library, reason, tmp_path):
    shutil.copy(ROOT / "ops.py", tmp_path)
    if library:
        (tmp_path / library).write_bytes(b"no library")
    status = run("ops.py", cwd=tmp_path)
    assert status.returncode == 0 and status.stderr == ""
    assert "cpu: plain PyTorch" in status.stdout and reason in status.stdout
    assert f"{sys.executable} {tmp_path}/setup.py build_ext --inplace" in status.stdout


def test_without_the_op_the_model_runs_and_one_line_says_so(tmp_path):
    for name in ("ops.py", "attention.py"):
        shutil.copy(ROOT / name, tmp_path)
    process = run("-c", USE, cwd=tmp_path)
    assert process.returncode == 0 and process.stdout == "(1, 3, 16)\n"
    assert len(process.stderr.splitlines()) == 1
    assert "is not built" in process.stderr and "/setup.py build_ext --inplace" in process.stderr


def test_a_gpu_that_the_library_has_no_code_for(monkeypatch, capsys):
    monkeypatch.setitem(ops.WITHOUT_OP, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, device.index))
    monkeypatch.setattr(ops, "gpu_lacks_code", lambda index: index > 0)
    monkeypatch.setattr(ops, "warned", set())
    assert [ops.has_op(torch.device("cuda", index)) for index in (0, 1, 1)] == [True, False, False]
    (line,) = capsys.readouterr().err.splitlines()
    assert "without code for this GPU (add 6.1 to TORCH_CUDA_ARCH_LIST)" in line and "in plain PyTorch" in line


@pytest.mark.skipif(bool(ops.WITHOUT_OP["cpu"]), reason="the compiled op is not built")
def test_status_and_silence_with_the_op():
    assert "cpu: compiled op" in run("ops.py", cwd=ROOT).stdout
    process = run("-c", USE, cwd=ROOT)
    assert process.stdout == "(1, 3, 16)\n" and process.stderr == ""


# The module and the sine embeddings


def test_module_starts_as_deformable_detr():
    """Offsets point in the compass directions, point p at p + 1 cells; samples weigh the same; values are projected."""
    module = MSDeformAttn(32, 8, 2, 4)
    assert (module.sampling_offsets.weight == 0).all() and (module.attention_weights.weight == 0).all()
    offsets = module.sampling_offsets.bias.view(8, 2, 4, 2)
    directions = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    expected = directions[:, None, None] * torch.arange(1, 5)[:, None]
    torch.testing.assert_close(offsets, expected.expand(8, 2, 4, 2).float())
    assert (module.attention_weights.bias == 0).all() and (module.value_proj.bias == 0).all()
    assert (module.output_proj.bias == 0).all()


def test_module_samples_around_points_and_within_boxes():
    """One head, identity projections, tokens that hold their own position: the output is the mean sampled position."""
    height, width = 64, 32
    module = MSDeformAttn(2, 1, 1, 4).double()
    with torch.no_grad():
        for projection in (module.value_proj, module.output_proj):
            projection.weight.copy_(torch.eye(2))
        module.sampling_offsets.bias.copy_(torch.tensor([1.0, 2.0]).repeat(4))
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    tokens = torch.stack([x, y], -1).reshape(1, -1, 2).double()
    query = torch.zeros(1, 2, 2).double()
    points = torch.tensor([[[0.5, 0.25], [0.3, 0.7]]]).double()
    found = module(query, points, tokens, [(height, width)])
    torch.testing.assert_close(found, points + torch.tensor([1 / width, 2 / height]).double())
    boxes = torch.tensor([[[0.5, 0.25, 0.2, 0.4], [0.3, 0.7, 0.1, 0.1]]]).double()
    found = module(query, boxes, tokens, [(height, width)])
    torch.testing.assert_close(found, boxes[..., :2] + torch.tensor([1.0, 2.0]).double() / 4 * 0.5 * boxes[..., 2:])


def test_sine_embedding():
    found = sine_embedding(torch.tensor([0.25, 1.0], dtype=torch.float64), 4)
    angles = torch.tensor([[math.pi / 2, math.pi / 200], [2 * math.pi, math.pi / 50]], dtype=torch.float64)
    expected = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # sin and cos in turn
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)


def test_sine_position_and_box_order():
    """Half the channels for y and then half for x; a box's are y, x, w, h."""
    position = sine_position(3, 5, 8, like=torch.zeros(1, dtype=torch.float64)).view(3, 5, 8)
    rows = sine_embedding(torch.tensor([1, 2, 3]).double() / (3 + 1e-6), 4)
    columns = sine_embedding(torch.tensor([1, 2, 3, 4, 5]).double() / (5 + 1e-6), 4)
    assert position.dtype == torch.float64
    torch.testing.assert_close(position[..., :4], rows[:, None].expand(3, 5, 4))
    torch.testing.assert_close(position[..., 4:], columns[None].expand(3, 5, 4))
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = torch.cat([sine_embedding(box[i], 16) for i in (1, 0, 2, 3)])
    torch.testing.assert_close(sine_box(box, 32), expected)
