"""experiments.figures from tiny random checkpoints: what is drawn, and one clear line for what cannot be."""

import json
import sys

import numpy as np
import pytest
import torch
import toys
from PIL import Image

from config import InputError
from data import eval_transform
from detections import detect
from di import candidate_boxes
from experiments import figures
from formats.images import DataError

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of tiny Mask DINO and DI-MaskDINO with random weights."""
    paths = []
    for name, modules in (("mask_dino", False), ("di", True)):
        model = toys.model(
            num_classes=3, selections=(60, 30), num_guiding=15, decoder_layers=3, di=modules, bato=modules
        )
        path = tmp_path_factory.mktemp("checkpoints") / f"{name}.pt"
        paths.append(str(toys.save(path, model, ["cat", "dog", "bird"])))
    return paths


@pytest.fixture
def image_path(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((160, 96)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def load(checkpoints):
    return figures.load(checkpoints, "cpu")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    figures.main()


def test_names(checkpoints):
    assert [name for name, *_ in load([*checkpoints, checkpoints[1]])] == [
        "Mask DINO",
        "DI-MaskDINO (1)",
        "DI-MaskDINO (2)",
    ]


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (130, 70)])
@pytest.mark.parametrize("levels", [4, 5])
def test_tokens_are_where_the_model_has_them(size, levels):
    """At the centres of the model's own candidate boxes, for the level shapes of its encoder."""
    model = toys.model(num_levels=levels, selections=(20, 10)).eval()
    shapes = []
    model.encoder.register_forward_hook(lambda _, args, out: shapes.append(out[1]))
    with torch.no_grad():
        model(torch.rand(1, 3, *size))
    height, width = (32 * -(-side // 32) for side in size)
    centres, strides = figures.token_centres(model.config, height, width)
    boxes, _ = candidate_boxes(shapes[0], torch.zeros(1))
    expected = boxes[:, :2].sigmoid() * torch.tensor([width, height])
    valid = boxes.isfinite().all(1)
    torch.testing.assert_close(centres[valid], expected[valid])
    counts = [int((strides == stride).sum()) for stride in (64, 32, 16, 8, 4)[:levels]]
    assert counts == [h * w for h, w in shapes[0]] and len(centres) == len(boxes)


def test_later_selections_are_among_the_first(checkpoints):
    image = torch.randint(255, (3, 96, 160), dtype=torch.uint8)
    mask_dino, di = (figures.selected_tokens(model, image, "cpu") for _, model, _ in load(checkpoints))
    assert [len(centres) for centres, _ in mask_dino.values()] == [30]
    assert [len(centres) for centres, _ in di.values()] == [60, 30, 15]
    sets = [{tuple(xy) for xy in centres.tolist()} for centres, _ in di.values()]
    assert sets[0] > sets[1] > sets[2] and len(sets[0]) == 60
    centres = torch.cat([centres for centres, _ in di.values()])
    assert centres.amin() > 0 and centres[:, 0].max() < 160 * 1.2 and centres[:, 0].max() > 100  # in its pixels


def test_the_same_queries_at_every_layer(checkpoints):
    _, model, _ = load(checkpoints)[1]
    image = torch.randint(255, (3, 96, 160), dtype=torch.uint8)
    queries, layers = figures.detections_of_queries(model, image, 4, "cpu")
    assert len(layers) == 4 and 1 <= len(queries) == len(set(queries.tolist())) <= 4
    with torch.no_grad():
        outputs = model([eval_transform(image, 64, 128)])  # 64 x 107, padded to 64 x 128
    for layer, predictions in zip(layers, [*outputs["aux_outputs"], outputs], strict=True):
        boxes = predictions["pred_boxes"][0, queries] * torch.tensor([128 * 160 / 107, 96, 128 * 160 / 107, 96])
        ours = layer["boxes"]
        torch.testing.assert_close((ours[:, :2] + ours[:, 2:]) / 2, boxes[:, :2])
        torch.testing.assert_close(ours[:, 2:] - ours[:, :2], boxes[:, 2:], atol=1e-3, rtol=1e-4)
        assert layer["masks"].shape == (len(queries), 96, 160)
    [[best]] = detect(model, [image])
    assert layers[-1]["scores"][0] == pytest.approx(float(best["scores"][0]), rel=1e-5)
    assert (layers[-1]["scores"].diff() <= 0).all()
    small = figures.detections_of_queries(model, image, 4, "cpu", (48, 80))[1]
    torch.testing.assert_close(small[0]["boxes"] * 2, layers[0]["boxes"])


def test_agreement_of_boxes_and_masks():
    masks = torch.zeros(3, 20, 20, dtype=torch.bool)
    masks[:2, 5:10, 5:15] = True  # the third is empty
    boxes = torch.tensor([[5.0, 5, 15, 10], [5, 5, 10, 10], [0, 0, 9, 9]])
    assert figures.box_mask_agreement({"boxes": boxes, "masks": masks}) == pytest.approx((1 + 0.5 + 0) / 3)


def write_layers(path, layers):
    scores = [{"layer": i, "box": {"AP": b}, "mask": {"AP": m}} for i, (b, m) in enumerate(layers)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"layers": scores}))
    return path


def test_bars_show_the_input_the_first_and_the_last_layer(tmp_path):
    a = figures.read_layers(write_layers(tmp_path / "a.json", [(5, 15), (13, 16), (17, 20), (18, 21)]))
    b = figures.read_layers(write_layers(tmp_path / "b.json", [(15, 19), (20, 20.5)]))
    panels = figures.bar_chart({"Mask DINO": a, "DI-MaskDINO": b}).axes
    assert [panel.get_title() for panel in panels] == ["Mask DINO", "DI-MaskDINO"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["0 (input)", "1", "3 (last)"]
    assert [bar.get_height() for bar in panels[0].patches] == [5, 13, 18, 15, 16, 21]
    assert [text.get_text() for text in panels[0].texts] == ["-10.0", "-3.0", "-3.0"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["0 (input)", "1 (last)"]


def test_pictures_are_written(checkpoints, image_path, tmp_path, monkeypatch, capsys):
    scores = [write_layers(tmp_path / name / "per_layer.json", [(5, 15), (13, 16)]) for name in "ab"]
    outputs = [tmp_path / f"{name}.png" for name in ("layers", "queries", "tokens")]
    run(monkeypatch, "layers", *scores, "--output", outputs[0])
    for name, output in zip(("queries", "tokens"), outputs[1:], strict=True):
        images = [image_path] * (2 if name == "tokens" else 1)
        run(monkeypatch, name, *images, "--checkpoints", *checkpoints, "--output", output)
    assert capsys.readouterr().out == "".join(f"written: {output}\n" for output in outputs)
    for output in outputs:
        with Image.open(output) as picture:
            assert picture.width > 700 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["layers", "{tmp}/none.json"], InputError, r"none.json: no AP per layer can be read from it \(.*No such file"),
        (["layers", "{tmp}/eval.json"], InputError, r"eval.json: no AP per layer can be read from it \("),
        (["layers", "{tmp}/ok.json", "--names", "a", "b"], InputError, "--names: 2 names for 1 files"),
        (["tokens", "{tmp}/none.png", "--checkpoints", "{c}"], DataError, "none.png: no such image"),
        (["tokens", "{image}", "--checkpoints", "{tmp}/ok.json"], InputError, "ok.json: is a text"),
        (["queries", "{image}", "--checkpoints", "{c}", "--layers", "4"], InputError, "--layers 4: .* 0 to 3"),
        (
            ["tokens", "{image}", "--checkpoints", "{c}", "--output", "{tmp}/no/a.png"],
            InputError,
            "no/a.png: its folder",
        ),
        (["layers", "{tmp}/ok.json", "--output", "{tmp}/a.doc"], InputError, "a.doc: cannot be written"),
    ],
)
def test_bad_input_is_named(arguments, error, message, checkpoints, image_path, tmp_path, monkeypatch):
    (tmp_path / "eval.json").write_text('{"box": {"AP": 1}}')
    write_layers(tmp_path / "ok.json", [(5, 15), (13, 16)])
    words = [word.format(tmp=tmp_path, image=image_path, c=checkpoints[0]) for word in arguments]
    with pytest.raises(error, match=message) as raised:
        run(monkeypatch, *words)
    assert "\n" not in str(raised.value)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    with pytest.raises(InputError, match="pip install matplotlib"):
        run(monkeypatch, "layers", write_layers(tmp_path / "a.json", [(5, 15), (13, 16)]))
