"""Image files of every mode are read as the same RGB, and damaged ones are named."""

import errno
import multiprocessing
import os
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

import formats.images
from formats.images import DataError, image_size, read_image, with_image


def gradient(dtype, top):
    return np.linspace(0, top, 256).astype(dtype).reshape(16, 16)


IMAGE_MODES = {
    "grey.png": Image.fromarray(gradient(np.uint8, 255)),
    "grey16.png": Image.fromarray(gradient(np.uint16, 65535)),
    "grey32.tif": Image.fromarray(gradient(np.int32, 65535)),
    "grey_alpha.png": Image.fromarray(gradient(np.uint8, 255)).convert("LA"),
    "rgba.png": Image.fromarray(gradient(np.uint8, 255)).convert("RGBA"),
    "palette.png": Image.fromarray(gradient(np.uint8, 255)).convert("P"),
    "rgb.bmp": Image.fromarray(gradient(np.uint8, 255)).convert("RGB"),
}


@pytest.mark.parametrize("name", IMAGE_MODES)
def test_every_image_mode_is_read_as_the_same_rgb(tmp_path, name):
    IMAGE_MODES[name].save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
    expected = torch.from_numpy(gradient(np.uint8, 255)).expand(3, 16, 16)
    assert (image.int() - expected.int()).abs().max() <= (1 if "16" in name or "32" in name else 0)


def test_transparency_is_dropped_and_bilevel_read(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png")[:, 0, 0].tolist() == [10, 20, 30]
    Image.new("1", (4, 4), 1).save(tmp_path / "bilevel.png")
    assert read_image(tmp_path / "bilevel.png").unique().tolist() == [255]


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_orientation_is_applied_unless_the_annotations_are_of_the_stored_pixels(tmp_path, mode):
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    image = Image.fromarray(pixels if mode == "I;16" else (pixels // 257).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to show"
    (image if mode == "I;16" else image.convert("RGB")).save(tmp_path / "a.png", exif=exif)
    stored, upright = read_image(tmp_path / "a.png", (3, 4)), read_image(tmp_path / "a.png")
    assert stored.shape == (3, 3, 4)
    assert torch.equal(upright, stored.rot90(-1, dims=(1, 2)))


def test_images_of_16_bits_that_hold_fewer_are_noticed_once(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(gradient(np.uint16, 4095)).save(tmp_path / name)
    with pytest.warns(UserWarning, match=r"a\.png: its 16-bit values, .* nearly black") as caught:
        assert [read_image(tmp_path / name).max() for name in ("a.png", "b.png")] == [16, 16]
    assert len(caught) == 1


@pytest.mark.parametrize("top, noticed", [(200, True), (4095, True), (65535, False)])
def test_colours_of_16_bits_that_hold_fewer_are_noticed(tmp_path, top, noticed):
    rows = np.insert(np.full((4, 5 * 3), top, ">u2").view(np.uint8), 0, 0, axis=1)  # a PNG that PIL cannot write
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(rows.tobytes()), b"IEND"
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    formats.images._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_image(tmp_path / "deep.png").unique().tolist() == [top >> 8]
    assert ["nearly black; scale them" in str(warning.message) for warning in caught] == [True] * noticed


def test_floats_that_rounding_takes_beyond_1(tmp_path):
    for top, name in ((1.000001, "a.tif"), (1.1, "b.tif")):
        Image.fromarray(gradient(np.float32, top)).save(tmp_path / name)
    assert read_image(tmp_path / "a.tif").max() == 255
    with pytest.raises(DataError, match=r"b\.tif: the values reach from 0 to 1\.1, expected 0\.\.\.1; scale the image"):
        read_image(tmp_path / "b.tif")


def test_a_warning_of_an_image_names_its_file_once(tmp_path, monkeypatch):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = "a description that is cut off " * 9
    Image.new("RGB", (8, 6)).save(path, exif=exif.tobytes()[:-200])
    with pytest.warns(UserWarning, match=rf"^{path}: ") as caught:
        for _ in range(3):
            read_image(path)
    assert len(caught) == 1
    monkeypatch.setattr("formats.images.MAX_PIXELS", 40)  # as an image of 500 megapixels
    Image.new("RGB", (8, 6)).save(path.with_suffix(".png"))
    with pytest.warns(
        Image.DecompressionBombWarning, match=r"photo\.png: Image size \(48 pixels\) exceeds limit of 40"
    ):
        read_image(path.with_suffix(".png"))
    Image.new("RGB", (20, 6)).save(path.with_suffix(".png"))
    with pytest.raises(DataError, match=r"photo\.png: cannot be read as an image \(Image size \(120 pixels\) exceeds"):
        read_image(path.with_suffix(".png"))


def test_settings_of_the_calling_program_stay(tmp_path, monkeypatch):
    Image.new("P", (20_000, 9_000)).save(tmp_path / "large.png", transparency=bytes([0, 128]))
    filters = list(warnings.filters)
    for limit in (1000, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # neither its size nor its lost transparency is worth a word
            assert image_size(tmp_path / "large.png") == (9_000, 20_000)
        with pytest.raises(DataError):
            read_image(tmp_path / "none.png")
        assert Image.MAX_IMAGE_PIXELS == limit and warnings.filters == filters


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_is_forked_while_a_thread_reads(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    reading = threading.Event()
    slowly = lambda image: (reading.set(), time.sleep(0.3))
    threading.Thread(target=with_image, args=(tmp_path / "a.png", slowly)).start()
    reading.wait()
    child = multiprocessing.get_context("fork").Process(target=read_image, args=(tmp_path / "a.png",))
    child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == 0


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError("image file is truncated")])
def test_an_image_that_fails_once_is_read_again(tmp_path, monkeypatch, error):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 6), (1, 2, 3)).save(path)
    failures = [error]

    def moody(*args, **kwargs):
        if failures:
            raise failures.pop()
        return opened(*args, **kwargs)

    opened = Image.open
    monkeypatch.setattr(Image, "open", moody)
    assert read_image(path)[:, 0, 0].tolist() == [1, 2, 3]
    failures += [error] * 2
    says = r"cannot be read \(Input/output error\); check the disk" if error.errno else "cannot be read as an image"
    with pytest.raises(DataError, match=rf"a\.png: {says}"):
        read_image(path)


def damage(path, how):
    if how == "missing":
        return path.unlink()
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image\n" * 9}[how])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "gif", "webp"])
@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing"])
def test_damaged_image_files_are_named(tmp_path, suffix, how):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    damage(path, how)
    with pytest.raises(DataError, match=rf"photo\.{suffix}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_errors_of_other_classes_are_of_damaged_files_too(tmp_path):
    photo, texture = tmp_path / "photo.avif", tmp_path / "texture.dds"
    texture.write_bytes(b"DDS " + (124).to_bytes(4, "little") + bytes(200))  # NotImplementedError
    if has_avif := features.check("avif"):  # not in every build of Pillow
        Image.new("RGB", (64, 64)).save(photo)
        head, mark, pixels = photo.read_bytes().partition(b"mdat")
        photo.write_bytes(head + mark + bytes(len(pixels)))  # as an unfinished download may leave it: RuntimeError
    for path in (texture, photo) if has_avif else (texture,):
        with pytest.raises(DataError, match=rf"{path.name}: cannot be read as an image"):
            read_image(path)
