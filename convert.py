"""Converts the checkpoints that the authors of DI-MaskDINO and Mask DINO released (Detectron2) into this project's."""

import argparse
import pickle
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from model import PRESETS, DIMaskDINO, build_model

# Released names to ours, first match wins. A module that the released code registers twice is saved twice: all its
# names lead to one of ours.
HEAD, PREDICTOR = r"sem_seg_head\.", r"sem_seg_head\.predictor\."
RULES = [
    # backbone
    (r"backbone\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"backbone\.stem\.conv1\.", "backbone.body.conv1."),
    *((rf"backbone\.res{n + 1}\.(\d+)\.shortcut\.norm\.", rf"backbone.body.layer{n}.\1.downsample.1.") for n in range(1, 5)),
    *((rf"backbone\.res{n + 1}\.(\d+)\.shortcut\.", rf"backbone.body.layer{n}.\1.downsample.0.") for n in range(1, 5)),
    *((rf"backbone\.res{n + 1}\.(\d+)\.conv(\d)\.norm\.", rf"backbone.body.layer{n}.\1.bn\2.") for n in range(1, 5)),
    *((rf"backbone\.res{n + 1}\.(\d+)\.conv(\d)\.", rf"backbone.body.layer{n}.\1.conv\2.") for n in range(1, 5)),
    # encoder and pixel features
    (HEAD + r"pixel_decoder\.input_proj\.", "encoder.input_proj."),
    (HEAD + r"pixel_decoder\.transformer\.level_embed", "encoder.level_embed"),
    (HEAD + r"pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"encoder.layers.\1.self_attn."),
    (HEAD + r"pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm1\.", r"encoder.layers.\1.norm."),
    (HEAD + r"pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm2\.", r"encoder.layers.\1.ffn.norm."),
    (HEAD + r"pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.linear", r"encoder.layers.\1.ffn.linear"),
    (HEAD + r"pixel_decoder\.adapter_1\.norm\.", "encoder.lateral.1."),
    (HEAD + r"pixel_decoder\.adapter_1\.", "encoder.lateral.0."),
    (HEAD + r"pixel_decoder\.layer_1\.norm\.", "encoder.output.1."),
    (HEAD + r"pixel_decoder\.layer_1\.", "encoder.output.0."),
    (HEAD + r"pixel_decoder\.mask_features\.", "encoder.pixel_proj."),
    # selection and heads
    (PREDICTOR + r"enc_output\.", "candidates.linear."),
    (PREDICTOR + r"enc_output_norm\.", "candidates.norm."),
    (PREDICTOR + r"label_enc\.", "label_embedding."),
    (PREDICTOR + r"(?:oldm\.|decoder\.)?class_embed\.", "heads.class_head."),
    (PREDICTOR + r"(?:decoder\.)?mask_embed\.", "heads.mask_head."),
    (PREDICTOR + r"(?:_bbox_embed|(?:decoder\.)?bbox_embed\.\d+)\.", "heads.box_head."),
    (PREDICTOR + r"(?:decoder_norm|decoder\.norm)\.", "heads.norm."),
    # De-Imbalance
    (PREDICTOR + r"(?:oldm_norm|oldm\.norm)\.", "interaction.norm."),
    (PREDICTOR + r"(?:_oldm_bbox_embed|oldm_bbox_embed\.\d+|oldm\.bbox_embed\.\d+)\.", "interaction.box_head."),
    (PREDICTOR + r"oldm\.ref_point_head\.", "interaction.query_pos."),
    (PREDICTOR + r"oldm\.layers\.(\d+)\.self_attn\.", r"interaction.layers.\1.self_attn."),
    (PREDICTOR + r"oldm\.layers\.(\d+)\.norm1\.", r"interaction.layers.\1.norm."),
    (PREDICTOR + r"oldm\.layers\.(\d+)\.norm2\.", r"interaction.layers.\1.ffn.norm."),
    (PREDICTOR + r"oldm\.layers\.(\d+)\.linear", r"interaction.layers.\1.ffn.linear"),
    # BATO
    (PREDICTOR + r"(?:decoder\.)?query_guide_feature_update\.multihead_attn\.", "bato.cross_attn."),
    (PREDICTOR + r"(?:decoder\.)?query_guide_feature_update\.norm1\.", "bato.norm."),
    (PREDICTOR + r"(?:decoder\.)?query_guide_feature_update\.norm2\.", "bato.ffn.norm."),
    (PREDICTOR + r"(?:decoder\.)?query_guide_feature_update\.linear", "bato.ffn.linear"),
    (PREDICTOR + r"decoder\.mask_output_conv\.norm\.", "bato.pixel_output.1."),
    (PREDICTOR + r"decoder\.mask_output_conv\.", "bato.pixel_output.0."),
    # decoder
    (PREDICTOR + r"decoder\.ref_point_head\.", "decoder.position_mlp."),
    (PREDICTOR + r"decoder\.layers\.(\d+)\.(self|cross)_attn\.", r"decoder.layers.\1.\2_attn."),
    (PREDICTOR + r"decoder\.layers\.(\d+)\.norm1\.", r"decoder.layers.\1.cross_norm."),
    (PREDICTOR + r"decoder\.layers\.(\d+)\.norm2\.", r"decoder.layers.\1.self_norm."),
    (PREDICTOR + r"decoder\.layers\.(\d+)\.norm3\.", r"decoder.layers.\1.ffn.norm."),
    (PREDICTOR + r"decoder\.layers\.(\d+)\.linear", r"decoder.layers.\1.ffn.linear"),
]
RULES = [(re.compile(pattern), ours) for pattern, ours in RULES]
# Entries of released checkpoints that hold nothing of the model.
IGNORED = re.compile(r"criterion\.|pixel_mean$|pixel_std$|.*num_batches_tracked$|.*relative_position_index$")


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message lists the entries, one a line."""


def our_name(name):
    """The name of a released entry in this project, or None where there is none."""
    for pattern, ours in RULES:
        if match := pattern.match(name):
            return match.expand(ours) + name[match.end() :]
    return None


def convert_state_dict(released):
    """{released name: tensor or array} -> our state dict {name: tensor}.

    Raises ConversionError, listing all of them, for names that the released models do not have and for modules saved
    twice with different values.
    """
    state, problems = {}, []
    for name, value in released.items():
        if IGNORED.match(name):
            continue
        ours, value = our_name(name), torch.as_tensor(value)
        if ours is None:
            problems.append(f"unknown: {name} {tuple(value.shape)}")
        elif ours in state and not torch.equal(state[ours], value):
            problems.append(f"contradictory: {name} differs from its other copies")
        else:
            state[ours] = value
    if problems:
        raise ConversionError("\n".join(problems))
    return state


def model_for(state):
    """The preset model whose architecture a converted state dict has; its number of classes is read off the class head.

    Raises ConversionError where entries are missing, too many or misshapen for it.
    """
    preset = "dimaskdino_r50" if any(name.startswith("interaction.") for name in state) else "maskdino_r50"
    if "heads.class_head.weight" not in state:
        raise ConversionError("missing: the class head (sem_seg_head.predictor.class_embed.weight)")
    model = build_model(preset, num_classes=len(state["heads.class_head.weight"]))
    expected = model.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in state]
    problems += [f"not part of {preset}: {name}" for name in state if name not in expected]
    problems += [
        f"misshapen: {name} is {tuple(value.shape)}, should be {tuple(expected[name].shape)}"
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        raise ConversionError("\n".join(problems))
    model.load_state_dict(state)
    return model
