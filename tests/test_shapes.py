"""The generated data sets: the same files every time, whole ones only, and annotations that fit what is drawn."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import CocoInstances
from formats.coco import coco_paths
from formats.images import DataError
from shapes import HARD_SHAPES, SHAPES, _coverage, draw_shapes, make_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=60, val=20, size=96, seed=4)
    return root


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_shapes_are_deterministic_and_made_once(shapes, tmp_path):
    make_shapes(tmp_path, train=60, val=20, size=96, seed=4)
    assert contents(tmp_path) == contents(shapes)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make_shapes(tmp_path, train=60, val=20, size=96, seed=4)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make_shapes(tmp_path, train=3, val=20, size=96, seed=5)  # other settings: made anew
    train, val = (CocoInstances(*coco_paths(tmp_path, s), s == "train") for s in ("train", "val"))
    assert len(train) == 3 and len(val) == 20
    assert (
        contents(tmp_path)[Path("images/train2017/000000000001.png")]
        != contents(shapes)[Path("images/train2017/000000000001.png")]
    )


def test_annotations_that_were_not_generated_stay(tmp_path):
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    path.write_text('{"images": [], "info": {}}')
    before = contents(tmp_path)
    with pytest.raises(DataError, match=f"^{path}: was not generated; choose another --data-root"):
        make_shapes(tmp_path, train=2, val=1)
    assert contents(tmp_path) == before


def test_interrupted_generation_is_not_taken_as_complete(shapes, tmp_path, monkeypatch):
    calls = iter(range(10))

    def interrupted(*args):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return draw_shapes(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shapes.draw_shapes", interrupted)
        make_shapes(tmp_path, train=60, val=20, size=96, seed=4)
    with pytest.raises(DataError):
        coco_paths(tmp_path, "train")
    make_shapes(tmp_path, train=60, val=20, size=96, seed=4)
    assert contents(tmp_path) == contents(shapes)


def test_a_full_disk_is_named_and_leaves_no_torn_file(tmp_path, monkeypatch):
    save = Image.Image.save

    def full(image, path, **options):
        save(image, path, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left on device: .*train2017/000000000001.png"):
        make_shapes(tmp_path, train=2, val=1)
    assert not contents(tmp_path)


def test_shapes_annotations(shapes):
    data = CocoInstances(*coco_paths(shapes, "train"), training=True, test_size=(96, 96))
    assert data.classes == list(SHAPES) and len(SHAPES) >= 8
    counts, labels, widths, covered = [], set(), [], 0
    for i in range(len(data)):
        image, target = data.ground_truth(i)
        assert image.shape == (3, 96, 96)
        masks = target["masks"]
        assert masks.sum(0).max() == 1  # occlusion: every pixel has one owner
        counts.append(len(masks))
        labels |= set(target["labels"].tolist())
        widths += (target["boxes"][:, 2:] - target["boxes"][:, :2]).amax(1).tolist()
        for a, mask, box in zip(data.instances[data.image_ids[i]], masks, target["boxes"], strict=True):
            x, y, w, h = a["bbox"]
            assert [x, y, x + w, y + h] == box.tolist() and a["area"] == mask.sum() >= 30
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        touch = (x0[:, None] < x1) & (x0 < x1[:, None]) & (y0[:, None] < y1) & (y0 < y1[:, None])
        covered += touch.sum().item() > len(masks)
    assert 1 <= min(counts) and max(counts) == 7 and labels == set(range(len(SHAPES)))
    assert min(widths) < 18 and max(widths) > 48  # of 96: small and large
    assert covered > len(data) / 3  # in many images shapes overlap


def test_shapes_differ_between_splits_and_do_not_depend_on_the_count(shapes, tmp_path):
    make_shapes(tmp_path, train=2, val=1, size=96, seed=4)
    new, old = contents(tmp_path), contents(shapes)
    first = Path("images/train2017/000000000001.png")
    assert new[first] == old[first] != new[Path("images/val2017/000000000001.png")]


def test_every_class_fills_its_patch_and_has_its_own_silhouette():
    silhouettes = [_coverage(outlines, 16, 0.0) for outlines in SHAPES.values()]
    for i, a in enumerate(silhouettes):
        rows, columns = np.nonzero(a >= 0.5)
        assert max(np.ptp(rows), np.ptp(columns)) >= 22  # of 32
        for b in silhouettes[:i]:
            assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.9


def test_hard_shapes_fill_little_of_their_boxes():
    share = {}
    for hard in (False, True):
        values = []
        for i in range(30):
            pixels, labels, masks = draw_shapes(np.random.default_rng([7, i]), 64, hard)
            assert pixels.shape == (64, 64, 3) and len(labels) == len(masks) >= 1
            assert masks.sum(0).max() <= 1 and masks.sum((1, 2)).min() >= 30  # visible parts
            if hard:
                assert set(labels) <= set(range(len(HARD_SHAPES)))
            for mask in masks:
                height, width = np.ptp(np.nonzero(mask), axis=1) + 1
                values.append(mask.sum() / (height * width))
        share[hard] = np.mean(values)
    assert share[True] < share[False] - 0.03


def test_hard_shapes_are_written_once(tmp_path):
    make_shapes(tmp_path, train=2, val=1, hard=True)
    path = tmp_path / "annotations" / "instances_train2017.json"
    before, content = path.stat().st_mtime_ns, json.loads(path.read_text())
    assert [c["name"] for c in content["categories"]] == list(HARD_SHAPES)
    make_shapes(tmp_path, train=2, val=1, hard=True)
    assert path.stat().st_mtime_ns == before
    make_shapes(tmp_path, train=2, val=1)  # the other set, in the same folder
    assert len(json.loads(path.read_text())["categories"]) == len(SHAPES)
