"""Image files of every mode are read as the same RGB, and damaged ones are named."""

import numpy as np
import pytest
import torch
from PIL import Image

from formats.images import DataError, read_image


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
