"""What the programs share: the flags that name the data, devices and processes, and errors in one line."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import warnings
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
from tqdm import tqdm

from backbone import Swin
from config import PRESETS, Config, InputError
from data import CocoInstances
from distributed import process_count, process_rank
from files import explaining
from formats.bdd100k import bdd100k_paths, read_bdd100k
from formats.coco import coco_paths, read_annotations
from formats.images import DataError
from shapes import make_shapes


def add_data_arguments(parser):
    """The flags that name the data, the same in every program."""
    add = parser.add_argument_group("data").add_argument
    kinds = "Generated images (shapes, shapes-hard), a data set in COCO format (coco) or BDD100K's bitmasks (bdd100k)"
    default = "default: coco with --data-root, and shapes where no data is named at all"
    add("--data", choices=["shapes", "shapes-hard", "coco", "bdd100k"], help=f"{kinds} ({default}).")
    layout = "The folder of the data set in COCO's or BDD100K's layout; for shapes, where to generate it"
    add("--data-root", metavar="DIR", help=f"{layout} (default: runs/ + its name).")
    for split in ("train", "val"):
        instead = f"of the {split} images, instead of the one in --data-root."
        add(f"--{split}-json", metavar="FILE", help=f"The annotation file {instead}")
        add(f"--{split}-images", metavar="DIR", help=f"The folder {instead}")
    workers = "The processes that load the data (default: half the cores, at most 4)."
    add("--workers", type=count, default=min(4, (os.cpu_count() or 2) // 2), help=workers)


def add_config_arguments(parser):
    """A flag for every setting but num_classes: --name VALUE; --name and --no-name; --name A B; or --name N,N,..."""
    add = parser.add_argument_group("settings of model, losses and images; the default is the preset's").add_argument
    for entry in fields(Config)[1:]:
        kind, inside = entry.type, get_args(entry.type)
        how = {"type": inside[0] if inside else kind, "metavar": "NAME" if kind is str else "N"}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            how = {"type": type(inside[0]), "choices": inside}
        elif inside[1:] == (...,):
            how = {"type": comma_separated, "metavar": "N,..."}
        elif get_origin(kind) is tuple:
            how |= {"nargs": len(inside)}
        add("--" + entry.name.replace("_", "-"), help=entry.metadata["help"], **how)


def comma_separated(text):
    """An argparse type: integers, "600,300" -> (600, 300)."""
    return tuple(int(number) for number in text.split(","))


def config_from(args):
    """The Config of the preset `args.preset` with the flags of `add_config_arguments` that are given."""
    given = {entry.name: getattr(args, entry.name) for entry in fields(Config)[1:]}
    return replace(PRESETS[args.preset], **{name: value for name, value in given.items() if value is not None})


def at_least(least, kind, most=sys.float_info.max):
    """An argparse type: a number of a kind, int or float, from the least to the most."""

    def number(text):
        if not least <= kind(text) <= most:
            limits = f"{least} or more" if most == sys.float_info.max else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return kind(text)

    return number


count, positive, not_negative, fraction = at_least(0, int), at_least(1, int), at_least(0, float), at_least(0, float, 1)


def data_kind(args):
    """--data or what stands for it: coco with --data-root, None with files alone, shapes with nothing."""
    files = (getattr(args, f"{split}_{what}") for split in ("train", "val") for what in ("json", "images"))
    return None if any(files) and not args.data_root else args.data or ("coco" if args.data_root else "shapes")


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
    if not annotation_file and kind is None:
        alone = "; or train without evaluation, with --no-eval" if split == "val" and hasattr(args, "evaluate") else ""
        raise DataError(f"{flags} are missing: files are given for the other split alone{alone}")
    if not annotation_file:
        if kind in ("coco", "bdd100k") and not args.data_root:
            raise DataError(f"--data {kind} needs --data-root, or {flags}")
        generate_shapes(args)
        paths, read = (bdd100k_paths, read_bdd100k) if kind == "bdd100k" else (coco_paths, read)
        annotation_file, image_dir = paths(args.data_root or f"runs/{kind}", split)
    keep_empty = getattr(args, "keep_empty", False)
    return CocoInstances(annotation_file, image_dir, split == "train", test_size, augmentation, keep_empty, read)


def add_model_arguments(parser):
    """The flags that say how a model runs, the same in every program."""
    add = parser.add_argument
    add("--device", default="auto", help="Compute on cpu, cuda, or auto, a GPU if there is one (default: auto).")
    kinds = ["auto", "float32", "bfloat16", "float16", "published"]
    default = "default: auto, bfloat16 on a GPU that has it, float16 on others, float32 on the CPU"
    add("--precision", choices=kinds, default="auto", help=f"Of activations; published is float16 in part ({default}).")
    add("--compile", action="store_true", help="Compile: the first images take minutes longer, the others less.")


def prepare_model(model, args, device):
    """Prepare a model for --precision and --compile; returns the dtype of autocast, see `autocast_dtype`."""
    if args.precision == "published":
        model.use_published_precision()
    if args.compile:
        compile_layers(model, device)
    return autocast_dtype(args.precision, device)


def autocast_dtype(precision, device):
    """The dtype of autocast for --precision on this device; None: float32, without autocast."""
    if precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "published": torch.float16}.get(precision)


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

    with explaining(RuntimeError, f"{flag}: needs a C++ compiler, such as g++", "install one (CXX may name it)"):
        torch._inductor.cpp_builder.get_cpp_compiler()
    if device.type == "cuda" and not find_spec("triton"):
        raise InputError(f"{flag}: needs Triton on a GPU: python -m pip install triton")


def choose_device(name):
    """torch.device of "cpu", "cuda", ... or, for "auto", a GPU if there is one. Raises InputError for one not there."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = ("cuda" if there else "cpu") if name == "auto" else name
    with explaining(Exception, f"--device {name}: cannot be used here", "use cpu, cuda or auto"):
        device = torch.device(name)  # each kind of device has errors of its own
        if device.type not in ("cpu", "cuda"):
            torch.ones(1, device=device).item()  # "meta" has no values at all
    if device.type == "cuda" and (device.index or 0) >= there:
        why = f"there are {there} GPUs here, numbered from 0" if there else "no usable CUDA GPU here; use --device cpu"
        raise InputError(f"--device {name}: {why}")
    # By default PyTorch takes TF32, with 10 bits of mantissa, for convolutions and not for matrix products.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


# What a program says: it changes no result, whatever becomes of the words


class Console:
    """sys.stdout or sys.stderr that takes every word: what its encoding lacks is escaped, what nobody takes is dropped.

    Neither is there under pythonw or where the shell has closed it; the reader of a pipe may have ended, as `head`
    does; a Windows console or a pipe may know cp1252 alone; a disk may be full.
    """

    def __init__(self, stream):
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None or stream.closed else stream
        self.attempt("reconfigure", errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt("write", text)
        return len(text)

    def flush(self):
        self.attempt("flush")

    def attempt(self, method, *arguments, **options):
        try:
            getattr(self.stream, method)(*arguments, **options)
        except (AttributeError, BlockingIOError, RuntimeError, UnicodeError):
            pass  # RuntimeError: in a signal's handler, amid other words
        except (OSError, ValueError):  # ValueError: closed meanwhile
            nowhere = open(os.devnull, "w", encoding="utf-8")
            with contextlib.suppress(OSError, ValueError):  # what is still in its buffer must not fail at the end
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream = nowhere


class Progress(tqdm):
    """How far a program is, on stderr: a bar on a terminal, else a line at least every 30 s, if no step takes longer.

    what: the work, e.g. "evaluate"; total: the number of things to do, `done` of them before; unit: what these are.
    The bar goes when the block ends. Of several processes that of rank 0 speaks.
    """

    EVERY = 15.0  # seconds after which the next step prints a line
    monitor_interval = 0  # tqdm's thread, for which there is nothing to do

    def __init__(self, what, total, done=0, unit="images"):
        self.lines = True
        with contextlib.suppress(OSError, ValueError):  # no terminal; a container's may have no size, and show no bar
            self.lines = os.get_terminal_size(sys.stderr.fileno()).columns == 0
        line = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}" if self.lines else None
        file, every = (io.StringIO(), self.EVERY) if self.lines else (sys.stderr, 1)
        how = {"bar_format": line, "file": file, "mininterval": every, "miniters": 1, "leave": False}
        super().__init__(desc=what, total=total, initial=done, unit=unit, disable=process_rank() > 0, **how)

    def step(self, count=1, **shown):
        """`count` more are done; `shown` are values to show beside it."""
        self.set_postfix(shown, refresh=False)
        if self.update(count) and self.lines:
            self.say(str(self), sys.stderr)

    def say(self, line, file=None):
        """Print a line, above the bar if there is one; on stdout or in another file."""
        self.write(line, file=file or sys.stdout)
        (file or sys.stdout).flush()


def run_program(main):
    """Run a program's `main`; bad data, bad input, files that cannot be written, lack of memory and Ctrl-C end it with
    one line and a status other than 0. Warnings take one line as well. What is printed cannot make it fail.
    """
    while (lowest_free := os.open(os.devnull, os.O_RDWR)) <= 2:  # no file that is opened later shall be one of these
        pass
    os.close(lowest_free)
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    program = Path(sys.argv[0]).name
    for before, word in zip(sys.argv, sys.argv[1:], strict=False):
        if not word or word.startswith("--") and word.endswith("="):
            name = word[:-1] or before
            sys.exit(f"{program}: error: the word behind {name} is empty; is a variable of the shell not set?")
    if os.getpid() == 1:  # in a container, where the system drops a signal that has no handler
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here; a Figure needs none
    warnings.formatwarning = lambda message, *_: f"{program}: warning: {message}\n"
    try:
        main()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if not (reason := reason_of(error)):
            raise
        sys.exit(f"{program}: error: {reason}")
    if process_count() > 1:
        torch.distributed.destroy_process_group()


# Where a limit of the machine is reached: what an exception's class and words say then, and what the program says.
LIMITS = {
    "MemoryError|DefaultCPUAllocator": "out of memory{asked}; use smaller images, a smaller batch, or another --device",
    "NotImplementedError.*device|Could not run": "the device cannot run the model ({text}); use --device cpu",
    "shared memory|Bus error": "the memory that loader processes share (/dev/shm) is full; give a container more with "
    "--shm-size (docker run --shm-size=8g), or load in this process with --workers 0",
    "Too many open files|ancdata": "too many open files; raise the limit (ulimit -n), or use --workers 0",
    "can't start new thread|Resource temporarily unavailable": "too many processes or threads; raise the limit "
    "(ulimit -u, docker --pids-limit), or use --workers 0",
    "DataLoader worker .*(exited|killed)": "a loader process was ended from outside, perhaps for lack of memory; use "
    "fewer --workers",
}


def reason_of(error):
    """The line for an exception that the input, the files or the machine are to blame for; None for any other."""
    if isinstance(error, DataError | InputError):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    asked = re.search(r"allocate ([\d.]+ ?\w+)", text)
    for pattern, line in LIMITS.items():
        if re.search(pattern, text):
            return line.format(text=text[:150], asked=f" ({asked[1]} asked for)" if asked else "")
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: cannot be read or written ({error.strerror}); check the path and its rights"
    # A loader process sends its traceback, the error being its end.
    return str(error).rstrip().split("\n")[-1] if isinstance(error, OSError) else None
