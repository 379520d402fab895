"""Generated data sets in COCO's format: `shapes`, and `shapes-hard`, in which a box tells little about its mask."""

import colorsys
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from files import write_whole
from formats.coco import encode_masks
from formats.images import DataError
from formats.segmentations import annotation_of


def _corners(radii, count):
    """Corners at `count` equal angles from the top on, their distances from the centre cycling through `radii`."""
    angles = np.arange(count) * 2 * np.pi / count - np.pi / 2
    return np.resize(radii, count)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


_t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
_disc = np.stack([np.cos(_t), np.sin(_t)], axis=1)
_heart = 13 * np.cos(_t) - 5 * np.cos(2 * _t) - 2 * np.cos(3 * _t) - np.cos(4 * _t)  # its y, upwards
_a = 0.32  # half the width of the cross's arms
# Class -> outline and, for some, a hole: (k, 2) points within about the unit circle. No two alike at 16 pixels across,
# whatever the rotation.
SHAPES = {
    "circle": [_disc * 0.9],
    "square": [_corners([1.0], 4)],
    "triangle": [_corners([1.0], 3)],
    "star": [_corners([1.0, 0.42], 10)],
    "ring": [_disc, _disc * 0.55],
    "cross": [[(-_a, -1), (_a, -1), (_a, -_a), (1, -_a), (1, _a), (_a, _a), (_a, 1), (-_a, 1), (-_a, _a), (-1, _a),
               (-1, -_a), (-_a, -_a)]],
    "ellipse": [_disc * (1.0, 0.48)],
    "crescent": [_disc, _disc * 0.8 + (0.45, 0)],
    "arrow": [[(0, -1), (0.8, 0), (0.3, 0), (0.3, 0.95), (-0.3, 0.95), (-0.3, 0), (-0.8, 0)]],
    "heart": [np.stack([16 * np.sin(_t) ** 3, -_heart - 2], axis=1) / 17],
}  # fmt: skip
# Classes of the harder variant: the thin, hollow and curved ones fill little of their boxes; the disc covers others.
HARD_SHAPES = {
    "disc": [_disc * 0.9],
    "bar": [[(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)]],
    "ring": [_disc, _disc * 0.66],
    "frame": [_corners([1.0], 4), _corners([0.58], 4)],
    "crescent": [_disc, _disc * 0.88 + (0.42, 0)],
}
SHAPES_VERSION = 1  # to be raised when the pictures change, so that old ones are made anew
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.3, 30


def make_shapes(root, train=2000, val=250, size=64, seed=0, hard=False):
    """Write the generated data set `shapes` to the folder `root` in COCO layout, unless it is there already.

    `train` and `val` images of size x size pixels with 2 to 7 overlapping shapes each, one class per outline; textures
    and colours say nothing about the class. Every visible shape is annotated with its visible part. The same settings
    give the same files. Every file appears whole and the annotation files last, so that an interrupted run is not taken
    for a whole one, and several machines may generate the same set on one disk at once.

    hard: `shapes-hard`, in which a box tells little about the mask in it: thin, hollow and curved shapes at any angle,
    3 to 7 of them, 18 to 84 % of the image wide, upon strokes that are not annotated.

    Raises DataError where the folder holds annotations that were not generated.
    """
    settings = {"version": SHAPES_VERSION, "train": train, "val": val, "size": size, "seed": seed}
    settings |= {"hard": True} if hard else {}
    files = {split: Path(root, "annotations", f"instances_{split}2017.json") for split in ("train", "val")}
    found = {path: _settings(path) for path in files.values()}
    for path in found:
        if found[path] is None:
            raise DataError(f"{path}: was not generated; choose another --data-root, or --data coco for these images")
    old = [path for path in found if found[path] != settings]
    for path in old:
        path.unlink(missing_ok=True)
    contents = {}
    for number, (split, path) in enumerate(files.items() if old else ()):
        images, annotations, folder = [], [], Path(root, "images", f"{split}2017")
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(settings[split]):
            pixels, labels, masks = draw_shapes(np.random.default_rng([seed, number, i]), size, hard)
            name, image = f"{i + 1:012d}.png", Image.fromarray(pixels)
            write_whole(folder / name, partial(image.save, format="PNG", compress_level=1))
            images.append({"id": i + 1, "file_name": name, "height": size, "width": size})
            for label, rle in zip(labels, encode_masks(torch.from_numpy(masks)), strict=True):
                annotations.append({"id": len(annotations) + 1} | annotation_of(rle, i + 1, label + 1))
        categories = [{"id": i, "name": name} for i, name in enumerate(HARD_SHAPES if hard else SHAPES, start=1)]
        info = {"description": "generated shapes", "settings": settings}
        contents[path] = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content))


def _settings(path):
    """The settings recorded in an annotation file of `make_shapes`; {} without a file, None in one of others."""
    try:
        return json.loads(path.read_bytes())["info"]["settings"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def draw_shapes(rng, size, hard=False):
    """One image of `shapes`: pixels (size, size, 3) uint8, labels [int, ...], visible masks (n, size, size) bool.

    Shapes are 20 to 70 % of the image wide and tilted by up to 0.4 radians. hard: see `make_shapes`. A shape that would
    leave too little of an earlier one visible is drawn again somewhere else, so that nothing in the image is without
    its annotation.
    """
    pixels = _texture(rng, size, saturation=(0.0, 0.35), value=(0.25, 0.55))
    for _ in range(rng.integers(2, 7) if hard else 0):  # short bright lines and small blobs that belong to no class
        canvas = Image.new("1", (size, size))
        start, step = rng.uniform(0, size, 2), rng.uniform(-0.15, 0.15, 2) * size
        ImageDraw.Draw(canvas).line([*start, *(start + step)], fill=1, width=int(rng.integers(1, 4)))
        stroke = np.asarray(canvas)
        pixels[stroke] = _texture(rng, size, saturation=(0.5, 1.0), value=(0.7, 1.0))[stroke]
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
            canvas = Image.new("F", (size, size))
            canvas.paste(Image.fromarray(patch), (int(x), int(y)))  # cut off at the edges
            coverage = np.asarray(canvas)
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
    """A random texture (size, size, 3) float32, about 0...255, around a random colour with HSV ranges in [0, 1]."""
    colour = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 20)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)
    v = (y * np.cos(angle) - x * np.sin(angle)) * (2 * np.pi / period)
    coarse = (size // 8 + 2,) * 2
    patterns = [
        lambda: np.sin(u),  # stripes
        lambda: np.sign(np.sin(u) * np.sin(v)),  # checks
        lambda: np.where(np.cos(u) + np.cos(v) > 0.9, 1.0, -0.6),  # dots
        lambda: u * period / (np.pi * size) - 1,  # gradient
        lambda: Image.fromarray(rng.uniform(-1, 1, coarse).astype(np.float32)).resize((size, size), Image.BICUBIC),
    ]  # the last: clouds
    pattern = np.asarray(patterns[rng.integers(5)]())
    swing = rng.uniform(8, 30) * rng.uniform(0.5, 1, 3)  # of each colour channel
    grain = rng.normal(0, 6, (size, size, 1))
    return (colour + pattern[:, :, None] * swing + grain).astype(np.float32)
