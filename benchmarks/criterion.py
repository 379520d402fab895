"""Times the criterion on random outputs and counts its operators; compares with another checkout: python -m
benchmarks.criterion.
"""

import argparse
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import beside
from losses import SetCriterion
from model import PRESETS  # PRESETS is there in every checkout


class Calls(TorchDispatchMode):
    """Counts operator calls."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


def random_targets(batch_size, height, width, num_classes, instances, device):
    """Targets as `train.py` has them, whose masks fill their boxes; the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    y, x = ((torch.arange(size) + 0.5) / size for size in (height, width))
    targets = []
    for _ in range(batch_size):
        sides = 0.05 + 0.4 * torch.rand(instances, 2, generator=generator)
        centres = sides / 2 + (1 - sides) * torch.rand(instances, 2, generator=generator)
        columns, rows = ((p - centres[:, i, None]).abs() < sides[:, i, None] / 2 for i, p in enumerate((x, y)))
        labels = torch.randint(num_classes, (instances,), generator=generator)
        target = {
            "labels": labels,
            "boxes": torch.cat([centres, sides], 1),
            "masks": rows[:, :, None] & columns[:, None],
        }
        targets.append({name: value.to(device) for name, value in target.items()})
    return targets


def random_outputs(batch_size, height, width, config, n, device, dtype):
    """What the model gives in training for images of this size, with denoising queries for n instances each; and
    a list of the tensors that are its leaves.
    """
    generator, leaves = torch.Generator().manual_seed(0), []

    def leaf(*shape, dtype=dtype):
        leaves.append(torch.rand(batch_size, *shape, generator=generator).to(device, dtype).requires_grad_())
        return leaves[-1]

    def predictions(queries, pixels=None):
        found = {"pred_logits": leaf(queries, config.num_classes), "pred_boxes": leaf(queries, 4, dtype=torch.float32)}
        if pixels is not None:
            embeddings = leaf(queries, config.hidden_dim) - 0.5
            masks = torch.einsum("bqc,bchw->bqhw", embeddings, pixels)
            # "pred_masks" and "pixels" are for checkouts up to commit de70fc7.
            found |= {"mask_embeddings": embeddings, "pixel_features": pixels, "pred_masks": masks, "pixels": pixels}
        return found

    def part(layer, queries):
        return {name: x if "pixel" in name else x[:, queries] for name, x in layer.items()}

    first, queries, groups = config.selections[0], config.selections[-1], config.denoising_queries // n
    before, after = (leaf(config.hidden_dim, height // 4, width // 4) - 0.5 for _ in range(2))  # F and F'
    pixels = [before, before] + [after] * (config.decoder_layers - 1)
    layers = [predictions(groups * n + queries, features) for features in pixels]
    matching, denoised = ([part(x, some) for x in layers] for some in (slice(groups * n, None), slice(groups * n)))
    outputs = matching[-1] | {"aux_outputs": matching[:-1], "interm_outputs": predictions(first, before)}
    outputs["di_outputs"] = [predictions(first) for _ in range(config.interaction_layers)]
    if groups:
        outputs["dn_outputs"] = denoised[-1] | {"aux_outputs": denoised[:-1], "num_groups": groups}
    return outputs, leaves


def prepare(args):
    """Two functions: one counts the operators of all passes, the other takes their times."""
    dtype, config = beside.set_precision(args) or torch.float32, PRESETS[args.preset]
    criterion = SetCriterion(config)

    def run(outputs, leaves, targets, backward):
        with torch.set_grad_enabled(backward):
            terms = criterion(outputs, targets)
            loss = sum(terms.values())
        if backward:
            # `backward` would add to the gradients of the last run. The products that are the masks stay for the next.
            torch.autograd.grad(loss, leaves, retain_graph=True)
        assert loss.isfinite()  # waits for the GPU

    passes = {}
    for n in args.instances:
        problem = random_outputs(args.batch_size, *args.size, config, n, args.device, dtype)
        targets = random_targets(args.batch_size, *args.size, config.num_classes, n, args.device)
        for name, backward in (("forward", False), ("forward and backward", True)):
            passes[f"{n} instances, {name}"] = partial(run, *problem, targets, backward)

    def untimed():
        counts = {}
        for name, one in passes.items():
            with Calls() as calls:
                one()
            counts[f"{name}, operator calls"] = calls.count
        return counts

    def measure():
        times = {name: beside.timed(one, args.device) for name, one in passes.items()}
        return {f"{name}, {kind}": value for name, found in times.items() for kind, value in found.items()}

    return untimed, measure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    beside.add_arguments(parser, PRESETS)
    parser.set_defaults(batch_size=2)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1088], metavar=("HEIGHT", "WIDTH"), help="800 1088")
    parser.add_argument("--instances", type=int, nargs="+", default=[7, 60], help="of an image, default: 7 60")
    args = parser.parse_args()
    if args.compile:
        parser.error("--compile: the criterion is never compiled")
    if args.folder:
        beside.serve(*prepare(args))
    else:
        beside.compare("criterion", args, lambda folder: None)


if __name__ == "__main__":
    main()
