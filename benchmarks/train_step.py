"""Times training steps on random images, part by part, and compares them with another checkout's: python -m
benchmarks.train_step. Operator calls are those of a whole step here; host waits and stored bytes those on a GPU.
"""

import argparse
import time

import torch
from torch import nn

from benchmarks import beside
from benchmarks.criterion import Calls, random_targets
from benchmarks.fake_gpu import FakeGPU
from losses import SetCriterion
from model import PRESETS, build_model  # PRESETS is there in every checkout
from train import backward, parameter_groups


def random_batch(batch_size, size, num_classes, instances, device):
    """Images (3, size, size) in [0, 1] and targets as `train.py` has them."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, size, size, generator=generator).to(device) for _ in range(batch_size)]
    return images, random_targets(batch_size, size, size, num_classes, instances, device)


class Clock:
    """Adds the time since the last mark to the part of the step that ends there, {part: seconds}, while it is on."""

    def __init__(self):
        self.parts, self.on = {}, False

    def watch(self, model, criterion):
        """Marks the ends of the modules in the forward and, by the gradients of their outputs, in the backward pass."""

        def after_backbone(module, args, maps):
            self.mark("backbone, forward")
            maps[-1].register_hook(lambda grad: self.mark("encoder, backward"))

        def after_encoder(module, args, output):
            self.mark("encoder, forward")
            output[0].register_hook(lambda grad: self.mark("losses, decoder, BATO and DI, backward"))

        model.backbone.register_forward_hook(after_backbone)
        model.encoder.register_forward_hook(after_encoder)
        model.register_forward_hook(lambda *args: self.mark("DI, decoder and BATO, forward"))
        criterion.matcher.register_forward_pre_hook(lambda *args: self.mark("losses, forward"))
        criterion.matcher.register_forward_hook(lambda *args: self.mark("matching"))
        criterion.register_forward_hook(lambda *args: self.mark("losses, forward"))

    def mark(self, part):
        if not self.on:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part:
            self.parts[part] = self.parts.get(part, 0) + now - self.last
        else:
            self.parts = {}
        self.last = now


def counts_on_gpu(args, dtype):
    """{figure: value} of forward pass and criterion on a stand-in for a GPU."""
    with torch.device("meta"):
        model = build_model(args.preset, grad_checkpoint=args.grad_checkpoint).train()
    with FakeGPU(model, dtype) as gpu:
        batch = random_batch(args.batch_size, args.size, model.config.num_classes, args.instances, "cuda")
        del gpu.waits[:]
        outputs = model(*batch)
        figures = {"stored by the model on a GPU, GB": sum(gpu.saved.values()) / 1e9}
        SetCriterion(model.config)(outputs, batch[1])
    return figures | {"host waits on a GPU": len(gpu.waits), "operator calls on a GPU, forward": gpu.calls}


def prepare(args):
    """Two functions that take training steps and return figures: what is counted; and time and memory of one step."""
    dtype = beside.set_precision(args)
    torch.manual_seed(0)
    model = build_model(args.preset, grad_checkpoint=args.grad_checkpoint)
    beside.same_weights(model, args.folder)
    model.to(args.device).train()
    criterion = SetCriterion(model.config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 1e-5), fused=True)
    batch = random_batch(args.batch_size, args.size, model.config.num_classes, args.instances, args.device)
    clock = Clock()
    if args.compile:
        from cli import compile_layers  # only here: not every checkout has it

        compile_layers(model, torch.device(args.device))
    else:
        clock.watch(model, criterion)  # its hooks would break the graph

    def step():
        clock.mark(None)
        optimizer.zero_grad()
        terms, _ = backward(model, criterion, [batch], dtype)
        clock.mark("backbone, backward")
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        assert terms["loss"].isfinite()  # waits for the GPU
        clock.mark("clipping and optimizer")

    def untimed():
        """Two steps: one whose operators are counted, and one that waits for the GPU at the end of every part."""
        counts = counts_on_gpu(args, dtype)
        if not args.compile:
            with Calls() as calls:
                step()
            counts["operator calls"] = calls.count
        clock.on = not args.compile
        step()
        clock.on = False
        return counts | {f"{part}, seconds": taken for part, taken in clock.parts.items()}

    def measure():
        return beside.timed(step, args.device) | {"peak memory, GB": beside.peak_memory(args.device)}

    return untimed, measure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    beside.add_arguments(parser, PRESETS)
    parser.add_argument("--size", type=int, default=1024, help="side of the images in pixels, default: %(default)s")
    parser.add_argument("--instances", type=int, default=10, help="of an image, default: %(default)s")
    parser.add_argument("--grad-checkpoint", action="store_true", help="compute layers twice instead of storing them")
    args = parser.parse_args()
    if args.folder:
        beside.serve(*prepare(args))
    else:
        beside.compare("train_step", args, lambda folder: None)


if __name__ == "__main__":
    main()
