"""Initial values of every parameter: the standard deviations that the released training starts from."""

import math
import re
from collections import defaultdict

import pytest
import torch

from model import build_model

# Standard deviations by the fans of a matrix or convolution; a bias has the fans of its weight.
DISTRIBUTIONS = {
    "zero": lambda fan_in, fan_out: 0,
    "normal": lambda fan_in, fan_out: 1,
    "xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "torch": lambda fan_in, fan_out: math.sqrt(
        1 / (3 * fan_in)
    ),  # nn.Linear and its bias: uniform within 1 / sqrt(fan_in)
    "kaiming": lambda fan_in, fan_out: math.sqrt(1 / fan_in),  # uniform, a = 1
    "resnet": lambda fan_in, fan_out: math.sqrt(2 / fan_out),
}
# What the whole of a parameter's name must match; the first that does counts.
RULES = [
    (r"backbone\..*", "resnet"),
    (r"encoder\.level_embed|denoising\.label_embedding\.weight", "normal"),
    (r".*\.(sampling_offsets|attention_weights)\.weight|.*\.attention_weights\.bias", "zero"),
    (r".*\.(value_proj|output_proj|in_proj|out_proj|input_proj\.\d\.0)[._]bias", "zero"),
    (r".*\.in_proj_weight|.*\.(value_proj|output_proj)\.weight|encoder\.input_proj\.\d\.0\.weight", "xavier"),
    (r"(encoder\.(lateral|output)|bato\.pixel_output)\.0\.weight|encoder\.pixel_proj\.weight", "kaiming"),
    (r"encoder\.pixel_proj\.bias|.*box_head\.layers\.2\..*", "zero"),
    (r"(encoder\.layers|decoder|bato)\..*\.weight", "xavier"),
    (r".*", "torch"),  # with DI's interaction, the heads, and the biases of all feed-forward networks
]


SMALLER = {"backbone": "resnet18", "encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 512}


def test_standard_deviations():
    """To 5 %; biases have few elements, so that they are taken from several models."""
    values, means = defaultdict(list), {}
    for seed in range(8):
        torch.manual_seed(seed)
        model = build_model("dimaskdino_r50", encoder_feedforward_dim=512, **SMALLER)
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if seed < 1 or parameter.dim() == 1:
                    name = f"{module_name}.{name}"
                    norm = isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm)
                    means[name] = 1 if norm and name.endswith("weight") else 0
                    values[name].append(parameter.detach().flatten())
    parameters = dict(model.named_parameters())
    assert values.keys() == parameters.keys()
    for name, found in values.items():
        found = torch.cat(found)
        weight = parameters[re.sub("bias$", "weight", name)]
        if weight.dim() == 1:  # of a norm
            assert (found == means[name]).all(), name
            continue
        if name.endswith("sampling_offsets.bias"):  # the compass directions, see tests/test_attention.py
            continue
        kind = next(kind for pattern, kind in RULES if re.fullmatch(pattern, name))
        fan_in, fan_out = weight[0].numel(), weight.numel() // weight.shape[1]
        expected = DISTRIBUTIONS[kind](fan_in, fan_out)
        assert found.std().item() == pytest.approx(expected, rel=0.05), (name, kind)
        assert abs(found.mean().item()) <= 4 * expected / math.sqrt(len(found)), (name, kind)


def test_interaction_layers_start_alike():
    """The released code clones one layer."""
    first, second = build_model("tiny").di.interactions[0].layers
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
