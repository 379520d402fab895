"""Times the compiled deformable attention against plain PyTorch, in one run: python -m benchmarks.ms_deform_attn."""

import argparse
import sys
import time
from functools import partial
from statistics import median

import torch

from attention import MSDeformAttn
from ops import BUILD, WITHOUT_OP, ms_deform_attn, ms_deform_attn_pytorch

LEVEL_SHAPES = [(100, 136), (50, 68), (25, 34), (13, 17)]  # an image of 800 x 1088 pixels: 18,071 tokens
HEADS, CHANNELS, POINTS = 8, 32, 4


def make_inputs(kind, batch, dtype, device):
    """value, locations and weights as they are when training begins: `kind` is "encoder" (every token is a query and
    looks around its own place) or "decoder" (300 boxes). Offsets are the initial ones plus normal noise of one cell.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, levels = sum(height * width for height, width in LEVEL_SHAPES), len(LEVEL_SHAPES)
    if kind == "encoder":
        centres = [
            torch.stack([(torch.arange(height * width) % width + 0.5) / width,
                         (torch.arange(height * width) // width + 0.5) / height], -1)
            for height, width in LEVEL_SHAPES
        ]  # fmt: skip
        centres, queries = torch.cat(centres).expand(batch, -1, -1), tokens
    else:
        centres, queries = torch.rand(batch, 300, 2, generator=generator), 300
    shape = (batch, queries, HEADS, levels, POINTS)
    module = MSDeformAttn(HEADS * CHANNELS, HEADS, levels, POINTS)
    offsets = module.sampling_offsets.bias.detach().view(HEADS, levels, POINTS, 2)
    offsets = offsets + torch.randn(*shape, 2, generator=generator)
    if kind == "encoder":
        units = 1 / torch.tensor([(width, height) for height, width in LEVEL_SHAPES])[:, None]  # (L, 1, 2)
    else:
        units = (0.5 * torch.rand(batch, queries, 2, generator=generator) * 0.5 / POINTS)[:, :, None, None, None]
    locations = centres[:, :, None, None, None] + offsets * units
    weights = torch.randn(shape, generator=generator).flatten(3).softmax(-1).view(shape)
    value = torch.randn(batch, tokens, HEADS, CHANNELS, generator=generator)
    return value.to(device, dtype), locations.to(device), weights.to(device)  # as under autocast


def seconds(function, device):
    """The wall time of a call, and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def copy_bandwidth(device):
    """Bytes per second, read and written together, of copies far larger than the caches."""
    source = torch.zeros(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    times = [seconds(lambda: target.copy_(source), device)[0] for _ in range(10)]
    return 2 * source.numel() / median(times[2:])


def measure(value, locations, weights, rounds, device):
    """Median seconds {function: (forward, backward)} of the op and of plain PyTorch, called in turn."""
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    grad_output = torch.randn(value.shape[0], locations.shape[1], HEADS * CHANNELS, device=device).to(value.dtype)
    times, outputs = {ms_deform_attn_pytorch: [], ms_deform_attn: []}, {}
    for _ in range(2 + rounds):
        for function, of_function in times.items():
            forward, output = seconds(partial(function, value, LEVEL_SHAPES, locations, weights), device)
            backward, _ = seconds(partial(torch.autograd.grad, output, leaves, grad_output), device)
            of_function.append((forward, backward))
            outputs[function] = output.detach().float()
    assert (outputs[ms_deform_attn] - outputs[ms_deform_attn_pytorch]).abs().max() < 0.05, "op and fallback differ"
    return {
        function: tuple(median(part) for part in zip(*of_function[2:], strict=True))
        for function, of_function in times.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"], help="default here: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads, %(default)s")
    parser.add_argument("--rounds", type=int, help="timed calls of each function: 7 on the CPU, 50 on a GPU")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.ms_deform_attn: torch sees no GPU; run it with --device cpu")
    if WITHOUT_OP[args.device]:
        sys.exit(f"benchmarks.ms_deform_attn: the compiled op {WITHOUT_OP[args.device]}. Build it: {BUILD}")
    on_gpu = args.device == "cuda"
    torch.set_num_threads(args.threads)
    rounds = args.rounds or (50 if on_gpu else 7)
    machine = torch.cuda.get_device_name() if on_gpu else (
        f"CPU, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    )  # fmt: skip
    bandwidth = copy_bandwidth(args.device)
    print(f"{machine}; torch {torch.__version__}; copies move {bandwidth / 1e9:.1f} GB/s; median of {rounds} calls\n")
    print("floor: the time to read every argument and to write every result once, at the speed of the copies\n")
    print("| shape | batch | dtype | pass | plain PyTorch, ms | op, ms | ratio | floor / op |")
    print("|---|---|---|---|---|---|---|---|")
    ours = {}
    for kind in ("encoder", "decoder"):
        for batch in (1, 8) if on_gpu else (1,):
            for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
                value, locations, weights = make_inputs(kind, batch, dtype, args.device)
                result = measure(value, locations, weights, rounds, args.device)
                arguments = sum(x.numel() * x.element_size() for x in (value, locations, weights))
                output = batch * locations.shape[1] * HEADS * CHANNELS * value.element_size()
                moved = (arguments + output, 2 * arguments + output)  # backward: a gradient for every argument
                name = str(dtype).removeprefix("torch.")
                for label, part in (("forward", [0]), ("backward", [1]), ("both", [0, 1])):
                    plain, op = (
                        sum(result[function][i] for i in part) for function in (ms_deform_attn_pytorch, ms_deform_attn)
                    )
                    floor = sum(moved[i] for i in part) / bandwidth
                    ours[kind, batch, name, label] = op
                    row = f"| {kind} | {batch} | {name} | {label} | {plain * 1e3:.3f} | {op * 1e3:.3f}"
                    print(f"{row} | {plain / op:.1f} | {floor / op:.2f} |", flush=True)
    if on_gpu:
        print("\nbfloat16 over float32, the op's speed:")
        for (kind, batch, name, label), op in ours.items():
            if name == "bfloat16":
                print(f"  {kind}, batch {batch}, {label}: {ours[kind, batch, 'float32', label] / op:.2f}")


if __name__ == "__main__":
    main()
