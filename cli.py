"""What the programs share: the flags that name the data, devices and processes, and errors in one line."""

import argparse
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from bdd100k import bdd100k_paths, read_bdd100k
from coco import coco_paths
from config import InputError
from data import CocoInstances
from images import DataError
from shapes import make_shapes


def add_data_arguments(parser):
    """The flags that name the data, the same in every program."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        choices=["shapes", "shapes-hard", "coco", "bdd100k"],
        default="shapes",
        help="shapes, shapes-hard: generated images; coco: a data set in COCO format; bdd100k: BDD100K's bitmasks "
        "(default: shapes)",
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
        raise argparse.ArgumentTypeError("must be 0 or more")
    return int(text)


def positive(text):
    """An argparse type: an integer, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def open_split(args, split, transform):
    """The data set that the flags name, split "train" or "val". Raises DataError."""
    annotation_file, image_dir = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
    if bool(annotation_file) != bool(image_dir):
        raise DataError(f"--{split}-json and --{split}-images belong together: give both or neither")
    if not annotation_file:
        if args.data in ("shapes", "shapes-hard"):
            args.data_root = args.data_root or f"runs/{args.data}"
            make_shapes(args.data_root, hard=args.data == "shapes-hard")
        elif not args.data_root:
            raise DataError(f"--data {args.data} needs --data-root, or --{split}-json and --{split}-images")
        if args.data == "bdd100k":
            return CocoInstances(*bdd100k_paths(args.data_root, split), transform, split == "train", read_bdd100k)
        annotation_file, image_dir = coco_paths(args.data_root, split)
    return CocoInstances(annotation_file, image_dir, transform, training=split == "train")


def choose_device(name):
    """torch.device of "cpu", "cuda", ... or, for "auto", a GPU if there is one. Raises InputError for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; use cpu, cuda or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no usable CUDA GPU here; use --device cpu")
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device has errors of its own; "meta" has no values at all
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise InputError(f"--device {name}: cannot be used here ({reason}); use cpu, cuda or auto") from None
    return device


def gather(value):
    """The picklable value of every process, ordered by rank, the same list in each; [value] where there is but one."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_program(main):
    """Run a program's `main`; bad data, bad input, lack of memory and Ctrl-C end it with one line, not 0 as status."""
    program = Path(sys.argv[0]).name
    try:
        main()
    except (DataError, InputError) as error:
        sys.exit(f"{program}: error: {error}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, NotImplementedError, RuntimeError) as error:
        if not (reason := resource_error(error)):
            raise
        sys.exit(f"{program}: error: {reason}")


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
