"""BDD100K's bitmasks: instances, crowds and ids as its format defines them, and the data set made of them."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import HEIGHT, WIDTH, average_precision_of_ground_truth

from cli import add_data_arguments, open_split
from data import CocoInstances, collate
from formats.bdd100k import bdd100k_paths, read_bdd100k

CAR, TRUCK, TRUNCATED, OCCLUDED, CROWD, IGNORED = 3, 4, 8, 4, 2, 1


def bitmask(height=HEIGHT, width=WIDTH, instances=()):
    """RGBA pixels of BDD100K's format; instances: (category, flags, id, (rows, columns)) each."""
    pixels = np.zeros((height, width, 4), np.uint8)
    for category, flags, number, region in instances:
        pixels[region] = category, flags, number // 256, number % 256
    return pixels


def write_bdd100k(root, bitmasks, split="train"):
    """A split in BDD100K's layout; bitmasks: RGBA pixels each."""
    for i, pixels in enumerate(bitmasks):
        label = root / f"labels/ins_seg/bitmasks/{split}/{i:08x}-{split}.png"
        picture = root / f"images/10k/{split}/{i:08x}-{split}.jpg"
        for path in (label, picture):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(label)
        Image.fromarray(pixels[:, :, :3] * 60).save(picture)
    return root


def open_bdd100k(root, training=True, split="train"):
    return CocoInstances(*bdd100k_paths(root, split), training, (HEIGHT, WIDTH), read=read_bdd100k)


def some_bitmasks():
    at = np.s_
    first = [
        (CAR, 0, 7, at[5:15, 10:20]),
        (1, TRUNCATED + OCCLUDED, 300, at[:, 30:32]),  # two whole columns; an id above 255
        (CAR, IGNORED, 8, at[20:25, 0:9]),
        (CAR, CROWD + OCCLUDED, 9, at[20:25, 9:18]),
        (TRUCK, 0, 10, at[12:15, 10:12]),  # covers a part of the first
    ]
    only_ignored = [(CAR, IGNORED, 1, at[2:6, 2:6])]
    return [bitmask(instances=first), bitmask(), bitmask(instances=only_ignored)]


def test_bdd100k_instances_areas_and_boxes(tmp_path):
    root = write_bdd100k(tmp_path, some_bitmasks())
    data = open_bdd100k(root, training=False)
    assert data.classes == ["pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert data.category_ids == list(range(1, 9)) and data.image_ids == [1, 2, 3]
    found = [
        (a["image_id"], a["category_id"], a["area"], a["bbox"], a["iscrowd"]) for a in data.coco.dataset["annotations"]
    ]
    assert found == [
        (1, CAR, 94, [10, 5, 10, 10], 0),
        (1, CAR, 45, [0, 20, 9, 5], 1),
        (1, CAR, 45, [9, 20, 9, 5], 1),
        (1, TRUCK, 6, [10, 12, 2, 3], 0),
        (1, 1, 60, [30, 0, 2, 30], 0),
        (3, CAR, 16, [2, 2, 4, 4], 1),
    ]
    image, target = data.ground_truth(0)
    assert image.shape == (3, HEIGHT, WIDTH) and target["labels"].tolist() == [CAR - 1, TRUCK - 1, 0]
    assert target["masks"].flatten(1).sum(1).tolist() == [94, 6, 60] and target["masks"].sum(0).max() == 1
    assert target["boxes"].tolist() == [[10, 5, 20, 15], [10, 12, 12, 15], [30, 0, 32, 30]]
    assert [len(data.ground_truth(i)[1]["labels"]) for i in (1, 2)] == [0, 0]
    for path in [*root.rglob("*.png"), *root.rglob("*.jpg")][::2]:
        path.rename(path.with_suffix(path.suffix.upper()))
    assert open_bdd100k(root).image_ids == [1]  # the others have nothing to train on


def test_bdd100k_agrees_with_its_definition_pixel_by_pixel(tmp_path):
    rng = np.random.default_rng(0)
    kinds = np.array([(0, 0, 0, 0), (1, 0, 0, 5), (8, 15, 255, 255), (3, 4, 1, 0), (3, 1, 0, 255)], np.uint8)
    root = write_bdd100k(tmp_path, [kinds[rng.integers(0, 5, (17, 23))] for _ in range(3)])
    data = open_bdd100k(root, training=False)
    for image_id, path in enumerate(sorted(bdd100k_paths(root, "train")[0].iterdir()), start=1):
        pixels = np.asarray(Image.open(path)).astype(int)
        numbers = pixels[:, :, 2] * 256 + pixels[:, :, 3]
        annotations = data.coco.imgToAnns[image_id]
        assert len(annotations) == 4
        for a, number in zip(annotations, (5, 255, 256, 65535), strict=True):
            mask = numbers == number
            rows, columns = np.nonzero(mask)
            assert np.array_equal(data.coco.annToMask(a), mask) and a["area"] == mask.sum()
            assert a["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert a["category_id"] == pixels[mask][0, 0]
            assert a["iscrowd"] == any(pixels[mask][0, 1] & flag for flag in (CROWD, IGNORED))


def test_bdd100k_ground_truth_as_prediction_gives_ap_100(tmp_path):
    """A detection on an ignored instance is no false positive; one beside it is."""
    root = write_bdd100k(tmp_path, some_bitmasks(), "val")
    data = open_bdd100k(root, training=False, split="val")
    ignored, elsewhere = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    ignored[20:25, 0:9] = elsewhere[0:3, 0:3] = True
    assert average_precision_of_ground_truth(data) == pytest.approx((100, 100))
    assert average_precision_of_ground_truth(data, [(0, CAR - 1, ignored)]) == pytest.approx((100, 100))
    assert max(average_precision_of_ground_truth(data, [(0, CAR - 1, elsewhere)])) < 95


def test_bdd100k_by_flags_in_loader_processes(tmp_path):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    for split in ("train", "val"):
        write_bdd100k(tmp_path, some_bitmasks(), split)
    (tmp_path / "images" / "10k" / "val" / "._a.jpg").write_text("what macOS leaves beside a copy")
    args = parser.parse_args(["--data", "bdd100k", "--data-root", str(tmp_path)])
    train, val = open_split(args, "train", augmentation=(64, (0.5, 1.0))), open_split(args, "val")
    assert len(train) == 1 and len(val) == 3 and train.classes == val.classes
    [(images, targets)] = torch.utils.data.DataLoader(train, num_workers=1, collate_fn=collate)
    assert images[0].shape == (3, 64, 64) and targets[0]["image_id"] == 1
