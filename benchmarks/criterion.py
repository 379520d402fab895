"""Times the criterion on random outputs of two images and counts its calls: python -m benchmarks.criterion.

With --beside DIR, another checkout's criterion runs in turn with this one, on the same tensors.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import PRESETS


class Calls(TorchDispatchMode):
    """Counts operator calls."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


def random_problem(config, n, height, width, device, batch_size=2):
    """What the model gives in training for images of this size with n instances each, and their targets."""

    def predictions(queries, masks=True):
        shapes = {"pred_logits": [config.num_classes], "pred_boxes": [4], "pred_masks": [height // 4, width // 4]}
        found = {name: torch.rand(batch_size, queries, *shape, device=device) for name, shape in shapes.items()}
        return {name: x.requires_grad_() for name, x in found.items() if masks or name != "pred_masks"}

    first, queries, groups = config.selections[0], config.selections[-1], config.denoising_queries // n
    layers = [predictions(groups * n + queries) for _ in range(config.decoder_layers + 1)]
    matching = [{name: x[:, groups * n :] for name, x in layer.items()} for layer in layers]
    denoised = [{name: x[:, : groups * n] for name, x in layer.items()} for layer in layers]
    outputs = matching[-1] | {"aux_outputs": matching[:-1], "interm_outputs": predictions(first)}
    outputs["di_outputs"] = [predictions(first, masks=False) for _ in range(config.interaction_layers)]
    if groups:
        outputs["dn_outputs"] = denoised[-1] | {"aux_outputs": denoised[:-1], "num_groups": groups}
    targets = []
    for _ in range(batch_size):
        boxes = 0.1 + 0.4 * torch.rand(n, 4, device=device)
        y, x = ((torch.arange(size, device=device) + 0.5) / size for size in (height, width))
        rows, columns = ((p - boxes[:, i, None]).abs() < boxes[:, i + 2, None] / 2 for p, i in ((y, 1), (x, 0)))
        labels = torch.randint(config.num_classes, (n,), device=device)
        targets.append({"labels": labels, "boxes": boxes, "masks": rows[:, :, None] & columns[:, None]})
    return outputs, targets


def load_criterion(folder, config):
    """SetCriterion of the checkout in this folder."""
    for name in ("losses", "matcher"):
        sys.modules.pop(name, None)
    if not (Path(folder) / "losses.py").exists():
        sys.exit(f"benchmarks.criterion: {folder}: has no losses.py; give the root of a checkout")
    sys.path.insert(0, folder)
    criterion = importlib.import_module("losses").SetCriterion(config)
    sys.path.pop(0)
    return criterion


def seconds(criterion, outputs, targets, backward):
    """Time of the terms, and of their gradient by all predictions if `backward`."""
    begin = time.perf_counter()
    with torch.set_grad_enabled(backward):
        terms = criterion(outputs, targets)
        loss = sum(criterion.weights[name] * term for name, term in terms.items())
    if backward:
        loss.backward()
    assert loss.isfinite()  # waits for the GPU
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="dimaskdino_r50", help="default: %(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1088), help="height and width, default: 800 1088")
    parser.add_argument("--instances", type=int, nargs="+", default=[7, 60], help="of an image, default: 7 60")
    parser.add_argument("--beside", metavar="DIR", help="another checkout, whose criterion runs in turn with this one")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, after one untimed; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    folders = [args.beside, "."] if args.beside else ["."]
    criteria = {folder: load_criterion(folder, config) for folder in folders}
    torch.manual_seed(0)
    print("| instances | pass | checkout | operator calls | seconds |\n|---|---|---|---|---|")
    for n in args.instances:
        problem = random_problem(config, n, *args.size, args.device)
        for name, backward in (("forward", False), ("forward and backward", True)):
            calls, times = {}, {folder: [] for folder in folders}
            for folder, criterion in criteria.items():
                with Calls() as counter:
                    seconds(criterion, *problem, backward)
                calls[folder] = counter.count
            for _ in range(args.repeats):
                for folder, criterion in criteria.items():
                    times[folder].append(seconds(criterion, *problem, backward))
            for folder in folders:
                taken = f"{median(times[folder]):.3f} ({min(times[folder]):.3f} to {max(times[folder]):.3f})"
                print(f"| {n} | {name} | {folder} | {calls[folder]} | {taken} |", flush=True)


if __name__ == "__main__":
    main()
