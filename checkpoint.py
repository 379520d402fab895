"""A training's files: checkpoints, whole or not at all; the folder, which is its alone; and what it starts from."""

import contextlib
import errno
import json
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torchvision

from backbone import SWINS
from config import Config, InputError
from distributed import process_rank, warn
from files import explaining, first_words, write_whole
from model import DIMaskDINO
from weights import find_weights, load_backbone_weights, mismatches, open_weights, some_of

# Settings that decide which parameters there are, by the beginning of the parameters' names.
SETTINGS_OF = {
    "di.interactions.": "selections (di)",
    "bato.": "bato",
    "di.position_tokens.": "position_tokens",
    "decoder.layers.": "decoder_layers",
}


def read_checkpoint(path):
    """The dictionary in a checkpoint file of `train.py` or `convert.py`, on the CPU.

    {"model": state dict, "config": fields of Config, "classes": names, ...}, see `train.py`.
    Raises InputError for a missing, damaged or foreign file; nothing in the file is executed.
    """
    foreign = f"{path}: not a checkpoint of this project; run convert.py on a released one"
    checkpoint = open_weights(path)
    weights = find_weights(path, checkpoint)
    missing = [repr(key) for key in ("config", "classes") if key not in checkpoint]
    if missing:
        raise InputError(f"{foreign} (there are {len(weights)} tensors in it, but no {' and no '.join(missing)})")
    if not (isinstance(checkpoint["config"], dict) and isinstance(checkpoint["classes"], list | tuple)):
        raise InputError(foreign)
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in checkpoint["config"].items()}
    return checkpoint | {"model": weights, "config": tuples}


def load_model(path, device="cpu", overrides=None):
    """The model of a checkpoint file, in evaluation mode, and the checkpoint's dictionary. Raises InputError.

    overrides: fields of `Config` that take the place of the checkpoint's.
    """
    checkpoint = read_checkpoint(path)
    weights, classes = checkpoint["model"], checkpoint["classes"]
    given = " with these settings" * bool(overrides)
    with explaining((TypeError, ValueError, RuntimeError), f"{path}: its config{given} is not one of this version"):
        model = DIMaskDINO(Config(**checkpoint["config"] | (overrides or {})))
    if problems := mismatches(weights, {name: value.shape for name, value in model.state_dict().items()}):
        settings = [name for start, name in SETTINGS_OF.items() if any(f": {start}" in line for line in problems)]
        where = f"in {' and '.join(settings)}: " * bool(settings)
        raise InputError(f"{path}: its weights and its config do not fit ({where}{some_of(problems, 3, '; ')})")
    for key in ("classes", "category_ids"):
        if len(checkpoint.get(key, classes)) != model.config.num_classes:
            numbers = f"{len(checkpoint[key])} {key} for {model.config.num_classes} classes"
            raise InputError(f"{path}: holds {numbers}; correct its entry {key!r}")
    model.float().load_state_dict(weights)  # whatever the caller's default dtype
    return model.to(device).eval(), checkpoint


def save_checkpoint(path, checkpoint, keep=None):
    """Write a checkpoint so that `path` always holds a whole one. Raises InputError where that fails.

    keep: a name in the same folder for the file that was at `path`.
    """
    path = Path(path)

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            link(path, keep)

    try:
        write_whole(path, write)
    except (OSError, RuntimeError) as error:  # torch.save turns some failures of the disk into RuntimeError
        reason = first_words(error.__context__ if isinstance(error.__context__, OSError) else error)
        with contextlib.suppress(OSError):
            reason += f"; {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free now"
        raise InputError(f"{path}: cannot be written ({reason}); what was there before is untouched") from None


def link(path, name):
    """Let `name`, in the same folder, be the file that `path` is now, without a copy where the disk has hard links."""
    try:
        write_whole(path.with_name(name), partial(os.link, path))
    except OSError:
        write_whole(path.with_name(name), partial(shutil.copyfile, path))


# The folder of a training


class Output:
    """The folder that one training writes to, checkpoints and log, locked while its process lives.

    resume: whether to go on from the newest checkpoint in it, if there is one: `resumed`, (path, content) or None.
    Of several processes that of rank 0 writes, and before `begin` nothing but the lock, in a folder that exists. Raises
    InputError where another training writes to the folder or has left what this one would overwrite.
    """

    def __init__(self, folder, resume):
        self.folder, self.resumed = Path(folder), None
        self.lock = False  # `lock_file`'s, once the folder is claimed
        if self.folder.is_dir():
            self.claim(resume)

    def claim(self, resume):
        """Lock the folder and look what is in it."""
        if process_rank() == 0:
            self.lock = lock_file(self.folder / ".lock")
        self.resumed = newest_checkpoint(self.folder) if resume else None
        # A log alone, without an evaluation, is of a training that came to no checkpoint.
        log = self.folder / "log.jsonl"
        early = resume and not (log.exists() and b'"box"' in log.read_bytes())  # before the first evaluation
        traces = ("checkpoint.pt", "previous.pt", "best.pt", *(() if early else ("log.jsonl",)))
        there = [name for name in traces if (path := self.folder / name).exists() and path.stat().st_size]
        if there and not self.resumed:
            what = "but no checkpoint to resume; choose" if resume else "go on with --resume or choose"
            left = f"{self.folder}: holds {', '.join(there)} of an earlier training"
            raise InputError(f"{left}; {what} another --output")

    def begin(self, iteration):
        """Make the folder, and cut the log off behind this iteration; returns the entries that stay."""
        if process_rank() > 0:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.lock is False:  # the folder was not there; another training may have begun meanwhile
            self.claim(resume=False)
        if self.lock:  # so that no one else is writing
            for path in self.folder.glob(f".{'[0-9a-f]' * 32}.tmp"):  # a killed process has left it
                path.unlink()
        if self.resumed and self.resumed[0].name != "checkpoint.pt":  # that is lost or damaged
            link(self.resumed[0], "checkpoint.pt")
        entries = read_log(self.folder / "log.jsonl", iteration)
        self.log = open(self.folder / "log.jsonl", "a", buffering=1)
        return entries


def lock_file(path):
    """Lock a file until this process ends, however it does; returns what holds the lock, None where there are no locks.

    Processes that this one starts do not share it, as they may outlive it. Raises InputError if another one holds it.
    """
    try:
        file = open(path, "a")  # noqa: SIM115
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return file
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK) and os.access(path, os.W_OK):
            several = "; several processes of a training are started with torchrun" * ("SLURM_NTASKS" in os.environ)
            another = f"{path.parent}: another program writes to this folder"
            raise InputError(f"{another}; choose another --output{several}") from None
        warn(f"{path}: cannot be locked ({error.strerror}); start no other program that writes to this folder")
        return None


def newest_checkpoint(output):
    """The newest checkpoint in a folder that can be read, or None where there is none. Raises InputError."""
    paths = [output / name for name in ("checkpoint.pt", "previous.pt") if (output / name).exists()]
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except InputError as error:
            if path == paths[-1]:
                raise
            warn(f"{error}; trying the one before it")


def check_config(path, checkpoint, config, settings):
    """Raise InputError where a checkpoint was made with another Config or other of the settings, naming them."""
    found, expected = checkpoint["config"] | checkpoint["settings"], asdict(config) | settings
    expected.pop("grad_checkpoint")  # changes no result
    different = [name for name, value in expected.items() if found.get(name) != value]
    different = [f"{name} {str(found.get(name))[:80]} instead of {str(expected[name])[:80]}" for name in different]
    if different:
        advice = "resume it with its own flags, or start anew from its weights, with --init and another --output"
        raise InputError(f"{path}: is of another model or training ({', '.join(different)}); {advice}")


def restore(path, checkpoint, model, optimizer, scaler, settings, schedule):
    """Go on with a training: put model, optimizer and scaler into the state in which the checkpoint was written.

    settings, schedule: those of now, of which the schedule may be another. Returns lines to print. Raises InputError.
    """
    if "settings" not in checkpoint:
        raise InputError(f"{path}: holds no state of a training; start from its weights with --init")
    check_config(path, checkpoint, model.config, settings)
    with explaining((KeyError, ValueError, RuntimeError), f"{path}: cannot be resumed", "start from it with --init"):
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # of float16
            scaler.load_state_dict(checkpoint["scaler"])
    changed = [name for name, value in schedule._asdict().items() if checkpoint["schedule"].get(name) != value]
    lines = [f"the schedule has changed in {', '.join(changed)}"] if changed else []
    return [f"resuming {path} after iteration {checkpoint['iteration']}", *lines]


def read_log(path, iteration):
    """The entries of a log up to this iteration; those behind it, which will be written again, and a torn line go."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the process was killed while it wrote the line, or the disk is damaged
            entries.append(json.loads(line))
    with explaining((KeyError, TypeError), f"{path}: is not the log of a training", "choose another --output"):
        entries = [entry for entry in entries if entry["iteration"] <= iteration]
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))
    return entries


def add_start_arguments(parser):
    """The flags that name what a training starts from."""
    add = parser.add_argument_group("starting point").add_argument
    kinds = "torchvision's name of weights, a file of torchvision, Microsoft's Swin or Detectron2, or none"
    help_text = f"The pretrained backbone: {kinds} (default: ImageNet's; for tiny, none)."
    add("--backbone-weights", metavar="NAME-OR-FILE", help=help_text)
    add("--init", metavar="CKPT", help="Start from the weights of a checkpoint, also one for other classes.")
    pickle = "Allow --backbone-weights to be a pickle, such as Detectron2's .pkl, which can run any program it holds."
    add("--trust-pickle", action="store_true", help=pickle)


def load_starting_point(model, args, classes):
    """Backbone weights or the weights of --init. Returns lines to print. Raises InputError."""
    if args.init:
        return load_init(model, args.init, classes)
    name, source = model.config.backbone, args.backbone_weights
    if source == "none" or (source is None and not model.config.frozen_batch_norm):
        return ["the backbone starts from random weights"]
    if source is None and name in SWINS and name not in ("swin_t", "swin_s", "swin_b"):
        file = "Microsoft's file, for swin_l_384 swin_large_patch4_window12_384_22k.pth"
        raise InputError(f"--backbone-weights is needed for {name}: give {file}, or none to start from random weights")
    try:
        source = source or str(torchvision.models.get_model_weights(name).IMAGENET1K_V1)
        load_backbone_weights(model.backbone, source, args.trust_pickle)
    except InputError as error:
        raise InputError(f"{error} (or --backbone-weights none, to start from random weights)") from None
    return [f"the backbone starts from {source}"]


def load_init(model, path, classes):
    """Load what fits of a checkpoint; what belongs to classes is loaded only if they are the same. Returns lines."""
    checkpoint, state = read_checkpoint(path), model.state_dict()
    other = ("heads.class_head.", "denoising.label_embedding.") if checkpoint["classes"] != classes else ()
    same = {name: value for name, value in checkpoint["model"].items() if name in state and not name.startswith(other)}
    found = {name: value for name, value in same.items() if value.shape == state[name].shape}
    if not found:
        raise InputError(f"{path}: nothing in it fits this model; give a checkpoint of a similar preset")
    model.load_state_dict(found, strict=False)
    kept = [name for name in state if name not in found]
    unused = [name for name in checkpoint["model"] if name not in state]
    return [
        f"{path}: {len(found)} of {len(state)} entries loaded",
        f"  start anew, as they are for other classes, of another shape or not in it: {some_of(kept)}",
        f"  in it but not in this model: {some_of(unused)}",
    ]
