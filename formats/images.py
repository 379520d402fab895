"""Image files read as upright tensors, and the error that all data modules raise."""

import os
import re
import struct
import threading
import time
import warnings
import zlib
from functools import cache

import numpy as np
import torch
from PIL import Image


class DataError(ValueError):
    """Bad data; the message is one line: what is wrong, where, and what to do about it."""

    def __str__(self):
        # A loader process sends its whole traceback as the message, our line being the last. Names may hold lines, too.
        lines = super().__str__().strip().splitlines()
        return " ".join(lines[-1:] if lines[0].startswith("Caught ") else lines).removeprefix(f"{__name__}.DataError: ")


def short(value):
    """A value for a message: what Python shows of it, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


# What PIL's decoders raise on damaged files.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError, struct.error,
                  zlib.error, Image.DecompressionBombError)  # fmt: skip
MAX_PIXELS = 500_000_000  # aerial and microscope images; PIL warns above and refuses twice as much

NEARLY_BLACK = "its 16-bit values, maybe those of others too, make it nearly black; scale them"
ORIENTATION = 0x0112  # the tag of EXIF and TIFF
UPRIGHT = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                          Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                          Image.Transpose.ROTATE_90), start=2))  # fmt: skip
INVERSE = {6: 8, 8: 6}  # the other orientations undo themselves


def image_size(path, size=(None, None)):
    """(H, W) of the image that `read_image(path, size)` returns, from the file's header; DataError as from it.

    Numbers of `size` may be None: not known. (Of a PNG without orientation all is read then: the tag may come last.)
    """
    return with_image(path, lambda image: _turn(path, image, size, load=False)[1])


def read_image(path, size=None):
    """Read an image file of any mode as (3, H, W) uint8 RGB; DataError if it is missing, truncated or not an image.

    The pixels are turned upright by the orientation tag, except where `size`, the (H, W) that the annotations were made
    for, fits the stored pixels and not the upright ones: these stay as stored. DataError where it fits neither.
    Of several pages the first is read. 16-bit greyscale is scaled from 0...65535 to 0...255, 32-bit float from 0...1;
    DataError for values beyond these. Transparency is dropped (the stored colours stay).
    """
    return with_image(path, lambda image: _rgb(path, _turn(path, image, size or (None, None), load=True)[0]))


_pil = threading.Lock()
if hasattr(os, "register_at_fork"):  # a forked process shall not wait for a thread that it lacks
    os.register_at_fork(before=_pil.acquire, after_in_parent=_pil.release, after_in_child=_pil.release)


def with_image(path, read, again=True):
    """`read(image)` of a file that PIL has opened, which is tried `again` after a failure: a network disk has moments.

    PIL's limit of pixels and Python's list of warnings are the whole process's: they are ours only meanwhile, one
    thread at a time. What PIL warns of is said with the file's name, once. Raises DataError.
    """
    try:
        # By name, PIL would garble a TIFF file with an orientation.
        with _pil, warnings.catch_warnings(record=True) as caught, open(path, "rb") as file:
            warnings.simplefilter("always")
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
            try:
                found = read(Image.open(file))
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except DataError:
        raise
    except DECODER_ERRORS as error:
        if again:
            time.sleep(0.2 if getattr(error, "errno", None) else 0)  # of a disk behind a network, for a moment
            return with_image(path, read, again=False)
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: no such image file") from None
        if getattr(error, "errno", None):
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk and the rights") from None
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from None
    for warning in caught:
        _warn_once(f"{path}: {warning.message}", warning.category)
    return found


@cache
def _warn_once(line, category):
    warnings.warn(line, category, stacklevel=4)


def _turn(path, image, size, load):
    """The PIL image, with `load` decoded and turned as `read_image` says, and its (H, W)."""
    halved = re.search(r"\b(RGB[AX]?|LA);16", str(getattr(image, "tile", "")))  # PIL keeps the upper 8 of 16 bits
    tiff = getattr(image, "tag_v2", None)
    stored = (tiff[257], tiff[256]) if tiff else image.size[::-1]
    orientation = _orientation(image) if load or size != stored else 1
    shown = stored[::-1] if orientation >= 5 else stored
    fitting = [found for found in (shown, stored) if all(n in (None, m) for m, n in zip(found, size, strict=True))]
    if not fitting:
        height, width = ("?" if pixels is None else pixels for pixels in size)
        sizes = f"the image is {shown[1]}x{shown[0]}, its annotation file says {width}x{height}"
        raise DataError(f"{path}: {sizes}; correct the file or the annotations")
    if load:
        image.load()
        if halved and max(high for _, high in image.convert("RGB").getextrema()) < 17:
            _warn_once(NEARLY_BLACK, UserWarning)
        if (left := _orientation(image)) > 1:  # PIL's decoder of TIFF has turned the image already
            image = image.transpose(UPRIGHT[left])
        if fitting[0] != shown:
            image = image.transpose(UPRIGHT[INVERSE.get(orientation, orientation)])
    return image, fitting[0]


def _orientation(image):
    """The orientation tag of an image, 1...8; 1 where there is none or its EXIF data cannot be read."""
    try:
        tag = image.getexif().get(ORIENTATION)
    except (SyntaxError, struct.error):
        return 1
    return tag if tag in UPRIGHT else 1


def _rgb(path, image):
    """A decoded PIL image as (3, H, W) uint8."""
    top = {"I": 65535, "F": 1}.get(image.mode[:1])  # 16-bit files open as I;16, some as I
    if top:  # PIL's own conversion would clip them
        pixels = np.asarray(image, dtype=np.float32)
        low, high = pixels.min(), pixels.max()
        if 0 < high < top / 15 and top > 1:
            _warn_once(NEARLY_BLACK, UserWarning)
        if not (low >= -1e-5 * top and high <= (1 + 1e-5) * top):  # NaN too; a little beyond is rounding
            raise DataError(f"{path}: the values reach from {low:g} to {high:g}, expected 0...{top}; scale the image")
        image = Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
    image.info.pop("transparency", None)  # PIL would warn that a palette's is lost
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
