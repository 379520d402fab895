"""BDD100K's instance segmentation: its bitmasks read and checked, as the dictionary of a COCO file."""

from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from formats.images import DataError, with_image
from formats.segmentations import annotation_of

BDD100K_CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")  # category 1...8
BDD100K_CROWD, BDD100K_IGNORED = 2, 1  # flags that matter here; the others say truncated (8) and occluded (4)


def bdd100k_paths(root, split):
    """Bitmask and image folder of split "train" or "val" in a BDD100K folder; DataError if they are not there."""
    folders = Path(root, "labels/ins_seg/bitmasks", split), Path(root, "images/10k", split)
    for folder in folders:
        if not folder.is_dir():
            layout = "the data root must hold BDD100K's images/10k and labels/ins_seg/bitmasks"
            raise DataError(f"{folder}: no such folder; {layout}")
    return folders


def read_bdd100k(bitmask_dir, image_dir):
    """Load and check a split of BDD100K's instance segmentation; a dictionary as from `read_annotations`.

    A bitmask is an RGBA PNG beside the JPEG of the same name: R category 1...8, G flags, B * 256 + A instance id, all
    zero in the background (https://doc.bdd100k.com/format.html#bitmask). Image ids are 1, 2, ... in the order of the
    names; crowds and ignored instances have iscrowd 1. Raises DataError, naming the file and what is wrong with it.
    """
    bitmasks, pictures = _files(bitmask_dir, ".png"), _files(image_dir, ".jpg")
    if alone := sorted(bitmasks.keys() ^ pictures.keys()):
        name, more = alone[0], f" ({len(alone)} files stand alone)" if len(alone) > 1 else ""
        there, other, suffix = (bitmasks, image_dir, "jpg") if name in bitmasks else (pictures, bitmask_dir, "png")
        what = f"{other} has no {name}.{suffix}{more}; add it, image and bitmask belong together"
        raise DataError(f"{there[name]}: {what}")
    images, annotations = [], []
    progress = tqdm(bitmasks.items(), desc="read bitmasks", leave=False, disable=None)
    for image_id, (name, path) in enumerate(progress, start=1):
        mode, pixels = with_image(path, lambda image: (image.mode, np.asarray(image)))
        if mode != "RGBA":
            raise DataError(f"{path}: is {mode}, not RGBA; give BDD100K's bitmasks, not its colour maps")
        height, width = pixels.shape[:2]
        w, h = with_image(pictures[name], lambda image: image.size)  # reads no more than the header
        if (h, w) != (height, width):
            raise DataError(f"{path}: the bitmask is {width}x{height}, its image {w}x{h}; replace the wrong one")
        images.append({"id": image_id, "file_name": pictures[name].name, "height": height, "width": width})
        for annotation in _bitmask_annotations(path, pixels.view("<u4")[:, :, 0], image_id):
            annotations.append({"id": len(annotations) + 1} | annotation)
    if not annotations:
        raise DataError(f"{bitmask_dir}: the data set is empty (no instance in {len(images)} bitmasks); check the path")
    categories = [{"id": i, "name": name} for i, name in enumerate(BDD100K_CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _files(folder, suffix):
    """{name without suffix: path} of the files in a folder that have the suffix, in capitals too."""
    try:
        return {path.stem: path for path in sorted(Path(folder).iterdir())
                if path.suffix.lower() == suffix and not path.name.startswith("._")}  # fmt: skip  # of macOS
    except OSError as error:
        raise DataError(f"{folder}: not a readable folder ({error.strerror}); check the path") from None


def _bitmask_annotations(path, bitmask, image_id):
    """COCO annotations of a bitmask (H, W) of 32-bit numbers, R the lowest byte, in the order of the instance ids."""
    # Two equivalent ways, pixels compared with each instance and runs of equal pixels, thousands instead of a million;
    # this is the second, down the columns as in COCO's RLE.
    flat = bitmask.T.ravel()
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    ends, values = np.append(starts[1:], flat.size), flat[starts]
    instances = {}  # id: (category, flags, value of its pixels)
    for value in set(values.tolist()) - {0}:
        category, flags, high, low = value.to_bytes(4, "little")
        number = high * 256 + low
        if not 1 <= category <= len(BDD100K_CLASSES) or number == 0:
            expected = f"the categories are 1 to {len(BDD100K_CLASSES)}, the ids begin with 1; replace the file"
            raise DataError(f"{path}: a pixel has category {category} and instance id {number}; {expected}")
        if number in instances:
            raise DataError(f"{path}: instance {number} has pixels of several categories or flags; replace the file")
        instances[number] = category, flags, value
    for _, (category, flags, value) in sorted(instances.items()):
        borders = np.stack([starts[values == value], ends[values == value]], axis=1)
        counts = np.diff(borders.ravel(), prepend=0, append=flat.size).tolist()
        rle = mask_utils.frPyObjects({"size": [*bitmask.shape], "counts": counts}, *bitmask.shape)
        yield annotation_of(rle, image_id, category, int(flags & (BDD100K_CROWD | BDD100K_IGNORED) != 0))
