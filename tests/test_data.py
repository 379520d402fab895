"""COCO's and BDD100K's formats, augmentation, collate, the generated shapes, one clear line for every bad input."""

import argparse
import copy
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from scipy.ndimage import minimum_filter1d
from torchvision import tv_tensors

from bdd100k import bdd100k_paths, read_bdd100k
from cli import add_data_arguments, open_split
from coco import coco_paths
from data import CocoInstances, collate, decode_masks, eval_transform, mask_boxes, train_transform
from eval import average_precision, coco_results
from images import DataError, read_image
from shapes import SHAPES, draw_shapes, make_shapes

TINY_COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiny_coco"
WIDTH, HEIGHT = 40, 30
SQUARE = [[10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]]  # columns 10 to 19, rows 5 to 14


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # as in loader processes; these operations are too small for more
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def square_mask():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:15, 10:20] = 1
    return mask


def uncompressed_rle(mask):
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0] * int(flat[0]) + runs}


def compressed_rle(mask):
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def annotation(id, segmentation=SQUARE, image_id=1, category_id=7, **changes):
    fields = {"id": id, "image_id": image_id, "category_id": category_id, "segmentation": segmentation}
    return fields | {"bbox": [10.0, 5.0, 10.0, 10.0], "area": 100.0, "iscrowd": 0} | changes


def dataset(annotations):
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)]
    categories = [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder, content):
    """Write a data set's annotation file and black images; returns the arguments for CocoInstances."""
    (folder / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / f"{i}.png")
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path, folder / "images"


def same_size(shorter=HEIGHT, longer=WIDTH):
    return eval_transform(shorter, longer)


# --- reading


@pytest.mark.parametrize("segmentation", [SQUARE, uncompressed_rle(square_mask()), compressed_rle(square_mask())])
def test_polygon_and_both_rle_forms_give_the_same_target(tmp_path, segmentation):
    data = CocoInstances(*write(tmp_path, dataset([annotation(1, segmentation)])), same_size(), training=True)
    image, target = data[0]
    assert image.dtype == torch.float32 and image.shape == (3, HEIGHT, WIDTH)
    assert target["image_id"] == 1 and target["original_size"] == (HEIGHT, WIDTH)
    assert target["masks"].dtype == torch.bool
    assert torch.equal(target["masks"], torch.from_numpy(square_mask())[None].bool())
    assert target["boxes"].dtype == torch.float32 and target["boxes"].tolist() == [[10, 5, 20, 15]]
    assert target["labels"].dtype == torch.int64 and target["labels"].tolist() == [0]


def test_decode_masks_accepts_bytes_and_joins_the_polygons_of_one_instance():
    rle = compressed_rle(square_mask())
    second = [[30.0, 20.0, 34.0, 20.0, 34.0, 24.0, 30.0, 24.0]]
    masks = decode_masks([rle | {"counts": rle["counts"].encode()}, SQUARE + second], HEIGHT, WIDTH)
    assert masks.flatten(1).sum(1).tolist() == [100, 116]
    assert decode_masks([], HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)


def test_rle_with_many_runs_passes_the_check_and_decodes(tmp_path):
    mask = (np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3).astype(np.uint8)
    mask[:, 20:] = 0  # one long run: several characters in the compressed form, and a large negative difference before
    for i, segmentation in enumerate([uncompressed_rle(mask), compressed_rle(mask), compressed_rle(1 - mask)]):
        (tmp_path / str(i)).mkdir()
        arguments = write(tmp_path / str(i), dataset([annotation(1, segmentation)]))
        target = CocoInstances(*arguments, same_size(), training=True)[0][1]
        assert torch.equal(target["masks"][0], torch.from_numpy(mask if i < 2 else 1 - mask).bool())


def test_classes_labels_crowds_and_images_without_instances(tmp_path):
    crowd = annotation(3, uncompressed_rle(square_mask()), image_id=2, iscrowd=1)
    arguments = write(tmp_path, dataset([annotation(1, category_id=90), annotation(2), crowd]))
    train = CocoInstances(*arguments, same_size(), training=True)
    assert train.classes == ["cat", "dog"] and train.category_ids == [7, 90]
    assert train.image_ids == [1] and train[0][1]["labels"].tolist() == [1, 0]
    val = CocoInstances(*arguments, same_size(), training=False)
    assert val.image_ids == [1, 2] and len(val) == 2
    target = val[1][1]
    assert target["masks"].shape == (0, HEIGHT, WIDTH) and target["boxes"].shape == (0, 4)
    assert len(val.coco.anns) == 3  # the evaluation sees crowds
    assert val.coco.annToMask(val.coco.anns[3]).sum() == 100 == val.coco.annToMask(val.coco.anns[1]).sum()


def test_building_a_data_set_prints_nothing(tmp_path, capsys):
    CocoInstances(*write(tmp_path, dataset([annotation(1)])), same_size(), training=True)
    assert capsys.readouterr() == ("", "")


def average_precision_of_ground_truth(data, false_positives=()):
    """eval.py's scores when every target is a detection, and `false_positives` too: (item, label, mask) each."""
    results = []
    for index in range(len(data)):
        image, target = data[index]
        assert image.shape[1:] == target["masks"].shape[1:] == target["original_size"]
        found = [(1.0, label, mask) for label, mask in zip(target["labels"], target["masks"], strict=True)]
        found += [(2.0, label, mask) for item, label, mask in false_positives if item == index]
        scores, labels, masks = zip(*found, strict=True) if found else ((), (), target["masks"])
        masks = torch.stack(masks) if found else masks
        detections = {"scores": torch.tensor(scores), "labels": torch.tensor(labels, dtype=torch.int64)}
        detections |= {"masks": masks, "boxes": mask_boxes(masks)}
        results += coco_results(detections, target["image_id"], data.category_ids)
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
    data = CocoInstances(*write(tmp_path, dataset(annotations)), same_size(), training=False)
    on_crowd, elsewhere = torch.from_numpy(crowd).bool(), torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    elsewhere[:3, :3] = True
    assert average_precision_of_ground_truth(data) == pytest.approx((100, 100))
    assert average_precision_of_ground_truth(data, [(0, 0, on_crowd)]) == pytest.approx((100, 100))
    assert max(average_precision_of_ground_truth(data, [(0, 0, elsewhere)])) < 95


# --- BDD100K


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


def open_bdd100k(root, training=True, split="train", transform=None):
    return CocoInstances(*bdd100k_paths(root, split), transform or same_size(), training, read_bdd100k)


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
    image, target = data[0]
    assert image.shape == (3, HEIGHT, WIDTH) and target["labels"].tolist() == [CAR - 1, TRUCK - 1, 0]
    assert target["masks"].flatten(1).sum(1).tolist() == [94, 6, 60] and target["masks"].sum(0).max() == 1
    assert target["boxes"].tolist() == [[10, 5, 20, 15], [10, 12, 12, 15], [30, 0, 32, 30]]
    assert [len(data[i][1]["labels"]) for i in (1, 2)] == [0, 0]
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
    args = parser.parse_args(["--data", "bdd100k", "--data-root", str(tmp_path)])
    train, val = open_split(args, "train", train_transform(64)), open_split(args, "val", same_size())
    assert len(train) == 1 and len(val) == 3 and train.classes == val.classes
    [(images, targets)] = torch.utils.data.DataLoader(train, num_workers=1, collate_fn=collate)
    assert images[0].shape == (3, 64, 64) and targets[0]["image_id"] == 1


# --- image files


def gradient(dtype, top):
    return np.linspace(0, top, 256).astype(dtype).reshape(16, 16)


IMAGE_MODES = {
    "grey.png": Image.fromarray(gradient(np.uint8, 255)),
    "grey16.png": Image.fromarray(gradient(np.uint16, 65535)),
    "grey32.tif": Image.fromarray(gradient(np.int32, 65535)),
    "grey_alpha.png": Image.fromarray(gradient(np.uint8, 255)).convert("LA"),
    "rgba.png": Image.fromarray(gradient(np.uint8, 255)).convert("RGBA"),
    "palette.png": Image.fromarray(gradient(np.uint8, 255)).convert("P"),
    "rgb.bmp": Image.fromarray(gradient(np.uint8, 255)).convert("RGB"),
}


@pytest.mark.parametrize("name", IMAGE_MODES)
def test_every_image_mode_is_read_as_the_same_rgb(tmp_path, name):
    IMAGE_MODES[name].save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
    expected = torch.from_numpy(gradient(np.uint8, 255)).expand(3, 16, 16)
    assert (image.int() - expected.int()).abs().max() <= (1 if "16" in name or "32" in name else 0)


def test_transparency_is_dropped_and_bilevel_read(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png")[:, 0, 0].tolist() == [10, 20, 30]
    Image.new("1", (4, 4), 1).save(tmp_path / "bilevel.png")
    assert read_image(tmp_path / "bilevel.png").unique().tolist() == [255]


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_orientation_is_applied_only_on_request(tmp_path, mode):
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    image = Image.fromarray(pixels if mode == "I;16" else (pixels // 257).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to show"
    (image if mode == "I;16" else image.convert("RGB")).save(tmp_path / "a.png", exif=exif)
    stored, upright = read_image(tmp_path / "a.png"), read_image(tmp_path / "a.png", exif=True)
    assert stored.shape == (3, 3, 4)
    assert torch.equal(upright, stored.rot90(-1, dims=(1, 2)))


def damage(path, how):
    if how == "missing":
        return path.unlink()
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image\n" * 9}[how])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "gif", "webp"])
@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing"])
def test_damaged_image_files_are_named(tmp_path, suffix, how):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    damage(path, how)
    with pytest.raises(DataError, match=rf"photo\.{suffix}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_a_loader_process_reports_the_same_single_line(tmp_path):
    arguments = write(tmp_path, dataset([annotation(1), annotation(2, image_id=2)]))
    damage(tmp_path / "images" / "1.png", "truncated")
    data = CocoInstances(*arguments, same_size(), training=True)
    with pytest.raises(DataError) as alone:
        data[0]
    batches = iter(torch.utils.data.DataLoader(data, num_workers=1, collate_fn=collate))
    with pytest.raises(DataError) as in_worker:
        next(batches)
    assert str(in_worker.value) == str(alone.value) and "\n" not in str(alone.value)
    assert len(list(batches)) == 1  # the other image; also ends the process


# --- damaged annotation files


def changed(key, value):
    def change(content):
        content["annotations"][1][key] = value

    return change


def removed(table, key):
    def change(content):
        del content[table][-1][key]

    return change


def set_table(table, value):
    def change(content):
        content[table] = value

    return change


def duplicate(table):
    def change(content):
        content[table].append(copy.deepcopy(content[table][0]))

    return change


RLE = compressed_rle(square_mask())
DAMAGE = {  # what is done to a good file -> what the error must say
    "no images": (set_table("images", []), "empty"),
    "no annotations": (set_table("annotations", []), "empty"),
    "no categories": (set_table("categories", []), "empty"),
    "images not a list": (set_table("images", {"1": {}}), "not in COCO format"),
    "annotation not an object": (set_table("annotations", [1]), "not in COCO format"),
    "annotations missing": (lambda content: content.pop("annotations"), "not in COCO format"),
    "unknown image": (changed("image_id", 99), "annotation 12: unknown image id 99"),
    "unknown category": (changed("category_id", 99), "annotation 12: unknown category id 99"),
    "two points": (changed("segmentation", [[1, 2, 3, 4]]), "annotation 12: polygon with fewer than three points"),
    "two points, second": (changed("segmentation", [*SQUARE, [1, 2, 3, 4]]), "annotation 12: polygon with fewer"),
    "odd coordinates": (changed("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "annotation 12: polygon with an odd number"),
    "text coordinates": (changed("segmentation", [list("abcdef")]), "annotation 12: a polygon is not a flat list"),
    "flat polygon": (changed("segmentation", SQUARE[0]), "annotation 12: a polygon is not a flat list"),
    "NaN coordinates": (changed("segmentation", [[1, 2, 3, 4, 5, float("nan")]]), "annotation 12: polygon with coord"),
    "huge coordinates": (changed("segmentation", [[1, 2, 3, 4, 5, 1e300]]), "annotation 12: polygon with coordinates"),
    "no polygon": (changed("segmentation", []), "annotation 12: no segmentation"),
    "segmentation of text": (changed("segmentation", "abc"), "id 12.* wrong 'segmentation'"),
    "RLE of another size": (changed("segmentation", RLE | {"size": [WIDTH, HEIGHT]}), "annotation 12: RLE of size"),
    "RLE without size": (changed("segmentation", {"counts": RLE["counts"]}), "annotation 12: RLE of size"),
    "RLE without counts": (changed("segmentation", {"size": RLE["size"]}), "annotation 12: RLE with malformed counts"),
    "RLE text": (changed("segmentation", RLE | {"counts": "a b\n"}), "annotation 12: RLE with malformed counts"),
    "RLE not ASCII": (changed("segmentation", RLE | {"counts": "ä"}), "annotation 12: RLE with malformed counts"),
    "RLE cut off": (changed("segmentation", RLE | {"counts": RLE["counts"][:-2]}), "annotation 12: RLE w"),
    "RLE ends in a number": (changed("segmentation", RLE | {"counts": RLE["counts"] + "o"}), "annotation 12: RLE w"),
    "counts too short": (changed("segmentation", RLE | {"counts": [5, 5]}), "annotation 12: RLE whose counts"),
    "counts negative": (changed("segmentation", RLE | {"counts": [-5, HEIGHT * WIDTH + 5]}), "annotation 12: RLE wh"),
    "counts of text": (changed("segmentation", RLE | {"counts": ["1"]}), "annotation 12: RLE with malformed counts"),
    "box without width": (changed("bbox", [10, 5, 0, 10]), "annotation 12: box .*has no area"),
    "box without height": (changed("bbox", [10, 5, 10, 0.0]), "annotation 12: box .*has no area"),
    "box with negative width": (changed("bbox", [10, 5, -1, 10]), "annotation 12: box .*has no area"),
    "box with NaN": (changed("bbox", [10, 5, float("nan"), 10]), "annotation 12: box .*has no area"),
    "box of three": (changed("bbox", [10, 5, 3]), "annotation 12: box .*four numbers"),
    "box of text": (changed("bbox", list("abcd")), "annotation 12: box .*four numbers"),
    "no box": (removed("annotations", "bbox"), "id 13.* no 'bbox'"),
    "no segmentation key": (removed("annotations", "segmentation"), "id 13.* no 'segmentation'"),
    "no area": (removed("annotations", "area"), "id 13.* no 'area'"),
    "no iscrowd": (removed("annotations", "iscrowd"), "id 13.* no 'iscrowd'"),
    "no annotation id": (removed("annotations", "id"), "entry 2 of 'annotations'.* no 'id'"),
    "no file name": (removed("images", "file_name"), "id 2.* no 'file_name'"),
    "no category name": (removed("categories", "name"), "id 7.* no 'name'"),
    "image height 0": (lambda content: content["images"][1].update(height=0), "image 2 has no area"),
    "image width as text": (lambda content: content["images"][1].update(width="40"), "id 2.* wrong 'width'"),
    "image twice": (duplicate("images"), "id 1 occurs twice in 'images'"),
    "annotation twice": (duplicate("annotations"), "id 11 occurs twice in 'annotations'"),
    "category twice": (duplicate("categories"), "id 90 occurs twice in 'categories'"),
    "image not there": (lambda content: content["images"][1].update(file_name="x.png"), r"1 of 2 images .*x\.png"),
    "image in no folder": (lambda content: content["images"][1].update(file_name="a/x.png"), r"1 of 2 images .*x\.png"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_annotation_file_gives_one_clear_line(tmp_path, case):
    content = dataset([annotation(11), annotation(12), annotation(13)])
    DAMAGE[case][0](content)
    arguments = write(tmp_path, content)
    for training in (True, False):
        with pytest.raises(DataError, match=DAMAGE[case][1]) as caught:
            CocoInstances(*arguments, same_size(), training)
        assert str(caught.value).startswith(f"{arguments[0]}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [("", "not JSON"), ('{"images": [', "not JSON"), ("\0\0", "not JSON"), ("[]", "COCO"), ("1", "COCO")],
)
def test_file_that_is_not_coco(tmp_path, text, message):
    with pytest.raises(DataError, match=rf"instances\.json: .*{message}"):
        CocoInstances(*write(tmp_path, text), same_size(), training=True)


def test_missing_file_and_folders_are_named(tmp_path):
    path, images = write(tmp_path, dataset([annotation(1)]))
    with pytest.raises(DataError, match="nowhere.json"):
        CocoInstances(tmp_path / "nowhere.json", images, same_size(), training=True)
    with pytest.raises(DataError, match="nowhere"):
        CocoInstances(path, tmp_path / "nowhere", same_size(), training=True)
    with pytest.raises(DataError, match="instances_val2017.json"):
        coco_paths(tmp_path, "val")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(DataError, match="neither .*val2017 nor .*images/val2017"):
        coco_paths(tmp_path, "val")
    (tmp_path / "images" / "val2017").mkdir()
    assert coco_paths(tmp_path, "val")[1] == tmp_path / "images" / "val2017"
    (tmp_path / "val2017").mkdir()
    assert coco_paths(tmp_path, "val")[1] == tmp_path / "val2017"


def test_several_faults_are_counted(tmp_path):
    content = dataset([annotation(i, category_id=99 if i > 2 else 7) for i in range(1, 6)])
    with pytest.raises(DataError, match=r"annotation 3: unknown category id 99 \(and 2 more"):
        CocoInstances(*write(tmp_path, content), same_size(), training=True)


def test_only_crowds_is_nothing_to_train_on(tmp_path):
    arguments = write(tmp_path, dataset([annotation(1, uncompressed_rle(square_mask()), iscrowd=1)]))
    with pytest.raises(DataError, match="no image has an instance"):
        CocoInstances(*arguments, same_size(), training=True)
    assert len(CocoInstances(*arguments, same_size(), training=False)) == 2


def test_a_degenerate_box_among_ten_thousand_is_left_out_with_a_warning(tmp_path):
    content = dataset([annotation(i) for i in range(9_999)] + [annotation(9_999, bbox=[1, 1, 5, 0], image_id=2)])
    arguments = write(tmp_path, content)
    with pytest.warns(UserWarning, match="1 degenerate .*annotation 9999: box"):
        data = CocoInstances(*arguments, same_size(), training=True)
    assert data.image_ids == [1] and 9_999 not in data.coco.anns
    content["annotations"][5]["bbox"][2] = 0
    arguments[0].write_text(json.dumps(content))
    with pytest.raises(DataError, match="annotation 5: box .*and 1 more"):
        CocoInstances(*arguments, same_size(), training=True)


def test_image_of_another_size_than_annotated(tmp_path):
    arguments = write(tmp_path, dataset([annotation(1)]))
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "1.png")
    data = CocoInstances(*arguments, same_size(), training=True)
    with pytest.raises(DataError, match=r"1\.png: the image is 30x40, .* 40x30"):
        data[0]


# --- transforms


def coloured_blocks(height, width):
    """An image of flat coloured rectangles and their masks, so that a pixel's colour says whose it is."""
    rng = np.random.default_rng(height * width)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    masks = torch.zeros(4, height, width, dtype=torch.bool)
    for i in range(4):
        y, x = rng.integers(0, height - height // 3), rng.integers(0, width - width // 3)
        rows, columns = slice(y, y + height // 3), slice(x, x + width // 3)
        masks[:, rows, columns] = False
        masks[i, rows, columns] = True
        image[:, rows, columns] = 50 * (i + 1)
    target = {
        "image_id": 3,
        "labels": torch.arange(4),
        "masks": tv_tensors.Mask(masks),
        "original_size": (height, width),
    }
    return tv_tensors.Image(image), target


def interior(mask, margin):
    """The pixels of a mask (H, W) whose neighbours up to `margin` rows and columns away are in the mask, too."""
    inside = mask.numpy()
    for axis in (0, 1):
        inside = minimum_filter1d(inside, 2 * margin + 1, axis=axis, mode="nearest")
    return torch.from_numpy(inside)


SIZES = [(16, 16), (16, 200), (300, 20), (480, 640), (640, 427), (1024, 1024), (1000, 1500), (4000, 3000)]


@pytest.mark.parametrize("height, width", SIZES)
def test_large_scale_jitter_at_any_size(height, width):
    """1024 x 1024 out, masks never empty, boxes tight around them, and every mask lies where its object's colour is."""
    transform = train_transform(1024)
    sample = coloured_blocks(height, width)
    reach = math.ceil(max(1, 2 * 1024 / max(height, width))) + 1  # how far interpolation mixes neighbours, at most
    seen = 0
    for seed in range(6):
        torch.manual_seed(seed)
        image, target = transform(*sample)
        masks, boxes = target["masks"], target["boxes"]
        assert image.shape == (3, 1024, 1024) and image.dtype == torch.float32
        assert masks.shape == (len(boxes), 1024, 1024) and masks.dtype == torch.bool
        assert len(target["labels"]) == len(boxes) and boxes.shape[1:] == (4,)
        assert target["image_id"] == 3 and target["original_size"] == (height, width)
        assert 0 <= image.min() and image.max() <= 1
        for mask, box, label in zip(masks, boxes, target["labels"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()  # raises in min() if the mask is empty
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            colours = image[:, interior(mask, reach)] * 255
            assert ((colours - 50 * (label + 1)).abs() < 1).all()
            seen += colours.numel() > 0
        assert masks.sum(0).max() <= 1  # they did not overlap before, either
    assert seen > 0
    torch.manual_seed(seed)
    again, target_again = transform(*sample)
    assert torch.equal(again, image) and torch.equal(target_again["masks"], masks)


def test_markers_stay_with_their_objects():
    """Single bright pixels, each its own instance, are found again inside their mask, and nowhere else."""
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    masks = torch.zeros(6, 48, 64, dtype=torch.bool)
    for i, (y, x) in enumerate([(3, 5), (10, 40), (20, 20), (30, 60), (40, 8), (47, 33)]):
        masks[i, y, x] = True
        image[:, y, x] = 255
    transform, seen = train_transform(256, (1.0, 2.0)), 0
    for seed in range(20):
        torch.manual_seed(seed)
        out, target = transform(
            tv_tensors.Image(image),
            {"labels": torch.arange(6), "masks": tv_tensors.Mask(masks), "image_id": 0, "original_size": (48, 64)},
        )
        picture = out[0] * (out[0] != torch.tensor(128 / 255))  # without the padding
        for mask in target["masks"]:
            assert picture[mask].mean() > 0.4
            seen += 1
        outside = picture[~target["masks"].any(0)]
        assert outside.max() <= 0.51  # bilinear interpolation has fallen to one half at the marker's edge
    assert seen > 40


def test_image_and_masks_have_the_same_centre_of_mass():
    """No systematic shift between image and masks, neither enlarged nor reduced, flipped or not."""
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(120.0), indexing="ij")
    disc = (y - 40) ** 2 + (x - 70) ** 2 < 25**2
    image = tv_tensors.Image((disc * 255).byte().expand(3, -1, -1))
    for scale in (0.13, 0.31, 0.77, 1.0):
        transform = train_transform(512, (scale, scale))
        for seed in range(4):
            torch.manual_seed(seed)
            sample = {"labels": torch.zeros(1).long(), "masks": tv_tensors.Mask(disc[None])}
            out, target = transform(image, sample | {"image_id": 0, "original_size": (90, 120)})
            height, width = round(90 * 512 / 120 * scale), round(512 * scale)
            weight, mask = out[0, :height, :width], target["masks"][0].float()
            for axis in (0, 1):
                positions = [(w.sum(1 - axis) * torch.arange(w.shape[axis])).sum() / w.sum() for w in (weight, mask)]
                assert abs(positions[0] - positions[1]) < 0.12


def test_padding_is_grey_and_belongs_to_nobody():
    torch.manual_seed(0)
    image, target = train_transform(64, (0.5, 0.5))(*coloured_blocks(40, 40))
    assert (image[:, 32:] == 128 / 255).all() and (image[:, :, 32:] == 128 / 255).all()
    assert not target["masks"][:, 32:].any() and not target["masks"][:, :, 32:].any()
    assert target["masks"].any()


def test_same_seed_same_sample_and_other_seed_another():
    transform, sample, results = train_transform(128, (1.5, 2.0)), coloured_blocks(100, 140), []  # so that it crops
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(transform(*sample))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in ("labels", "boxes", "masks"))
    assert not torch.equal(results[0][0], results[2][0])


def test_instances_without_a_pixel_are_dropped_with_their_labels():
    masks = torch.zeros(3, 20, 20, dtype=torch.bool)
    masks[1, :5], masks[2, 10:] = True, True
    target = {"labels": torch.tensor([5, 6, 7]), "masks": tv_tensors.Mask(masks), "original_size": (20, 20)}
    _, target = eval_transform(20, 20)(tv_tensors.Image(torch.zeros(3, 20, 20, dtype=torch.uint8)), target)
    assert target["labels"].tolist() == [6, 7] and target["boxes"].tolist() == [[0, 0, 20, 5], [0, 10, 20, 20]]


def test_crop_without_any_instance_is_fine():
    image = tv_tensors.Image(torch.zeros(3, 400, 400, dtype=torch.uint8))
    masks = torch.zeros(1, 400, 400, dtype=torch.bool)
    masks[0, 0, 0] = True
    sample = {
        "labels": torch.zeros(1).long(),
        "masks": tv_tensors.Mask(masks),
        "image_id": 0,
        "original_size": (400, 400),
    }
    torch.manual_seed(0)
    samples = [train_transform(64, (2.0, 2.0))(image, sample) for _ in range(5)]
    assert {len(target["labels"]) for _, target in samples} == {0}
    targets = collate(samples)[1]
    assert targets[0]["boxes"].shape == (0, 4) and targets[0]["masks"].shape == (0, 64, 64)


@pytest.mark.parametrize(
    "size, expected",
    [((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((100, 1000), (133, 1333)), ((1000, 20), (1333, 27))],
)
def test_evaluation_resize(size, expected):
    sample = coloured_blocks(*size)
    image, target = eval_transform()(*sample)
    assert image.shape == (3, *expected) and target["masks"].shape[1:] == expected
    assert torch.equal(eval_transform()(sample[0]), image)  # an image alone, as for prediction


def test_mask_boxes_of_edges_and_empty_masks():
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0] = True
    masks[1, 4, 6] = True
    assert mask_boxes(masks).tolist() == [[0, 0, 7, 5], [6, 4, 7, 5], [0, 0, 0, 0]]


def test_collate_normalises_boxes_by_the_padded_size():
    batch = [eval_transform(*sorted(size))(*coloured_blocks(*size)) for size in ((50, 70), (64, 40))]
    images, targets = collate(batch)
    assert [tuple(image.shape) for image in images] == [(3, 50, 70), (3, 64, 40)]
    assert type(images[0]) is torch.Tensor
    for (image, before), after in zip(batch, targets, strict=True):
        assert after["masks"].shape == (len(after["labels"]), 64, 96) and after["masks"].dtype == torch.bool
        assert after["size"] == tuple(image.shape[1:]) and after["original_size"] == before["original_size"]
        assert after["image_id"] == 3 and after["boxes"].dtype == torch.float32
        cx, cy, w, h = (after["boxes"] * torch.tensor([96, 64, 96, 64])).unbind(1)
        xyxy = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
        torch.testing.assert_close(xyxy, before["boxes"])
        torch.testing.assert_close(xyxy, mask_boxes(after["masks"]))


# --- shapes


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
    train, val = (CocoInstances(*coco_paths(tmp_path, s), eval_transform(), s == "train") for s in ("train", "val"))
    assert len(train) == 3 and len(val) == 20
    assert (
        contents(tmp_path)[Path("images/train2017/000000000001.png")]
        != contents(shapes)[Path("images/train2017/000000000001.png")]
    )


def test_interrupted_generation_is_not_taken_as_complete(shapes, tmp_path, monkeypatch):
    calls = iter(range(10))

    def interrupted(*args):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return draw_shapes(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.draw_shapes", interrupted)
        make_shapes(tmp_path, train=60, val=20, size=96, seed=4)
    with pytest.raises(DataError):
        coco_paths(tmp_path, "train")
    make_shapes(tmp_path, train=60, val=20, size=96, seed=4)
    assert contents(tmp_path) == contents(shapes)


def test_shapes_annotations(shapes):
    data = CocoInstances(*coco_paths(shapes, "train"), eval_transform(96, 96), training=True)
    assert data.classes == list(SHAPES) and len(SHAPES) >= 8
    counts, labels, widths, covered = [], set(), [], 0
    for i in range(len(data)):
        image, target = data[i]
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
    from data import _coverage

    silhouettes = [_coverage(outlines, 16, 0.0) for outlines in SHAPES.values()]
    for i, a in enumerate(silhouettes):
        rows, columns = np.nonzero(a >= 0.5)
        assert max(np.ptp(rows), np.ptp(columns)) >= 22  # of 32
        for b in silhouettes[:i]:
            assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.9


# --- real photographs


needs_tiny_coco = pytest.mark.skipif(not TINY_COCO.is_dir(), reason="tiny_coco is not there")


@needs_tiny_coco
def test_tiny_coco_masks_are_those_of_pycocotools():
    data = CocoInstances(*coco_paths(TINY_COCO, "val"), eval_transform(), training=False)
    assert len(data) == 6 and len(data.classes) == 80 and data.category_ids[-1] == 90
    index = max(range(6), key=lambda i: len(data.instances[data.image_ids[i]]))
    image, target = data[index]
    assert min(image.shape[1:]) == 800 or max(image.shape[1:]) == 1333
    instances = data.instances[target["image_id"]]
    assert len(instances) == len(target["labels"]) > 10
    scale = torch.tensor([n / o for n, o in zip(image.shape[1:], target["original_size"], strict=True)])
    stored = torch.from_numpy(np.stack([data.coco.annToMask(a) for a in instances])).bool()
    areas = stored.flatten(1).sum(1) * scale.prod()
    assert ((target["masks"].flatten(1).sum(1) - areas).abs() <= 0.05 * areas + 20).all()
    assert (target["boxes"] - mask_boxes(stored) * scale.flip(0).repeat(2)).abs().max() <= 1


@needs_tiny_coco
def test_tiny_coco_trains_and_loads_in_processes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = CocoInstances(*coco_paths(TINY_COCO, "train"), train_transform(256), training=True)
    assert 0 < len(data) <= 32 and all(not a["iscrowd"] for i in data.image_ids for a in data.instances[i])
    loader = torch.utils.data.DataLoader(data, 8, num_workers=1, collate_fn=collate)
    count = 0
    for images, targets in loader:
        assert all(image.shape == (3, 256, 256) for image in images)
        for target in targets:
            assert target["masks"].flatten(1).any(1).all() and (target["boxes"] > 0).all()
            assert (target["boxes"] <= 1).all()
        count += len(images)
    assert count == len(data)
