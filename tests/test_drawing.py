"""Pictures of instances, and the bars of box and mask AP."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drawing
from drawing import (
    class_colour,
    draw_instances,
    draw_rows,
    is_drawing,
    lettering,
    save_classes,
    save_layers,
    save_png,
    side_by_side,
)
from formats.coco import encode_masks

GREY = 90
CLASSES = [f"kind {i}" for i in range(80)]


def instances(*boxes, size=(600, 800), labels=None):
    """Rectangles, on an image of that size."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    labels = torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)
    return {"labels": labels, "boxes": torch.tensor(boxes).float().reshape(-1, 4), "masks": masks}


def image(size=(600, 800)):
    return torch.full((3, *size), GREY, dtype=torch.uint8)


def test_an_object_stays_visible_below_its_mask():
    picture = image()
    picture[:, 300:, :] = 200  # something to be seen inside
    drawn = draw_instances(picture, instances((200, 200, 400, 400)), CLASSES)
    colour = torch.tensor(class_colour(0))
    upper, lower = drawn[:, 280, 350].int(), drawn[:, 320, 350].int()
    assert drawn.shape == picture.shape and drawn.dtype == torch.uint8
    for pixel, before in ((upper, GREY), (lower, 200)):  # a light fill: nearer to what was there than to the colour
        assert ((pixel - before).abs() < (pixel - colour).abs())[(colour - before).abs() > 20].all()
        assert (pixel != before).any()
    for y, x in ((200, 300), (399, 300), (300, 200), (300, 399)):  # its contour is opaque
        assert torch.equal(drawn[:, y, x].int(), colour.int()), (y, x)
    assert (drawn[:, 450:, 450:] == 200).all()  # nothing elsewhere


def test_masks_may_be_encoded():
    found = instances((10, 20, 300, 200), (250, 150, 500, 400), labels=[1, 2])
    encoded = found | {"masks": encode_masks(found["masks"])}
    assert torch.equal(draw_instances(image(), found, CLASSES), draw_instances(image(), encoded, CLASSES))


def test_a_class_has_one_colour_and_classes_have_different_ones():
    colours = [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80
    apart = [np.abs(np.subtract(a, b)).max() for a, b in zip(colours, colours[1:], strict=False)]
    assert min(apart) > 60  # neighbours, as person and bicycle
    drawn = draw_instances(image(), instances((20, 100, 120, 200), (420, 100, 520, 200), labels=[4, 4]), CLASSES)
    assert torch.equal(drawn[:, 60:220, 10:140], drawn[:, 60:220, 410:540])


@pytest.mark.parametrize("label", range(12))
def test_names_contrast_with_their_ground(label):
    drawn = draw_instances(image(), instances((300, 300, 500, 500), labels=[label]), CLASSES)
    ground = np.array(class_colour(label))
    strip = drawn[:, 270:299, 300:420].permute(1, 2, 0).reshape(-1, 3).numpy()  # above the box
    assert (strip == ground).all(1).sum() > 200
    brightness = strip @ (0.299, 0.587, 0.114)
    own = ground @ (0.299, 0.587, 0.114)
    letters = brightness[(strip != GREY).any(1)]
    assert np.abs(letters - own).max() > 100


ANY_SCRIPT = ["kind", "", "\n", 7, "a\tb", "é", "e\u0301", "Ключ", "너트", "螺栓", "\ue000", "\u200b"]


@pytest.fixture
def dejavu(monkeypatch):
    """The only font of the system has Latin and Cyrillic letters."""
    matplotlib = pytest.importorskip("matplotlib")
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    monkeypatch.setattr(drawing, "system_fonts", lambda: ["none.ttf", str(path)])
    lettering.cache_clear()
    yield str(path)
    lettering.cache_clear()


def test_a_name_is_written_in_a_font_that_has_its_letters_or_else_as_a_number(dejavu, tmp_path):
    with pytest.warns(UserWarning, match="no font of this system has the letters of ") as warned:
        shown = [lettering(name, label) for label, name in enumerate(ANY_SCRIPT)]
    assert [text for text, _ in shown] == [
        "kind", "class 1", "class 2", "7", "a b", "é", "é", "Ключ", "class 8", "class 9", "class 10", "class 11"
    ]  # fmt: skip
    assert [i for i, (_, font) in enumerate(shown) if font == dejavu] == [5, 6, 7]
    assert len(warned) == 2  # of the Korean and the Chinese name, once each
    drawn = draw_instances(image(), instances(*[(9, 90, 99, 99)] * 2, labels=[7, 1]), ANY_SCRIPT)
    other = draw_instances(image(), instances(*[(9, 90, 99, 99)] * 2, labels=[7, 1]), ["class 1"] * 7 + ["Клюв"])
    assert (drawn != other).any()  # its last letter is another one
    save_classes({"classes": [{"name": name, "box": 9.0, "mask": 9.0} for name in ANY_SCRIPT]}, tmp_path / "a.png")
    save_classes({"classes": [{"name": name, "box": 9.0, "mask": 9.0} for name, _ in shown]}, tmp_path / "b.png")
    a, b = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b)


def test_letters_grow_with_the_image():
    heights = []
    for factor in (1, 5):
        size = (600 * factor, 800 * factor)
        drawn = draw_instances(
            image(size), instances(tuple(factor * x for x in (300, 300, 500, 500)), size=size), CLASSES
        )
        heights.append((drawn[:, : 299 * factor] != GREY).any(0).any(1).sum().item())
    assert heights[1] > 3 * heights[0] > 30


def test_names_do_not_hide_small_objects():
    """A grid of small objects, close to each other: all stay in sight, though some get no name."""
    boxes = [(x, y, x + 12, y + 12) for y in range(100, 500, 16) for x in range(100, 700, 16)]
    drawn = draw_instances(image(), instances(*boxes), CLASSES)
    for x0, y0, x1, y1 in boxes:
        inside = drawn[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].permute(1, 2, 0).reshape(-1, 3)
        filled = (inside != torch.tensor(class_colour(0))).any(1) & (inside != GREY).any(1)
        assert filled.sum() > 30
    lonely = draw_instances(image(), instances(*boxes, (720, 300, 730, 310)), CLASSES)
    assert (lonely[:, :, 715:] != GREY).any(0).sum() > 300  # there is room for this one's name


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (64, 64), (511, 200), (20, 700)])
def test_any_size_and_boxes_beyond_it(size):
    height, width = size
    found = instances((0, 0, width, height), (0, 0, 1, 1), size=size, labels=[3, 70])
    found["boxes"] = torch.tensor([[-50.0, -9, 2 * width, 3 * height], [width + 9.0, height, width + 20, height + 5]])
    found["masks"][1] = False
    found["scores"] = torch.tensor([0.9, 0.123])
    drawn = draw_instances(image(size), found, CLASSES)
    factor = drawn.shape[1] // height
    assert drawn.shape == (3, factor * height, factor * width) and max(drawn.shape[1:]) >= 512
    assert factor == 1 or max(size) < 512
    assert torch.equal(draw_instances(image(size), instances(size=size), CLASSES).unique(), torch.tensor([GREY]))


def test_side_by_side(tmp_path):
    left, right = image((50, 60)), image((50, 60)) + 20
    drawn = side_by_side([left, right], ["layer 0 (input)", "layer 3"])
    assert torch.equal(drawn[:, -50:, :60], left) and torch.equal(drawn[:, -50:, -60:], right)
    assert (drawn[:, :-50, :60] < 100).any() and (drawn[:, :-50, -60:] < 100).any()  # letters


def test_rows_are_aligned(tmp_path):
    columns = []
    for size in ((600, 900), (900, 600), (64, 64), (40, 800), (700, 5)):
        height, width = size
        found = instances((0, 0, width // 2, height), size=size)
        columns.append([(image(size), found, CLASSES), (image(size), instances(size=size), CLASSES)])
    drawn = draw_rows(columns)
    assert drawn.dtype == torch.uint8 and drawn.shape == (3, 2 * 516, 772 + 345 + 516 + 1540 + 8)
    white = (drawn == 255).all(0)
    for row in (drawn[:, :512], drawn[:, 516:-4]):
        left = 0
        for width, height in ((768, 512), (341, 512), (512, 512), (1536, 77), (4, 512)):
            assert not white[:height, left : left + width].all(0).any() and white[height:512, left : left + width].all()
            assert white[:, left + width : left + width + 4].all()
            assert (row[:, height // 2, left + width - 1] == GREY).all()  # the right half is in no mask
            left += width + 4
    lower = drawn[:, 516:-4][:, :, :768]
    assert (lower == GREY).all() and (drawn[:, 256, 1:384] != GREY).any(0).all()  # the left half above


def test_own_pictures_are_known(tmp_path):
    save_png(image(), tmp_path / "own.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("x")
    assert [is_drawing(tmp_path / f"{name}.png") for name in ("own", "other", "text", "none")] == [True] + 3 * [False]
    with Image.open(tmp_path / "own.png") as own:
        assert np.array_equal(np.array(own), np.full((600, 800, 3), GREY))


# Bars


def layer_scores(pairs):
    return {"layers": [{"layer": i, "box": {"AP": b}, "mask": {"AP": m}} for i, (b, m) in enumerate(pairs)]}


def test_bars_of_the_layers(tmp_path):
    pytest.importorskip("matplotlib")
    save_layers(layer_scores([(10.0, 20.0), (None, None), (25.0, 24.0)]), tmp_path / "eval.png")
    with Image.open(tmp_path / "eval.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((255, 127, 14), (31, 119, 180)):  # bars of box and mask
        assert (colours == colour).all(1).sum() > 1000


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    save_layers(layer_scores([(10.0, 20.0)]), tmp_path / "eval.png")
    assert "pip install matplotlib" in capsys.readouterr().err and not (tmp_path / "eval.png").exists()
