"""export.py: the files run without this repository, at any size and batch, and equal the model."""

import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from checkpoint import load_model, save_checkpoint
from config import PRESETS
from export import Detector, largest_difference
from model import DIMaskDINO, postprocess

SIZES = [(1, 96, 96), (2, 128, 96), (1, 160, 224)]


def spread_(model):
    """Scores and boxes far enough apart that rounding changes no order."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function of di and bato: the path of a small model's checkpoint."""

    def write(**settings):
        torch.manual_seed(0)
        small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 64, "feedforward_dim": 64}
        model = DIMaskDINO(replace(PRESETS["tiny"], **small, **settings))
        spread_(model)
        path = tmp_path_factory.mktemp("export") / "checkpoint.pt"
        content = {"model": model.state_dict(), "config": asdict(model.config), "classes": [*"abcdefghij"]}
        save_checkpoint(path, content)
        return path

    return write


def program(*arguments):
    return subprocess.run([sys.executable, "export.py", *map(str, arguments)], capture_output=True, text=True)


def test_file_equals_the_model(checkpoint, tmp_path):
    source, path = checkpoint(), tmp_path / "model.pt2"
    done = program(source, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest difference") == 3
    images = [torch.rand(batch, 3, height, width) for batch, height, width in SIZES]
    torch.save(images, tmp_path / "images.pt")
    script = "import torch\nmodel = torch.export.load('model.pt2').module()\n"
    script += "torch.save([list(model(x)) for x in torch.load('images.pt')], 'found.pt')"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)  # where no module of ours is found
    detector = Detector(load_model(source)[0])
    with torch.no_grad():
        for batch, found in zip(images, torch.load(tmp_path / "found.pt"), strict=True):
            assert max(largest_difference(detector(batch), found)) < 1e-4


def test_detector_gives_the_detections_of_postprocess(checkpoint):
    model, _ = load_model(checkpoint())
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        scores, labels, boxes, masks = Detector(model, max_detections=20)(images)
        expected = postprocess(model(images), [(96, 128)] * 2, [(96, 128)] * 2, topk=20)
    for b, detections in enumerate(expected):
        torch.testing.assert_close(scores[b], detections["scores"])
        assert torch.equal(labels[b], detections["labels"])
        torch.testing.assert_close(boxes[b], detections["boxes"])
        full = torch.nn.functional.interpolate(masks[b, None], (96, 128), mode="bilinear", align_corners=False)[0] > 0
        assert torch.equal(full, detections["masks"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["c.pt", "out.txt"], "out.txt: the suffix says the format"),
        (["c.pt", "nowhere/out.pt2"], "nowhere/out.pt2: its folder does not exist"),
        (["c.pt", "out.onnx", "--compile"], "--compile is for .pt2"),
        (["missing.pt", "out.pt2"], "missing.pt: no such"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch):
    import export

    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    with pytest.raises(ValueError, match=message):
        export.main()
