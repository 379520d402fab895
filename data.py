"""Instance segmentation data: COCO's format and BDD100K's, augmentation, collate, and the generated set `shapes`."""

import colorsys
import contextlib
import gc
import io
import json
import math
import os
import re
import struct
import warnings
import zlib
from array import array
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm


class DataError(ValueError):
    """Bad data; the message is one line: what is wrong, where, and what to do about it."""

    def __str__(self):
        # A loader process sends its whole traceback as the message, our line being the last.
        return super().__str__().rstrip().split("\n")[-1].removeprefix(f"{__name__}.DataError: ")


# ----------------------------------------------------------------------------------------------------------------------
# Files


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


def bdd100k_paths(root, split):
    """Bitmask and image folder of split "train" or "val" in a BDD100K folder; DataError if they are not there."""
    root = Path(root)
    folders = root / "labels" / "ins_seg" / "bitmasks" / split, root / "images" / "10k" / split
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; the data root must hold BDD100K's images/10k and labels/ins_seg/bitmasks"
            )
    return folders


# What PIL's decoders raise on damaged files.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error,
                  Image.DecompressionBombError)  # fmt: skip


def read_image(path, exif=False):
    """Read an image file of any mode as (3, H, W) uint8 RGB; DataError if it is missing, truncated or not an image.

    16-bit greyscale is scaled from 0...65535 to 0...255, transparency is dropped (the stored colours stay). With `exif`
    the orientation tag is applied, so that a photograph stands upright; without it the pixels are as stored.
    """
    try:
        with Image.open(path) as image:
            if exif:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit files open as I;16, some as I; PIL's own conversion would clip them
                pixels = np.clip(np.asarray(image, dtype=np.float32) / 257, 0, 255).round().astype(np.uint8)
                image = Image.fromarray(pixels)
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except DECODER_ERRORS as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_annotations(annotation_file, image_dir):
    """Load and check a whole COCO annotation file.

    Returns the dictionary. Polygons come back as float arrays and uncompressed RLE compressed: forked loader processes
    share the parent's memory until they touch an object, so that lists of a million floats would be copied by each.
    Raises DataError, naming the file and the first annotation or image in question.
    """
    gc.disable()  # millions of new lists, no cycles: the collector would need as long as the parser
    try:
        dataset = json.loads(Path(annotation_file).read_bytes())
    except OSError as error:
        raise DataError(f"{annotation_file}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise DataError(f"{annotation_file}: is not JSON ({error}); give a COCO annotation file") from None
    finally:
        gc.enable()
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
            stacklevel=3,
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
    seen = set()
    for index, entry in enumerate(dataset[key]):
        for name, kind in types.items():
            if not isinstance(entry.get(name), kind):
                what = "wrong" if name in entry else "no"
                where = f"entry {index} of {key!r} (id {entry.get('id')})"
                raise DataError(f"{annotation_file}: {where} has {what} {name!r}; correct the file")
        seen.add(entry["id"])
        if len(seen) == index:
            raise DataError(f"{annotation_file}: id {entry['id']} occurs twice in {key!r}; make the ids unique")
        if key == "images" and not (entry["height"] > 0 and entry["width"] > 0):
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
BDD100K_CROWD, BDD100K_IGNORED = 2, 1  # flags that matter here; the others say truncated (8) and occluded (4)


def read_bdd100k(bitmask_dir, image_dir):
    """Load and check a split of BDD100K's instance segmentation; the same dictionary as from `read_annotations`.

    A bitmask is an RGBA PNG beside the JPEG of the same name: R category 1...8, G flags, B * 256 + A instance id, all
    zero in the background (https://doc.bdd100k.com/format.html#bitmask). Image ids are 1, 2, ... in the order of the
    names; crowds and ignored instances have iscrowd 1. Raises DataError, naming the file and what is wrong with it.
    """
    files = []  # of the bitmasks and of the images: {name without suffix: path}
    for folder, suffix in ((bitmask_dir, ".png"), (image_dir, ".jpg")):
        try:
            files.append({path.stem: path for path in sorted(Path(folder).iterdir()) if path.suffix == suffix})
        except OSError as error:
            raise DataError(f"{folder}: not a readable folder ({error.strerror}); check the path") from None
    bitmasks, pictures = files
    for some, others, folder, suffix in (
        (bitmasks, pictures, image_dir, ".jpg"),
        (pictures, bitmasks, bitmask_dir, ".png"),
    ):
        if alone := [path for name, path in some.items() if name not in others]:
            more = f" ({len(alone)} such files)" if len(alone) > 1 else ""
            raise DataError(
                f"{alone[0]}: {folder} has no {alone[0].stem}{suffix}{more}; add it, image and bitmask belong together"
            )
    images, annotations = [], []
    progress = tqdm(bitmasks.items(), desc="read bitmasks", leave=False, disable=None)
    for image_id, (name, path) in enumerate(progress, start=1):
        bitmask = _read_bitmask(path)
        height, width = bitmask.shape
        try:
            with Image.open(pictures[name]) as picture:  # reads no more than the header
                size = picture.size
        except DECODER_ERRORS as error:
            raise DataError(f"{pictures[name]}: cannot be read as an image ({error}); replace the file") from None
        if size != (width, height):
            raise DataError(
                f"{path}: the bitmask is {width}x{height}, its image {size[0]}x{size[1]}; replace the wrong one"
            )
        images.append({"id": image_id, "file_name": pictures[name].name, "height": height, "width": width})
        annotations += _bitmask_annotations(path, bitmask, image_id, len(annotations) + 1)
    if not annotations:
        raise DataError(f"{bitmask_dir}: the data set is empty (no instance in {len(images)} bitmasks); check the path")
    categories = [{"id": i, "name": name} for i, name in enumerate(BDD100K_CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read_bitmask(path):
    """The pixels (H, W) of an RGBA file as 32-bit numbers, R the lowest byte, A the highest."""
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except DECODER_ERRORS as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace the file") from None
    if mode != "RGBA":
        raise DataError(f"{path}: is {mode}, not RGBA; give BDD100K's bitmasks, not its colour maps")
    return pixels.view("<u4")[:, :, 0]


def _bitmask_annotations(path, bitmask, image_id, first_id):
    """COCO annotations of a bitmask (H, W) of 32-bit numbers, in the order of the instance ids.

    Looks at the runs of equal pixels, down the columns as in COCO's RLE: thousands, instead of a million pixels.
    """
    height, width = bitmask.shape
    flat = bitmask.T.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    starts = np.append(0, ends[:-1])
    values = flat[starts]
    instances = []  # (instance id, category, flags, value of its pixels)
    for value in set(values.tolist()) - {0}:
        category, flags, high, low = value.to_bytes(4, "little")
        if not 1 <= category <= len(BDD100K_CLASSES) or high == low == 0:
            raise DataError(
                f"{path}: a pixel has category {category} and instance id {high * 256 + low}; the categories are 1 to"
                f" {len(BDD100K_CLASSES)}, the ids begin with 1; replace the file"
            )
        instances.append((high * 256 + low, category, flags, value))
    ids = [instance for instance, *_ in sorted(instances)]
    for instance, following in zip(ids, ids[1:], strict=False):
        if instance == following:
            raise DataError(f"{path}: instance {instance} has pixels of several categories or flags; replace the file")
    annotations = []
    for _, category, flags, value in sorted(instances):
        borders = np.stack([starts[values == value], ends[values == value]], axis=1)
        counts = np.diff(borders.ravel(), prepend=0, append=flat.size).tolist()
        rle = mask_utils.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        annotations.append(
            {
                "id": first_id + len(annotations),
                "image_id": image_id,
                "category_id": category,
                "segmentation": rle,
                "bbox": mask_utils.toBbox(rle).tolist(),
                "area": int(mask_utils.area(rle)),
                "iscrowd": int(flags & (BDD100K_CROWD | BDD100K_IGNORED) != 0),
            }
        )
    return annotations


# ----------------------------------------------------------------------------------------------------------------------
# Data set


class CocoInstances(torch.utils.data.Dataset):
    """An instance segmentation data set.

    annotation_file, image_dir: paths, as `read` takes them. All annotations are checked here; DataError says what is
    wrong with them.
    transform: `train_transform(...)` or `eval_transform(...)`.
    training: keep only the images with at least one usable instance (not a crowd); otherwise all.
    read: `read_annotations` for a file in COCO format, `read_bdd100k` for BDD100K's bitmasks.

    classes       names of the classes, ordered by category id
    category_ids  category_ids[label] is the category id in the file
    image_ids     image_ids[i] is the image id of item i
    coco          pycocotools.coco.COCO of all annotations, crowds included, for the evaluation
    """

    def __init__(self, annotation_file, image_dir, transform, training, read=read_annotations):
        dataset = read(annotation_file, image_dir)
        self.image_dir = Path(image_dir)
        self.transform = transform
        categories = sorted(dataset["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self.coco = COCO()
        self.coco.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        self.instances = {image["id"]: [] for image in dataset["images"]}  # image id -> usable annotations
        for annotation in dataset["annotations"]:
            if not annotation["iscrowd"]:
                self.instances[annotation["image_id"]].append(annotation)
        self.image_ids = [i for i, instances in self.instances.items() if instances or not training]
        if not self.image_ids:
            raise DataError(f"{annotation_file}: no image has an instance to train on (only crowds); give another file")

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        """Image (3, H, W) float32 RGB in [0, 1] and its target; crowds and instances without a pixel are left out.

        image_id int; labels (n,) int64; boxes (n, 4) float32, absolute xyxy of the transformed image, tight around the
        masks' pixel edges; masks (n, H, W) bool; original_size (H, W) of the image as stored in the file: EXIF
        orientation is not applied, because COCO annotations refer to the stored pixels.
        """
        image_id = self.image_ids[index]
        entry = self.coco.imgs[image_id]
        height, width = entry["height"], entry["width"]
        path = self.image_dir / entry["file_name"]
        image = read_image(path)
        if image.shape[1:] != (height, width):
            raise DataError(
                f"{path}: the image is {image.shape[2]}x{image.shape[1]}, its annotation file says {width}x{height};"
                " correct the file or the annotations"
            )
        instances = self.instances[image_id]
        target = {
            "image_id": image_id,
            "labels": torch.tensor([self.labels[a["category_id"]] for a in instances], dtype=torch.int64),
            "masks": tv_tensors.Mask(decode_masks([a["segmentation"] for a in instances], height, width)),
            "original_size": (height, width),
        }
        return self.transform(tv_tensors.Image(image), target)


def decode_masks(segmentations, height, width):
    """Masks (n, height, width) bool of COCO segmentations: lists of polygons, uncompressed or compressed RLE."""
    if not segmentations:
        return torch.zeros(0, height, width, dtype=torch.bool)
    rles = []
    for segmentation in segmentations:
        if isinstance(segmentation, list):
            segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            segmentation = mask_utils.frPyObjects(segmentation, height, width)
        rles.append(segmentation)
    return torch.from_numpy(mask_utils.decode(rles)).permute(2, 0, 1).contiguous().view(torch.bool)


# ----------------------------------------------------------------------------------------------------------------------
# Transforms: (image, target) -> (image, target), image and masks uint8 and bool until the end


def train_transform(size, scale_range=(0.1, 2.0)):
    """Training augmentation: horizontal flip with probability 1/2, large-scale jitter, size x size out.

    Input: (3, H, W) uint8 image and a target with labels (n,) and masks (n, H, W), a tv_tensors.Mask. Output: float32
    image in [0, 1], target with the instances that are still visible, boxes added. See `LargeScaleJitter`.
    """
    return v2.Compose([v2.RandomHorizontalFlip(0.5), LargeScaleJitter(size, scale_range), finish])


def eval_transform(shorter=800, longer=1333):
    """Test-time transform: the shorter side resized to `shorter`, or less where the longer one would exceed `longer`.

    Input and output as for `train_transform`; also takes an image alone.
    """
    return v2.Compose([ResizeShorter(shorter, longer), finish])


class LargeScaleJitter(v2.Transform):
    """Scale the image to fit size x size times a random factor, crop size x size at random, pad with grey (128/255).

    The padding is at the bottom and right. The window to crop is chosen in the unscaled image, in whole pixels, and
    only it is resized: the same distribution, at a fraction of the work.
    """

    def __init__(self, size, scale_range):
        super().__init__()
        self.size, self.scale_range = size, scale_range

    def make_params(self, flat_inputs):
        image_size = v2.query_size(flat_inputs)
        scale = self.size / max(image_size) * torch.empty(1).uniform_(*self.scale_range).item()
        start, window, out = [], [], []  # (y, x) each: first pixel and pixels of the window, pixels it becomes
        for pixels in image_size:
            scaled = max(1, round(pixels * scale))
            window.append(pixels if scaled <= self.size else min(pixels, max(1, round(self.size / scale))))
            out.append(min(scaled, self.size))
            start.append(torch.randint(pixels - window[-1] + 1, ()).item())
        return {"start": start, "window": window, "out": out}

    def transform(self, inpt, params):
        (top, left), (height, width) = params["start"], params["window"]
        out = resize(F.crop(inpt, top, left, height, width), params["out"])
        bottom, right = (self.size - pixels for pixels in params["out"])
        return F.pad(out, [0, 0, right, bottom], fill=0 if isinstance(inpt, tv_tensors.Mask) else 128)


class ResizeShorter(v2.Transform):
    """Resize so that the shorter side has `shorter` pixels, but the longer one at most `longer`; the ratio is kept."""

    def __init__(self, shorter, longer):
        super().__init__()
        self.shorter, self.longer = shorter, longer

    def make_params(self, flat_inputs):
        image_size = v2.query_size(flat_inputs)
        scale = min(self.shorter / min(image_size), self.longer / max(image_size))
        return {"size": [max(1, round(pixels * scale)) for pixels in image_size]}

    def transform(self, inpt, params):
        return resize(inpt, params["size"])


def resize(inpt, size):
    """Resize an image (bilinear, antialiased) or masks (nearest) to (height, width), pixel centre on pixel centre.

    torchvision's own nearest mode for masks takes the upper left corner: up to half a pixel off the image.
    """
    if not isinstance(inpt, tv_tensors.Mask):
        return F.resize(inpt, size, antialias=True)
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64) for new, old in zip(size, inpt.shape[1:], strict=True)
    )
    # NumPy's take needs a fifth of the time of torch's indexing on the CPU, most of the time of loading otherwise.
    masks = inpt.as_subclass(torch.Tensor).numpy().take(columns, 2).take(rows, 1)
    return tv_tensors.Mask(torch.from_numpy(masks))


def finish(image, target=None):
    """Last step: the image to float32 in [0, 1], boxes from masks, instances without a pixel dropped."""
    image = F.to_dtype(image, torch.float32, scale=True)
    if target is None:
        return image
    masks = target["masks"].as_subclass(torch.Tensor)
    boxes = mask_boxes(masks)
    keep = boxes[:, 2] > 0
    return image, target | {"labels": target["labels"][keep], "boxes": boxes[keep], "masks": masks[keep]}


def mask_boxes(masks):
    """Tight xyxy boxes (n, 4) float32 of masks (n, H, W) bool: pixel edges, so x1 = last column + 1; empty: zeros."""
    sides = []
    pixels = masks.view(torch.uint8)  # amax of bytes is twenty times as fast as any()
    for occupied in (pixels.amax(1), pixels.amax(2)):  # (n, W), (n, H)
        position = torch.arange(1, occupied.shape[1] + 1)
        end = (occupied * position).amax(1)
        start = occupied.shape[1] - (occupied * position.flip(0)).amax(1)
        sides.append((torch.minimum(start, end), end))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def collate(batch):
    """Batch of (image, target) -> (list of (3, H, W) images, list of targets as the model and the losses take them).

    The padded size is the largest height and width of the batch, rounded up to multiples of 32; the model pads the
    images itself. Targets: image_id; labels (n,) int64; boxes (n, 4) float32 cxcywh in [0, 1] relative to the padded
    size; masks (n, padded H, padded W) bool; size (H, W) of the transformed image; original_size (H, W) of the file's.
    """
    images = [image.as_subclass(torch.Tensor) for image, _ in batch]
    padded_height, padded_width = (math.ceil(max(image.shape[axis] for image in images) / 32) * 32 for axis in (1, 2))
    targets = []
    for image, (_, target) in zip(images, batch, strict=True):
        height, width = image.shape[1:]
        boxes = F.convert_bounding_box_format(target["boxes"], old_format="xyxy", new_format="cxcywh")
        padding = (0, padded_width - width, 0, padded_height - height)
        targets.append(
            {
                "image_id": target["image_id"],
                "labels": target["labels"],
                "boxes": boxes / torch.tensor([padded_width, padded_height] * 2),
                "masks": torch.nn.functional.pad(target["masks"], padding) if any(padding) else target["masks"],
                "size": (height, width),
                "original_size": target["original_size"],
            }
        )
    return images, targets


# ----------------------------------------------------------------------------------------------------------------------
# Shapes: a generated data set in COCO format


def _ellipse(rx, ry, x=0.0):
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + rx * np.cos(angles), ry * np.sin(angles)], axis=1)


def _corners(radii, count):
    """Corners at `count` equal angles from the top on, their distances from the centre cycling through `radii`."""
    angles = np.arange(count) * 2 * np.pi / count - np.pi / 2
    return np.resize(radii, count)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rectangle(rx, ry):
    return np.array([(-rx, -ry), (rx, -ry), (rx, ry), (-rx, ry)])


def _heart():
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], axis=1) / 17


_a = 0.32  # half the width of the cross's arms
# Class -> outline and, for some, a hole: (k, 2) points within about the unit circle. No two alike at 16 pixels across,
# whatever the rotation.
SHAPES = {
    "circle": [_ellipse(0.9, 0.9)],
    "square": [_corners([1.0], 4)],
    "triangle": [_corners([1.0], 3)],
    "star": [_corners([1.0, 0.42], 10)],
    "ring": [_ellipse(1.0, 1.0), _ellipse(0.55, 0.55)],
    "cross": [np.array([(-_a, -1), (_a, -1), (_a, -_a), (1, -_a), (1, _a), (_a, _a), (_a, 1), (-_a, 1), (-_a, _a),
                        (-1, _a), (-1, -_a), (-_a, -_a)])],
    "ellipse": [_ellipse(1.0, 0.48)],
    "crescent": [_ellipse(1.0, 1.0), _ellipse(0.8, 0.8, x=0.45)],
    "arrow": [np.array([(0, -1), (0.8, 0), (0.3, 0), (0.3, 0.95), (-0.3, 0.95), (-0.3, 0), (-0.8, 0)])],
    "heart": [_heart()],
}  # fmt: skip
# Classes of the harder variant: the thin, hollow and curved ones fill little of their boxes; the disc covers others.
HARD_SHAPES = {
    "disc": [_ellipse(0.9, 0.9)],
    "bar": [_rectangle(1.0, 0.22)],
    "ring": [_ellipse(1.0, 1.0), _ellipse(0.66, 0.66)],
    "frame": [_corners([1.0], 4), _corners([0.58], 4)],
    "crescent": [_ellipse(1.0, 1.0), _ellipse(0.88, 0.88, x=0.42)],
}
SHAPES_VERSION = 1  # to be raised when the pictures change, so that old ones are made anew
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.3, 30


def make_shapes(root, train=2000, val=250, size=64, seed=0, hard=False):
    """Write the generated data set `shapes` to the folder `root` in COCO layout, unless it is there already.

    `train` and `val` images of size x size pixels with 2 to 7 overlapping shapes each, one class per outline; textures
    and colours say nothing about the class. Every visible shape is annotated with its visible part. The same settings
    give the same files. The annotation files are written last, so that an interrupted run is not taken for a whole one.

    hard: `shapes-hard`, in which a box tells little about the mask in it: thin, hollow and curved shapes at any angle,
    3 to 7 of them, 18 to 84 % of the image wide, upon strokes that are not annotated.
    """
    root = Path(root)
    settings = {"version": SHAPES_VERSION, "train": train, "val": val, "size": size, "seed": seed}
    settings |= {"hard": True} if hard else {}  # so that sets without it stay as they are
    files = {split: root / "annotations" / f"instances_{split}2017.json" for split in ("train", "val")}
    if all(_shapes_settings(path) == settings for path in files.values()):
        return
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    written = {}
    for number, (split, path) in enumerate(files.items()):
        folder = root / "images" / f"{split}2017"
        folder.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in range(settings[split]):
            pixels, labels, masks = draw_shapes(np.random.default_rng([seed, number, i]), size, hard)
            name = f"{i + 1:012d}.png"
            Image.fromarray(pixels).save(folder / name, compress_level=1)
            images.append({"id": i + 1, "file_name": name, "height": size, "width": size})
            rles = mask_utils.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
            for label, rle in zip(labels, rles, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": label + 1,
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                        "bbox": mask_utils.toBbox(rle).tolist(),
                        "area": int(mask_utils.area(rle)),
                        "iscrowd": 0,
                    }
                )
        written[path] = {
            "info": {"description": "generated shapes", "settings": settings},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(HARD_SHAPES if hard else SHAPES)],
        }
    for path, content in written.items():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)


def _shapes_settings(path):
    """The settings recorded in an annotation file of `make_shapes`; None if there is no such file."""
    try:
        return json.loads(path.read_bytes())["info"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def draw_shapes(rng, size, hard=False):
    """One image of `shapes`: pixels (size, size, 3) uint8, labels [int, ...], visible masks (n, size, size) bool.

    Shapes are 20 to 70 % of the image wide and tilted by up to 0.4 radians. hard: see `make_shapes`.

    A shape that would leave too little of an earlier one visible is drawn again somewhere else, so that nothing in the
    image is without its annotation.
    """
    pixels = _texture(rng, size, saturation=(0.0, 0.35), value=(0.25, 0.55))
    if hard:
        _draw_strokes(rng, pixels)
    outlines = list((HARD_SHAPES if hard else SHAPES).values())
    fewest, most, smallest, largest, tilt = (3, 7, 0.09, 0.42, np.pi) if hard else (2, 7, 0.1, 0.35, 0.4)
    owner = np.full((size, size), -1)  # the uppermost shape of every pixel
    labels, areas = [], []  # areas: of the whole shape, covered or outside the image or not
    for _ in range(rng.integers(fewest, most + 1)):
        for _ in range(20):  # tries to place it
            label = int(rng.integers(len(outlines)))
            radius = size * smallest * (largest / smallest) ** rng.random()  # log-uniform
            patch = _coverage(outlines[label], radius, rng.uniform(-tilt, tilt))
            y, x = rng.uniform(0.6 * radius, size - 0.6 * radius, 2).round().astype(int) - len(patch) // 2
            coverage = np.zeros((size, size), np.float32)
            top, left, bottom, right = max(y, 0), max(x, 0), min(y + len(patch), size), min(x + len(patch), size)
            coverage[top:bottom, left:right] = patch[top - y : bottom - y, left - x : right - x]
            new_owner = np.where(coverage >= 0.5, len(labels), owner)
            new_areas = areas + [(patch >= 0.5).sum()]
            visible = np.bincount(new_owner[new_owner >= 0], minlength=len(new_areas))
            if (visible >= np.maximum(MIN_VISIBLE_SHARE * np.array(new_areas), MIN_VISIBLE_PIXELS)).all():
                texture = _texture(rng, size, saturation=(0.5, 1.0), value=(0.7, 1.0))
                pixels += coverage[:, :, None] * (texture - pixels)
                owner, areas = new_owner, new_areas
                labels.append(label)
                break
    return pixels.clip(0, 255).astype(np.uint8), labels, owner == np.arange(len(labels))[:, None, None]


def _draw_strokes(rng, pixels):
    """Clutter: short bright lines and small blobs that belong to no class, drawn into pixels (size, size, 3)."""
    size = len(pixels)
    for _ in range(rng.integers(2, 7)):
        canvas = Image.new("L", (size, size))
        start, step = rng.uniform(0, size, 2), rng.uniform(-0.15, 0.15, 2) * size
        line = [tuple(start), tuple(start + step)]
        ImageDraw.Draw(canvas).line(line, fill=255, width=int(rng.integers(1, 4)))
        texture = _texture(rng, size, saturation=(0.5, 1.0), value=(0.7, 1.0))
        covered = np.asarray(canvas, dtype=bool)
        pixels[covered] = texture[covered]


def _coverage(outlines, radius, angle):
    """Share of each pixel that the rotated shape covers: (k, k) float32 in [0, 1], the shape in the middle."""
    fine = 4  # subpixels per pixel and axis
    side = 2 * math.ceil(radius) + 3
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    canvas = Image.new("L", (side * fine, side * fine))
    for outline, value in zip(outlines, (255, 0), strict=False):
        points = (outline @ turn * radius + side / 2) * fine - 0.5
        ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=value)
    return np.asarray(canvas.reduce(fine), dtype=np.float32) / 255


def _texture(rng, size, saturation, value):
    """A random texture (size, size, 3) float32 in 0...255 around a random colour with HSV ranges in [0, 1]."""
    colour = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 20)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)
    v = (y * np.cos(angle) - x * np.sin(angle)) * (2 * np.pi / period)
    kind = rng.integers(5)
    if kind == 0:  # stripes
        pattern = np.sin(u)
    elif kind == 1:  # checks
        pattern = np.sign(np.sin(u) * np.sin(v))
    elif kind == 2:  # dots
        pattern = np.where(np.cos(u) + np.cos(v) > 0.9, 1.0, -0.6)
    elif kind == 3:  # gradient
        pattern = u * period / (np.pi * size) - 1
    else:  # clouds
        noise = Image.fromarray(rng.uniform(-1, 1, (size // 8 + 2,) * 2).astype(np.float32))
        pattern = np.asarray(noise.resize((size, size), Image.BICUBIC))
    swing = rng.uniform(8, 30) * rng.uniform(0.5, 1, 3)  # of each colour channel
    grain = rng.normal(0, 6, (size, size, 1))
    return (colour + pattern[:, :, None] * swing + grain).astype(np.float32)
