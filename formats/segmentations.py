"""Segmentations and boxes of COCO files, checked and brought into one form."""

import math
import re
from array import array
from functools import partial
from itertools import chain

import numpy as np
from pycocotools import mask as mask_utils

from formats.images import short

# Kinds of faults; of several the first counts: the annotation belongs to no image, it encloses nothing, it cannot be
# understood, some of its polygons are left out, its box is not the mask's.
STRANGE, LEFT_OUT, REFUSED, TRIMMED, MISFIT = range(5)
DOUBLES = partial(array, "d")
NO_BOX = DOUBLES([math.nan] * 4)


class Fault(Exception):
    """A segmentation that cannot be used; its arguments are LEFT_OUT or REFUSED and why."""


def check_segmentations(annotations, sizes):
    """Bring segmentation and bbox of some annotations into one form, in place; returns {(kind, index): why}.

    sizes: {image id: (height, width)}. The forms: polygons as float64 arrays or compressed RLE; x, y, width, height,
    those of the mask within the image where there is no box. Two equivalent ways, annotation by annotation and all
    numbers at once; this is the second, since the first takes longer than to read the file.
    """
    faults, boxes, polygons, owners = {}, [], [], []
    bounds = np.full((2, 2, len(annotations)), np.nan)  # of the masks: x0, y0 and x1, y1
    for index, annotation in enumerate(annotations):
        try:
            box = DOUBLES(annotation.get("bbox") or NO_BOX)
            if len(box) != 4:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            why = f"box {short(annotation['bbox'])} (x, y, width, height) is not a list of four numbers"
            box, faults[REFUSED, index] = NO_BOX, why
        boxes.append(box)
        try:
            annotation["segmentation"] = shape = _shape(annotation, sizes)
        except Fault as fault:
            kind, faults[kind, index] = fault.args
            continue
        if isinstance(shape, dict):
            x, y, width, height = mask_utils.toBbox(shape)
            bounds[:, :, index] = (x, y), (x + width, y + height)
        else:
            polygons += shape
            owners += [index] * len(shape)
    if polygons:
        _measure(annotations, polygons, np.array(owners), bounds, faults)
    boxes = np.frombuffer(b"".join(boxes)).reshape(-1, 4).T.reshape(2, 2, -1)
    limits = np.array([sizes[annotation["image_id"]] for annotation in annotations], float).T[::-1]
    _compare(annotations, limits, bounds, boxes, faults)
    return faults


def _measure(annotations, polygons, owners, bounds, faults):
    """Set the bounds of the annotations (owners: the index of each polygon's) and leave out polygons without area."""
    x, y = np.frombuffer(b"".join(polygons)).reshape(-1, 2).T.copy()
    ends = np.cumsum(np.fromiter(map(len, polygons), int, len(polygons)) // 2)
    starts, last = np.append(0, ends[:-1]), ends - 1
    with np.errstate(all="ignore"):
        cross = np.append(x[:-1] * y[1:] - x[1:] * y[:-1], 0)
        cross[last] = x[last] * y[starts] - x[starts] * y[last]
        areas = np.add.reduceat(cross, starts)
    # A figure of eight may have no signed area either: flat is what lies on a line.
    lines = ((i, np.reshape(polygons[i], (-1, 2))) for i in np.flatnonzero(np.abs(areas) < 1e-6))
    flat = [i for i, points in lines if np.linalg.matrix_rank(points - points[0], tol=1e-6) < 2]
    for i in flat:
        shape = annotations[owners[i]]["segmentation"]
        shape[:] = [polygon for polygon in shape if polygon is not polygons[i]]
    for i in flat:
        why = f"polygon {short(polygons[i].tolist())} has no area, expected three points or more, not on a line"
        faults.setdefault((TRIMMED if annotations[owners[i]]["segmentation"] else LEFT_OUT, owners[i]), why)
    solid = np.delete(np.arange(len(polygons)), flat)
    if len(solid):
        having, first = np.unique(owners[solid], return_index=True)
        for corner, ufunc in enumerate((np.minimum, np.maximum)):
            for axis, numbers in enumerate((x, y)):
                bounds[corner, axis, having] = ufunc.reduceat(ufunc.reduceat(numbers, starts)[solid], first)


def _compare(annotations, limits, bounds, boxes, faults):
    """Compare masks with images (limits: width, height) and boxes with masks; sets the boxes that are missing."""
    with np.errstate(all="ignore"):  # infinity and NaN fail the comparisons
        far = ~(np.abs(bounds).max((0, 1)) <= 10 * limits.sum(0))  # the rasteriser walks along every edge
        visible = np.clip(bounds, 0, limits)
        outside = ~far & ~(visible[1] > visible[0]).all(0)
        missing = np.isnan(boxes).all((0, 1))
        boxes = np.where(missing, (visible[0], visible[1] - visible[0]), boxes)
        empty = ~missing & ~((boxes[1] > 0) & np.isfinite(boxes.sum(0))).all(0)
        misfit = ~_fit(boxes, bounds) & ~_fit(boxes, visible)  # neither that of the mask nor of its part in the image
    for index in np.flatnonzero(missing):
        annotations[index]["bbox"] = boxes[:, :, index].ravel().tolist()
    for found, kind, why in (
        (far, REFUSED, "polygon with coordinates far outside its {} image ({})"),
        (outside, LEFT_OUT, "its mask lies outside its {} image ({})"),
        (empty, LEFT_OUT, "box {2} (x, y, width, height) has no area"),
        (misfit, MISFIT, "box {2}, but the mask has {1}"),
    ):
        for index in np.flatnonzero(found):
            size = "{:g}x{:g}".format(*limits[:, index])
            corners = "x0, y0, x1, y1 = " + ", ".join(f"{number:.6g}" for number in bounds[:, :, index].ravel())
            faults.setdefault((kind, index), why.format(size, corners, short(annotations[index]["bbox"])))


def _fit(boxes, bounds):
    """Whether boxes (x, y, width, height) share half of their area with masks' bounds (corners), both (2, 2, n)."""
    (origin, extent), (start, end) = boxes, bounds
    # Each is taken a pixel larger on all sides: what rounding can do is no fault.
    common = (np.minimum(origin + extent, end) - np.maximum(origin, start) + 2).clip(0).prod(0)
    return common >= 0.5 * ((extent + 2).prod(0) + (end - start + 2).prod(0) - common)


def _shape(annotation, sizes):
    """Polygons as arrays or compressed RLE of a segmentation in any form; Fault for what is neither."""
    segmentation = annotation.get("segmentation")
    try:
        polygons = list(map(DOUBLES, segmentation))
        if min(map(len, polygons)) < 6:
            raise ValueError
    except (TypeError, ValueError, OverflowError):  # not the usual form
        if isinstance(segmentation, dict):
            return _rle(segmentation, *sizes[annotation["image_id"]])
        try:
            polygons = _polygons([] if segmentation is None else segmentation)
        except (TypeError, OverflowError):
            why = f"segmentation {short(segmentation)}, expected RLE or polygons, lists of x, y, x, y, ..."
            raise Fault(REFUSED, why) from None
    if not polygons:
        raise Fault(LEFT_OUT, "no segmentation")
    for polygon in polygons:
        if len(polygon) % 2:
            raise Fault(REFUSED, f"polygon with an odd number of coordinates ({len(polygon)})")
    return polygons


def _polygons(segmentation):
    """Polygons of a list of polygons, of one polygon, or of lists of [x, y] points; TypeError for what is neither."""
    if not isinstance(segmentation, list):
        raise TypeError
    if all(isinstance(point, list) and len(point) == 2 for point in segmentation):
        return [DOUBLES(chain(*segmentation))] if segmentation else []
    if any(isinstance(inner, list) for inner in segmentation):
        return [polygon for inner in segmentation for polygon in _polygons(inner)]
    return [DOUBLES(segmentation)]


def _rle(segmentation, height, width):
    """The compressed form of checked RLE."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise Fault(REFUSED, f"RLE of size {short(size)}, but its image is {[height, width]} (height, width)")
    try:
        runs = np.array(counts) if isinstance(counts, list) else _runs(counts)
        if runs.dtype.kind not in "if" or (runs % 1).any():
            raise ValueError("not integers")
    except (TypeError, ValueError, OverflowError):
        why = f"RLE with malformed counts {short(counts)}, expected run lengths or their string"
        raise Fault(REFUSED, why) from None
    if (runs < 0).any() or runs.sum() != height * width:
        raise Fault(REFUSED, f"RLE whose counts do not add up to the {height * width} pixels of its image")
    if not runs[1::2].any():
        raise Fault(LEFT_OUT, "RLE without a pixel")
    if isinstance(counts, list):
        return mask_utils.frPyObjects({"size": [height, width], "counts": runs.astype(int).tolist()}, height, width)
    return {"size": [height, width], "counts": counts}


def _runs(counts):
    """Run lengths (int64 array) of compressed RLE counts (str or bytes); ValueError or TypeError if malformed.

    pycocotools reads past the end of a malformed string, so it must not see one. Numbers have five bits to a character
    from "0" on, the least significant first, bit 5 = more follow, bit 4 of the last = negative; from the fourth run on
    they are the differences to the run two before.
    """
    counts = counts.encode("ascii") if isinstance(counts, str) else counts
    if not re.fullmatch(rb"(?:[P-o]{0,6}[0-O])+", counts):
        raise ValueError("not an RLE string")
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(digits < 32)  # of every number
    first = np.append(0, last[:-1] + 1)
    place = 5 * (np.arange(len(digits)) - np.repeat(first, last - first + 1))
    runs = np.add.reduceat((digits & 31) << place, first)
    runs -= np.where(digits[last] & 16, 32 << place[last], 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def annotation_of(rle, image_id, category_id, iscrowd=0):
    """A COCO annotation of compressed RLE, but for its id."""
    bbox, area = mask_utils.toBbox(rle).tolist(), int(mask_utils.area(rle))
    return {"image_id": image_id, "category_id": category_id, "segmentation": rle, "bbox": bbox, "area": area,
            "iscrowd": iscrowd}  # fmt: skip


def mask_area(segmentation, height, width):
    """Pixels of a mask in one of the forms of `check_segmentations`."""
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    return float(mask_utils.area(segmentation))
