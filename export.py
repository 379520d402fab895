"""Exports a checkpoint's model, with post-processing, as one file for other programs: .pt2 (torch.export) or .onnx."""

import argparse
import logging
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from backbone import Swin
from checkpoint import load_model
from cli import positive, require_compiler, run_program
from config import InputError
from decoder import masks
from detections import best_queries
from di import gather_tokens

ONNX = ("onnx", "onnxscript", "onnxruntime")  # packages that .onnx needs
LARGEST, MOST = 64, 64  # bounds of a dynamic side, in units of 32 pixels, and of a dynamic batch


class Detector(nn.Module):
    """What is exported: images in, detections out."""

    def __init__(self, model, max_detections=100, precision=None):
        super().__init__()
        self.model, self.max_detections, self.precision = model, max_detections, precision

    def forward(self, images):
        """images (B, 3, H, W) RGB in [0, 1], H and W multiples of 32.

        Returns, best first, scores (B, N), labels (B, N) int64, boxes (B, N, 4) xyxy in pixels of the images, and mask
        logits (B, N, H/4, W/4): what `postprocess` gives for these images, but for the masks' size and threshold.
        """
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            outputs = self.model(images)
        scores, labels, query, boxes = best_queries(outputs, self.max_detections)
        height, width = images.shape[2:]
        boxes = boxes.float() * torch.stack([boxes.new_full((), n) for n in (width, height, width, height)])
        logits = masks(outputs | {"mask_embeddings": gather_tokens(outputs["mask_embeddings"], query)}).float()
        full = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        inside = (full > 0).to(full)
        quality = (full.sigmoid() * inside).sum((2, 3)) / (inside.sum((2, 3)) + 1e-6)
        scores, order = (scores * quality).topk(scores.shape[1], dim=1)
        logits = gather_tokens(logits.flatten(2), order).unflatten(2, logits.shape[2:])
        return scores, labels.gather(1, order), gather_tokens(boxes, order), logits


def dynamic_sizes(config):
    """What may differ between calls, for torch.export: the batch, and both sides in steps of 32 pixels.

    The smallest side is that of a square whose tokens suffice for the first selection, and of which every map has more
    than one cell: torch.export makes a case of its own of sizes of 1.
    """
    tokens = lambda n: sum((n * 32 // stride) ** 2 for stride in (8, 16, 32, 64))  # noqa: E731
    least = next(n for n in range(3, LARGEST) if tokens(n) >= config.selections[0])
    batch = Dim("batch", max=MOST)
    height, width = (Dim(name, min=least, max=LARGEST) for name in ("height", "width"))
    return {"images": {0: batch, 2: 32 * height, 3: 32 * width}}, 32 * least


def trace(detector, example, dynamic):
    """The detector as a torch.export program, traced on `example` (B, 3, H, W); `dynamic`: as torch.export takes it, or
    None for that size alone.
    """
    with torch.no_grad():
        return torch.export.export(detector, (example,), dynamic_shapes=dynamic, strict=False)


def write(program, path, compiled=False):
    """Write a traced program to the file, in the format of its suffix; `compiled`: ahead of time, for this machine."""
    if path.suffix == ".onnx":
        names = {"input_names": ["images"], "output_names": ["scores", "labels", "boxes", "masks"]}
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of every constant that it does not fold
        torch.onnx.export(program, dynamo=True, verbose=False, **names).save(path)
    elif compiled:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        warnings.filterwarnings("ignore", "No complete tensor found")  # it is about weights that are not on the CPU
        torch.export.save(program, path)


def open_file(path, compiled=False):
    """A function from images to detections that runs a file of `write`."""
    if path.suffix == ".onnx":
        import onnxruntime  # only here: an extra

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]
    return torch._inductor.aoti_load_package(str(path)) if compiled else torch.export.load(path).module()


def largest_difference(expected, found):
    """Between two results for the same images: of scores, boxes and mask logits, each detection with the one that is
    most like it, since scores that are nearly equal may come in either order.
    """
    worst = [0.0, 0.0, 0.0]
    for b in range(len(expected[0])):
        ours, theirs = (
            torch.cat([scores[b, :, None], 1e3 * labels[b, :, None], boxes[b] / 1e3, masks[b].flatten(1) / 1e3], 1)
            for scores, labels, boxes, masks in (expected, found)
        )
        twin = torch.cdist(ours, theirs, p=torch.inf).argmin(1)
        for i, (one, other) in enumerate(zip(expected[::2] + expected[3:], found[::2] + found[3:], strict=True)):
            worst[i] = max(worst[i], (one[b] - other[b][twin]).abs().max().item())
    return worst


def check_output(path, compiled, half):
    """Raise InputError unless the file can be written in the format that its suffix names, with what is installed."""
    if path.suffix not in (".pt2", ".onnx"):
        raise InputError(f"{path}: the suffix says the format; give a file that ends in .pt2 or .onnx")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create it first")
    if path.suffix == ".onnx" and (compiled or half):
        raise InputError(f"{path}: {'--compile' if compiled else '--half'} is for .pt2")
    if compiled:
        require_compiler("--compile", torch.device("cpu"))
    if path.suffix == ".onnx" and (absent := [name for name in ONNX if find_spec(name) is None]):
        raise InputError(f"{path}: needs {', '.join(absent)}; python -m pip install {' '.join(absent)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint of train.py or convert.py")
    parser.add_argument("output", metavar="OUT", help="file to write: OUT.pt2 for PyTorch, OUT.onnx for other runtimes")
    parser.add_argument("--max-detections", type=positive, default=100, metavar="N", help="per image (default: 100)")
    parser.add_argument(
        "--size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="images of this one size, in multiples of 32 pixels, one at a time (default: any batch and size; a Swin "
        "backbone needs this flag, since its windows depend on the size)",
    )
    parser.add_argument(
        "--half", action="store_true", help="for .pt2: compute in bfloat16, boxes and scores in float32"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="for .pt2 and with --size: compile ahead of time, for this machine; takes minutes",
    )
    args = parser.parse_args()

    path = Path(args.output)
    check_output(path, args.compile, args.half)
    if args.compile and not args.size:  # for any size the compiler had not ended after 12 minutes, with preset tiny
        raise InputError("--compile needs --size: compiling for any size takes too long; e.g. --size 800 1344")
    if args.size and (args.size[0] % 32 or args.size[1] % 32):
        raise InputError(f"--size {args.size[0]} {args.size[1]}: both must be multiples of 32")
    model, _ = load_model(args.checkpoint)
    if not args.size and isinstance(model.backbone, Swin):
        raise InputError("--size is needed for a Swin backbone, whose windows depend on the size; e.g. --size 800 1344")
    dynamic, least = (None, None) if args.size else dynamic_sizes(model.config)
    sizes = (
        [(1, *args.size)] if args.size else [(1, least, least), (2, least + 32, least), (1, least + 64, least + 128)]
    )
    detector = Detector(model, args.max_detections, torch.bfloat16 if args.half else None).eval()
    begin = time.perf_counter()
    with torch.no_grad():
        program = trace(detector, torch.rand(2 if dynamic else 1, 3, *sizes[-1][1:]), dynamic)
        write(program, path, args.compile)
        print(f"{path}: written in {time.perf_counter() - begin:.0f} s, {path.stat().st_size / 1e6:.0f} MB")
        run = open_file(path, args.compile)
        for batch, height, width in sizes:
            images = torch.rand(batch, 3, height, width)
            found = largest_difference(detector(images), run(images))
            shown = ", ".join(f"{x:.1e} in {name}" for x, name in zip(found, ("scores", "boxes", "masks"), strict=True))
            print(f"{batch} x {height} x {width}: largest difference from the model {shown}")


if __name__ == "__main__":
    run_program(main)
