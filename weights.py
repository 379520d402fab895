"""Weight files of others: opened safely, found in their wrappers, renamed, and loaded into a backbone."""

import contextlib
import pickle
import pickletools
import re
import sys
import zipfile
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torchvision

from backbone import MobileNet, ResNet, Swin
from config import InputError
from files import explaining, first_words

# Parameter names here and in the files of others: (ours, theirs), each the beginning of a name, "#" a number. The first
# row that fits holds.
RESNET_NAMES = [  # Detectron2
    ("body.bn1.", "stem.conv1.norm."),
    ("body.conv1.", "stem.conv1."),
]
SWIN_NAMES = [  # Microsoft's original Swin, and Detectron2's
    ("body.features.0.0.", "patch_embed.proj."),
    ("body.features.0.2.", "patch_embed.norm."),
    ("norms.#.", "norm#."),
]
for i in range(4):
    RESNET_NAMES += [
        (f"body.layer{i + 1}.#.downsample.1.", f"res{i + 2}.#.shortcut.norm."),
        (f"body.layer{i + 1}.#.downsample.0.", f"res{i + 2}.#.shortcut."),
        (f"body.layer{i + 1}.#.bn#.", f"res{i + 2}.#.conv#.norm."),
        (f"body.layer{i + 1}.#.conv#.", f"res{i + 2}.#.conv#."),
    ]
    SWIN_NAMES += [
        (f"body.features.{2 * i + 1}.#.mlp.0.", f"layers.{i}.blocks.#.mlp.fc1."),
        (f"body.features.{2 * i + 1}.#.mlp.3.", f"layers.{i}.blocks.#.mlp.fc2."),
        (f"body.features.{2 * i + 1}.#.", f"layers.{i}.blocks.#."),
        (f"body.features.{2 * i + 2}.", f"layers.{i}.downsample."),
    ]
# Entries of pretrained classifiers that are no part of a backbone: the classifier itself, MobileNetV2's convolution
# before it, and what is computed anew.
NOT_BACKBONE = re.compile(
    r"(stem\.)?fc\.|head\.|norm\.|classifier\.|features\.18\.|"
    r".*\.(num_batches_tracked|relative_position_index|attn_mask)$"
)


def renamed(name, table):
    """`name` with its beginning replaced by the first row (ours, theirs) of the table that fits. Raises KeyError."""
    for ours, theirs in table:
        if match := re.match(re.escape(ours).replace(r"\#", r"(\d+)"), name):
            return theirs.replace("#", "{}").format(*match.groups()) + name[match.end() :]
    raise KeyError(name)


def file_kind(path):
    """What a file is that holds no weights, in words, by its first bytes; else None."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip()
    if not start:
        return "empty, perhaps truncated; get it again"
    if start[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, not the weights behind it; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; fetch them with git lfs pull"
    if zipfile.is_zipfile(path) and not is_pickle(path):
        return "an archive without a checkpoint, perhaps of export.py; give the checkpoint itself"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start) and start.isascii() and not is_pickle(path):
        return "a text, not weights; check the path"


def is_pickle(path):
    """Whether a file is a pickle from beginning to end, or a file of torch.save with one; nothing in it is run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("data.pkl") for name in archive.namelist())
        with open(path, "rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 1
    except Exception:  # it fails on all sorts of bytes in all sorts of ways
        return False


LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)  # the first bytes of torch.save's files before 1.6


def open_weights(path, trust_pickle=False):
    """What a file of torch.save or safetensors, or a plain pickle, holds; tensors on the CPU.

    Raises InputError for what cannot be read, and without `trust_pickle` for a file that only Python's pickle can open,
    since that runs whatever program the file holds.
    """
    path = Path(path)
    with explaining(OSError, f"{path}: cannot be read", "check the disk and its rights"):
        if path.is_dir():
            raise InputError(f"{path}: is a folder; give the checkpoint file in it")
        if not path.is_file():
            raise InputError(f"{path}: no such file; check the path")
        if kind := file_kind(path):
            raise InputError(f"{path}: is {kind}")
    if path.suffix == ".safetensors":
        with explaining(ImportError, f"{path}: needs a further package", "python -m pip install safetensors"):
            from safetensors.torch import load_file
    # Whatever zip, pickle and their own checks come across.
    with explaining(Exception, f"{path}: not a readable checkpoint, perhaps truncated"):
        if path.suffix == ".safetensors":
            return load_file(path)
        with open(path, "rb") as file:
            of_torch = zipfile.is_zipfile(file) or file.seek(0) == 0 and file.read(len(LEGACY)) == LEGACY
            if of_torch:
                with contextlib.suppress(pickle.UnpicklingError):  # it holds more than tensors, or is damaged
                    return torch.load(path, map_location="cpu", weights_only=True)
            if trust_pickle and of_torch:
                return torch.load(path, map_location="cpu", weights_only=False)
            if trust_pickle:
                file.seek(0)
                return pickle.load(file, encoding="latin1")  # as Detectron2 does: some of its files come from Python 2
        if not is_pickle(path):
            raise ValueError("no whole file of torch.save")
    raise InputError(
        f"{path}: only Python's pickle can open it, which can run any program on this machine; if you trust where it "
        "comes from, convert.py takes it with --trust-pickle, train.py too, as --backbone-weights"
    )


# Where programs put the weights in what they save, the first that is there: PyTorch Lightning's are in "state_dict".
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_ema", "ema", "ema_state_dict", "module")


def find_weights(path, content):
    """The weights in what a file holds: {name: tensor}, without the prefixes of DDP, torch.compile and Lightning.

    A line on stderr says where they were if that is neither its top nor "model", and what other ones there are. Raises
    InputError.
    """
    entries, where = content, []
    while isinstance(entries, dict) and (found := [key for key in WRAPPERS if isinstance(entries.get(key), dict)]):
        where.append(found[0])
        if found[1:] or found[0] != "model":
            others = f", not those of {', '.join(found[1:])}" if found[1:] else ""
            print(f"{path}: takes the weights of {'.'.join(where)!r}{others}", file=sys.stderr)
        entries = entries[found[0]]
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: holds no weights, neither at its top nor under {', '.join(map(repr, WRAPPERS))}")
    weights = {}
    for name, value in entries.items():
        if not isinstance(value, torch.Tensor | np.ndarray | np.generic):
            raise InputError(f"{path}: the entry {name!r} is not a tensor but {type(value).__name__}")
        if str(name) != "n_averaged":  # of torch.optim.swa_utils.AveragedModel
            bare = re.sub(r"^((module|model)\.)*", "", str(name).replace("_orig_mod.", ""))
            if bare in weights:
                raise InputError(f"{path}: holds {bare} twice, with and without a prefix; give a file with one model")
            weights[bare] = torch.as_tensor(value)
    for name, value in weights.items():
        if value.is_floating_point() and value.numel() and not torch.stack(value.float().aminmax()).isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinity: its training diverged, or it is damaged")
    return weights


def read_weights(path, trust_pickle=False):
    """{name: tensor} from a file of others, see `open_weights`, `find_weights`. Raises InputError."""
    return find_weights(path, open_weights(path, trust_pickle))


def mismatches(found, expected):
    """What is wrong with entries {name: tensor} where {name: shape} is expected: one line for each wrong entry."""
    shape = lambda name: tuple(found[name].shape)
    common = [name for name in found if name in expected and shape(name) != tuple(expected[name])]
    return [
        *(f"missing: {name}, of shape {tuple(expected[name])}" for name in expected if name not in found),
        *(f"unknown: {name}, of shape {shape(name)}" for name in found if name not in expected),
        *(f"misshapen: {name} is {shape(name)}, should be {tuple(expected[name])}" for name in common),
    ]


def some_of(names, most=10, between=", "):
    """Names in a line, the first `most` and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return between.join(names[:most] + more) or "none"


def listed(problems):
    """The lines of `mismatches`, indented below another: `some_of` each kind."""
    kinds = groupby(problems, lambda line: line.split(":")[0])
    return "".join("\n  " + some_of(list(lines), between="\n  ") for _, lines in kinds)


def load_backbone_weights(backbone, source, trust_pickle=False):
    """Load pretrained weights into a backbone. The norms on Swin's maps stay where the weights have none.

    source        torchvision's name of weights, e.g. "ResNet50_Weights.IMAGENET1K_V1", downloaded if need be; or a file
                  of torchvision, of Microsoft's Swin, or of Detectron2, told apart by the names in it
    trust_pickle  allows a file in the format of Python's pickle, as Detectron2's .pkl, which may run any program

    Raises InputError, which lists entries that are missing, unknown or misshapen, ten of each kind at most.
    """
    named = "_Weights." in str(source) and not Path(source).exists()
    weights = download_weights(source) if named else read_weights(source, trust_pickle)
    weights = {name.removeprefix("backbone."): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if not NOT_BACKBONE.match(name)}
    state = backbone.state_dict()
    table = {ResNet: RESNET_NAMES, Swin: SWIN_NAMES, MobileNet: [("body.", "")]}[type(backbone)]  # or as here
    formats = {name.removeprefix("body."): name for name in state}, {renamed(name, table): name for name in state}
    names = max(formats, key=lambda names: len(names.keys() & weights.keys()))
    needed = {name: ours for name, ours in names.items() if name in weights or not ours.startswith("norms.")}
    expected = {name: state[ours].shape for name, ours in needed.items()}
    if problems := mismatches(weights, expected):
        raise InputError(f"{source}: {len(problems)} entries do not fit the backbone:{listed(problems)}")
    backbone.load_state_dict({names[name]: value for name, value in weights.items()}, strict=False)


def download_weights(name):
    """{name: tensor} of torchvision's weights of that name, from its cache or the net. Raises InputError."""
    with explaining((ValueError, KeyError, AttributeError), f"{name}: torchvision has no weights of that name"):
        weights = torchvision.models.get_weight(name)
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # of the connection, of the disk, or of a damaged file
        advice = f"give its file with --backbone-weights, or put it into {Path(torch.hub.get_dir(), 'checkpoints')}"
        raise InputError(f"{name}: cannot load {weights.url} ({first_words(error)}); {advice}") from None
