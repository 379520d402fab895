"""BDD100K's instance segmentation: its bitmasks read and checked, as the dictionary of a COCO file."""

from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from tqdm import tqdm

from formats.images import DECODER_ERRORS, DataError

BDD100K_CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")  # category 1...8
BDD100K_CROWD, BDD100K_IGNORED = 2, 1  # flags that matter here; the others say truncated (8) and occluded (4)


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
