"""Conversion of released checkpoints and back: names, architectures, bad input, and the program as a user runs it."""

import gzip
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import convert
from checkpoint import load_model
from cli import run_program
from config import PRESETS
from convert import ConversionError, convert_state_dict, read_config, released_names, released_state_dict
from model import DIMaskDINO
from weights import read_weights

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = ["dimaskdino_r50", "maskdino_r50", "dimaskdino_swin_l", "maskdino_swin_l"]
PREDICTOR = "sem_seg_head.predictor."


def key_list(system):
    """{released name: [shape, source name]} of the released models."""
    return json.loads(gzip.decompress((ROOT / "tests" / "golden" / f"keys_{system}.json.gz").read_bytes()))


def stand_in(number, shape):
    """A tensor of that shape that takes no memory: one number, everywhere."""
    return torch.full((1,) * len(shape), float(number)).expand(shape)


def checkpoint(system):
    """{released name: tensor}, another number for every tensor, the same for the names of one."""
    keys = key_list(system)
    numbers = {source: i for i, (_, source) in enumerate(keys.values())}
    tensors = {source: stand_in(numbers[source], shape) for shape, source in keys.values()}
    return {name: tensors[source] for name, (_, source) in keys.items()}


def resized(released, old, new, beginning):
    """The checkpoint with another size where the tensors of these names have `old`."""
    return {
        name: stand_in(x.flatten()[0], [new if n == old else n for n in x.shape]) if name.startswith(beginning) else x
        for name, x in released.items()
    }


def problems(released):
    """The lines of the error about the entries."""
    with pytest.raises(ConversionError) as error:
        convert_state_dict(released)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize("system", SYSTEMS)
def test_round_trip(system):
    released = checkpoint(system)
    assert read_config(released) == PRESETS[system]
    state = convert_state_dict(released)
    back = released_state_dict(state, PRESETS[system])
    assert back.keys() == released.keys()
    for name, x in released.items():
        assert torch.equal(back[name], x), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_loads_into_the_model(system):
    state = convert_state_dict(checkpoint(system))
    with torch.device("meta"):
        model = DIMaskDINO(PRESETS[system])
    model.load_state_dict(state, assign=True)  # strict
    for name in ("decoder.layers.0.cross_norm.weight", "decoder.layers.0.self_norm.weight"):
        number = "norm1" if "cross" in name else "norm2"
        assert torch.equal(state[name], checkpoint(system)[f"{PREDICTOR}decoder.layers.0.{number}.weight"])


def test_encoder_width_1024():
    beginning = "sem_seg_head.pixel_decoder.transformer.encoder.layers."
    released = resized(checkpoint("maskdino_r50"), 2048, 1024, beginning)
    config = read_config(released)
    assert (config.encoder_feedforward_dim, config.feedforward_dim) == (1024, 2048)
    back = released_state_dict(convert_state_dict(released), config)
    assert back.keys() == released.keys() and all(torch.equal(back[name], x) for name, x in released.items())


def test_other_numbers_of_layers_and_classes():
    released = resized(checkpoint("dimaskdino_r50"), 80, 8, PREDICTOR)
    for name in list(released):
        if any(f"{part}.5." in name for part in ("encoder.layers", "decoder.layers", "bbox_embed")):
            del released[name]
    config = read_config(released)
    assert (config.num_classes, config.encoder_layers, config.decoder_layers) == (8, 5, 5)
    back = released_state_dict(convert_state_dict(released), config)
    assert back.keys() == released.keys()


# The entries that the architecture is read off are among these, and some that hold a tensor under another name.
ENTRIES = {
    "dimaskdino_r50": [
        "backbone.res3.2.conv2.norm.running_mean",
        "sem_seg_head.pixel_decoder.transformer.level_embed",
        "sem_seg_head.pixel_decoder.input_proj.3.0.bias",
        PREDICTOR + "class_embed.weight",
        PREDICTOR + "label_enc.weight",
        PREDICTOR + "oldm_norm.weight",
        PREDICTOR + "oldm.layers.1.linear1.weight",
        PREDICTOR + "decoder.bbox_embed.5.layers.2.bias",
    ],
    "maskdino_r50": [
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.linear1.weight",
        PREDICTOR + "decoder.layers.8.linear1.bias",
        PREDICTOR + "decoder_norm.weight",
    ],
    "dimaskdino_swin_l": [PREDICTOR + "decoder.query_guide_feature_update.linear1.weight"],
    "maskdino_swin_l": [
        "backbone.patch_embed.proj.weight",
        "backbone.layers.2.blocks.17.attn.relative_position_bias_table",
        "backbone.norm3.bias",
    ],
}


@pytest.mark.parametrize("system, name", [(system, name) for system in SYSTEMS for name in ENTRIES[system]])
def test_missing_extra_and_misshapen_entries_are_named(system, name):
    released = checkpoint(system)
    x = released.pop(name)
    [line] = problems(released)
    assert line.startswith(f"missing: {name},")

    released[name] = x
    extra = name + "_too"
    [line] = problems(released | {extra: x})
    assert line.startswith(f"unknown: {extra},")

    wrong = torch.zeros(3, 5)
    [line] = problems(released | {name: wrong})
    assert line == f"misshapen: {name} is (3, 5), should be {tuple(x.shape)}"


def test_an_entry_of_a_further_layer_is_extra():
    name = PREDICTOR + "decoder.layers.6.norm1.weight"
    [line] = problems(checkpoint("dimaskdino_r50") | {name: torch.zeros(256)})
    assert line == f"unknown: {name}, of shape (256,)"


def test_contradictory_entries_are_named():
    name = PREDICTOR + "bbox_embed.3.layers.1.weight"
    [line] = problems(checkpoint("maskdino_r50") | {name: torch.ones(256, 256)})
    assert line == f"contradictory: {name} should equal {PREDICTOR}_bbox_embed.layers.1.weight"


def test_long_lists_are_cut():
    names = list(released_names(PRESETS["maskdino_r50"])[0])
    lines = problems({f"stranger.{i}": torch.zeros(2) for i in range(700)})
    assert lines[:10] == [f"missing: {n}, of shape {tuple(key_list('maskdino_r50')[n][0])}" for n in names[:10]]
    assert lines[10] == f"and {len(names) - 10} more"
    assert lines[11:] == [f"unknown: stranger.{i}, of shape (2,)" for i in range(10)] + ["and 690 more"]


def test_entries_that_are_not_of_the_model_are_ignored():
    others = {
        "criterion.empty_weight": torch.zeros(81),
        "pixel_mean": torch.zeros(3, 1, 1),
        "pixel_std": torch.zeros(3, 1, 1),
        "backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(144, 144).long(),
        "backbone.stem.conv1.norm.num_batches_tracked": torch.tensor(0),
    }
    for system in SYSTEMS[:3:2]:
        assert convert_state_dict(checkpoint(system) | others).keys() == convert_state_dict(checkpoint(system)).keys()


def test_unknown_swin():
    released = checkpoint("dimaskdino_swin_l")
    for name in list(released):
        if name.startswith("backbone.layers.2.blocks.17."):
            del released[name]
    with pytest.raises(ConversionError, match="no known Swin has 192 channels, 17 blocks in stage 3, windows of 12"):
        convert_state_dict(released)


def test_an_encoder_of_three_scales_is_refused():
    of_c6 = "sem_seg_head.pixel_decoder.input_proj.3."
    released = {name: x for name, x in checkpoint("maskdino_r50").items() if not name.startswith(of_c6)}
    with pytest.raises(ConversionError) as error:
        convert_state_dict(released)
    assert str(error.value).startswith("its encoder has 3 scales; the model here has 4 (C3 to C6) or 5 (C2 to C6).")
    assert "\n" not in str(error.value)


def parameters(system):
    with torch.device("meta"):
        return sum(p.numel() for p in DIMaskDINO(PRESETS[system]).parameters())


@pytest.mark.parametrize("system", SYSTEMS)
def test_parameter_counts(system):
    published = {"dimaskdino_r50": 52_286_232, "dimaskdino_swin_l": 222_607_116, "maskdino_r50": 52_058_004}
    shapes = {source: shape for name, (shape, source) in key_list(system).items()}
    # In Detectron2 frozen batch norms have no parameters.
    frozen = [
        source for source in shapes if source.startswith("backbone.") and ".norm." in source and "swin" not in system
    ]
    listed = sum(torch.Size(shape).numel() for source, shape in shapes.items() if source not in frozen)
    assert parameters(system) == listed == published.get(system, listed)


def test_categories():
    coco, ids = convert.categories(80)
    assert len(coco) == len(set(coco)) == 80 and (coco[0], coco[11], coco[79]) == ("person", "stop sign", "toothbrush")
    assert convert.categories(8)[0][0] == "pedestrian" and convert.categories(8)[1] == list(range(1, 9))
    assert convert.categories(3) == (["class 0", "class 1", "class 2"], [1, 2, 3])


def test_models_that_were_not_released_are_not_reverted():
    config = PRESETS["tiny"]
    message = "no model with backbone resnet18, frozen_batch_norm False, hidden_dim 64"
    with pytest.raises(ConversionError, match=message):
        released_state_dict(DIMaskDINO(config).state_dict(), config)
    with pytest.raises(ConversionError, match="no model with backbone mobilenet_v2"):
        released_state_dict({}, PRESETS["small"])
    state = convert_state_dict(checkpoint("dimaskdino_r50"))
    for other in ({"guidance": "t_s2"}, {"num_guiding": 7}):  # which no shape shows
        with pytest.raises(ConversionError, match="no model with [gn]"):
            released_state_dict(state, replace(PRESETS["dimaskdino_r50"], **other))
    with pytest.raises(ConversionError, match="missing: bato.norm.weight"):
        del state["bato.norm.weight"]
        released_state_dict(state, PRESETS["dimaskdino_r50"])


# The program


def run(monkeypatch, capsys, *args):
    """convert.py with these arguments, in this process: exit status or message, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
    status = 0
    try:
        run_program(convert.main)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_program_converts_and_reverts(tmp_path, monkeypatch, capsys):
    released = checkpoint("dimaskdino_r50")
    torch.save({"model": released, "iteration": 368749}, tmp_path / "official.pth")
    command = [sys.executable, ROOT / "convert.py", tmp_path / "official.pth", tmp_path / "ours.pt"]
    result = subprocess.run(command, capture_output=True, text=True)  # as a user runs it
    assert (result.returncode, result.stderr) == (0, "")
    assert "DI-MaskDINO, resnet50, 4 scales, 6 encoder and 6 decoder layers, 80 classes" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official.pth", "ours.pt"]  # nothing temporary

    content = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert content.keys() == {"model", "config", "classes", "category_ids"}
    assert len(content["classes"]) == 80 and content["category_ids"][-1] == 90
    model, _ = load_model(tmp_path / "ours.pt")
    assert model.config == PRESETS["dimaskdino_r50"] and not model.training
    first = released["backbone.stem.conv1.weight"]
    assert torch.equal(model.state_dict()["backbone.body.conv1.weight"], first)

    assert run(monkeypatch, capsys, "--reverse", tmp_path / "ours.pt", tmp_path / "back.pth")[0] == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == released.keys() and all(torch.equal(back[name], x) for name, x in released.items())


def test_where_boxes_come_from_can_be_said(tmp_path, monkeypatch, capsys):
    torch.save({"model": checkpoint("maskdino_swin_l")}, tmp_path / "official.pth")
    for flags, expected in (([], "bitmask"), (["--box-init", "head"], "head")):
        status, printed = run(monkeypatch, capsys, *flags, tmp_path / "official.pth", tmp_path / "ours.pt")
        assert status == 0 and f"box_init {expected}" in printed
        content = torch.load(tmp_path / "ours.pt", weights_only=True)
        assert content["config"]["box_init"] == expected
    arguments = "--reverse", tmp_path / "ours.pt", tmp_path / "back.pth"  # shapes do not show it: any goes back
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    assert torch.load(tmp_path / "back.pth", weights_only=True)["model"].keys() == checkpoint("maskdino_swin_l").keys()
    status, _ = run(monkeypatch, capsys, "--box-init", "head", *arguments)
    assert "--box-init: is for a released checkpoint" in status


WRAPPED = {
    "bare": (lambda s: s, None),
    "DDP": (lambda s: {"model": {f"module.{n}": x for n, x in s.items()}, "optimizer": {}}, None),
    "compiled": (lambda s: {"state_dict": {f"_orig_mod.{n}": x for n, x in s.items()}}, "'state_dict'"),
    "Lightning": (lambda s: {"state_dict": {f"model.{n}": x for n, x in s.items()}, "epoch": 3}, "'state_dict'"),
    "EMA": (lambda s: {"model_ema": {"module": s, "decay": 0.9}, "epoch": 3}, "'model_ema.module'"),
    "both": (lambda s: {"model": s, "model_ema": {"module": s}}, "'model', not those of model_ema"),
    "averaged": (lambda s: {f"module.{n}": x for n, x in s.items()} | {"n_averaged": torch.tensor(3)}, None),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_weights_are_found_in_wrappers(form, tmp_path, capsys):
    released = checkpoint("maskdino_r50")
    wrap, says = WRAPPED[form]
    torch.save(wrap(released), tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert found.keys() == released.keys() and all(torch.equal(found[name], x) for name, x in released.items())
    printed = capsys.readouterr().err
    assert (says in printed and str(tmp_path / "w.pth") in printed) if says else printed == ""


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {"a.weight": torch.rand(2, 3), "b.bias": torch.rand(4).half()}
    safetensors.save_file(weights, tmp_path / "w.safetensors")
    found = read_weights(tmp_path / "w.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], x) for name, x in weights.items())


def test_program_lists_what_does_not_fit(tmp_path, monkeypatch, capsys):
    released = checkpoint("maskdino_r50")
    del released["backbone.res2.0.conv1.weight"]
    torch.save(released | {"backbone.res9.weight": torch.zeros(1)}, tmp_path / "official.pth")  # bare
    status, printed = run(monkeypatch, capsys, tmp_path / "official.pth", tmp_path / "ours.pt")
    assert printed == "" and not (tmp_path / "ours.pt").exists()
    first, *lines = status.splitlines()
    assert first == f"convert.py: error: {tmp_path / 'official.pth'}: 2 entries do not fit a released checkpoint:"
    assert "missing: backbone.res2.0.conv1.weight" in lines[0] and "unknown: backbone.res9.weight" in lines[1]


def test_help_ends_well(monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "--help")
    assert status == 0 and "--trust-pickle" in printed and "--reverse" in printed


class Trap:
    """Opening its pickle writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_is_told_by_what_is_in_it(legacy, tmp_path):
    """A file of torch.save named as a pickle needs no trust; a pickle named as such a file opens with it."""
    weights = {"a.weight": torch.rand(2, 3), "b": torch.rand(4).to(torch.half if legacy else torch.float8_e4m3fn)}
    torch.save(weights, tmp_path / "w.pkl", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(read_weights(tmp_path / "w.pkl")["a.weight"], weights["a.weight"])
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a.weight": weights["a.weight"].numpy()}))
    assert torch.equal(read_weights(tmp_path / "w.pth", trust_pickle=True)["a.weight"], weights["a.weight"])


@pytest.mark.parametrize("file", ["official.pkl", "official.pth"])
def test_pickles_are_opened_only_when_trusted(file, tmp_path, monkeypatch, capsys):
    trap = tmp_path / "trap"
    content = {"model": dict(checkpoint("maskdino_r50")), "__author__": "someone", "hook": Trap(trap)}
    if file.endswith(".pkl"):  # Detectron2's holds arrays
        content["model"] = {name: x.numpy() for name, x in content["model"].items()}
        del content["hook"]
        (tmp_path / file).write_bytes(pickle.dumps(content | {"hook": Trap(trap)}))
    else:
        torch.save(content, tmp_path / file)
    arguments = tmp_path / file, tmp_path / "ours.pt"
    status, _ = run(monkeypatch, capsys, *arguments)
    assert "can run any program" in status and "--trust-pickle" in status and "\n" not in status
    assert not trap.exists() and not (tmp_path / "ours.pt").exists()
    status, printed = run(monkeypatch, capsys, "--trust-pickle", *arguments)
    assert status == 0 and "Mask DINO" in printed and trap.exists()
    state = torch.load(tmp_path / "ours.pt", weights_only=True)["model"]
    assert torch.equal(state["heads.class_head.weight"], checkpoint("maskdino_r50")[PREDICTOR + "class_embed.weight"])


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole.pth"
    torch.save({"model": checkpoint("maskdino_r50")}, whole)
    data = whole.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "page.pth").write_text("\n<!DOCTYPE html><html><body>Quota exceeded</body></html>")
    (tmp_path / "lfs.pkl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    (tmp_path / "garbage.pth").write_bytes(b"\x93\x01\x02" * 100)
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    nan = checkpoint("maskdino_r50") | {PREDICTOR + "class_embed.bias": torch.full((80,), float("nan"))}
    torch.save({"model": nan}, tmp_path / "nan.pth")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"a": 1})[:-3])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"weight": "a word"}}, tmp_path / "word.pth")
    output = tmp_path / "ours.pt"
    convert.convert(whole, tmp_path / "converted.pt")
    cases = [
        (["cut.pth"], "truncated"),
        (["empty.pth"], "truncated"),
        (["text.pth"], "is a text"),
        (["--trust-pickle", "text.pth"], "is a text"),
        (["page.pth"], "is a web page"),
        (["lfs.pkl"], "is a Git LFS pointer"),
        (["cut.pkl"], "truncated"),  # not that --trust-pickle helps
        (["garbage.pth"], "truncated"),
        (["nan.pth"], "class_embed.bias holds NaN"),
        (["weights.safetensors"], "pip install safetensors"),
        (["--trust-pickle", "cut.pkl"], "truncated"),
        (["list.pth"], "holds no weights"),
        (["word.pth"], "'weight' is not a tensor but str"),
        (["none.pth"], "no such file"),
        ([""], "is a folder"),
        (["converted.pt"], "already"),
        (["--reverse", "whole.pth"], "not a checkpoint of this project"),
        (["--reverse", "cut.pth"], "truncated"),
    ]
    for arguments, message in cases:
        *flags, file = arguments
        status, _ = run(monkeypatch, capsys, *flags, tmp_path / file, output)
        assert isinstance(status, str) and message in status and str(tmp_path / file) in status, (file, status)
        assert "\n" not in status and "with --trust-pickle" not in status and not output.exists(), file
    status, _ = run(monkeypatch, capsys, whole, whole)
    assert "exists, and only a checkpoint that was converted is replaced" in status and whole.read_bytes() == data
    status, _ = run(monkeypatch, capsys, whole, tmp_path / "none" / "ours.pt")
    assert "folder does not exist" in status
