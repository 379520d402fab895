"""Exports a checkpoint's model, with post-processing, as one file for other programs: .pt2 (torch.export) or .onnx."""

import argparse
import io
import json
import logging
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
from cli import positive, require_compiler, run_program, write_whole
from config import InputError
from decoder import masks
from detections import best_queries
from di import gather_tokens

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

    The batch, and both sides up to `largest`, in steps of 32 pixels. The smallest side is that of a square whose tokens
    suffice for the first selection, and of which every map has more than one cell: torch.export makes a case of its own
    of sizes of 1, as the coarsest map of 64 pixels has.
    """
    tokens = lambda n: sum((n * 32 // stride) ** 2 for stride in (8, 16, 32, 64))  # noqa: E731
    least = next(n for n in count(3) if tokens(n) >= config.selections[0])
    if largest // 32 <= least:
        raise InputError(f"--max-size {largest}: must be {32 * least + 32} or more for this model; or give --size")
    height, width = (Dim(name, min=least, max=largest // 32) for name in ("height", "width"))
    dynamic = {"images": {0: Dim("batch", max=MOST), 2: 32 * height, 3: 32 * width}}
    return dynamic, {"batch": [1, MOST]} | dict.fromkeys(("height", "width"), [32 * least, largest // 32 * 32])


def trace(detector, example, dynamic):
    """The detector as a torch.export program, traced on `example` (B, 3, H, W); `dynamic`: as torch.export takes it, or
    None for that size alone.
    """
    with torch.no_grad():
        return torch.export.export(detector, (example,), dynamic_shapes=dynamic, strict=False)


def write(program, path, bounds, compiled=False):
    """Write a traced program to the file, in the format of its suffix, with the bounds of `dynamic_sizes` in its
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
    if path.suffix == ".onnx" and (compiled or half):
        raise InputError(f"{path}: {'--compile' if compiled else '--half'} is for .pt2")
    if compiled:
        require_compiler("--compile", torch.device("cpu"))
    if path.suffix == ".onnx" and (absent := [name for name in ONNX if find_spec(name) is None]):
        raise InputError(f"{path}: needs {', '.join(absent)}; python -m pip install {' '.join(absent)}")
    if not path.resolve().parent.exists():
        raise InputError(f"{path}: its folder does not exist; create it first")
    try:
        tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")


def parse_arguments():
    """The flags as a namespace, checked."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__} Such a file takes batches of 1 to {MOST} images and sides in steps of 32 pixels, from "
        "96, or what the first selection needs (192 for the presets with a ResNet-50), up to --max-size. Sides of 64, "
        "of which a map has a single cell, torch.export does not trace together with larger ones: give --size. "
        "export.py prints these bounds, and they stand in the file's metadata, as bounds.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="A checkpoint of train.py or convert.py.")
    add("output", metavar="OUT", help="The file to write: OUT.pt2 for PyTorch, OUT.onnx for other runtimes.")
    add("--max-detections", type=positive, default=100, metavar="N", help="Detections of an image (default: 100).")
    add("--max-size", type=positive, default=4096, metavar="N", help="The largest side in pixels (default: 4096).")
    add(
        "--size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="Take images of this one size, in multiples of 32 pixels, one at a time (default: any batch and size). A "
        "Swin backbone needs this flag, since its windows depend on the size.",
    )
    add("--half", action="store_true", help="For .pt2: compute in bfloat16, boxes and scores in float32.")
    add(
        "--compile",
        action="store_true",
        help="For .pt2 and with --size: compile ahead of time, for this machine, which takes minutes.",
    )
    args = parser.parse_args()
    args.output = Path(args.output)
    if args.compile and not args.size:  # for any size the compiler had not ended after 12 minutes, with preset tiny
        raise InputError("--compile needs --size: compiling for any size takes too long; e.g. --size 800 1344")
    if args.size and (args.size[0] % 32 or args.size[1] % 32):
        raise InputError(f"--size {args.size[0]} {args.size[1]}: both must be multiples of 32")
    check_output(args.output, args.compile, args.half)
    return args


def main():
    args = parse_arguments()
    path = args.output
    model, _ = load_model(args.checkpoint)
    if not args.size and isinstance(model.backbone, Swin):
        raise InputError("--size is needed for a Swin backbone, whose windows depend on the size; e.g. --size 800 1344")
    needed = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if (free := shutil.disk_usage(path.resolve().parent).free) < needed:
        raise InputError(f"{path}: {free / 1e6:.0f} MB are free, {needed / 1e6:.0f} MB are needed; make room")
    if args.size:
        dynamic, sizes = None, [(1, *args.size)]
        bounds = {name: [size, size] for name, size in zip(("batch", "height", "width"), sizes[0], strict=True)}
    else:
        dynamic, bounds = dynamic_sizes(model.config, args.max_size)
        least, most = bounds["height"]
        sizes = [(1, least, least), (2, least + 32, least), (1, min(least + 64, most), min(least + 128, most))]
    detector = Detector(model, args.max_detections, torch.bfloat16 if args.half else None).eval()
    begin = time.perf_counter()
    with torch.no_grad():
        program = trace(detector, torch.rand(2 if dynamic else 1, 3, *sizes[-1][1:]), dynamic)
        try:
            write(program, path, bounds, args.compile)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); nothing is left of it") from None
        print(f"{path}: written in {time.perf_counter() - begin:.0f} s, {path.stat().st_size / 1e6:.0f} MB")
        print(
            "takes "
            + ", ".join(f"{name} {low} to {high}" for name, (low, high) in bounds.items())
            + ", in steps of 32 pixels"
        )
        run = open_file(path, args.compile)
        for batch, height, width in sizes:
            images = torch.rand(batch, 3, height, width)
            found = largest_difference(detector(images), run(images))
            shown = ", ".join(f"{x:.1e} in {name}" for x, name in zip(found, ("scores", "boxes", "masks"), strict=True))
            print(f"{batch} x {height} x {width}: largest difference from the model {shown}")


if __name__ == "__main__":
    run_program(main)
