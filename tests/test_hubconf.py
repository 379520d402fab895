"""Models and predictors by torch.hub, in this process and in one that has modules of the same names."""

import pickle
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import load_model
from config import PRESETS
from detections import detect
from formats.images import read_image
from precision import without_tf32

ROOT = Path(__file__).resolve().parents[1]


def load(name, **arguments):
    return torch.hub.load(str(ROOT), name, source="local", **arguments)


@pytest.fixture
def photo(tmp_path):
    """A picture that is stored on its side."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


@pytest.fixture(scope="module")
def predictor(small_checkpoint):
    return load("predictor", checkpoint=small_checkpoint, device="cpu")


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_predictor_takes_every_form_of_an_image(small_checkpoint, photo):
    predictor = load("predictor", checkpoint=small_checkpoint, device="cpu", score_threshold=0.001, max_detections=20)
    upright = read_image(photo)
    assert upright.shape == (3, 70, 50)
    [[expected]] = detect(load_model(small_checkpoint)[0], [upright], topk=20, score_threshold=0.001)
    assert expected["masks"].shape == (20, 70, 50) and predictor.classes[3] == "kind 3"
    array = upright.permute(1, 2, 0).numpy()
    for image in (
        photo,
        str(photo),
        Image.open(photo),
        Image.fromarray(array),
        array,
        np.asfortranarray(array),
        array[:, ::-1].copy()[:, ::-1],  # negative strides
        upright,
        upright / 255,
        (upright / 255).double(),
    ):
        assert same(predictor(image), expected)
    grey = Image.open(photo).convert("L")
    assert same(predictor(grey), predictor(grey.convert("RGB")))


@pytest.mark.parametrize("image, found", [
    (5, "int"),
    (None, "NoneType"),
    ([np.zeros((9, 9, 3), np.uint8)], "list"),
    (np.zeros((9, 9), np.uint8), r"ndarray of uint8, shape \(9, 9\)"),
    (np.zeros((9, 9, 4), np.uint8), r"ndarray of uint8, shape \(9, 9, 4\)"),
    (np.zeros((0, 9, 3), np.uint8), r"shape \(0, 9, 3\)"),
    (np.zeros((9, 9, 3)), "ndarray of float64"),
    (torch.zeros(1, 3, 9, 9), r"Tensor of torch.float32, shape \(1, 3, 9, 9\)"),
    (torch.zeros(9, 9, 3), r"shape \(9, 9, 3\)"),
    (torch.zeros(3, 9, 9, dtype=torch.int64), "Tensor of torch.int64"),
    (torch.zeros(3, 9, 9, dtype=torch.complex64), "Tensor of torch.complex64"),
    (torch.full((3, 9, 9), 200.0), "values from 200 to 200"),
    (torch.full((3, 9, 9), float("nan")), "values from nan"),
    (Image.new("F", (9, 9)), "Image of mode F"),
])  # fmt: skip
def test_anything_else_gets_an_error_that_says_what_is_expected(predictor, image, found):
    with pytest.raises(ValueError, match=found + r".*; expected a path, .*\(3, H, W\) RGB"):
        predictor(image)


def test_a_program_may_have_another_default_dtype(predictor, small_checkpoint, photo):
    before, expected = torch.get_default_dtype(), predictor(photo)
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = load("predictor", checkpoint=small_checkpoint, device="cpu")
        assert same(other(photo), expected) and same(pickle.loads(pickle.dumps(other))(photo), expected)
    finally:
        torch.set_default_dtype(before)


def test_a_predictor_of_wrong_arguments(small_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="score_threshold 30: must be between 0 and 1"):
        load("predictor", checkpoint=small_checkpoint, score_threshold=30)
    with pytest.raises(ValueError, match="max_detections 0"):
        load("predictor", checkpoint=small_checkpoint, max_detections=0)
    with pytest.raises(ValueError, match="no such file"):
        load("predictor", checkpoint=tmp_path / "none.pt")
    predictor = load("predictor", checkpoint=small_checkpoint)
    with pytest.raises(ValueError, match="none.jpg: no such image"):
        predictor(tmp_path / "none.jpg")


def test_one_entry_for_every_preset():
    with torch.device("meta"):
        for preset, config in PRESETS.items():
            model = load(preset)
            assert asdict(model.config) == asdict(config) and model.classes is None and not model.training
        model = load("dimaskdino_r50", classes=["cat", "dog"], decoder_layers=3)
    assert (model.config.num_classes, model.config.decoder_layers, model.classes) == (2, 3, ["cat", "dog"])


def test_a_model_of_a_checkpoint(tiny_checkpoint):
    model = load("tiny", checkpoint=tiny_checkpoint, test_size=(32, 50))
    assert model.classes[9] == "kind 9" and model.config.test_size == (32, 50)
    weights = torch.load(tiny_checkpoint, weights_only=True)["model"]
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        outputs = model([torch.rand(3, 64, 64)])
    queries = outputs["pred_logits"].shape[1]
    assert model.masks(outputs).shape == model.masks(outputs["aux_outputs"][0]).shape == (1, queries, 16, 16)
    with pytest.raises(ValueError, match="is no maskdino_r50, its backbone is resnet18"):
        load("maskdino_r50", checkpoint=tiny_checkpoint)
    with pytest.raises(ValueError, match="the checkpoint has its own"):
        load("tiny", checkpoint=tiny_checkpoint, classes=["cat"])
    with pytest.raises(ValueError, match="2 classes, but num_classes=3"):
        load("tiny", classes=["cat", "dog"], num_classes=3)
    for classes in ("cat", {"cat": 0}, ["cat", 1]):
        with pytest.raises(ValueError, match="classes .*cat.*: expected a list of names"):
            load("tiny", classes=classes)


def test_one_thread_at_a_time_is_without_tf32(request):
    """The predictor on a GPU; a second thread would put back what the first has set."""
    switches, seen = (torch.backends.cuda.matmul, torch.backends.cudnn.conv), []
    for part in switches:
        request.addfinalizer(partial(setattr, part, "fp32_precision", part.fp32_precision))
        part.fp32_precision = "tf32"

    def compute():
        with without_tf32():
            seen.append([part.fp32_precision for part in switches])

    thread = threading.Thread(target=compute)
    with without_tf32():
        thread.start()
        thread.join(0.2)
        assert not seen and [part.fp32_precision for part in switches] == ["ieee", "ieee"]
    thread.join()
    assert seen == [["ieee", "ieee"]] and [part.fp32_precision for part in switches] == ["tf32", "tf32"]


PROGRAM = """
import pickle, shutil, sys, torch
from PIL import Image
import data, formats                       # the program's own, imported before
from formats import reader
clone, other, checkpoint, photo = sys.argv[1:]

def state():
    return Image.MAX_IMAGE_PIXELS, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, [*sys.path]

def load(folder):
    return torch.hub.load(folder, "predictor", source="local", checkpoint=checkpoint, score_threshold=0.0, device="cpu")

before = state()
first = load(clone)
scores = first(photo)["scores"]
import model, config                       # its own, imported afterwards
assert len(scores) == 100
second = load(other)                       # another version, which halves the scores
assert torch.equal(second(photo)["scores"], scores / 2) and torch.equal(first(photo)["scores"], scores)
third = load(clone)
assert torch.equal(third(photo)["scores"], scores) and type(third.model) is type(first.model) is not type(second.model)
assert (data.NAME, model.NAME, config.NAME) == ("my data", "my model", "my config")
import data
assert data.NAME == "my data" and sys.modules["formats.reader"] is reader and "detections" not in sys.modules
assert state() == before
pickle.dump((first, scores), open("predictor.pickle", "wb"))
"""


HALVED = """
whole = postprocess

def postprocess(*arguments):
    return [found | {"scores": found["scores"] / 2} for found in whole(*arguments)]
"""


def test_a_program_keeps_its_own_modules_and_settings_beside_those_of_two_clones(tiny_checkpoint, photo, tmp_path):
    """Our modules have names that others have too, and torch.hub puts our folder before theirs."""
    other = tmp_path / "other"
    shutil.copytree(ROOT, other, ignore=lambda folder, names: {
        name for name in names if name != "formats" and not name.endswith((".py", ".so"))
    })  # fmt: skip
    with open(other / "detections.py", "a") as file:
        file.write(HALVED)
    program = tmp_path / "program"
    (program / "formats").mkdir(parents=True)
    for name in ("data", "model", "config", "formats/__init__", "formats/reader"):
        (program / f"{name}.py").write_text(f"NAME = 'my {name}'\n")
    (program / "images").mkdir()  # a mere folder, as many have
    checkpoint = shutil.copy(tiny_checkpoint, tmp_path / "checkpoint.pt")
    command = [sys.executable, "-c", PROGRAM, ROOT, other, checkpoint, photo]
    result = subprocess.run(command, cwd=program, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    Path(checkpoint).unlink()  # a pickle needs it no more
    sent, scores = pickle.loads((program / "predictor.pickle").read_bytes())
    assert torch.equal(sent(photo)["scores"], scores) and sent.classes[3] == "kind 3"
