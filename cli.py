"""What the programs share: the flags that name the data, devices and processes, and errors in one line."""

import argparse
import ctypes
import math
import os
import re
import signal
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from backbone import Swin
from config import InputError
from data import CocoInstances
from distributed import warn
from formats.bdd100k import bdd100k_paths, read_bdd100k
from formats.coco import coco_paths, read_annotations
from formats.images import DataError
from shapes import make_shapes


def add_data_arguments(parser):
    """The flags that name the data, the same in every program."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        choices=["shapes", "shapes-hard", "coco", "bdd100k"],
        help="shapes, shapes-hard: generated images; coco: a data set in COCO format; bdd100k: BDD100K's bitmasks "
        "(default: coco with --data-root, and shapes where no data is named at all)",
    )
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder of the data set in COCO's or BDD100K's layout; for shapes, where to generate it (default: runs/ + "
        "its name)",
    )
    for split in ("train", "val"):
        group.add_argument(
            f"--{split}-json",
            metavar="FILE",
            help=f"annotation file of the {split} images, instead of the one in --data-root",
        )
        group.add_argument(
            f"--{split}-images", metavar="DIR", help=f"folder of the {split} images, instead of the one in --data-root"
        )
    group.add_argument(
        "--workers",
        type=count,
        default=min(4, (os.cpu_count() or 2) // 2),
        help="processes that load the data (default: half the cores, at most 4)",
    )


def count(text):
    """An argparse type: an integer, 0 or more."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return int(text)


def positive(text):
    """An argparse type: an integer, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def not_negative(text):
    """An argparse type: a finite number, 0 or more."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more, not {text}")
    return float(text)


def data_kind(args):
    """--data or what stands for it: coco with --data-root alone, None with files alone, shapes with nothing."""
    files = (getattr(args, f"{split}_{what}") for split in ("train", "val") for what in ("json", "images"))
    return args.data or ("coco" if args.data_root else None if any(files) else "shapes")


def generate_shapes(args):
    """Generate the images of `--data shapes` or `shapes-hard`, if that is the data and they are not there."""
    kind = data_kind(args)
    if kind in ("shapes", "shapes-hard"):
        make_shapes(args.data_root or f"runs/{kind}", hard=kind == "shapes-hard")


def open_split(args, split, test_size=(800, 1333), augmentation=None, need_annotations=True):
    """The data set that the flags name, split "train", "val" or "test"; sizes as CocoInstances takes them.

    need_annotations: refuse a file that only lists images. Raises DataError, also for flags that are missing.
    """
    kind, flags = data_kind(args), f"--{split}-json and --{split}-images"
    read = partial(read_annotations, need_annotations=need_annotations)
    annotation_file, image_dir = getattr(args, f"{split}_json", None), getattr(args, f"{split}_images", None)
    if bool(annotation_file) != bool(image_dir):
        missing = "images" if annotation_file else "json"
        raise DataError(f"{flags} belong together: --{split}-{missing} is missing")
    if annotation_file:
        pass
    elif kind is None:
        alone = "; or train without evaluation, with --no-eval" if split == "val" and hasattr(args, "evaluate") else ""
        raise DataError(f"{flags} are missing: files are given for the other split alone{alone}")
    elif kind in ("shapes", "shapes-hard"):
        generate_shapes(args)
        annotation_file, image_dir = coco_paths(args.data_root or f"runs/{kind}", split)
    elif not args.data_root:
        raise DataError(f"--data {kind} needs --data-root, or {flags}")
    elif kind == "bdd100k":
        annotation_file, image_dir = bdd100k_paths(args.data_root, split)
        read = read_bdd100k
    else:
        annotation_file, image_dir = coco_paths(args.data_root, split)
    keep_empty = getattr(args, "keep_empty", False)
    return CocoInstances(annotation_file, image_dir, split == "train", test_size, augmentation, keep_empty, read)


def warn_of_crowded_images(dataset, config):
    """Warn of images with more instances than the model has queries to find them or, in training, for denoising."""
    counts = [len(dataset.instances[image_id]) for image_id in dataset.image_ids]
    hold = lambda limit: f"{sum(n > limit for n in counts)} of {len(counts)} images hold more instances"  # noqa: E731
    most = max(counts, default=0)
    if most > (queries := config.selections[-1]):
        warn(
            f"{hold(queries)} than the model has queries, up to {most}: it can find {queries} in an image; the "
            "last number of --selections sets how many"
        )
    if most > (denoising := config.denoising_queries) > 0:
        warn(
            f"{hold(denoising)} than the {denoising} denoising queries: a batch with one of them trains without "
            "denoising, and learns more slowly; raise --denoising-queries"
        )


def add_precision_argument(parser):
    """--precision, the same in every program that runs a model."""
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16", "float16", "published"],
        default="auto",
        help="of the model's activations; boxes, the scores that select, matching and losses are always in float32. "
        "published: float16, with encoder, interaction layers and decoder layers in float32 (default: auto, bfloat16 "
        "on a GPU that has it, float16 on others, float32 on the CPU). float32 is exact: TF32 is off, for matrix "
        "products and convolutions alike",
    )


def autocast_dtype(precision, device):
    """The dtype of autocast for --precision on this device; None: float32, without autocast."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"float32": None, "published": torch.float16}.get(precision, getattr(torch, precision, None))


def use_precision(model, precision, device):
    """Prepare a model for --precision; returns the dtype of autocast, see `autocast_dtype`."""
    if precision == "published":
        model.use_published_precision()
    return autocast_dtype(precision, device)


def add_compile_argument(parser):
    """--compile, the same in every program that runs a model."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers with torch.compile: the first images take minutes longer, the others less time; "
        "needs a C++ compiler, on a GPU also Triton, which comes with PyTorch for Linux",
    )


def compile_layers(model, device):
    """Compile the parts of a model that take the time, in place: names of parameters stay. Raises InputError.

    Part by part, since the layers of a kind share what is compiled, for any sizes and numbers of queries; in the whole
    model each would be compiled on its own, and again for every number of instances. A Swin backbone is left as it is:
    with sizes that are symbols, the tracing of its windows does not end within minutes.
    """
    require_compiler("--compile", device)
    import torch._dynamo  # only here, as it takes a second
    import torch.fx.experimental._config

    torch._dynamo.config.specialize_float = True  # a float that is a symbol makes each part be compiled twice
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal at first need not be so later
    parts = [*model.encoder.layers, model.di.candidates, model.heads, *model.decoder.layers]
    parts += [layer for interaction in model.di.interactions for layer in interaction.layers]
    parts += [model.bato] if model.bato else []
    for part in parts if isinstance(model.backbone, Swin) else [model.backbone, *parts]:
        part.compile(dynamic=True, fullgraph=True)


def require_compiler(flag, device):
    """Raise InputError, for this flag, where torch.compile lacks what it needs to make code for the device."""
    import torch._inductor.cpp_builder  # only here, as it takes a second

    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except RuntimeError:
        raise InputError(f"{flag}: needs a C++ compiler, such as g++; install one (CXX may name it)") from None
    if device.type == "cuda" and not find_spec("triton"):
        raise InputError(f"{flag}: needs Triton on a GPU: python -m pip install triton")


def choose_device(name):
    """torch.device of "cpu", "cuda", ... or, for "auto", a GPU if there is one. Raises InputError for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no usable CUDA GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, numbered from 0")
    try:
        if device.type not in ("cpu", "cuda"):
            torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device has errors of its own; "meta" has no values at all
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise InputError(f"--device {name}: cannot be used here ({reason}); use cpu, cuda or auto") from None
    # By default PyTorch takes TF32, with 10 bits of mantissa, for convolutions and not for matrix products.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def keep_freed_memory(device):
    """On a CPU, let glibc keep the memory of tensors below 16 MB that a step frees, for the next step.

    As a default it goes back to the system, which clears it page by page when it is wanted again: a tenth of a step or
    more. What is larger still goes back: kept, its room would fall to pieces, and the process would grow.
    """
    mallopt = getattr(ctypes.pythonapi, "mallopt", None) if sys.platform == "linux" and device.type == "cpu" else None
    if mallopt:  # another C library may have none
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 2**24)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def percent(value):
    """A metric for printing."""
    return "    -" if value is None else f"{value:5.1f}"


def write_whole(path, write):
    """`write(temporary path)`, then rename: `path` holds what it did or all that is new. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run_program(main):
    """Run a program's `main`; bad data, bad input, files that cannot be written, lack of memory and Ctrl-C end it with
    one line and a status other than 0. Warnings take one line as well.
    """
    program = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *_: f"{program}: warning: {message}\n"
    try:
        main()
    except (DataError, InputError, OSError) as error:
        sys.exit(f"{program}: error: {error}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (MemoryError, NotImplementedError, RuntimeError) as error:
        if not (reason := resource_error(error)):
            raise
        sys.exit(f"{program}: error: {reason}")
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def resource_error(error):
    """The line for an exception that says that memory or an operation of the device is missing; else None."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        asked = re.search(r"allocate (?:memory: you tried to allocate )?([\d.]+ ?\w+)", text)
        asked = f" ({asked[1]} asked for)" if asked else ""
        return f"out of memory{asked}; use smaller images, a smaller batch, or another --device"
    if isinstance(error, NotImplementedError) and "device" in text or "Could not run" in text:
        return f"the device cannot run the model ({text[:150]}); use --device cpu"
    return None
