"""Checkpoint files of this project that went through other hands: prefixes, wrappers, damage, names of classes."""

import pytest
import torch

from checkpoint import load_model, read_checkpoint
from config import InputError


@pytest.fixture
def content(tiny_checkpoint):
    return torch.load(tiny_checkpoint, weights_only=True)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_prefixes_are_taken_off(content, tmp_path, prefix):
    weights = content["model"]
    model, _ = load_model(saved(tmp_path, content | {"model": {prefix + name: x for name, x in weights.items()}}))
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_parts_may_have_been_compiled(content, tmp_path):
    weights = {name.replace("encoder.", "encoder._orig_mod."): x for name, x in content["model"].items()}
    load_model(saved(tmp_path, content | {"model": weights}))


@pytest.mark.parametrize("wrapper", ["state_dict", "model_ema", "ema"])
def test_weights_are_found_and_where_they_were_is_said(content, tmp_path, capsys, wrapper):
    content[wrapper] = content.pop("model")
    model, checkpoint = load_model(saved(tmp_path, content))
    assert wrapper in capsys.readouterr().err
    assert torch.equal(checkpoint["model"]["heads.norm.weight"], model.heads.norm.weight)


def test_numbers_of_the_config_come_back_as_tuples(content, tmp_path):
    config = content["config"] | {"selections": [60, 30], "test_size": [64, 64], "train_scale": [0.8, 1.25]}
    model, checkpoint = load_model(saved(tmp_path, content | {"config": config}))
    assert checkpoint["config"] == content["config"] and model.config.selections == (60, 30)


def fails(path, says):
    with pytest.raises(InputError, match=says) as error:
        load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_names_of_classes_that_are_too_few(content, tmp_path):
    fails(saved(tmp_path, content | {"classes": content["classes"][:9]}), "holds 9 classes for 10 classes")
    fails(saved(tmp_path, content | {"category_ids": [1, 2]}), "holds 2 category_ids for 10 classes")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(content, tmp_path, value):
    content["model"]["bato.norm.bias"][3] = value
    fails(saved(tmp_path, content), "bato.norm.bias holds NaN or infinity")


def test_what_does_not_fit_is_named_and_the_list_is_cut(content, tmp_path):
    content["config"]["decoder_layers"] = 9
    fails(saved(tmp_path, content), r"do not fit \(in decoder_layers: missing: decoder.layers.3.*; and \d+ more\)")
    content["config"]["depth"] = 3
    fails(saved(tmp_path, content), "its config is not one of this version .*depth")


def test_what_is_no_checkpoint_is_called_what_it_is(content, tmp_path):
    path = tmp_path / "file.pt"
    for text, says in (
        ("<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "is a Git LFS pointer"),
        ("hello", "is a text"),
        ("", "is empty"),
    ):
        path.write_text(text)
        fails(path, says)
    fails(tmp_path / "none.pt", "no such checkpoint")
    torch.save({"state_dict": content["model"]}, path)
    fails(path, "run convert.py on a released one .*tensors in it, but no 'config' and no 'classes'")
    torch.save(content | {"config": torch.nn.Linear(1, 1)}, path)  # an object, which only a pickle can open
    with pytest.raises(InputError, match="not a checkpoint of this project") as error:
        read_checkpoint(path)
    assert "--trust-pickle" not in str(error.value)
