"""Checkpoints of preset `small`, narrow but with its backbone: resumed, frozen, evaluated, predicted with, exported."""

import json
import re
import sys

import pytest
import torch
import torchvision
from programs import assert_same_run, checkpoint

import eval as evaluation
import export
import predict
from cli import run_program

NARROW = "--hidden-dim 64 --num-heads 4 --encoder-layers 1 --encoder-feedforward-dim 64 --decoder-layers 2 "
NARROW += "--feedforward-dim 64 --selections 20,10 --num-guiding 4 --denoising-queries 12 --loss-points 64 "
NARROW += "--train-size 64 --test-size 64 96 --batch-size 4 --epochs 2 --workers 0 --device cpu --no-eval"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of torchvision's MobileNetV2, which `--backbone-weights` takes."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.pth"
    torch.save(torchvision.models.mobilenet_v2().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def train(run, weights):
    return lambda output, *flags: run("--preset", "small", "--backbone-weights", weights, "--output", output,
                                      *NARROW.split(), *flags)  # fmt: skip


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    output = tmp_path_factory.mktemp("small") / "out"
    train(output)
    return output


@pytest.fixture
def call(monkeypatch, capsys):
    """A function: a program's main with these arguments, in this process; what it prints."""

    def call(program, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)])
        run_program(program.main)
        return capsys.readouterr().out

    return call


def test_goes_on_as_if_it_had_not_been_stopped(train, trained, tmp_path):
    train(tmp_path / "out", "--max-iterations", 3)
    train(tmp_path / "out", "--resume")
    assert_same_run(tmp_path / "out", trained)
    assert checkpoint(trained)["iteration"] == 6


def test_frozen_backbone_keeps_its_weights(train, trained, weights, tmp_path):
    train(tmp_path / "out", "--backbone-lr", 0, "--max-iterations", 2)
    frozen, moved = checkpoint(tmp_path / "out")["model"], checkpoint(trained)["model"]
    original = torch.load(weights, weights_only=True)
    names = [name for name in frozen if name.startswith("backbone.body.features.")]
    assert len(names) > 200
    for name in names:
        assert torch.equal(frozen[name], original[name.removeprefix("backbone.body.")]), name
    convolution = "backbone.body.features.17.conv.2.weight"
    assert not torch.equal(moved[convolution], frozen[convolution])


def test_evaluated_and_predicted_with(trained, shapes, call, tmp_path):
    flags = ["--checkpoint", trained / "checkpoint.pt", "--device", "cpu"]
    data = ["--data", "coco", "--data-root", shapes, "--workers", 0]
    call(evaluation, *flags, *data, "--per-layer", "--output", tmp_path / "eval.json")
    scores = json.loads((tmp_path / "eval.json").read_text())
    assert len(scores["layers"]) == 3 and all(0 <= scores[kind]["AP"] <= 100 for kind in ("box", "mask"))
    images = sorted((shapes / "images" / "val2017").iterdir())
    call(predict, *flags, "--output", tmp_path / "out", "--score-threshold", 0, *images[:2])
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len({result["image_id"] for result in found}) == 2


def test_exported_and_compiled(train, call, tmp_path):
    # Without DI and BATO, which test_export.py traces: every operation takes its time.
    train(tmp_path / "run", "--no-di", "--no-bato", "--decoder-layers", 1, "--max-iterations", 1)
    trained = tmp_path / "run" / "checkpoint.pt"
    said = call(export, trained, tmp_path / "out.pt2", "--size", 64, 96)
    differences = [float(x) for x in re.findall(r"([\d.e+-]+) in ", said.partition("from the model")[2])]
    assert len(differences) == 3 and max(differences) < 1e-4
    # Traced as for --compile, and run without what a compiler, which needs minutes, would make of it.
    backbone = predict.load_model(trained)[0].backbone
    compiled = torch.compile(backbone, backend="eager", dynamic=True, fullgraph=True)
    images = torch.rand(2, 3, 64, 96)
    for ours, expected in zip(compiled(images), backbone(images), strict=True):
        torch.testing.assert_close(ours, expected)
    sum(x.square().mean() for x in compiled(images)).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
