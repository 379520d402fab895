"""config.py: what cannot be set is refused, and every setting has its flag."""

import argparse
from dataclasses import fields, replace

import pytest

from cli import add_config_arguments, config_from
from config import PRESETS, Config, InputError


def parse(*flags, preset="tiny"):
    """The Config of a preset with these flags."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    args = parser.parse_args(flags)
    args.preset = preset
    return config_from(args)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"selections": ()}, r"selections \(\): give one size or more"),
        ({"selections": (30, 60)}, r"selections \(30, 60\): .* none above the one before"),
        ({"selections": (60, 0)}, r"selections \(60, 0\): must be 1 or more"),
        ({"hidden_dim": 40, "num_heads": 4}, "hidden_dim 40: must be a multiple of 32"),
        ({"hidden_dim": 64, "num_heads": 3}, "hidden_dim 64: .* num_heads 3"),
        ({"num_levels": 3}, "num_levels 3: choose from 4, 5"),
        ({"num_classes": 0}, "num_classes 0: must be 1 or more"),
        ({"noise_scale": 1.5}, "noise_scale 1.5: must be 1 or less"),
        ({"noise_scale": -0.1}, "noise_scale -0.1: must be 0 or more"),
        ({"class_prior": 1.0}, "class_prior 1.0: must be below 1"),
        ({"class_prior": 0.0}, "class_prior 0.0: must be 1e-06 or more"),
        ({"train_scale": (2.0, 0.1)}, "train_scale .* the smaller number comes first"),
        ({"train_scale": (0.0, 1.0)}, "train_scale .* must be 0.001 or more"),
        ({"train_size": 0}, "train_size 0: must be 1 or more"),
        ({"test_size": (0, 64)}, "test_size .* must be 1 or more"),
        ({"guidance": "t_s1", "di": False}, "guidance t_s1: needs di and bato"),
        ({"guidance": "t_s2", "bato": False}, "guidance t_s2: needs di and bato"),
        ({"guidance": "t_s2", "selections": (30,)}, "guidance t_s2: needs .* two selections, not"),
        ({"guidance": "memory"}, "guidance 'memory': choose from t_s1, t_s2, q_bal"),
        ({"box_init": "boxes"}, "box_init 'boxes': choose from mask, bitmask, head"),
        ({"position_tokens": "none"}, "position_tokens 'none': choose from boxes, random"),
        ({"gtg": False, "bato": False}, "gtg False: .* bato must be on"),
        ({"decoder_layers": 0}, "decoder_layers 0: must be 1 or more"),
        ({"decoder_layers": 1}, "decoder_layers 1: .* give 2 or more"),
        ({"box_loss_scale": float("nan")}, "box_loss_scale nan: must be 0 or more"),
        ({"selections": [60, -5]}, "selections .60, -5.: must be 1 or more"),
        ({"loss_points": 0}, "loss_points 0: must be 1 or more"),
        ({"denoising_queries": -1}, "denoising_queries -1: must be 0 or more"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(InputError, match=message) as error:
        replace(PRESETS["tiny"], **settings)
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_least_values_are_taken():
    """0 is a value where it makes sense: no denoising, no noise, no weight."""
    zeros = ("denoising_queries", "noise_scale", "class_weight", "box_weight", "giou_weight", "mask_weight",
             "dice_weight", "box_loss_scale")  # fmt: skip
    config = replace(Config(), **dict.fromkeys(zeros, 0))
    assert not any(getattr(config, name) for name in zeros)


def test_only_the_last_selection_is_kept_where_nothing_follows_the_first():
    assert Config(di=False).selections == (300,)
    assert Config(guidance="t_s1").selections == Config().selections == (600, 300)


@pytest.mark.parametrize("preset", PRESETS)
def test_without_flags_the_preset(preset):
    assert parse(preset=preset) == PRESETS[preset]


def other_value(name, value):
    """A value that differs from this one, as flags and as it is then in Config."""
    special = {
        "backbone": (["resnet34"], "resnet34"),
        "selections": (["50,20,10"], (50, 20, 10)),
        "box_init": (["head"], "head"),
        "position_tokens": (["random"], "random"),
        "guidance": (["t_s2"], "t_s2"),
        "num_levels": (["5"], 5),
        "hidden_dim": (["96"], 96),
        "num_heads": (["2"], 2),
    }
    if name in special:
        return special[name]
    if isinstance(value, tuple):
        return [str(number * 2) for number in value], tuple(number * 2 for number in value)
    new = value * 2 if value else 1
    return [str(new)], new


@pytest.mark.parametrize("entry", fields(Config)[1:], ids=lambda entry: entry.name)
def test_every_setting_has_a_flag(entry):
    """It sets this setting and no other; its help says what it is."""
    flag, before = "--" + entry.name.replace("_", "-"), getattr(PRESETS["tiny"], entry.name)
    if isinstance(before, bool):
        flags, value = ([flag.replace("--", "--no-", 1)] if before else [flag]), not before
    else:
        words, value = other_value(entry.name, before)
        flags = [flag, *words]
    config = parse(*flags)
    assert getattr(config, entry.name) == value and type(value) is type(getattr(config, entry.name))
    assert config == replace(PRESETS["tiny"], **{entry.name: value})
    assert len(entry.metadata["help"]) > 10


def test_zeros_as_flags():
    """A flag that is 0 means 0, and not the preset's value."""
    config = parse("--denoising-queries", "0", "--noise-scale", "0", "--box-weight", "0", "--box-loss-scale", "0")
    assert (config.denoising_queries, config.noise_scale, config.box_weight, config.box_loss_scale) == (0, 0, 0, 0)


@pytest.mark.parametrize("flags", [["--selections", "30,x"], ["--train-scale", "1"], ["--guidance", "t_x"],
                                   ["--hidden-dim", "6.5"], ["--num-classes", "3"]])  # fmt: skip
def test_flags_that_argparse_refuses(flags, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert flags[0] in capsys.readouterr().err
