"""Times the detection of objects in an image, and compares with another checkout: python -m benchmarks.inference."""

import argparse
from pathlib import Path

import torch

from benchmarks import beside
from model import PRESETS, build_model  # PRESETS is there in every checkout

try:
    from detections import postprocess
except ImportError:  # a checkout up to commit de70fc7
    from model import postprocess

OUTPUT = (480, 653)  # size of the image that boxes and masks are wanted in


def prepare(args):
    """Two functions: one detects objects and keeps the detections in a file, the other returns the figures of it."""
    dtype, size = beside.set_precision(args), tuple(args.size)
    torch.manual_seed(0)
    model = build_model(args.preset).eval()
    beside.same_weights(model, args.folder)
    model.to(args.device)
    if args.compile:
        from cli import compile_layers  # only here: not every checkout has it

        compile_layers(model, torch.device(args.device))
    images = torch.rand(args.batch_size, 3, *size, generator=torch.Generator().manual_seed(0)).to(args.device)
    found = {}

    def predict():
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            found["outputs"] = model(images)

    def finish():
        found["detections"] = postprocess(found.pop("outputs"), [size] * len(images), [OUTPUT] * len(images))

    @torch.inference_mode()
    def measure():
        alone, after = (beside.timed(function, args.device) for function in (predict, finish))
        figures = {f"{key}, model alone": value for key, value in alone.items()}
        figures |= {key: value + after[key] for key, value in alone.items()}
        figures["images per second"] = args.batch_size / figures["seconds"]
        return figures | {"peak memory, GB": beside.peak_memory(args.device)}

    def untimed():
        measure()
        measure()
        torch.save(found["detections"], Path(args.folder) / f"{str(Path.cwd()).replace('/', '_')}.detections")
        return {}

    return untimed, measure


def report(folder):
    """Prints how far the detections of two checkouts are from each other."""
    paths = sorted(Path(folder).glob("*.detections"))
    if len(paths) < 2:
        return
    print("\nlargest differences of the detections:")
    for a, b in zip(*(torch.load(path, map_location="cpu") for path in paths), strict=True):
        masks = (a["masks"] != b["masks"]).sum((1, 2)).max().item()
        scores, boxes = ((a[name] - b[name]).abs().max().item() for name in ("scores", "boxes"))
        labels = (a["labels"] != b["labels"]).sum().item()
        print(f"scores {scores:.2g}, boxes {boxes:.2g} pixels, {labels} labels, {masks} pixels of a mask")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    beside.add_arguments(parser, PRESETS)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1088], metavar=("HEIGHT", "WIDTH"), help="800 1088")
    args = parser.parse_args()
    if args.folder:
        beside.serve(*prepare(args))
    else:
        beside.compare("inference", args, report)


if __name__ == "__main__":
    main()
