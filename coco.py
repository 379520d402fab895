"""COCO annotation files, read and checked."""

import gc
import json
import math
import os
import re
import warnings
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils
from torchvision.ops import box_convert

from config import InputError
from images import DataError


def coco_paths(root, split):
    """Annotation file and image folder of split "train" or "val" in a COCO folder; DataError if they are not there.

    Both COCO layouts work: the images in root/{split}2017 or in root/images/{split}2017.
    """
    root = Path(root)
    annotation_file = root / "annotations" / f"instances_{split}2017.json"
    folders = [root / f"{split}2017", root / "images" / f"{split}2017"]
    if not annotation_file.is_file():
        raise DataError(f"{annotation_file}: no such file; the data root must be a COCO folder")
    for folder in folders:
        if folder.is_dir():
            return annotation_file, folder
    raise DataError(f"{root}: neither {folders[0]} nor {folders[1]} is a folder; put the {split} images there")


def read_annotations(annotation_file, image_dir):
    """Load and check a whole COCO annotation file.

    Returns the dictionary. Polygons come back as float arrays and uncompressed RLE compressed: forked loader processes
    share the parent's memory until they touch an object, so that lists of a million floats would be copied by each.
    Raises DataError, naming the file and the first annotation or image in question.
    """
    gc.disable()  # millions of new lists, no cycles: the collector would need as long as the parser
    try:
        return _read_annotations(annotation_file, image_dir)
    finally:
        gc.enable()


def _read_annotations(annotation_file, image_dir):
    try:
        dataset = json.loads(Path(annotation_file).read_bytes())
    except OSError as error:
        raise DataError(f"{annotation_file}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise DataError(f"{annotation_file}: is not JSON ({error}); give a COCO annotation file") from None
    for key in ("images", "annotations", "categories"):
        entries = dataset.get(key) if isinstance(dataset, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(
                f"{annotation_file}: is not in COCO format (no list of {key!r}); give a COCO annotation file"
            )
        if not entries:
            raise DataError(f"{annotation_file}: the data set is empty (no {key}); give a file with some")
    _check_entries(annotation_file, dataset, "categories", {"id": int, "name": str})
    _check_entries(annotation_file, dataset, "images", {"id": int, "file_name": str, "height": int, "width": int})
    _check_entries(annotation_file, dataset, "annotations", ANNOTATION_KEYS)

    names = [image["file_name"] for image in dataset["images"]]
    try:
        present = set(os.listdir(image_dir))  # one listing instead of a system call per image
    except OSError as error:
        raise DataError(f"{image_dir}: not a readable image folder ({error.strerror}); check the path") from None
    missing = [n for n in names if n not in present and not ("/" in n and (Path(image_dir) / n).is_file())]
    if missing:
        raise DataError(
            f"{annotation_file}: {len(missing)} of {len(names)} images are not in {image_dir}, the first is"
            f" {missing[0]}; check the image folder"
        )

    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    categories = {category["id"] for category in dataset["categories"]}
    wrong, degenerate = {}, {}  # annotation id -> what is the matter
    for annotation in dataset["annotations"]:
        if annotation["image_id"] not in sizes:
            wrong[annotation["id"]] = f"unknown image id {annotation['image_id']}"
        elif annotation["category_id"] not in categories:
            wrong[annotation["id"]] = f"unknown category id {annotation['category_id']}"
        elif problem := _degenerate_geometry(annotation):
            degenerate[annotation["id"]] = problem
        elif problem := _pack_segmentation(annotation, *sizes[annotation["image_id"]]):
            wrong[annotation["id"]] = problem
    # COCO's own train2017 has a box without height or two among its 860,001 annotations. So degenerate shapes are an
    # error, except where they are at most one in ten thousand: those are left out everywhere, with a warning.
    if len(degenerate) * 10_000 > len(dataset["annotations"]):
        wrong |= degenerate
    elif degenerate:
        first = next(iter(degenerate))
        warnings.warn(
            f"{annotation_file}: {len(degenerate)} degenerate annotation(s) left out, the first is annotation {first}:"
            f" {degenerate[first]}",
            stacklevel=4,
        )
        dataset["annotations"] = [a for a in dataset["annotations"] if a["id"] not in degenerate]
    if wrong:
        first = next(iter(wrong))
        more = f" (and {len(wrong) - 1} more annotations with faults)" if len(wrong) > 1 else ""
        raise DataError(f"{annotation_file}: annotation {first}: {wrong[first]}{more}; correct or remove it")
    return dataset


ANNOTATION_KEYS = {
    "id": int,
    "image_id": int,
    "category_id": int,
    "bbox": list,
    "segmentation": (list, dict),
    "area": (int, float),
    "iscrowd": int,
}


def _check_entries(annotation_file, dataset, key, types):
    """Raise DataError unless the entries of dataset[key] have unique ids and these keys with values of these types."""
    entries = dataset[key]
    for name, kind in types.items():
        # The few types that occur are quicker to collect than each entry is to judge.
        if not all(issubclass(found, kind) for found in {type(entry.get(name)) for entry in entries}):
            index, entry = next((i, e) for i, e in enumerate(entries) if not isinstance(e.get(name), kind))
            what = "wrong" if name in entry else "no"
            where = f"entry {index} of {key!r} (id {entry.get('id')})"
            raise DataError(f"{annotation_file}: {where} has {what} {name!r}; correct the file")
    ids = Counter(entry["id"] for entry in entries)
    if len(ids) < len(entries):
        [(twice, _)] = ids.most_common(1)
        raise DataError(f"{annotation_file}: id {twice} occurs twice in {key!r}; make the ids unique")
    if key == "images":
        for entry in entries:
            if not (entry["height"] > 0 and entry["width"] > 0):
                raise DataError(f"{annotation_file}: image {entry['id']} has no area; correct its height and width")


def _degenerate_geometry(annotation):
    """Why this annotation encloses nothing: what is wrong with its box or polygons, or None."""
    box, segmentation = annotation["bbox"], annotation["segmentation"]
    try:
        x, y, w, h = box
        if not (w > 0 and h > 0 and math.isfinite(x + y + w + h)):
            return f"box {box} (x, y, width, height) has no area"
    except (TypeError, ValueError):
        return f"box {box} is not a list of four numbers"
    if isinstance(segmentation, list):
        if not segmentation:
            return "no segmentation"
        for polygon in segmentation:
            if isinstance(polygon, list) and len(polygon) < 6:
                return f"polygon with fewer than three points ({len(polygon)} numbers)"
    return None


def _pack_segmentation(annotation, height, width):
    """Replace polygons by arrays and uncompressed by compressed RLE in place; returns what is wrong, or None."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        try:
            for polygon in segmentation:
                if len(polygon) % 2:
                    return f"polygon with an odd number of coordinates ({len(polygon)})"
                # The rasteriser walks along every edge: one absurd coordinate would take all memory. (NaN fails too.)
                if not sum(map(abs, polygon)) <= len(polygon) * (height + width):
                    return f"polygon with coordinates far outside its {width}x{height} image"
            annotation["segmentation"] = [array("d", polygon) for polygon in segmentation]
        except TypeError:
            return "a polygon is not a flat list of numbers"
        return None

    counts = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        return f"RLE of size {segmentation.get('size')}, but its image is {[height, width]} (height, width)"
    try:
        runs = np.array(array("q", counts)) if isinstance(counts, list) else _runs(counts)
    except (TypeError, ValueError, OverflowError):
        return "RLE with malformed counts"
    if (runs < 0).any() or runs.sum() != height * width:
        return f"RLE whose counts do not add up to the {height * width} pixels of its image"
    if isinstance(counts, list):
        annotation["segmentation"] = mask_utils.frPyObjects(segmentation, height, width)
    return None


def _runs(counts):
    """Run lengths (int64 array) of compressed RLE counts (str or bytes); ValueError or TypeError if malformed.

    pycocotools reads past the end of a malformed string, so it must not see one. The format: base 32, five bits to a
    character from "0" on, the least significant first, bit 5 = more follow, bit 4 of the last = negative; from the
    fourth run on the number is the difference to the run two before.
    """
    counts = counts.encode("ascii") if isinstance(counts, str) else counts
    if not re.fullmatch(rb"(?:[P-o]{0,6}[0-O])+", counts):
        raise ValueError("not an RLE string")
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(digits < 32)  # of every number
    first = np.concatenate([[0], last[:-1] + 1])
    place = 5 * (np.arange(len(digits)) - np.repeat(first, last - first + 1))
    runs = np.add.reduceat((digits & 31) << place, first)
    runs -= np.where(digits[last] & 16, 32 << place[last], 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


BDD100K_CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")  # category 1...8


def encode_masks(masks):
    """Compressed RLE of masks (n, H, W) bool, on any device: a list of {"size": [H, W], "counts": str}.

    The same as pycocotools' `encode`, which wants all masks turned into its column-major order first, three quarters of
    its time: here only the places where a column changes are.
    """
    rles = []
    height, width = masks.shape[1:]
    for mask in masks.cpu().numpy():
        changes = np.empty_like(mask)  # a pixel differs from the one before it, down the columns
        np.not_equal(mask[1:], mask[:-1], out=changes[1:])
        changes[0, 1:] = mask[0, 1:] != mask[-1, :-1]
        changes[0, 0] = mask[0, 0]
        rows, columns = np.divmod(np.flatnonzero(changes), width)
        runs = np.diff(np.sort(columns * height + rows), prepend=0, append=height * width)
        rle = mask_utils.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
        rles.append({"size": [height, width], "counts": rle["counts"].decode()})
    return rles


def coco_results(detections, image_id, category_ids):
    """Detections of one image (`postprocess`, on any device) as COCO results: a list of dictionaries.

    detections: its masks may be RLE already, from `encode_masks`. category_ids: category id of every label.
    Raises InputError where a score or a box is NaN or infinite.
    """
    scores, boxes = detections["scores"].tolist(), box_convert(detections["boxes"], "xyxy", "xywh").tolist()
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise InputError(
            f"image {image_id}: the predicted scores or boxes are not finite (NaN): the checkpoint is damaged or its "
            "training diverged; give another one"
        )
    labels, masks = detections["labels"].tolist(), detections["masks"]
    masks = masks if isinstance(masks, list) else encode_masks(masks)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score, "segmentation": rle}
        for score, label, box, rle in zip(scores, labels, boxes, masks, strict=True)
    ]
