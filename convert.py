"""Converts the checkpoints that the authors of DI-MaskDINO and Mask DINO released into this project's, and back."""

import argparse
import contextlib
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mode
from typing import get_args

import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from backbone import SWINS
from checkpoint import load_model, read_checkpoint, save_checkpoint
from cli import run_program
from config import PRESETS, Config, InputError
from formats.bdd100k import BDD100K_CLASSES
from model import DIMaskDINO
from weights import RESNET_NAMES, SWIN_NAMES, listed, mismatches, read_weights, renamed

# Names of entries: (ours, released), each the beginning of a name, "#" a number. The first row that fits holds.
ENCODER, PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
NAMES = [("backbone." + ours, "backbone." + released) for ours, released in RESNET_NAMES + SWIN_NAMES]
NAMES += [
    ("encoder.input_proj.", ENCODER + "input_proj."),
    ("encoder.level_embed", ENCODER + "transformer.level_embed"),
    ("encoder.lateral.0.", ENCODER + "adapter_1."),
    ("encoder.lateral.1.", ENCODER + "adapter_1.norm."),
    ("encoder.output.0.", ENCODER + "layer_1."),
    ("encoder.output.1.", ENCODER + "layer_1.norm."),
    ("encoder.pixel_proj.", ENCODER + "mask_features."),
    ("di.candidates.linear.", PREDICTOR + "enc_output."),
    ("di.candidates.norm.", PREDICTOR + "enc_output_norm."),
    ("denoising.label_embedding.", PREDICTOR + "label_enc."),
    ("heads.class_head.", PREDICTOR + "class_embed."),
    ("heads.mask_head.", PREDICTOR + "mask_embed."),
    ("heads.box_head.", PREDICTOR + "_bbox_embed."),
    ("heads.norm.", PREDICTOR + "decoder_norm."),
    ("di.interactions.0.norm.", PREDICTOR + "oldm_norm."),
    ("di.interactions.0.box_head.", PREDICTOR + "_oldm_bbox_embed."),
    ("di.interactions.0.query_pos.", PREDICTOR + "oldm.ref_point_head."),
    ("bato.cross_attn.", PREDICTOR + "query_guide_feature_update.multihead_attn."),
    ("bato.pixel_output.0.", PREDICTOR + "decoder.mask_output_conv."),
    ("bato.pixel_output.1.", PREDICTOR + "decoder.mask_output_conv.norm."),
    ("decoder.position_mlp.", PREDICTOR + "decoder.ref_point_head."),
]
for ours, released, norms in [  # the released code numbers a layer's norms
    ("encoder.layers.#.", ENCODER + "transformer.encoder.layers.#.", ("norm", "ffn.norm")),
    ("di.interactions.0.layers.#.", PREDICTOR + "oldm.layers.#.", ("norm", "ffn.norm")),
    ("bato.", PREDICTOR + "query_guide_feature_update.", ("norm", "ffn.norm")),
    ("decoder.layers.#.", PREDICTOR + "decoder.layers.#.", ("cross_norm", "self_norm", "ffn.norm")),
]:
    NAMES += [(f"{ours}{norm}.", f"{released}norm{number}.") for number, norm in enumerate(norms, start=1)]
    NAMES += [(ours + "ffn.linear", released + "linear"), (ours, released)]  # other parts have one name in both
# Entries of released checkpoints that hold nothing of the model.
IGNORED = re.compile(r"criterion\.|pixel_mean$|pixel_std$|.*\.(num_batches_tracked|relative_position_index)$")


class ConversionError(InputError):
    """A checkpoint that cannot be converted; the message lists entries, one a line."""


def copies(config):
    """[(start of another name, start of the first)] of the modules that the released code saves several times."""
    pairs = [("decoder.norm.", "decoder_norm.")]
    pairs += [(f"{at}bbox_embed.{i}.", "_bbox_embed.") for at in ("", "decoder.") for i in range(config.decoder_layers)]
    if len(config.selections) > 1:
        pairs += [("oldm.norm.", "oldm_norm."), ("oldm.class_embed.", "class_embed.")]
        layers = range(config.interaction_layers)
        pairs += [(f"oldm{dot}bbox_embed.{i}.", "_oldm_bbox_embed.") for dot in "_." for i in layers]
    if config.bato:
        modules = "class_embed", "mask_embed", "query_guide_feature_update"
        pairs += [(f"decoder.{module}.", f"{module}.") for module in modules]
    return [(PREDICTOR + copy, PREDICTOR + first) for copy, first in pairs]


def released_names(config):
    """{released name: our name} of every entry of a released checkpoint of this architecture; {our name: shape}."""
    with torch.device("meta"):  # shapes only
        shapes = {name: tuple(value.shape) for name, value in DIMaskDINO(config).state_dict().items()}
    names = {renamed(ours, NAMES): ours for ours in shapes}
    for copy, first in copies(config):
        names |= {copy + name.removeprefix(first): ours for name, ours in names.items() if name.startswith(first)}
    return names, shapes


def read_config(released):
    """The Config of the architecture that {released name: tensor} has, read off names and shapes.

    Each number is what most of the entries that depend on it say, so that a wrong entry shows as the wrong one. What
    shapes do not show (`box_init`) is as in the released model of that backbone. Raises ConversionError for a Swin
    transformer of unknown dimensions and for an encoder with another number of scales than the model here can have.
    """

    def rows(pattern):  # of the matrices and vectors whose whole name fits; None where there are none
        sizes = [len(value) for name, value in released.items() if value.dim() and re.fullmatch(pattern, name)]
        return mode(sizes) if sizes else None

    def modules(pattern):  # in a list of modules with the same entries each; None where there are none
        entries = Counter(match[1] for name in released if (match := re.match(pattern + r"\.\d+\.(.*)", name)))
        return mode(entries.values()) if entries else None

    number = lambda start: sum(name.startswith(start) for name in released)
    swin, di = number("backbone.layers.") > number("backbone.res"), number(PREDICTOR + "oldm") > 1
    encoder_layers, decoder_layers = ENCODER + r"transformer\.encoder\.layers", PREDICTOR + r"decoder\.layers"
    found = {
        "num_classes": rows(PREDICTOR + r"(.*\.)?(class_embed|label_enc)\.\w+"),
        "num_levels": modules(ENCODER + "input_proj"),
        "encoder_layers": modules(encoder_layers),
        "encoder_feedforward_dim": rows(encoder_layers + r"\.\d+\.linear1\.\w+"),
        "interaction_layers": modules(PREDICTOR + r"oldm\.layers"),
        "decoder_layers": modules(decoder_layers),
        "feedforward_dim": rows(decoder_layers + r"\.\d+\.linear1\.\w+"),
    }
    if found["num_levels"] not in (None, 4, 5):
        raise ConversionError(
            f"its encoder has {found['num_levels']} scales; the model here has 4 (C3 to C6) or 5 (C2 to C6). Give a "
            "checkpoint that was trained with one of these, or evaluate this one with the released code"
        )
    if swin:
        channels, blocks = rows(r"backbone\.patch_embed\.\w+\.\w+"), modules(r"backbone\.layers\.2\.blocks")
        table = rows(r"backbone\..*\.relative_position_bias_table") or 0  # (2 window - 1)^2
        size = channels, blocks, (math.isqrt(table) + 1) // 2
        found["backbone"] = next((name for name, numbers in SWINS.items() if numbers[:3] == size), None)
        if not found["backbone"]:
            raise ConversionError("no known Swin has {} channels, {} blocks in stage 3, windows of {}".format(*size))
    config = PRESETS[f"{'di' if di else ''}maskdino_{'swin_l' if swin else 'r50'}"]
    return replace(config, **{name: value for name, value in found.items() if value})


def convert_state_dict(released):
    """{released name: tensor or array} -> our state dict {name: tensor}.

    Raises ConversionError, listing ten of each kind at most, for entries that are missing, unknown or misshapen for the
    architecture that most of the entries have, or else for modules saved twice with different values.
    """
    released = {name: torch.as_tensor(value) for name, value in released.items() if not IGNORED.match(name)}
    names, shapes = released_names(read_config(released))
    first = {}
    for name, ours in names.items():
        first.setdefault(ours, name)
    problems = mismatches(released, {name: shapes[ours] for name, ours in names.items()}) or [
        f"contradictory: {name} should equal {first[ours]}"
        for name, ours in names.items()
        if not torch.equal(released[name], released[first[ours]])
    ]
    if problems:
        some = f"{len(problems)} entries do" if len(problems) > 1 else "1 entry does"
        raise ConversionError(f"{some} not fit a released checkpoint:{listed(problems)}")
    return {ours: released[name] for ours, name in first.items()}


def released_state_dict(state, config):
    """Our state dict -> {released name: tensor}, with every name that a released checkpoint has.

    Raises ConversionError for an architecture that the released code does not have, and for entries that do not fit it.
    """
    if len(config.selections) > 2:
        raise ConversionError(f"the released code has no model with selections {config.selections}")
    if config.backbone == "mobilenet_v2":
        raise ConversionError("the released code has no model with backbone mobilenet_v2")
    names, shapes = released_names(config)
    if problems := mismatches(state, shapes):
        raise ConversionError(f"entries do not fit its config:{listed(problems)}")
    released = {name: state[ours] for name, ours in names.items()}
    # What shapes show is right in it; the rest has to be as in a released model.
    ours, known = asdict(config), asdict(read_config(released))
    fields = "backbone frozen_batch_norm hidden_dim num_heads num_points selections position_tokens bato gtg guidance"
    if different := [f"{f} {ours[f]}" for f in [*fields.split(), "num_guiding"] if ours[f] != known[f]]:
        raise ConversionError(f"the released code has no model with {', '.join(different)}")
    return released


def categories(num_classes):
    """Names and category ids of the classes of a released checkpoint, by their number: COCO's 80 or BDD100K's 8."""
    if num_classes == 80:
        names = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]  # by category id, with gaps
        known = {i: name for i, name in enumerate(names) if name not in ("__background__", "N/A")}
        return list(known.values()), list(known)
    names = list(BDD100K_CLASSES) if num_classes == 8 else [f"class {i}" for i in range(num_classes)]
    return names, list(range(1, num_classes + 1))


def convert(source, output, trust_pickle=False, box_init=None):
    """Released checkpoint -> checkpoint of this project. Returns its Config. Raises InputError.

    box_init: where the boxes of the first selection come from, which no shape shows; None: as `read_config` takes it.
    """
    released = read_weights(source, trust_pickle)
    if "heads.class_head.weight" in released:
        raise ConversionError("is a checkpoint of this project already; --reverse converts it back")
    state, config = convert_state_dict(released), read_config(released)
    config = replace(config, box_init=box_init or config.box_init)
    classes, ids = categories(config.num_classes)
    save_checkpoint(output, {"model": state, "config": asdict(config), "classes": classes, "category_ids": ids})
    return config


def revert(source, output):
    """Checkpoint of this project -> {"model": released names and tensors}. Returns its Config. Raises InputError."""
    model, checkpoint = load_model(source)
    save_checkpoint(output, {"model": released_state_dict(checkpoint["model"], model.config)})
    return model.config


def is_converted(path):
    """Whether a file is a checkpoint as `convert` writes it, without the state of a training."""
    with contextlib.suppress(InputError):
        return "optimizer" not in read_checkpoint(path)
    return False


def main():
    parser = argparse.ArgumentParser(description=f"{__doc__} The architecture is read off the tensors' shapes.")
    add = parser.add_argument
    add("source", metavar="OFFICIAL.pth", type=Path, help="The checkpoint to convert: a released one, or one of ours.")
    add("output", metavar="OUT.pt", type=Path, help="The file to write.")
    add("--reverse", action="store_true", help="Convert one of ours into a file that the released code loads.")
    boxes = (
        "Say where the first selection's boxes come from: mask, around the masks; bitmask, the same, a pixel larger; "
        "head, the box head (default: as released, bitmask for Mask DINO with a Swin transformer, else mask)."
    )
    add("--box-init", choices=get_args(Config.__annotations__["box_init"]), help=boxes)
    pickles = "Open a file that only Python's pickle can read, such as a .pkl; it runs whatever program the file holds."
    add("--trust-pickle", action="store_true", help=pickles)
    args = parser.parse_args()
    source, output = args.source, args.output
    if not output.resolve().parent.is_dir():
        raise InputError(f"{output}: its folder does not exist; create it first")
    if args.reverse and args.box_init:
        raise InputError("--box-init: is for a released checkpoint, not with --reverse")
    if output.exists() and (args.reverse or not is_converted(output)):
        raise InputError(f"{output}: exists, and only a checkpoint that was converted is replaced; choose another name")
    try:
        config = revert(source, output) if args.reverse else convert(source, output, args.trust_pickle, args.box_init)
    except ConversionError as error:
        raise InputError(f"{source}: {error}") from None
    print(
        f"{output}: {'DI-MaskDINO' if config.di else 'Mask DINO'}, {config.backbone}, {config.num_levels} scales, "
        f"{config.encoder_layers} encoder and {config.decoder_layers} decoder layers, {config.num_classes} classes, "
        f"box_init {config.box_init}"
    )


if __name__ == "__main__":
    run_program(main)
