"""Exports a checkpoint's model, with post-processing, as one file for other programs: .pt2 (torch.export) or .onnx."""

import argparse
import io
import json
import logging
import re
import shutil
import tempfile
import time
import warnings
from importlib.util import find_spec
from itertools import count
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
from files import explaining, write_whole

ONNX = ("onnx", "onnxscript", "onnxruntime")  # packages that .onnx needs
MOST = 64  # images in a batch


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


def dynamic_sizes(config, largest=4096):
    """What may differ between calls: as torch.export takes it, and {name: [smallest, largest]} in images and pixels.

    The smallest side is that of a square whose tokens suffice for the first selection, and of which every map has more
    than one cell, as a map of one is a case of its own to torch.export. Raises InputError where `largest` is too small.
    """
    least = next(n for n in count(3) if sum((32 * n // s) ** 2 for s in (8, 16, 32, 64)) >= config.selections[0])
    if largest // 32 <= least:
        raise InputError(f"--max-size {largest}: must be {32 * least + 32} or more for this model; or give --size")
    height, width = (Dim(name, min=least, max=largest // 32) for name in ("height", "width"))
    dynamic = {"images": {0: Dim("batch", max=MOST), 2: 32 * height, 3: 32 * width}}
    return dynamic, {"batch": [1, MOST]} | dict.fromkeys(("height", "width"), [32 * least, largest // 32 * 32])


def write(program, path, bounds, compiled=False):
    """Write a torch.export program to the file, in the format of its suffix, with the bounds of `dynamic_sizes` in its
    metadata; `compiled`: ahead of time, for this machine. The file is written whole or not at all. Raises OSError.
    """
    data, text = io.BytesIO(), json.dumps(bounds)
    if path.suffix == ".onnx":
        names = {"input_names": ["images"], "output_names": ["scores", "labels", "boxes", "masks"]}
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of every constant that it does not fold
        proto = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
        proto.metadata_props.add(key="bounds", value=text)
        data.write(proto.SerializeToString())
    elif compiled:  # what compiles ahead of time has no public name yet
        configs = {"aot_inductor.metadata": {"bounds": text}}
        torch._inductor.aoti_compile_and_package(program, package_path=data, inductor_configs=configs)
    else:
        warnings.filterwarnings("ignore", "No complete tensor found")  # it is about weights that are not on the CPU
        torch.export.save(program, data, extra_files={"bounds": text})
    write_whole(path, lambda temporary: temporary.write_bytes(data.getbuffer()))


def open_file(path, compiled=False):
    """A function from images to detections that runs a file of `write`."""
    if path.suffix == ".onnx":
        import onnxruntime  # only here: an extra

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]
    if compiled:
        return torch._inductor.aoti_load_package(str(path))
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def largest_difference(expected, found):
    """Between two results for the same images, {name: number} of scores, boxes and masks: each detection with the one
    that is most like it, since scores that are nearly equal may come in either order.
    """
    ours, theirs = ((s[..., None], b, m.flatten(2), n[..., None]) for s, n, b, m in (expected, found))  # (B, N, values)
    weighted = [torch.cat([s, b / 1e3, m / 1e3, n * 1e3], 2) for s, b, m, n in (ours, theirs)]
    twin = torch.cdist(*weighted, p=torch.inf).argmin(2)
    pairs = zip(("scores", "boxes", "masks"), ours[:3], theirs[:3], strict=True)
    return {name: (one - gather_tokens(other, twin)).abs().max().item() for name, one, other in pairs}


def check_output(path, compiled, half):
    """Raise InputError unless the file can be written in the format that its suffix names, with what is installed."""
    if path.suffix not in (".pt2", ".onnx"):
        raise InputError(f"{path}: the suffix says the format; give a file that ends in .pt2 or .onnx")
    if path.suffix == ".onnx" and (compiled or half):
        raise InputError(f"{path}: {'--compile' if compiled else '--half'} is for .pt2")
    if path.suffix == ".onnx" and (absent := [name for name in ONNX if find_spec(name) is None]):
        raise InputError(f"{path}: needs {', '.join(absent)}; python -m pip install {' '.join(absent)}")
    if compiled:
        require_compiler("--compile", torch.device("cpu"))
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    with explaining(OSError, f"{path}: cannot be written", "choose another place"):
        tempfile.TemporaryFile(dir=path.resolve().parent).close()
        there = path.read_bytes() if path.exists() else b""
    # Ours have bounds in their metadata, in which --compile escapes the quotes.
    if there and not re.search(rb'"batch\\?": \[1, ', there):
        raise InputError(f"{path}: exists, and only a file of export.py is replaced; choose another name")


def parse_arguments():
    """The flags as a namespace, checked."""
    sides = "in steps of 32 pixels from 96, or what the first selection needs (192 for `dimaskdino_r50`), to --max-size"
    about = f"{__doc__} A file takes 1 to {MOST} images at a time, with sides {sides}; its metadata holds these bounds."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="A checkpoint of train.py or convert.py.")
    add("output", metavar="OUT", type=Path, help="The file to write: OUT.pt2 for PyTorch, OUT.onnx for other runtimes.")
    add("--max-detections", type=positive, default=100, metavar="N", help="Detections of an image (default: 100).")
    add("--max-size", type=positive, default=4096, metavar="N", help="The largest side in pixels (default: 4096).")
    size = "Take one image at a time, of this size, in multiples of 32. A Swin backbone and sides of 64 need this flag."
    add("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help=size)
    add("--half", action="store_true", help="For .pt2: compute in bfloat16, boxes and scores in float32.")
    ahead = "For .pt2 and with --size: compile ahead of time, for this machine, which takes minutes."
    add("--compile", action="store_true", help=ahead)
    args = parser.parse_args()
    if args.compile and not args.size:  # for any size the compiler had not ended after 12 minutes, with preset tiny
        raise InputError("--compile needs --size: compiling for any size takes too long; e.g. --size 800 1344")
    if args.size and (args.size[0] % 32 or args.size[1] % 32):
        raise InputError(f"--size {args.size[0]} {args.size[1]}: both must be multiples of 32")
    check_output(args.output, args.compile, args.half)
    return args


@torch.no_grad()
def main():
    args = parse_arguments()
    path = args.output
    model, _ = load_model(args.checkpoint)
    if not args.size and isinstance(model.backbone, Swin):
        raise InputError("--size is needed for a Swin backbone, whose windows depend on the size; e.g. --size 800 1344")
    needed = sum(value.nbytes for value in model.state_dict().values())
    if (free := shutil.disk_usage(path.resolve().parent).free) < needed:
        raise InputError(f"{path}: {free / 1e6:.0f} MB are free, {needed / 1e6:.0f} MB are needed; make room")
    if args.size:
        dynamic, (height, width) = None, args.size
        bounds, sizes = {"batch": [1, 1], "height": [height] * 2, "width": [width] * 2}, [(1, 3, height, width)]
    else:
        dynamic, bounds = dynamic_sizes(model.config, args.max_size)
        least, most = bounds["height"]
        sizes = [(1, 3, least, least), (2, 3, least + 32, least), (2, 3, min(least + 64, most), min(least + 128, most))]
    detector = Detector(model, args.max_detections, torch.bfloat16 if args.half else None).eval()
    begin = time.perf_counter()
    program = torch.export.export(detector, (torch.rand(sizes[-1]),), dynamic_shapes=dynamic, strict=False)
    with explaining(OSError, f"{path}: cannot be written", "nothing is left of it"):
        write(program, path, bounds, args.compile)
    print(f"{path}: written in {time.perf_counter() - begin:.0f} s, {path.stat().st_size / 1e6:.0f} MB")
    ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in bounds.items())
    print(f"takes {ranges}, in steps of 32 pixels")
    run = open_file(path, args.compile)
    for images in map(torch.rand, sizes):
        found = largest_difference(detector(images), run(images))
        shown = ", ".join(f"{value:.1e} in {name}" for name, value in found.items())
        B, _, H, W = images.shape
        print(f"{B} x {H} x {W}: largest difference from the model {shown}")


if __name__ == "__main__":
    run_program(main)
