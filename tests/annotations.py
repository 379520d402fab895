"""A data set in COCO's format of two images and one square, for the tests that change something of it."""

import numpy as np
from pycocotools import mask as mask_utils

WIDTH, HEIGHT = 40, 30
SQUARE = [[10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]]  # columns 10 to 19, rows 5 to 14


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
