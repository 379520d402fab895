"""COCO's files: annotations found, read, checked and brought into one form; results in theirs."""

import gc
import json
import math
import os
import re
import unicodedata
import warnings
from collections import Counter
from difflib import get_close_matches
from functools import cache, partial
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from pycocotools import mask as mask_utils
from torchvision.ops import box_convert

from config import InputError
from formats.images import DataError, image_size, short
from formats.segmentations import LEFT_OUT, MISFIT, REFUSED, STRANGE, TRIMMED, check_segmentation, mask_area


def coco_paths(root, split):
    """Annotation file and image folder of split "train", "val" or "test" in COCO's or Roboflow's layout (docs/data.md).

    Raises DataError if they are not there.
    """
    root = Path(root)
    names = [f"annotations/instances_{split}2017.json"]
    names += [f"annotations/image_info_{name}2017.json" for name in ("test-dev", "test") if split == "test"]
    coco = list(filter(Path.is_file, map(root.joinpath, names)))
    roboflow = root / {"val": "valid"}.get(split, split) / "_annotations.coco.json"
    if coco and roboflow.is_file():
        raise DataError(f"{root}: has both {coco[0]} and {roboflow}; remove one, or name the files with flags")
    if roboflow.is_file():
        return roboflow, roboflow.parent
    if not coco:
        expected = f"{' nor '.join(names)} (COCO's layout) nor {roboflow.relative_to(root)} (Roboflow's)"
        flag = "--train" if split == "train" else "--val"
        advice = f"check the data root, or name other files with {flag}-json and {flag}-images"
        raise DataError(f"{root}: has neither {expected}; {advice}")
    folders = root / f"{split}2017", root / "images" / f"{split}2017"
    for folder in filter(Path.is_dir, folders):
        return coco[0], folder
    raise DataError(f"{root}: neither {folders[0]} nor {folders[1]} is a folder; put the {split} images there")


def match_classes(trained, classes):
    """The label, among those that a model was trained for, of each of a data set's classes, by their names.

    Raises DataError, naming them, for classes of the data set that the model does not know.
    """
    if unknown := [name for name in classes if name not in trained]:
        known = f"but the model was trained for {_list(trained)}; rename them or give the data set that fits"
        raise DataError(f"the data set has the classes {_list(unknown)}, {known}")
    return [trained.index(name) for name in classes]


def check_sizes(dataset, image_dir):
    """Compare all sizes of `read_annotations` with the files' headers; DataError names the first that differs."""
    faults = []
    for image in dataset["images"]:
        try:
            image_size(Path(image_dir) / image["file_name"], (image["height"], image["width"]))
        except DataError as error:
            faults.append(error)
    if faults:
        raise DataError(f"{faults[0]}{_more(faults, 'images')}")


# --- reading: what has one meaning is taken, single useless annotations are left out, the rest is an error

OTHER_KINDS = {  # a field that only entries of another kind of COCO's files have: what these hold
    "score": "results (detections with a score)",
    "segments_info": "panoptic segments",
    "keypoints": "keypoints without masks",
    "caption": "captions",
}
FLAGS = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1}  # iscrowd and ignore; True and 1.0 are found as 1
NOTES = {
    STRANGE: "annotation(s) of images that are not in the file left out",
    LEFT_OUT: "annotation(s) left out",
    TRIMMED: "annotation(s) with polygons that have no area, which are left out",
    MISFIT: "box(es) that do not fit their masks; bbox must be x, y, width, height",
}


def read_annotations(annotation_file, image_dir, need_annotations=True):
    """Load and check a whole COCO annotation file; returns its dictionary in one form.

    images        id int, file_id as the file has it, file_name relative to `image_dir`, height and width int
    categories    id int, file_id, name: a text, numbers are taken as theirs
    annotations   id 1...N in the order of the file, image_id, category_id and iscrowd int (1 also for `ignore`), area
                  and bbox (x, y, width, height) also where the file has none; segmentation: polygons as float64 arrays
                  (lists of floats would be copied into every loader process that touches them) or compressed RLE

    Ids are kept where all of a table are integers below 2**53 (1, 1.0 and "1" are the same), and else numbered.
    Annotations that enclose nothing or belong to no image of the file are left out with a warning. With
    need_annotations=False a file without annotations is fine. Raises DataError, which names the file and the first
    annotation or image in question.
    """
    collecting = gc.isenabled()
    gc.disable()  # millions of new lists, no cycles: the collector would need as long as the parser
    try:
        dataset = _load(annotation_file, need_annotations)
        for note in _normalise(dataset, image_dir, need_annotations):
            warnings.warn(f"{annotation_file}: {note}", stacklevel=2)
    except (DataError, RecursionError) as error:
        why = error if isinstance(error, DataError) else "is nested too deeply; give a COCO annotation file"
        raise DataError(f"{annotation_file}: {why}") from None
    finally:
        if collecting:
            gc.enable()
    return dataset


def _load(annotation_file, need_annotations):
    """The dictionary of an annotation file, in which the three tables are lists of dictionaries."""
    try:
        dataset = json.loads(Path(annotation_file).read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise DataError(f"is not JSON ({error}); give a COCO annotation file, in UTF-8") from None
    listed = dataset.get("annotations") if isinstance(dataset, dict) else dataset
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    kind = next((kind for field, kind in OTHER_KINDS.items() if entries and field in entries[0]), None)
    if kind and (listed is dataset or not any(entry.get("segmentation") for entry in entries)):
        expected = "expected instances: images, categories, and annotations with a segmentation; give such a file"
        raise DataError(f"holds {kind}, {expected}")
    if not isinstance(dataset, dict):
        raise DataError(f"is not in COCO format ({short(dataset)}, expected an object); give a COCO annotation file")
    if not need_annotations and dataset.get("annotations") is None:
        dataset["annotations"] = []
    for key in ("images", "categories", "annotations"):
        entries = dataset.get(key)
        if not isinstance(entries, list) or not set(map(type, entries)) <= {dict}:
            why = f"{key!r} is {short(entries)}, expected a list of objects"
            raise DataError(f"is not in COCO format ({why}); give a COCO annotation file")
        if not entries and (need_annotations or key != "annotations"):
            raise DataError(f"the data set is empty (no {key}); give a file with some")
    return dataset


def _normalise(dataset, image_dir, need_annotations):
    """Bring the dictionary into the form of `read_annotations`, in place; returns the warnings."""
    notes = []
    for category in dataset["categories"]:
        if type(name := category.get("name")) not in (str, int, float):
            raise DataError(f"category {short(category.get('id'))} has name {short(name)}, expected a text")
        category["name"] = unicodedata.normalize("NFC", str(name))
    for image in dataset["images"]:
        image |= {field: n for field in ("height", "width") if (n := _integer(image.get(field))) is not None}
    image_ids = _unique_ids(dataset, "images", ("file_name", "coco_url", "height", "width"), notes)
    category_ids = _unique_ids(dataset, "categories", ("name",), notes)
    _find_files(dataset["images"], image_dir, notes)
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    sizes[None] = math.inf, math.inf  # of an annotation whose image is unknown

    references = ("image_id", image_ids, STRANGE), ("category_id", category_ids, REFUSED)
    kept, faults = [], {}  # kind: a line for every annotation
    for index, annotation in enumerate(dataset["annotations"]):
        found = list(_check_fields(annotation, references))  # first, as it finds the image
        found += check_segmentation(annotation, *sizes[annotation["image_id"]])
        first = dict(reversed(found))  # of each kind
        worst = min(first, default=MISFIT)
        for kind, why in first.items():
            if kind == worst or worst == TRIMMED:  # which may be MISFIT as well
                name = short(annotation["id"]) if "id" in annotation else f"without id, entry {index} of 'annotations'"
                faults.setdefault(kind, []).append(f"annotation {name}: {why}")
        if worst not in (STRANGE, LEFT_OUT):
            kept.append(annotation)
    if refused := faults.pop(REFUSED, None):
        raise DataError(f"{refused[0]}{_more(refused, 'annotations with faults')}; correct or remove it")
    notes += [f"{len(lines)} {NOTES[kind]}; the first is {lines[0]}" for kind, lines in sorted(faults.items())]
    if need_annotations and not kept:
        raise DataError(f"no annotation is left: {notes[-1]}; give a file with masks")
    if kept and all(max(annotation["bbox"]) <= 1 for annotation in kept):
        raise DataError(f"no box goes beyond 1, the first is {kept[0]['bbox']}, expected pixels")
    if kept and all(annotation["iscrowd"] for annotation in kept):
        notes.append("all annotations are crowds (iscrowd or ignore), which do not count: there will be no AP")
    dataset["annotations"] = kept = _without_copies(kept, notes)
    _unique_names(dataset, notes)
    for number, annotation in enumerate(kept, start=1):
        annotation["id"] = number  # the file's mean nothing, and pycocotools takes 0 for "unmatched"
        if annotation["area"] is None:
            annotation["area"] = mask_area(annotation["segmentation"], *sizes[annotation["image_id"]])
    return notes


def _more(faults, what):
    return f" (and {len(faults) - 1} more {what})" if len(faults) > 1 else ""


def _list(values):
    return ", ".join(map(repr, islice(values, 10))) + (", ..." if len(values) > 10 else "")


# --- ids, names, sizes, flags


def _integer(value):
    """The integer that a JSON value means, 1 for 1, 1.0 and "1"; None where it means none."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([+-]?[0-9]{1,99})(\.0*)?\s*", value)):
        return int(match[1])
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # beyond, it may have been another
        return int(value)
    return value if type(value) is int else None


def _key(value):
    """An id as it is compared: an integer for 1, 1.0 and "1", a text as it stands, "01" too; None for what is no id."""
    number = _integer(value)
    return value or None if isinstance(value, str) and str(number) != value else number


def _unique_ids(dataset, table, fields, notes):
    """Keep one of equal entries of a table and give each an integer id; returns two dictionaries of these ids.

    By the ids' keys, and by the integer that a text such as "01" means, where no other id means the same.
    """
    entries, copies = {}, []
    for index, entry in enumerate(dataset[table]):
        if (key := _key(entry.get("id"))) is None:
            why = f"has id {short(entry.get('id'))}, expected an integer or a text; correct the file"
            raise DataError(f"entry {index} of {table!r} {why}")
        if (first := entries.setdefault(key, entry)) is entry:
            continue
        copies.append(key)
        if differ := [field for field in fields if first.get(field) != entry.get(field)]:
            values = " and ".join(short(one.get(differ[0])) for one in (first, entry))
            raise DataError(f"id {key!r} occurs twice in {table!r}, with {differ[0]} {values}; make the ids unique")
    if copies:
        notes.append(f"{len(copies)} of the {table} come twice and are taken once; the first has id {copies[0]!r}")
    dataset[table] = list(entries.values())
    meanings = Counter(map(_integer, entries))
    # pycocotools sorts ids by NumPy, which makes texts of numbers among texts and floats of large ones.
    keep = None not in meanings and len(meanings) == len(entries) and max(map(abs, meanings)) < 2**53
    meanings.pop(None, None)
    for number, (key, entry) in enumerate(entries.items(), start=1):
        entry["file_id"], entry["id"] = entry["id"], _integer(key) if keep else number
    ids = {key: entry["id"] for key, entry in entries.items()}
    return ids, {_integer(key): number for key, number in ids.items() if meanings[_integer(key)] == 1}


def _without_copies(annotations, notes):
    """The annotations without those that repeat another in everything, id too, as where files that overlap were joined.

    Those without an id, or of another one, stay: they may be two instances that were outlined alike.
    """
    first, kept = {}, []  # of each id; of all
    for annotation in annotations:
        key = _key(annotation.get("id"))
        if key is None or first.setdefault(key, annotation) is annotation or first[key] != annotation:
            kept.append(annotation)
    if copies := len(annotations) - len(kept):
        notes.append(f"{copies} annotation(s) come twice, equal in everything, and are taken once")
    return kept


def _unique_names(dataset, notes):
    """Drop categories without annotations that have the name of another, as Roboflow's placeholder 0 often has."""
    used = {annotation["category_id"] for annotation in dataset["annotations"]}
    names, dropped = {}, []
    for category in sorted(dataset["categories"], key=lambda category: category["id"] not in used):
        file_id, name = category["file_id"], category["name"]
        if (first := names.setdefault(name, category)) is category:
            continue
        if category["id"] in used:
            both = f"categories {first['file_id']!r} and {file_id!r} both have the name {name!r}"
            raise DataError(f"{both}; rename one, or give their annotations one id")
        dropped.append(f"category {file_id!r}: {name!r}")
    if dropped:
        what = "categories without annotations, of the same name as another, left out"
        notes.append(f"{len(dropped)} {what}; the first is {dropped[0]}")
        dataset["categories"] = list(names.values())


def _pixels(image, field):
    """Height or width as an integer; None where it is missing, -1 or 0."""
    value = image.get(field)
    if value is None or (number := _integer(value)) in (-1, 0):
        return None
    if number is None or not 0 < number < 2**31:
        raise DataError(f"image {short(image['file_id'])} has {field} {short(value)}, expected a positive integer")
    return number


def _check_fields(annotation, references):
    """Bring ids and iscrowd into one form, and area, to None what is no number of pixels; yields (kind, why).

    references: of each field with an id its name, the ids of `_unique_ids`, and the kind of fault of an unknown one.
    """
    for field, ids, unknown in references:
        value = annotation.get(field)
        key = _key(value)
        number = ids[0].get(key)
        annotation[field] = number = ids[1].get(_integer(value)) if number is None else number
        if number is None:
            what = f"{field.replace('_', ' ')} {short(value)}, expected"
            why = f"{what} an integer or a text" if key is None else f"unknown {what} one of {_list(ids[0])}"
            yield REFUSED if key is None else unknown, why
    try:
        annotation["iscrowd"] = FLAGS[annotation.get("iscrowd")] | FLAGS[annotation.get("ignore")]
    except (KeyError, TypeError):
        flags = ", ".join(f"{flag} {short(annotation.get(flag))}" for flag in ("iscrowd", "ignore"))
        yield REFUSED, f"{flags}, expected 0 or 1"
    area = annotation.get("area")
    annotation["area"] = area if type(area) in (int, float) and 0 < area < 1e15 else None


# --- image files

SEPARATOR = re.compile(r"[/\\]|%2f|%5c|\?d=", re.IGNORECASE)  # ?d=: of Label Studio's local files
QUERY = re.compile(r"[?#].*", re.DOTALL)  # of a URL


def _find_files(images, image_dir, notes):
    """Set file_name to where the image is in the folder, height and width to integers, from the file where unknown."""
    try:
        present = set(os.listdir(image_dir))  # one listing instead of a system call per image
    except OSError as error:
        raise DataError(f"{image_dir} is not a readable image folder ({error.strerror}); check the path") from None
    alike = cache(partial(_by_plain_name, image_dir))
    missing, again, files = [], [], {}
    for image in images:
        given = image.get("file_name") or image.get("coco_url")
        if not isinstance(given, str):
            why = f"has file_name {short(image.get('file_name'))}, expected the name of an image file"
            raise DataError(f"image {short(image['file_id'])} {why}")
        name = given if given in present else _find_file(given, image_dir, alike)
        name = name or _find_file(QUERY.sub("", given), image_dir, alike)
        if name is None:
            missing.append(given)
            continue
        image["file_name"] = name
        size = [_pixels(image, field) for field in ("height", "width")]
        image["height"], image["width"] = image_size(os.path.join(image_dir, name), size) if None in size else size
        again += [name] if name in files else []
        if (other := files.setdefault(name, given)) != given:
            advice = "give the folder that has them all"
            raise DataError(f"images {other!r} and {given!r} would both be {name!r} in {image_dir}; {advice}")
    if missing:
        nearest = get_close_matches(_plain(SEPARATOR.split(missing[0])[-1]), alike(""), n=1, cutoff=0)
        there = f"the nearest name there is {short(alike('')[nearest[0]][0])}" if nearest else "the folder is empty"
        what = f"the first is {short(missing[0])}, {there}; check the image folder"
        raise DataError(f"{len(missing)} of {len(images)} images are not in {image_dir}, {what}")
    if again:
        notes.append(f"{len(again)} images have the file of another one; the first is {again[0]}")


def _find_file(given, image_dir, alike):
    """The file in the folder that a path, perhaps of another machine, means, by as much of its end as is there.

    In this spelling or else in one that a person takes for the same; None if there is none, DataError if several fit.
    alike: `_by_plain_name` of a folder in `image_dir`.
    """
    if os.path.isfile(os.path.join(image_dir, given)):
        return given
    parts = SEPARATOR.split(given)
    for i in range(len(parts)):
        found = [""]
        for part in parts[i:]:
            named = [(path, alike(path).get(_plain(part), ())) for path in found]
            found = [os.path.join(path, name) for path, names in named for name in ([part] if part in names else names)]
        found = [path for path in found if os.path.isfile(os.path.join(image_dir, path))]
        if len(found) > 1:
            raise DataError(f"image {given!r} could be {_list(found)} in {image_dir}; give it the name of one")
        if found:
            return found[0]
    return None


def _plain(name):
    """What all spellings of a file's name share: composed or decomposed, percent-encoded, capitals, outer spaces."""
    return unicodedata.normalize("NFD", unquote(name, errors="surrogateescape").lower().strip())


def _by_plain_name(image_dir, folder):
    """{what `_plain` makes of it: names} of what is in a folder within another; empty if it is no folder."""
    names, path = {}, os.path.join(image_dir, folder)
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
        names.setdefault(_plain(name), []).append(name)
    return names


# --- results


def encode_masks(masks):
    """Compressed RLE of masks (n, H, W) bool, on any device: a list of {"size": [H, W], "counts": str}.

    The same as pycocotools' `encode`, which wants all masks turned into its column-major order first, three quarters of
    its time: here only the places where a column changes are.
    """
    rles = []
    height, width = masks.shape[1:]
    for mask in masks.cpu().numpy():
        above = np.append(False, mask[-1, :-1])[None]  # of the first row: the last pixels of the columns before
        rows, columns = np.divmod(np.flatnonzero(np.diff(mask, axis=0, prepend=above)), width)
        runs = np.diff(np.sort(columns * height + rows), prepend=0, append=height * width)
        rle = mask_utils.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
        rles.append(rle | {"counts": rle["counts"].decode()})
    return rles


def coco_results(detections, image_id, category_ids):
    """Detections of one image (`postprocess`, on any device) as COCO results: a list of dictionaries.

    detections: its masks may be RLE already, from `encode_masks`. category_ids: category id of every label.
    Raises InputError where a score or a box is NaN or infinite.
    """
    scores, labels, masks = detections["scores"].tolist(), detections["labels"].tolist(), detections["masks"]
    boxes = box_convert(detections["boxes"], "xyxy", "xywh").tolist()
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        why = "the predicted scores or boxes are not finite (NaN): the checkpoint is damaged or its training diverged"
        raise InputError(f"image {image_id}: {why}; give another one")
    found = zip(scores, labels, boxes, masks if isinstance(masks, list) else encode_masks(masks), strict=True)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score, "segmentation": rle}
        for score, label, box, rle in found
    ]
