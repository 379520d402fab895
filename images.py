"""Image files read as tensors, and the error that all data modules raise."""

import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps


class DataError(ValueError):
    """Bad data; the message is one line: what is wrong, where, and what to do about it."""

    def __str__(self):
        # A loader process sends its whole traceback as the message, our line being the last.
        return super().__str__().rstrip().split("\n")[-1].removeprefix(f"{__name__}.DataError: ")


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
