"""The data set, its augmentation against the released code's and by its properties, collate."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from annotations import HEIGHT, SQUARE, WIDTH, annotation, compressed_rle, dataset, square_mask, uncompressed_rle
from PIL import Image
from pycocotools import mask as mask_utils
from scipy.ndimage import minimum_filter1d
from torchvision.ops import masks_to_boxes

from data import CocoInstances, augment, collate, draw_augmentation, eval_transform
from eval import average_precision, coco_results
from formats.coco import coco_paths
from formats.images import DataError, read_image

TESTS = Path(__file__).resolve().parent
TINY_COCO = TESTS.parents[1] / "shared" / "data" / "tiny_coco"
needs_tiny_coco = pytest.mark.skipif(not TINY_COCO.is_dir(), reason="tiny_coco is not there")
SAME_SIZE = HEIGHT, WIDTH  # test_size that leaves the images as they are


def write(folder, content):
    """Write a data set's annotation file and black images; returns the arguments for CocoInstances."""
    (folder / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / f"{i}.png")
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path, folder / "images"


# --- the data set


@pytest.mark.parametrize("segmentation", [SQUARE, uncompressed_rle(square_mask()), compressed_rle(square_mask())])
def test_polygon_and_both_rle_forms_give_the_same_target(tmp_path, segmentation):
    data = CocoInstances(*write(tmp_path, dataset([annotation(1, segmentation)])), training=True, test_size=SAME_SIZE)
    image, target = data[0]
    assert image.dtype == torch.float32 and image.shape == (3, HEIGHT, WIDTH)
    assert target["image_id"] == 1 and target["original_size"] == (HEIGHT, WIDTH)
    assert target["masks"].dtype == torch.bool
    assert torch.equal(target["masks"], torch.from_numpy(square_mask())[None].bool())
    assert target["boxes"].dtype == torch.float32 and target["boxes"].tolist() == [[10, 5, 20, 15]]
    assert target["labels"].dtype == torch.int64 and target["labels"].tolist() == [0]


def test_classes_labels_crowds_and_images_without_instances(tmp_path):
    crowd = annotation(3, uncompressed_rle(square_mask()), image_id=2, iscrowd=1)
    arguments = write(tmp_path, dataset([annotation(1, category_id=90), annotation(2), crowd]))
    train = CocoInstances(*arguments, training=True, test_size=SAME_SIZE)
    assert train.classes == ["cat", "dog"] and train.category_ids == [7, 90]
    assert train.image_ids == [1] and train[0][1]["labels"].tolist() == [1, 0]
    val = CocoInstances(*arguments, training=False)
    assert val.image_ids == [1, 2] and len(val) == 2
    assert len(val.coco.anns) == 3  # the evaluation sees crowds
    assert val.coco.annToMask(val.coco.anns[3]).sum() == 100 == val.coco.annToMask(val.coco.anns[1]).sum()


@pytest.mark.parametrize("augmentation", [None, (64, (0.5, 1.0))])
def test_images_without_instances_take_part_on_request(tmp_path, augmentation):
    arguments = write(tmp_path, dataset([annotation(1)]))
    data = CocoInstances(*arguments, True, SAME_SIZE, augmentation, keep_empty=True)
    assert data.image_ids == [1, 2] and CocoInstances(*arguments, True).image_ids == [1]
    image, target = data[1]
    assert target["masks"].shape == (0, *image.shape[1:]) and target["boxes"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64 and target["masks"].dtype == torch.bool
    _, targets = collate([data[0], data[1]])
    assert [len(target["labels"]) for target in targets] == [1, 0]


@pytest.mark.parametrize("keep_empty", [False, True])
def test_only_crowds_is_nothing_to_train_on(tmp_path, keep_empty):
    arguments = write(tmp_path, dataset([annotation(1, uncompressed_rle(square_mask()), iscrowd=1)]))
    with pytest.warns(UserWarning, match="all annotations are crowds"):
        assert len(CocoInstances(*arguments, training=False)) == 2
        with pytest.raises(DataError, match="no image has an instance"):
            CocoInstances(*arguments, training=True, keep_empty=keep_empty)


def test_evaluation_decodes_no_masks(tmp_path, monkeypatch):
    data = CocoInstances(*write(tmp_path, dataset([annotation(1)])), training=False, test_size=(60, 200))
    monkeypatch.setattr("data.mask_utils", None)
    images, targets = collate([data[0], data[1]])
    assert [image.shape for image in images] == [(3, 60, 80)] * 2
    assert targets[0] == {"image_id": 1, "original_size": (HEIGHT, WIDTH)}
    with pytest.raises(AttributeError):
        data.ground_truth(0)


def test_ground_truth_is_at_the_size_of_evaluation(tmp_path):
    data = CocoInstances(*write(tmp_path, dataset([annotation(1, category_id=90)])), False, (60, 200))
    image, target = data.ground_truth(0)
    assert image.dtype == torch.uint8 and image.shape == (3, 60, 80)
    assert target["boxes"].tolist() == [[20, 10, 40, 30]] and target["labels"].tolist() == [1]
    expected = torch.zeros(1, 60, 80, dtype=torch.bool)
    expected[:, 10:30, 20:40] = True
    assert torch.equal(target["masks"], expected)


def test_building_a_data_set_prints_nothing(tmp_path, capsys):
    CocoInstances(*write(tmp_path, dataset([annotation(1)])), training=True)
    assert capsys.readouterr() == ("", "")


def test_image_of_another_size_than_annotated(tmp_path):
    arguments = write(tmp_path, dataset([annotation(1)]))
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "1.png")
    data = CocoInstances(*arguments, training=True)
    with pytest.raises(DataError, match=r"1\.png: the image is 30x40, .* 40x30"):
        data[0]


def test_a_loader_process_reports_the_same_single_line(tmp_path):
    arguments = write(tmp_path, dataset([annotation(1), annotation(2, image_id=2)]))
    path = tmp_path / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    data = CocoInstances(*arguments, training=True)
    with pytest.raises(DataError) as alone:
        data[0]
    batches = iter(torch.utils.data.DataLoader(data, num_workers=1, collate_fn=collate))
    with pytest.raises(DataError) as in_worker:
        next(batches)
    assert str(in_worker.value) == str(alone.value) and "\n" not in str(alone.value)
    assert len(list(batches)) == 1  # the other image; also ends the process


def average_precision_of_ground_truth(data, false_positives=()):
    """eval.py's scores when every target is a detection, and `false_positives` too: (item, label, mask) each."""
    results = []
    for index in range(len(data)):
        image, target = data.ground_truth(index)
        assert image.shape[1:] == target["masks"].shape[1:] == data[index][1]["original_size"]
        wrong = [(label, mask) for item, label, mask in false_positives if item == index]
        masks = torch.stack([*target["masks"], *(mask for _, mask in wrong)]) if wrong else target["masks"]
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # torchvision's end at the last pixel's index
        scores = torch.cat([torch.ones(len(target["labels"])), torch.full((len(wrong),), 2.0)])
        labels = torch.cat([target["labels"], torch.tensor([label for label, _ in wrong], dtype=torch.int64)])
        detections = {"scores": scores, "labels": labels, "masks": masks, "boxes": boxes}
        results += coco_results(detections, data.image_ids[index], data.category_ids)
    scores = average_precision(data.coco, results, data.image_ids)
    return scores["box"]["AP"], scores["mask"]["AP"]


def test_ground_truth_as_prediction_gives_ap_100(tmp_path):
    """Polygons and both forms of RLE, and a crowd: a detection on it counts as neither right nor wrong."""
    flipped = np.ascontiguousarray(square_mask()[:, ::-1])  # columns 20 to 29
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
    crowd[20:28, 2:38] = 1
    annotations = [
        annotation(1, SQUARE),
        annotation(2, uncompressed_rle(flipped), image_id=2, category_id=90, bbox=[20, 5, 10, 10]),
        annotation(3, compressed_rle(square_mask()), image_id=2),
        annotation(4, uncompressed_rle(crowd), iscrowd=1, bbox=[2, 20, 36, 8], area=288),
    ]
    data = CocoInstances(*write(tmp_path, dataset(annotations)), False, SAME_SIZE)
    on_crowd, elsewhere = torch.from_numpy(crowd).bool(), torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    elsewhere[:3, :3] = True
    assert average_precision_of_ground_truth(data) == pytest.approx((100, 100))
    assert average_precision_of_ground_truth(data, [(0, 0, on_crowd)]) == pytest.approx((100, 100))
    assert max(average_precision_of_ground_truth(data, [(0, 0, elsewhere)])) < 95


# --- augmentation


def outlines(rng, count, depth=0.6):
    """(12, 2) points each of `count` stars with notches of up to `depth`, some of them beyond HEIGHT x WIDTH."""
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    stars = []
    for _ in range(count):
        radii = rng.uniform(3, 14) * rng.uniform(1 - depth, 1, (12, 1))
        stars.append(rng.uniform((0, 0), (WIDTH, HEIGHT)) + radii * np.stack([np.cos(angles), np.sin(angles)], 1))
    return stars


def overlap(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


@needs_tiny_coco
def test_augmentation_is_that_of_the_released_code():
    golden = np.load(TESTS / "golden" / "augmentation.npz")
    sets = [CocoInstances(*coco_paths(TINY_COCO, split), training=True) for split in ("train", "val")]
    seen = 0
    for number in range(golden["cases"]):
        case = {name: golden[f"{number}_{name}"] for name in ("flip", "resized", "offset", "labels", "boxes", "rle")}
        image_id = int(golden[f"{number}_image_id"])
        [data] = [data for data in sets if image_id in data.instances]
        annotations = data.instances[image_id]
        image = read_image(data.image_dir / data.coco.imgs[image_id]["file_name"])
        placement = bool(case["flip"]), case["resized"].tolist(), case["offset"].tolist()
        image, boxes, masks, kept = augment(image, [a["segmentation"] for a in annotations], *placement, 1024)
        assert image.dtype == torch.uint8 and image.shape == (3, 1024, 1024)
        assert [data.labels[annotations[i]["category_id"]] for i in kept] == case["labels"].tolist()
        assert kept.tolist() == sorted(set(kept.tolist()))
        np.testing.assert_allclose(boxes.numpy(), case["boxes"], rtol=0, atol=1e-4)
        for mask, counts in zip(masks.numpy(), case["rle"], strict=True):
            assert np.array_equal(mask, mask_utils.decode({"size": [1024, 1024], "counts": bytes(counts)}))
        blocks = image.float().unflatten(2, (32, 32)).unflatten(1, (32, 32)).mean((2, 4))
        # The golden ones are float16, within 1/16; decoders of JPEG may round differently.
        assert (blocks - torch.from_numpy(golden[f"{number}_blocks"]).float()).abs().max() < 0.25
        seen += len(kept)
    assert seen > 60


@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize(
    "flip, resized, offset, size, expected",
    [
        (False, (30, 40), (0, 0), 64, (10, 5, 20, 15)),
        (True, (30, 40), (0, 0), 64, (20, 5, 30, 15)),
        (False, (60, 80), (0, 0), 100, (20, 10, 40, 30)),
        (True, (45, 50), (0, 0), 50, (25, 7.5, 37.5, 22.5)),
        (False, (60, 80), (12, 25), 32, (0, 0, 15, 18)),  # cut off at the left and at the top
        (True, (60, 80), (2, 28), 16, (12, 8, 16, 16)),  # and at the right and at the bottom
        (False, (3, 4), (0, 0), 8, (1, 0.5, 2, 1.5)),
        (False, (60, 80), (40, 60), 20, None),
        (False, (60, 80), (0, 40), 20, None),  # touches the crop
    ],
)
def test_box_and_mask_of_a_rectangle_are_exact(rle, flip, resized, offset, size, expected):
    segmentation = compressed_rle(square_mask()) if rle else SQUARE
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    _, boxes, masks, kept = augment(image, [segmentation], flip, resized, offset, size)
    assert boxes.dtype == torch.float32 and masks.dtype == torch.bool and kept.dtype == torch.int64
    assert boxes.tolist() == ([] if expected is None else [list(expected)]) and len(kept) == len(boxes)
    assert masks.shape == (len(boxes), size, size)
    if expected and all(number == int(number) for number in expected):
        x0, y0, x1, y1 = map(int, expected)
        pixels = torch.zeros(size, size, dtype=torch.bool)
        pixels[y0:y1, x0:x1] = True
        assert torch.equal(masks[0], pixels)


def test_parts_of_an_instance_and_every_form_of_segmentation():
    second = [30.0, 20.0, 34.0, 20.0, 34.0, 24.0, 30.0, 24.0]
    rle = compressed_rle(square_mask())
    forms = [[*SQUARE, second], rle, rle | {"counts": rle["counts"].encode()}, uncompressed_rle(square_mask())]
    forms += [[np.array(SQUARE[0]), np.array(second)], [SQUARE[0], [1.0, 1.0, 5.0, 5.0]]]  # two points enclose nothing
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    _, boxes, masks, kept = augment(image, forms, False, (HEIGHT, WIDTH), (0, 0), 40)
    assert masks.flatten(1).sum(1).tolist() == [116, 100, 100, 100, 116, 100] and kept.tolist() == [*range(6)]
    assert boxes[[0, 4]].tolist() == [[10, 5, 34, 24]] * 2 and boxes[[1, 2, 3, 5]].tolist() == [[10, 5, 20, 15]] * 4
    _, boxes, masks, kept = augment(image, [], True, (HEIGHT, WIDTH), (0, 0), 40)
    assert boxes.shape == (0, 4) and masks.shape == (0, 40, 40) and kept.shape == (0,)


def test_masks_at_the_stored_size_are_those_of_pycocotools():
    stars = outlines(np.random.default_rng(0), 60)
    polygons = [[star.round(1).ravel().tolist()] for star in stars]  # tenths, where pycocotools rounds to fifths
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    _, _, masks, kept = augment(image, polygons, False, (HEIGHT, WIDTH), (0, 0), 64)  # the size holds all of them
    whole = [mask_utils.merge(mask_utils.frPyObjects(polygons[i], 64, 64)) for i in kept]
    inside = [i for i, k in enumerate(kept) if min(polygons[k][0]) >= 0]  # the others are cut
    assert len(inside) > 20
    assert all(np.array_equal(masks[i].numpy(), mask_utils.decode(whole[i])) for i in inside)


def test_polygons_and_rle_agree_to_a_pixel():
    """Any placement: whole boxes within the pixel of the original that a raster rounds to, masks alike."""
    torch.manual_seed(3)
    rng = np.random.default_rng(1)
    polygons = [[star.clip(0, (WIDTH, HEIGHT)).ravel().tolist()] for star in outlines(rng, 12, depth=0.2)]
    rles = [mask_utils.merge(mask_utils.frPyObjects(polygon, HEIGHT, WIDTH)) for polygon in polygons]
    image, compared = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8), 0
    for _ in range(30):
        placement = draw_augmentation((HEIGHT, WIDTH), 64, (0.5, 4.0))
        _, boxes, masks, kept = augment(image, polygons, *placement, 64)
        _, rle_boxes, rle_masks, rle_kept = augment(image, rles, *placement, 64)
        pixel = max(placement[1][0] / HEIGHT, placement[1][1] / WIDTH)  # of the original
        for i in set(kept.tolist()) & set(rle_kept.tolist()):
            a, b = kept.tolist().index(i), rle_kept.tolist().index(i)
            box = boxes[a]
            if 0 < box.min() and box.max() < 64:  # not cut
                assert (rle_boxes[b] - box).abs().max() <= 1.01 * pixel
            if (box[2:] - box[:2]).min() > 12 * pixel:
                assert overlap(masks[a], rle_masks[b]) > 0.8
                compared += 1
    assert compared > 50


def test_crops_cut_boxes_and_masks_of_the_whole_image():
    """A crop's instances are those of the larger picture around it, within the crop."""
    rng = np.random.default_rng(2)
    stars = [[star.ravel().tolist()] for star in outlines(rng, 20)]
    rles = [mask_utils.encode(np.asfortranarray(rng.random((HEIGHT, WIDTH)) < 0.4, np.uint8)) for _ in range(3)]
    image = torch.from_numpy(rng.integers(0, 256, (3, HEIGHT, WIDTH), np.uint8))
    for flip in (False, True):
        whole, boxes, masks, kept = augment(image, stars + rles, flip, (100, 130), (0, 0), 160)
        crop, crop_boxes, crop_masks, crop_kept = augment(image, stars + rles, flip, (100, 130), (31, 44), 50)
        assert torch.equal(crop, whole[:, 31:81, 44:94])
        there = dict(zip(crop_kept.tolist(), zip(crop_boxes, crop_masks, strict=True), strict=True))
        for index, box, mask in zip(kept.tolist(), boxes, masks, strict=True):
            window = mask[31:81, 44:94]
            if index not in there:
                assert not window.any()
                continue
            crop_box, crop_mask = there[index]
            # Cut edges begin at the border, where they are rounded to fifths of a pixel.
            assert (crop_mask ^ window).sum() <= 0.02 * window.sum() + 4
            limits = (box - torch.tensor([44.0, 31] * 2)).clip(0, 50)
            assert (crop_box >= limits - 1e-4)[:2].all() and (crop_box <= limits + 1e-4)[2:].all()
            if window.any():
                rows, columns = window.nonzero().T
                assert (torch.stack([columns.min(), rows.min()]) >= crop_box[:2] - 1).all()
                assert (torch.stack([columns.max(), rows.max()]) < crop_box[2:] + 1).all()


def test_boxes_of_outlines_that_run_around_a_corner_of_the_crop():
    """What lies outside the crop widens no box, and is no instance alone, whichever side is cut first."""
    image = torch.zeros(3, 300, 300, dtype=torch.uint8)
    around = np.array([(30, 50), (30, 60), (-20, 60), (-20, -20), (60, -20), (60, -10), (-10, -10), (-10, 50)])
    cup = np.array([(-9, -9), (109, -9), (109, 109), (-9, 109), (-9, 99), (99, 99), (99, -9)])
    outside = np.array([(-9, -9), (109, -9), (109, 109), (105, 109), (105, -4), (-4, -4), (-4, 109), (-9, 109)])
    tip = np.array([(0, 0), (200, 90), (200, 98)])  # a vertex on the corner itself
    polygons = [around, around[:, ::-1], 100 - around, cup, outside, tip, np.array([(-9, -9), (-9, 209), (209, -9)])]
    segmentations = [[(100 + polygon).ravel().tolist()] for polygon in polygons]
    _, boxes, masks, kept = augment(image, segmentations, False, (300, 300), (100, 100), 100)
    assert kept.tolist() == [0, 1, 2, 3, 5, 6]
    whole = (0, 0, 100, 100)
    expected = [(0, 50, 30, 60), (50, 0, 60, 30), (70, 40, 100, 50), whole, (0, 0, 100, 49), whole]
    assert boxes.tolist() == [list(box) for box in expected]
    assert masks[:2].flatten(1).sum(1).tolist() == [300, 300]


def test_instances_without_extent_are_left_out_and_those_without_a_pixel_kept():
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    square = lambda x, y, side: [[x, y, x + side, y, x + side, y + side, x, y + side]]
    point, small, outside, line = square(5.0, 5, 0), square(5.1, 5.1, 0.2), square(50.0, 5, 4), [[1.0, 2, 9, 2, 4, 2]]
    segmentations = [point, SQUARE, small, outside, line, compressed_rle(0 * square_mask())]
    _, boxes, masks, kept = augment(image, segmentations, False, (HEIGHT, WIDTH), (0, 0), 40)
    assert kept.tolist() == [1, 2] and masks.flatten(1).sum(1).tolist() == [100, 0]
    torch.testing.assert_close(boxes[1], torch.tensor([5.1, 5.1, 5.3, 5.3]))


def coloured_blocks(height, width, rle):
    """An image of flat coloured rectangles and their segmentations, so that a pixel's colour says whose it is."""
    rng = np.random.default_rng(height * width)
    image, segmentations = torch.zeros(3, height, width, dtype=torch.uint8), []
    for i in range(4):  # one to a quarter, so that they do not cover one another
        h, w = height // 3, width // 3
        y = i // 2 * (height // 2) + rng.integers(0, height // 2 - h + 1)
        x = i % 2 * (width // 2) + rng.integers(0, width // 2 - w + 1)
        image[:, y : y + h, x : x + w] = 50 * (i + 1)
        mask = np.zeros((height, width), np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        segmentations.append(mask_utils.encode(mask) if rle else [[float(number) for number in corners]])
    return image, segmentations


def interior(mask, margin):
    """The pixels of a mask (H, W) whose neighbours up to `margin` rows and columns away are in the mask, too."""
    inside = mask.numpy()
    for axis in (0, 1):
        inside = minimum_filter1d(inside, 2 * margin + 1, axis=axis, mode="constant")
    return torch.from_numpy(inside)


SIZES = [(16, 16), (16, 200), (300, 20), (480, 640), (640, 427), (1024, 1024), (1000, 1500), (4000, 3000)]


@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize("height, width", SIZES)
def test_every_mask_lies_where_its_colour_is(height, width, rle):
    """Images of any size: masks apart, boxes around them, the padding grey and nobody's."""
    image, segmentations = coloured_blocks(height, width, rle)
    seen = 0
    for seed in range(4):
        torch.manual_seed(seed)
        flip, resized, offset = draw_augmentation((height, width), 512, (0.1, 2.0))
        out, boxes, masks, kept = augment(image, segmentations, flip, resized, offset, 512)
        reach = (
            math.ceil(max(1, *(n / o for n, o in zip(resized, (height, width), strict=True)))) + 1
        )  # of interpolation
        for mask, box, index in zip(masks, boxes, kept, strict=True):
            colours = out[:, interior(mask, reach)].int()
            assert ((colours - 50 * (index + 1)).abs() <= 1).all()
            seen += colours.numel() > 0
            if mask.any():
                rows, columns = mask.nonzero().T
                tight = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (box - tight).abs().max() <= 1
        assert masks.sum(0).max() <= 1 if len(masks) else True
        bottom, right = resized[0] - offset[0], resized[1] - offset[1]
        assert (out[:, bottom:] == 128).all() and (out[:, :, right:] == 128).all()
        assert not masks[:, bottom:].any() and not masks[:, :, right:].any()
    assert seen > 0


@pytest.mark.parametrize("rle", [False, True])
def test_image_and_masks_have_the_same_centre_of_mass(rle):
    """No systematic shift between image and masks, neither enlarged nor reduced, flipped or not."""
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="ij")
    disc = (y - 39.5) ** 2 + (x - 69.5) ** 2 < 25**2
    angles = np.linspace(0, 2 * np.pi, 200)
    circle = [np.stack([70 + 25 * np.cos(angles), 40 + 25 * np.sin(angles)], 1).ravel()]
    segmentation = mask_utils.encode(np.asfortranarray(disc.numpy(), np.uint8)) if rle else circle
    image = (disc * 255).byte().expand(3, -1, -1)
    for scale in (0.57, 1.3, 3.3, 4.27):
        resized = round(90 * scale), round(120 * scale)
        for flip in (False, True):
            out, _, masks, _ = augment(image, [segmentation], flip, resized, (0, 0), 520)
            weight, mask = out[0, : resized[0], : resized[1]].float(), masks[0].float()
            for axis in (0, 1):
                positions = [(w.sum(1 - axis) * torch.arange(w.shape[axis])).sum() / w.sum() for w in (weight, mask)]
                assert abs(positions[0] - positions[1]) < 0.15


def test_crops_lie_on_the_diagonal_at_uniform_scales():
    torch.manual_seed(0)
    draws = [draw_augmentation((480, 640), 1024, (0.1, 2.0)) for _ in range(4000)]
    scales, places = [], []
    for _, (height, width), (top, left) in draws:
        scale = width / 1024  # the longer side is 1024 times the scale
        assert abs(height - 480 * width / 640) <= 1 and 0.099 < scale < 2.001
        scales.append(scale)
        room = max(height - 1024, 0), max(width - 1024, 0)
        assert 0 <= top <= room[0] and 0 <= left <= room[1]
        if min(room) > 100:
            assert abs(top / room[0] - left / room[1]) < 0.011  # one random number
            places.append(left / room[1])
    for values, low, high in ((scales, 0.1, 2.0), (places, 0.0, 1.0)):
        expected = low + (high - low) * (np.arange(len(values)) + 0.5) / len(values)
        assert np.abs(np.sort(values) - expected).max() < 0.05 * (high - low)
    assert 0.47 < np.mean([flip for flip, _, _ in draws]) < 0.53
    assert draw_augmentation((10, 3000), 1024, (0.1, 0.1))[1] == (1, 102)  # never less than a pixel


def test_same_seed_same_sample_and_other_seed_another(tmp_path):
    arguments = write(tmp_path, dataset([annotation(1)]))
    data = CocoInstances(*arguments, True, augmentation=(48, (0.8, 1.0)))
    (image, target), (again, target_again), (other, _) = (data[0, seed] for seed in (5, 5, 6))
    assert image.shape == (3, 48, 48) and image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    assert torch.equal(image, again) and not torch.equal(image, other)
    assert all(torch.equal(target[key], target_again[key]) for key in ("labels", "boxes", "masks"))
    assert target["masks"].shape == (1, 48, 48) and target["boxes"].shape == (1, 4)


# --- evaluation's images, batches


@pytest.mark.parametrize(
    "size, expected",
    [
        ((480, 640), (800, 1067)),
        ((427, 640), (800, 1199)),
        ((320, 640), (667, 1333)),
        ((100, 1000), (133, 1333)),
        ((1000, 20), (1333, 27)),
    ],
)
def test_evaluation_resize(size, expected):
    image = eval_transform(torch.full((3, *size), 51, dtype=torch.uint8), 800, 1333)
    assert image.shape == (3, *expected) and image.dtype == torch.float32 and (image - 0.2).abs().max() < 1e-6


def test_collate_normalises_boxes_by_the_padded_size():
    batch = []
    for size in ((50, 70), (64, 40)):
        mask = torch.zeros(1, *size, dtype=torch.bool)
        mask[0, 10:30, 5:25] = True
        target = {"image_id": 3, "original_size": (7, 9), "labels": torch.tensor([2]), "masks": mask}
        batch.append((torch.zeros(3, *size), target | {"boxes": torch.tensor([[5.0, 10, 25, 30]])}))
    images, targets = collate(batch)
    assert [tuple(image.shape) for image in images] == [(3, 50, 70), (3, 64, 40)]
    for target in targets:
        assert target["masks"].shape == (1, 64, 96) and target["masks"].dtype == torch.bool
        assert target["masks"].sum() == 400 and target["masks"][0, 10:30, 5:25].all()
        assert target["original_size"] == (7, 9) and target["image_id"] == 3 and target["labels"].tolist() == [2]
        torch.testing.assert_close(target["boxes"], torch.tensor([[15 / 96, 20 / 64, 20 / 96, 20 / 64]]))
    assert batch[0][1]["boxes"].tolist() == [[5, 10, 25, 30]]  # the items are as they were


# --- real photographs


@needs_tiny_coco
def test_tiny_coco_masks_are_those_of_pycocotools():
    data = CocoInstances(*coco_paths(TINY_COCO, "val"), training=False)
    assert len(data) == 6 and len(data.classes) == 80 and data.category_ids[-1] == 90
    index = max(range(6), key=lambda i: len(data.instances[data.image_ids[i]]))
    image, target = data.ground_truth(index)
    assert min(image.shape[1:]) == 800 or max(image.shape[1:]) == 1333
    instances = data.instances[data.image_ids[index]]
    assert len(instances) == len(target["labels"]) > 10
    entry = data.coco.imgs[data.image_ids[index]]
    scale = torch.tensor([image.shape[1] / entry["height"], image.shape[2] / entry["width"]])
    stored = torch.from_numpy(np.stack([data.coco.annToMask(a) for a in instances])).bool()
    areas = stored.flatten(1).sum(1) * scale.prod()
    assert ((target["masks"].flatten(1).sum(1) - areas).abs() <= 0.05 * areas + 25).all()
    x, y, w, h = torch.tensor([a["bbox"] for a in instances]).unbind(1)  # the polygons' bounds, rounded to hundredths
    annotated = torch.stack([x, y, x + w, y + h], 1) * scale.flip(0).repeat(2)
    assert (target["boxes"] - annotated).abs().max() <= 0.05


@needs_tiny_coco
def test_tiny_coco_trains_and_loads_in_processes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = CocoInstances(*coco_paths(TINY_COCO, "train"), training=True, augmentation=(256, (0.1, 2.0)))
    assert 0 < len(data) <= 32 and all(not a["iscrowd"] for i in data.image_ids for a in data.instances[i])
    loader = torch.utils.data.DataLoader(data, 8, num_workers=1, collate_fn=collate)
    count = 0
    for images, targets in loader:
        assert all(image.shape == (3, 256, 256) for image in images)
        for target in targets:
            assert target["masks"].shape[1:] == (256, 256) and (target["boxes"] > 0).all()
            assert (target["boxes"] <= 1).all()
        count += len(images)
    assert count == len(data)
