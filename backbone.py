"""Feature extractors: torchvision's ResNets and Swin transformers, giving maps C2...C5 at strides 4 to 32; weights."""

import contextlib
import pickle
import pickletools
import re
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlock,
    shifted_window_attention,
)
from torchvision.ops import FrozenBatchNorm2d

from config import InputError

# Swin transformers: embedding channels, blocks of the third stage, window side, stochastic depth. "_384" are those with
# the larger window, pretrained on images of 384 pixels.
SWINS = {
    "swin_t": (96, 6, 7, 0.2),
    "swin_s": (96, 18, 7, 0.3),
    "swin_b": (128, 18, 7, 0.3),
    "swin_b_384": (128, 18, 12, 0.3),
    "swin_l": (192, 18, 7, 0.3),
    "swin_l_384": (192, 18, 12, 0.3),
}


def build_backbone(name, frozen_batch_norm=True):
    """A randomly initialised backbone: a name in `SWINS` or a ResNet of torchvision.models; InputError for others."""
    try:
        return Swin(*SWINS[name]) if name in SWINS else ResNet(name, frozen_batch_norm)
    except (ValueError, TypeError, AttributeError):  # torchvision has no such model, or it is no ResNet
        names = f"resnet18, resnet50 or another ResNet of torchvision.models, or one of {', '.join(SWINS)}"
        raise InputError(f"backbone {name!r}: choose {names}") from None


def group_norm(channels):
    """Normalisation that trains from scratch at any batch size, for models without pretrained weights."""
    return nn.GroupNorm(32, channels)


def fold_norms(body):
    """Let every convolution of a ResNet apply the frozen batch norm behind it: one pass over the activations instead of
    three, none of them stored in float32 under autocast. Parameters, buffers and their names stay as they are.
    """
    for module in list(body.modules()):
        children = dict(module.named_children())
        for name, conv in children.items():
            norm = children.get({"0": "1"}.get(name, name.replace("conv", "bn")))
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                conv.forward, norm.forward = partial(normed_conv, conv, norm), identity


def normed_conv(conv, norm, x):
    """norm(conv(x)) as one convolution: with its weight times the norm's gain, and the norm's shift as bias."""
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv._conv_forward(x, conv.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain)


def identity(x):
    """x itself, of a norm that its convolution applies."""
    return x


class ResNet(nn.Module):
    """A torchvision ResNet without its classifier; parameters keep torchvision's names below `body`.

    name                a constructor in torchvision.models, e.g. "resnet50"
    frozen_batch_norm   True: batch norm with fixed statistics and gains (pretrained weights); False: GroupNorm
    """

    def __init__(self, name, frozen_batch_norm=True):
        super().__init__()
        norm_layer = FrozenBatchNorm2d if frozen_batch_norm else group_norm
        self.body = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
        if frozen_batch_norm:
            fold_norms(self.body)
        # With GroupNorm a step on a CPU is a tenth shorter in the plain layout for images of 64 pixels, else no longer.
        self.memory_format = torch.channels_last if frozen_batch_norm else torch.contiguous_format
        self.body.to(memory_format=self.memory_format)
        self.channels = [stage[0].conv1.in_channels for stage in (self.body.layer2, self.body.layer3, self.body.layer4)]
        self.channels.append(self.body.fc.in_features)  # of C2, C3, C4, C5
        del self.body.fc

    @property
    def stages(self):
        """The four stages, each a sequence of blocks."""
        return self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4

    def forward(self, images):
        """images (B, 3, H, W), normalised, H, W multiples of 32. Returns [C2, C3, C4, C5], (B, channels, H/s, W/s)."""
        body = self.body
        x = images.contiguous(memory_format=self.memory_format)
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class WindowAttention(ShiftedWindowAttention):
    """torchvision's window attention, shifted also along a side that one window covers, as in the original Swin."""

    def define_relative_position_index(self):
        with torch.device("cpu"):  # not "meta": no checkpoint holds its values
            super().define_relative_position_index()
        self.register_buffer("relative_position_index", self.relative_position_index, persistent=False)

    def forward(self, x):
        """x (B, H, W, C), any H and W. Returns the same shape."""
        H, W = x.shape[1:3]
        window = self.window_size
        # The shift that torchvision leaves out. Where it does, all windows are alike along that side, so that the mask
        # between the two parts of a shifted window can travel with the position bias.
        dropped = [s if size <= w else 0 for s, size, w in zip(self.shift_size, (H, W), window, strict=True)]
        if not any(dropped):
            return super().forward(x)
        x = F.pad(x, (0, 0, 0, max(window[1] - W, 0), 0, max(window[0] - H, 0)))
        x = x.roll((-dropped[0], -dropped[1]), (1, 2))
        part = [torch.arange(w, device=x.device) >= w - s for w, s in zip(window, dropped, strict=True)]
        part = (2 * part[0][:, None] + part[1]).flatten()  # (window area,)
        bias = self.get_relative_position_bias()
        bias = torch.where(part[:, None] == part, bias, bias - 100)
        x = shifted_window_attention(
            x, self.qkv.weight, self.proj.weight, bias, window, self.num_heads, self.shift_size,
            qkv_bias=self.qkv.bias, proj_bias=self.proj.bias,
        )  # fmt: skip
        return x.roll(dropped, (1, 2))[:, :H, :W]


class Swin(nn.Module):
    """A torchvision Swin transformer without its classifier, with a norm on every stage's output map.

    Parameters keep torchvision's names below `body`. embed_dim, third_depth, window, stochastic_depth are the numbers
    of `SWINS`; the other stages have two blocks, and every head 32 channels.
    """

    def __init__(self, embed_dim, third_depth, window, stochastic_depth):
        super().__init__()
        self.channels = [embed_dim * 2**stage for stage in range(4)]  # of C2, C3, C4, C5
        self.body = SwinTransformer(
            patch_size=[4, 4],
            embed_dim=embed_dim,
            depths=[2, 2, third_depth, 2],
            num_heads=[channels // 32 for channels in self.channels],
            window_size=[window, window],
            stochastic_depth_prob=stochastic_depth,
            block=partial(SwinTransformerBlock, attn_layer=WindowAttention),
        )
        del self.body.norm, self.body.head
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    @property
    def stages(self):
        """The four stages, each a sequence of blocks."""
        return self.body.features[1::2]

    def forward(self, images):
        """images (B, 3, H, W), normalised, any H, W. Returns [C2, C3, C4, C5], (B, channels, H/s, W/s), rounded up."""
        H, W = images.shape[-2:]
        features = self.body.features
        x = features[0](F.pad(images, (0, -W % 4, 0, -H % 4)))  # (B, H/4, W/4, C)
        maps = []
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            x = stage(features[2 * i](x) if i else x)  # patch merging opens every stage but the first
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps


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
# Entries of pretrained classifiers that are no part of a backbone: the classifier itself, and what is computed anew.
NOT_BACKBONE = re.compile(r"(stem\.)?fc\.|head\.|norm\.|.*\.(num_batches_tracked|relative_position_index|attn_mask)$")


def renamed(name, table):
    """`name` with its beginning replaced by the first row (ours, theirs) of the table that fits. Raises KeyError."""
    for ours, theirs in table:
        if match := re.match(re.escape(ours).replace(r"\#", r"(\d+)"), name):
            numbers = iter(match.groups())
            return re.sub("#", lambda _: next(numbers), theirs) + name[match.end() :]  # noqa: B023
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
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start) and start.isascii() and not is_pickle(path):
        return "a text, not weights; check the path"
    return None


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


def open_weights(path, trust_pickle=False):
    """What a file of torch.save or safetensors, or a plain pickle with the suffix .pkl, holds; tensors on the CPU.

    Raises PermissionError without `trust_pickle` for a file that only Python's pickle can open, since that runs
    whatever program the file holds; ValueError or OSError, in one line, for what cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the checkpoint file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if kind := file_kind(path):
        raise ValueError(f"{path}: is {kind}")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        if path.suffix != ".pkl":
            with contextlib.suppress(pickle.UnpicklingError):  # it holds more than tensors, or is damaged
                return torch.load(path, map_location="cpu", weights_only=True)
        if not trust_pickle and is_pickle(path):
            raise PermissionError(
                f"{path}: opening this file needs Python's pickle, which can run any program on this machine; "
                "if you trust where the file comes from, add --trust-pickle"
            )
        if not trust_pickle:
            raise ValueError("no whole file of torch.save")
        if path.suffix != ".pkl":
            return torch.load(path, map_location="cpu", weights_only=False)
        with open(path, "rb") as file:
            return pickle.load(file, encoding="latin1")  # as Detectron2 does: some of its files come from Python 2
    except PermissionError:
        raise
    except Exception as error:  # whatever zip, pickle and their own checks come across
        reason = str(error).split("\n")[0][:100] or type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint, perhaps truncated ({reason})") from None


def load_safetensors(path):
    """{name: tensor} of a file of safetensors, a package of its own."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise PermissionError(f"{path}: needs a further package: python -m pip install safetensors") from None
    return load_file(path)


# Where programs put the weights in what they save, the first that is there: PyTorch Lightning's are in "state_dict".
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_ema", "ema", "ema_state_dict", "module")


def find_weights(path, content):
    """The weights in what a file holds: {name: tensor}, without the prefixes of DDP, torch.compile and Lightning.

    A line on stderr says where they were if that is neither its top nor "model", and what other ones there are. Raises
    ValueError.
    """
    entries, where = content, []
    while isinstance(entries, dict) and (found := [key for key in WRAPPERS if isinstance(entries.get(key), dict)]):
        where.append(found[0])
        if found[1:] or found[0] != "model":
            others = f", not those of {', '.join(found[1:])}" if found[1:] else ""
            print(f"{path}: takes the weights of {'.'.join(where)!r}{others}", file=sys.stderr)
        entries = entries[found[0]]
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: holds no weights, neither at its top nor under {', '.join(map(repr, WRAPPERS))}")
    weights = {}
    for name, value in entries.items():
        if not isinstance(value, torch.Tensor | np.ndarray | np.generic):
            raise ValueError(f"{path}: the entry {name!r} is not a tensor but {type(value).__name__}")
        if str(name) != "n_averaged":  # of torch.optim.swa_utils.AveragedModel
            bare = re.sub(r"^((module|model)\.)*", "", str(name).replace("_orig_mod.", ""))
            if bare in weights:
                raise ValueError(f"{path}: holds {bare} twice, once as {name}; give a file with one model")
            weights[bare] = torch.as_tensor(value)
    for name, value in weights.items():
        if value.is_floating_point() and value.numel() and not torch.stack(value.aminmax()).isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: its training diverged, or it is damaged")
    return weights


def read_weights(path, trust_pickle=False):
    """{name: tensor} from a file of others, see `open_weights`, `find_weights`. Raises ValueError or OSError."""
    return find_weights(path, open_weights(path, trust_pickle))


def mismatches(found, expected):
    """What is wrong with entries {name: tensor} where {name: shape} is expected: one line for each wrong entry."""
    shape = lambda name: tuple(found[name].shape)  # noqa: E731
    return [
        *(f"missing: {name}, of shape {tuple(expected[name])}" for name in expected if name not in found),
        *(f"unknown: {name}, of shape {shape(name)}" for name in found if name not in expected),
        *(
            f"misshapen: {name} is {shape(name)}, should be {tuple(expected[name])}"
            for name in found
            if name in expected and shape(name) != tuple(expected[name])
        ),
    ]


def shortened(problems, most=10):
    """The lines of `mismatches`, of each kind the first `most` and how many more there are."""
    kinds = {}
    for line in problems:
        kinds.setdefault(line.split(":")[0], []).append(line)
    return [
        line
        for kind, lines in kinds.items()
        for line in lines[:most] + ([f"{kind}: and {len(lines) - most} more"] if len(lines) > most else [])
    ]


def load_backbone_weights(backbone, source, trust_pickle=False):
    """Load pretrained weights into a `ResNet` or `Swin`. The norms on Swin's maps stay where the weights have none.

    source        torchvision's name of weights, e.g. "ResNet50_Weights.IMAGENET1K_V1", downloaded if need be; or a file
                  of torchvision, of Microsoft's Swin, or of Detectron2, told apart by the names in it
    trust_pickle  allows a file in the format of Python's pickle, as Detectron2's .pkl, which may run any program

    Raises ValueError, listing entries that are missing, unknown or misshapen, ten of each kind at most; ValueError or
    OSError, in one line, for what cannot be read.
    """
    weights = download_weights(source) if "_Weights." in str(source) else read_weights(source, trust_pickle)
    weights = {name.removeprefix("backbone."): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if not NOT_BACKBONE.match(name)}
    state = backbone.state_dict()
    table = SWIN_NAMES if isinstance(backbone, Swin) else RESNET_NAMES
    formats = {name.removeprefix("body."): name for name in state}, {renamed(name, table): name for name in state}
    names = max(formats, key=lambda names: len(names.keys() & weights.keys()))
    expected = {
        name: state[ours].shape for name, ours in names.items() if name in weights or not ours.startswith("norms.")
    }
    if problems := mismatches(weights, expected):
        lines = "\n  ".join(shortened(problems))
        raise ValueError(f"{source}: {len(problems)} entries do not fit the backbone:\n  {lines}")
    backbone.load_state_dict({names[name]: value for name, value in weights.items()}, strict=False)


def download_weights(name):
    """{name: tensor} of torchvision's weights of that name, from its cache or the net. Raises ValueError or OSError."""
    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{name}: torchvision has no weights of that name") from None
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # of the connection, of the disk, or of a damaged file
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        reason = str(error) or type(error).__name__
        raise OSError(f"{name}: cannot load {weights.url} ({reason}); download it and put it into {folder}") from None
