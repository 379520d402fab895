"""Deterministic weights, images and targets for the golden tests.

Every tensor of a checkpoint is a pure function of its *name* and *shape*, so a
200 MB state dict needs no file: `weights(keys)` rebuilds it anywhere. The
random stream is numpy's legacy MT19937 (`RandomState`), which numpy guarantees
never to change.
"""

import gzip
import json
import zlib

import numpy as np


def tensor(name, shape, salt=0):
    """One float64 tensor of the recipe checkpoint.

    name   dotted parameter name as the *official* checkpoint spells it
    shape  tuple of ints
    salt   another value gives another, equally valid checkpoint
    """
    rng = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32)
    x = rng.standard_normal(shape) if shape else np.asarray(rng.standard_normal())
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape)
    if leaf == "running_var":
        return 1.0 + 0.2 * np.abs(x)
    if leaf == "running_mean":
        return 0.1 * x
    if len(shape) <= 1:
        if leaf == "weight":  # the gain of a norm layer
            return 1.0 + 0.1 * x
        if "sampling_offsets" in name:
            return 2.0 * x
        return 0.1 * x  # biases
    fan_in = int(np.prod(shape[1:]))
    if name.endswith(("label_enc.weight", "level_embed", "query_feat.weight")):
        return x
    if "sampling_offsets" in name:
        return 0.5 * x / np.sqrt(fan_in)
    if "bbox_embed" in name and ".layers.2." in name:  # last layer of a box head
        return 0.3 * x / np.sqrt(fan_in)
    return x / np.sqrt(fan_in)


def weights(keys_json, salt=0):
    """The whole recipe checkpoint: {official name: float64 array}.

    keys_json  path of a JSON object (.json or .json.gz) {official name: [shape, source name]}. A
               module that the official code registers twice is saved twice;
               both entries then have the same source name, so the same values.
    """
    with (gzip.open if str(keys_json).endswith(".gz") else open)(keys_json) as f:
        keys = json.load(f)
    return {name: tensor(source, tuple(shape), salt) for name, (shape, source) in keys.items()}


def image(height, width, seed=0):
    """A smooth, busy uint8 RGB image, shape (height, width, 3)."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    out = np.zeros((height, width, 3))
    for channel in range(3):
        for _ in range(12):
            fy, fx = rng.uniform(-0.12, 0.12, 2)
            phase, gain = rng.uniform(0, 6.28), rng.uniform(10, 40)
            out[..., channel] += gain * np.sin(fy * y + fx * x + phase)
    return np.clip(out + 120, 0, 255).round().astype(np.uint8)


def targets(height, width, count, num_classes=80, seed=0):
    """`count` elliptical instances on a height x width image.

    Returns labels (count,) int64, boxes (count, 4) float64 as normalised
    (cx, cy, w, h) tight around the mask's pixel edges, and masks
    (count, height, width) bool.
    """
    rng = np.random.RandomState(1000 + seed)
    y, x = np.mgrid[0:height, 0:width]
    labels, boxes, masks = [], [], []
    while len(labels) < count:
        cy, cx = rng.uniform(0.15, 0.85) * height, rng.uniform(0.15, 0.85) * width
        ry, rx = rng.uniform(0.06, 0.3) * height, rng.uniform(0.06, 0.3) * width
        mask = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
        rows, cols = np.where(mask)
        if rows.size < 16:
            continue
        x0, x1, y0, y1 = cols.min(), cols.max() + 1, rows.min(), rows.max() + 1
        boxes.append([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height])
        labels.append(rng.randint(num_classes))
        masks.append(mask)
    if not labels:
        return np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros((0, height, width), bool)
    return np.array(labels, np.int64), np.array(boxes), np.stack(masks)


def uniform(first, *shape):
    """A fixed float64 array (first, *shape) in [0, 1): `first` times the same values, the fractions of multiples of the
    golden ratio. They depend on `shape` alone, so that images, instances and layers may be stacked in any way.

    In `training_steps.npz` it takes the place of every torch.rand of the mask losses and of the matching.
    """
    values = np.modf(np.arange(1, int(np.prod(shape)) + 1) * 0.6180339887498949)[0].reshape(shape)
    return np.broadcast_to(values, (first, *shape)).copy()
