"""Times training steps on random images, part by part, and measures their memory: python -m benchmarks.train_step."""

import argparse
import resource
import sys
import time
from statistics import median

import torch
from torch import nn

from config import PRESETS
from losses import SetCriterion
from model import build_model
from train import parameter_groups

INSTANCES = 10  # of an image


def random_batch(batch_size, size, num_classes, device):
    """Images (3, size, size) in [0, 1] and targets as `train.py` has them, whose masks fill their boxes."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, size, size, generator=generator).to(device) for _ in range(batch_size)]
    pixels = (torch.arange(size) + 0.5) / size
    targets = []
    for _ in range(batch_size):
        sides = 0.05 + 0.4 * torch.rand(INSTANCES, 2, generator=generator)
        centres = sides / 2 + (1 - sides) * torch.rand(INSTANCES, 2, generator=generator)
        inside = (pixels - centres[..., None]).abs() < sides[..., None] / 2  # (n, 2, size): columns, rows
        targets.append(
            {
                "labels": torch.randint(num_classes, (INSTANCES,), generator=generator).to(device),
                "boxes": torch.cat([centres, sides], 1).to(device),
                "masks": (inside[:, 1, :, None] & inside[:, 0, None]).to(device),
            }
        )
    return images, targets


class Clock:
    """Adds the time since the last mark to the part of the step that ends there."""

    def __init__(self):
        self.parts, self.waits = {}, False

    def start(self):
        self.parts.clear()
        self.last = self.now()

    def now(self):
        if self.waits:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, part):
        now = self.now()
        self.parts[part] = self.parts.get(part, 0) + now - self.last
        self.last = now

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
        for interaction in model.interactions:
            interaction.register_forward_hook(lambda *args: self.mark("DI, forward"))
        model.register_forward_hook(lambda *args: self.mark("decoder and BATO, forward"))
        criterion.matcher.register_forward_pre_hook(lambda *args: self.mark("losses, forward"))
        criterion.matcher.register_forward_hook(lambda *args: self.mark("matching"))


def peak_memory(device):
    """The most bytes held so far: of GPU memory in tensors, or of main memory by the whole process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=PRESETS, default="dimaskdino_r50", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=1024, help="side of the images in pixels, default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--grad-checkpoint", action="store_true", help="compute layers twice instead of storing them")
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"], help="default here: %(default)s")
    parser.add_argument("--steps", type=int, help="timed steps, after one untimed: 1 on the CPU, 20 on a GPU")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("benchmarks.train_step: torch sees no GPU; run it with --device cpu")
    steps = args.steps or (20 if on_gpu else 1)

    torch.manual_seed(0)
    model = build_model(args.preset, grad_checkpoint=args.grad_checkpoint).to(args.device).train()
    criterion, clock = SetCriterion(model.config), Clock()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 1e-5, weight_decay=0.05), fused=True)
    images, targets = random_batch(args.batch_size, args.size, model.config.num_classes, args.device)
    clock.watch(model, criterion)

    def step():
        clock.start()
        with torch.autocast(args.device, torch.bfloat16, enabled=on_gpu):
            outputs = model(images, targets)
        terms = criterion(outputs, targets)
        loss = sum(criterion.weights[name] * term for name, term in terms.items())
        clock.mark("losses, forward")
        optimizer.zero_grad()
        loss.backward()
        clock.mark("backbone, backward")
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        clock.mark("clipping and optimizer")
        return loss

    def seconds():
        begin = time.perf_counter()
        assert step().isfinite()  # waits for the GPU
        return time.perf_counter() - begin

    seconds()  # untimed: the optimizer's state, the choice of convolution algorithms
    taken = median(seconds() for _ in range(steps))
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; {'bfloat16 autocast' if on_gpu else 'float32'}")
    checkpointed = "with" if args.grad_checkpoint else "without"
    print(f"{args.preset}, {args.batch_size} x {args.size} x {args.size}, {checkpointed} gradient checkpointing")
    memory = peak_memory(args.device) / 1e9
    print(f"{taken:.3f} s per step, {args.batch_size / taken:.3f} images/s, peak {memory:.2f} GB")
    if on_gpu:
        clock.waits = True  # the parts from a step that waits for the GPU at every mark
        seconds()
    total = sum(clock.parts.values())
    print("\n| part | seconds | share |\n|---|---|---|")
    for part, time_of_part in clock.parts.items():
        print(f"| {part} | {time_of_part:.4f} | {time_of_part / total:.1%} |")


if __name__ == "__main__":
    main()
