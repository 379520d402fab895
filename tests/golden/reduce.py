"""Makes the reduced golden data beside it from the full set: python tests/golden/reduce.py FOLDER_OF_THE_FULL_SET."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np


def project(x):
    """Sum over the last axis with fixed random weights, (..., n) -> (...): every number of x still counts."""
    return x @ np.random.RandomState(0).standard_normal(x.shape[-1])


def reduced(arrays):
    """What the reduced copy keeps of one file's {name: array}.

    Arrays of three or more axes lose the last one (`project`); large ones become float32, whose rounding, 6e-8, lies
    far below the tolerance of 1e-6; integers become as short as they can; the images go, since the recipe makes them;
    the loss terms become two arrays, loss_names and loss_values.
    """
    kept = {}
    for name, x in arrays.items():
        if name in ("image", "images") or name.startswith("loss/"):
            continue
        if x.ndim > 2:
            x = project(x)
        if x.dtype.kind == "i":
            x = x.astype(np.int16 if abs(x).max() < 2**15 else np.int32)
        elif x.dtype.kind == "f" and x.size > 128:
            x = x.astype(np.float32)
        kept[name] = x
    losses = {name.removeprefix("loss/"): x for name, x in arrays.items() if name.startswith("loss/")}
    if losses:
        kept["loss_names"], kept["loss_values"] = np.array(list(losses)), np.array(list(losses.values()))
    return kept


def main(source, destination):
    for path in sorted(source.glob("*.npz")):
        arrays = dict(np.load(path))
        if path.stem == "augmentation":  # blocks are compared to 1.5 of 255, boxes to 1e-3 of 1024
            short = {np.dtype(np.float32): np.float16, np.dtype(np.float64): np.float32}
            kept = {name: x.astype(short.get(x.dtype, x.dtype)) for name, x in arrays.items()}
        else:
            kept = reduced(arrays)
        np.savez_compressed(destination / path.name, **kept)
    for path in sorted(source.glob("keys_*.json")):
        compact = json.dumps(json.loads(path.read_text()), separators=(",", ":"))
        (destination / f"{path.name}.gz").write_bytes(gzip.compress(compact.encode(), mtime=0))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).resolve().parent)
