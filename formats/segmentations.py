"""Segmentations and boxes of COCO files, checked and brought into one form."""

import math
import re
from array import array
from functools import partial
from itertools import chain
from operator import mul

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


def check_segmentation(annotation, height, width):
    """Bring an annotation's segmentation and bbox into one form, in place; yields (kind, why) for every fault.

    height, width: of its image. The forms: polygons as float64 arrays or compressed RLE; x, y, width, height, those of
    the mask within the image where there is no box.
    """
    bounds, visible = NO_BOX, NO_BOX  # of the mask and of its part in the image: x0, y0, x1, y1
    try:
        annotation["segmentation"] = shape = _shape(annotation.get("segmentation"), height, width)
        if isinstance(shape, list) and (flat := list(filter(_is_flat, shape))):
            shape[:] = [polygon for polygon in shape if polygon not in flat]
            why = f"polygon {short(flat[0].tolist())} has no area, expected three points or more, not on a line"
            yield TRIMMED if shape else LEFT_OUT, why
        if shape:
            x0, y0, x1, y1 = bounds = _bounds(shape)
            visible = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
            if not all(abs(number) <= 10 * (width + height) for number in bounds):  # the rasteriser walks all edges
                what = "polygon with coordinates far outside its"
                yield REFUSED, f"{what} {width:g}x{height:g} image ({_corners(bounds)})"
            elif not (visible[0] < visible[2] and visible[1] < visible[3]):
                yield LEFT_OUT, f"its mask lies outside its {width:g}x{height:g} image ({_corners(bounds)})"
    except Fault as fault:
        yield fault.args
    yield from _check_box(annotation, bounds, visible)


def _check_box(annotation, bounds, visible):
    """Compare bbox with the bounds of the mask and of its visible part, which it is set to where there is none."""
    given = annotation.get("bbox")
    try:
        x, y, width, height = box = DOUBLES(given or NO_BOX)
    except (TypeError, ValueError, OverflowError):
        yield REFUSED, f"box {short(given)} (x, y, width, height) is not a list of four numbers"
        return
    if not given:
        x0, y0, x1, y1 = visible
        annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    elif not (width > 0 and height > 0 and math.isfinite(sum(box))):
        yield LEFT_OUT, f"box {short(given)} (x, y, width, height) has no area"
    elif not (_fit(box, bounds) or _fit(box, visible)):
        fractions = ", expected pixels, not fractions of the image" * (max(bounds) <= 1)
        yield REFUSED if fractions else MISFIT, f"box {short(given)}, but the mask has {_corners(bounds)}{fractions}"


def _is_flat(polygon):
    """Whether a polygon's points lie on a line; not so a figure of eight, which may have no signed area either."""
    x, y = polygon[::2], polygon[1::2]
    area = sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, x[1:] + x[:1], y))
    return abs(area) < 1e-6 and np.linalg.matrix_rank(np.reshape(polygon, (-1, 2)) - polygon[:2], tol=1e-6) < 2


def _bounds(shape):
    """[x0, y0, x1, y1] of polygons or of compressed RLE; NaN where a polygon has NaN."""
    if isinstance(shape, dict):
        x, y, width, height = mask_utils.toBbox(shape).tolist()
        return [x, y, x + width, y + height]
    points = np.concatenate(shape).reshape(-1, 2)
    return [*points.min(0).tolist(), *points.max(0).tolist()]


def _corners(bounds):
    return "x0, y0, x1, y1 = " + ", ".join(f"{number:.6g}" for number in bounds)


def _fit(box, bounds):
    """Whether a box (x, y, width, height) shares half of its area with bounds (x0, y0, x1, y1); not with NaN."""
    # Each is taken a pixel larger on all sides: what rounding can do is no fault.
    (x, y, width, height), (x0, y0, x1, y1) = box, bounds
    common = max(min(x + width, x1) - max(x, x0) + 2, 0) * max(min(y + height, y1) - max(y, y0) + 2, 0)
    return common >= 0.5 * ((width + 2) * (height + 2) + (x1 - x0 + 2) * (y1 - y0 + 2) - common)


def _shape(segmentation, height, width):
    """Polygons as arrays or compressed RLE of a segmentation in any form; Fault for what is neither."""
    if isinstance(segmentation, list) and len(segmentation) == 1 and isinstance(segmentation[0], dict):
        segmentation = segmentation[0]
    if segmentation and isinstance(segmentation, dict):
        return _rle(segmentation, height, width)
    try:
        polygons = _polygons(segmentation) if segmentation else []
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
    """Polygons of a list of polygons, of one polygon, of lists of [x, y] points or of OpenCV's [[x, y]]; TypeError for
    what is none of these.
    """
    if not isinstance(segmentation, list):
        raise TypeError
    kinds = set(map(type, segmentation))
    if kinds == {list}:
        if all(len(inner) == 1 and isinstance(inner[0], list) for inner in segmentation):
            return _polygons([inner[0] for inner in segmentation])
        if all(len(inner) == 2 and not isinstance(inner[0], list) for inner in segmentation):
            return [DOUBLES(chain(*segmentation))]
    if list in kinds:
        return [polygon for inner in segmentation for polygon in _polygons(inner)]
    return [DOUBLES(segmentation)] if segmentation else []


def _rle(segmentation, height, width):
    """The compressed form of checked RLE."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise Fault(REFUSED, f"RLE of size {short(size)}, but its image entry says {[height, width]} (height, width)")
    try:
        runs = np.array(counts) if isinstance(counts, list) else _runs(counts)
        if runs.ndim != 1 or runs.dtype.kind not in "if" or not np.isfinite(runs).all() or (runs % 1).any():
            raise ValueError("not integers")
    except (TypeError, ValueError, OverflowError):
        why = f"RLE with malformed counts {short(counts)}, expected run lengths or their string"
        raise Fault(REFUSED, why) from None
    if ((runs < 0) | (runs > height * width)).any() or runs.sum() != height * width:  # a sum of more could overflow
        raise Fault(REFUSED, f"RLE whose counts do not add up to the {height * width} pixels of its image")
    if not runs[1::2].any():
        raise Fault(LEFT_OUT, "RLE without a pixel")
    return mask_utils.frPyObjects({"size": [height, width], "counts": runs.astype(int).tolist()}, height, width)


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
    """Pixels of a mask in one of the forms of `check_segmentation`."""
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    return float(mask_utils.area(segmentation))
