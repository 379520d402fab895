"""predict.py on good and on bad input: what it takes, what it writes, what it refuses and what it keeps."""

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import program
from pycocotools import mask as mask_utils

import cli
import drawing
import predict
from checkpoint import load_model
from detections import detect
from formats.coco import encode_masks
from formats.images import read_image


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures, a.png and b.jpg, 70 x 50 and 40 x 60."""
    (tmp_path / "in").mkdir()
    picture((70, 50)).save(tmp_path / "in" / "a.png")
    picture((40, 60)).save(tmp_path / "in" / "b.jpg")
    return tmp_path / "in"


def picture(size, seed=0):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def run(small_checkpoint, tmp_path, monkeypatch, capsys):
    """Runs predict.py in this process into tmp_path/out: (exit status, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments, checkpoint=small_checkpoint, output=tmp_path / "out", threshold=0):
        flags = ["--checkpoint", checkpoint, "--output", output, "--score-threshold", threshold, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, [*flags, *arguments])])
        try:
            cli.run_program(predict.main)
        except SystemExit as end:
            printed = capsys.readouterr()
            failed = isinstance(end.code, str)  # as Python does with it at the end of a program
            return (1, printed.out, printed.err + end.code + "\n") if failed else (end.code, *printed)
        return 0, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


def error_line(result):
    """The one line of a run that failed."""
    status, _, errors = result
    assert status not in (0, None) and "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if "error: " in line]
    assert errors.endswith(line + "\n")
    return line


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# What goes in


def test_every_kind_of_image(run, tmp_path):
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    image = picture((70, 50))
    exif = image.getexif()
    exif[0x0112] = 6  # stored on its side
    image.save(folder / "rotated.jpg", exif=exif)
    for mode in ("L", "RGBA", "P"):
        image.convert(mode).save(folder / f"{mode}.png")
    Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257).save(folder / "16bit.png")
    image.save(folder / ("가" * 83 + ".png"))  # 253 bytes, as many as a name can have but two
    Image.new("RGB", (3, 2)).save(folder / "L.bmp")  # far below 60 tokens; its overlay must not replace L.png's
    assert run(folder)[0] == 0
    overlays = {path.name for path in output.glob("*.png")}
    assert {"rotated.png", "L.png", "RGBA.png", "P.png", "16bit.png"} < overlays and len(overlays) == 7
    with Image.open(output / "rotated.png") as upright:
        assert upright.height > upright.width
    results = read(output, "detections")
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} <= results[0].keys()
    sizes = {Path(r["file_name"]).name: r["segmentation"]["size"] for r in results}
    assert sizes["rotated.jpg"] == [70, 50] and sizes["L.bmp"] == [2, 3]
    assert all(1 <= r["category_id"] <= 10 and 0 <= r["score"] <= 1 for r in results)
    assert all(r["category"] == f"kind {r['category_id'] - 1}" for r in results)


def test_only_images_of_a_folder_are_taken(run, folder, tmp_path):
    (folder / "._a.png").write_bytes(b"\0\5\26\7")
    (folder / "notes.txt").write_text("x")
    (folder / "Thumbs").write_text("x")
    for name in ("c.heic", "d.HEIC", "e.pdf", "f.mpg"):
        (folder / name).write_bytes(b"x")
    (folder / "g.png").mkdir()
    os.mkfifo(folder / "h.png")  # who opens it waits for ever
    (folder / "i.png").symlink_to("nowhere.png")
    (folder / "sub" / "deep").mkdir(parents=True)
    picture((30, 30)).save(folder / "sub" / "deep" / "a.jpg")
    (folder / "sub" / "loop").symlink_to(folder)
    (tmp_path / "store").mkdir()
    picture((30, 30)).save(tmp_path / "store" / "c.png")
    for link in ("sub/day1", "day2"):
        (folder / link).symlink_to(tmp_path / "store")
    status, printed, errors = run(folder)
    assert status == 0 and "2 of 2 images" in printed
    for kind in ("12, most", "2 .heic", "1 ._*", "1 .txt", "1 .pdf", "1 .mpg", "1 without", "2 not a", "3 folders"):
        assert kind in errors, (kind, errors)
    status, printed, errors = run("--recursive", folder)
    assert status == 0 and "4 of 4 images" in printed and "folders" not in errors
    names = [Path(entry["file_name"]).relative_to(folder).as_posix() for entry in read(tmp_path / "out", "images")]
    assert names == ["a.png", "b.jpg", "sub/deep/a.jpg", "sub/day1/c.png"]
    assert [entry["overlay"] for entry in read(tmp_path / "out", "images")] == ["a.png", "b.png", "a_3.png", "c.png"]


def test_a_folder_without_images_is_an_error(run, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    picture((30, 30)).save(tmp_path / "in" / "sub" / "a.jpg")
    assert "no image in this folder (left out: 1, most of them 1 folders (--rec" in error_line(run(tmp_path / "in"))
    assert "none: no such image or folder" in error_line(run(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_of_several_pages_the_first_is_taken(run, tmp_path):
    pages = [picture((30, 20)), picture((50, 60)), picture((10, 10))]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[pages[2]])  # as phones do
    status, _, errors = run(tmp_path / "pages.tif", tmp_path / "two.jpg")
    assert status == 0 and "pages.tif: has 3 pages" in errors and "two.jpg" not in errors
    assert (read(tmp_path / "out", "images")[0]["width"], read(tmp_path / "out", "images")[0]["height"]) == (30, 20)


def test_an_unreadable_image_does_not_stop_the_others(run, folder, tmp_path):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:200])
    line = error_line(run(folder))
    assert "1 of 2 images could not be done" in line and "a.png" in line
    broken, good = read(tmp_path / "out", "images")
    assert "cannot be read" in broken["error"] and broken["overlay"] is None and good["overlay"] == "b.png"
    assert {r["image_id"] for r in read(tmp_path / "out", "detections")} == {2}


def test_a_name_that_the_disk_cannot_have_does_not_stop_the_others(run, folder, tmp_path, monkeypatch):
    def save(picture, path):  # as to a stick for Windows, which has no name with a colon
        if len(calls) == 0:
            calls.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        drawing.save_png(picture, path)

    calls = []
    monkeypatch.setattr(predict, "save_png", save)
    assert "1 of 2 images could not be done" in error_line(run(folder))
    bad, good = read(tmp_path / "out", "images")
    assert bad["error"] == f"{folder}/a.png: Invalid argument" and good["overlay"] == "b.png"
    assert {r["image_id"] for r in read(tmp_path / "out", "detections")} == {2}


# What comes out


def test_every_image_is_listed(run, folder, tmp_path):
    assert run(folder, threshold=1)[0] == 0
    assert read(tmp_path / "out", "detections") == []
    a, b = read(tmp_path / "out", "images")
    expected = {"id": 1, "file_name": f"{folder}/a.png", "width": 70, "height": 50, "overlay": "a.png", "detections": 0}
    assert a == expected
    assert (b["id"], b["width"], b["height"], b["overlay"], b["detections"]) == (2, 40, 60, "b.png", 0)
    assert run(folder)[0] == 0
    results = read(tmp_path / "out", "detections")
    assert [sum(r["image_id"] == i for r in results) for i in (1, 2)] == [100, 100]
    assert [entry["detections"] for entry in read(tmp_path / "out", "images")] == [100, 100]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock", "a.png", "b.png", "detections.json", "images.json"
    ]  # fmt: skip


def test_detections_are_those_of_the_model(run, folder, tmp_path, small_checkpoint):
    model, _ = load_model(small_checkpoint)
    [[every]] = detect(model, [read_image(folder / "a.png")])
    threshold = every["scores"][4].item()  # as JSON writes it, and above it five
    assert run("--max-detections", 9, folder / "a.png", threshold=threshold)[0] == 0
    results = read(tmp_path / "out", "detections")
    assert [r["score"] for r in results] == every["scores"][:5].tolist()
    masks = np.stack([mask_utils.decode(r["segmentation"]) for r in results])
    assert np.array_equal(masks, every["masks"][:5].numpy())
    assert encode_masks(every["masks"][:5]) == [r["segmentation"] for r in results]
    assert run("--max-detections", 9, folder / "a.png")[0] == 0
    assert len(read(tmp_path / "out", "detections")) == 9


def test_layers_side_by_side(run, folder, tmp_path):
    assert run(folder / "a.png")[0] == 0
    last = read(tmp_path / "out", "detections")
    with Image.open(tmp_path / "out" / "a.png") as overlay:
        width, height = overlay.size
    assert run(folder / "a.png", "--layer", 0, 3)[0] == 0
    first = read(tmp_path / "out", "detections_0")
    assert read(tmp_path / "out", "detections_3") == last
    assert [r["score"] for r in first] != [r["score"] for r in last]
    assert read(tmp_path / "out", "images")[0]["detections"] == [100, 100]
    with Image.open(tmp_path / "out" / "a.png") as both:
        assert both.width > 2 * width and both.height > height
    assert run(folder / "a.png", "--layer", 0)[0] == 0
    assert read(tmp_path / "out", "detections") == first
    with Image.open(tmp_path / "out" / "a.png") as overlay:
        assert overlay.size == (width, height)
    assert "--layer 4: this model has layers 0 to 3" in error_line(run(folder / "a.png", "--layer", 1, 4))


def test_names_of_overlays_are_all_different():
    images = [Path(p) for p in ("a.jpg", "b/a.bmp", "a_2.jpg", "A.png", "a_2_3.tif", "a_2.gif", "c.tar.png", ".png")]
    names = predict.overlay_names(images)
    assert len({name.lower() for name in names}) == len(images) and names[0] == "a.png" and names[6] == "c.tar.png"
    images = [Path(folder, "가" * 60 + name) for folder in "ab" for name in ("", "1.png", "2.png", ".png")]
    names = predict.overlay_names(images, longest=143)  # bytes, as in an encrypted home
    assert len(set(names)) == len(images) and all(name.endswith(".png") for name in names)
    assert all(100 < len(name.encode()) <= 143 for name in names)


# What is refused


def test_no_image_is_overwritten(run, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").symlink_to(folder / "a.png")
    for output in (folder, tmp_path / "link", tmp_path / "other", folder / ".." / "in"):
        line = error_line(run(folder, output=output, checkpoint="none.pt"))
        assert "a.png: would be overwritten, but is not of predict.py" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_only_what_it_wrote_is_overwritten(run, folder, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    picture((9, 9)).save(output / "b.png")
    before = (output / "b.png").read_bytes()
    assert "b.png: would be overwritten, but is not of predict.py" in error_line(run(folder))
    assert (output / "b.png").read_bytes() == before
    (output / "b.png").unlink()
    for name, text in (("detections.json", "[]"), ("images.json", "{}")):
        (output / name).write_text(text)
        assert f"{name}: would be overwritten" in error_line(run(folder))
        (output / name).unlink()
    assert run(folder)[0] == 0 and run(folder / "b.jpg")[0] == 0 and run(folder)[0] == 0
    # Beside the images, whose own names do not collide: the second time the overlay is no image.
    (folder / "a.png").rename(folder / "a.bmp")
    for _ in range(2):
        status, printed, _ = run(folder, output=folder)
        assert status == 0 and "2 of 2 images" in printed
    line = error_line(run(folder / "a.bmp", folder / "a.png", output=folder))  # an overlay that is given as an image
    assert "a.png: would be overwritten" in line


def test_two_runs_in_one_folder(run, folder, tmp_path, small_checkpoint):
    for i in range(400):
        picture((64, 64), i).save(folder / f"{i:03}.png")
    flags = ["--checkpoint", small_checkpoint, "--output", tmp_path / "out", "--device", "cpu"]
    process = program("predict", *flags, folder, output=tmp_path / "predict")
    process.until((tmp_path / "out" / "003.png").exists)
    line = error_line(run(folder / "b.jpg"))
    assert "out: another program writes to this folder; choose another --output" in line
    process.signal(signal.SIGTERM)
    assert process.wait() == 130 and len(read(tmp_path / "out", "images")) == 402


def test_a_folder_within_that_cannot_be_read_is_counted(run, folder, monkeypatch):
    (folder / "lost+found").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lost+found" and access(path, mode))
    status, printed, errors = run(folder, "--recursive")
    assert status == 0 and "2 of 2 images" in printed and "1 folders that cannot be read" in errors


def test_a_name_of_two_lines_and_an_empty_one(run, folder):
    (folder / "of\ntwo.png").write_bytes(b"none")
    assert "of two.png: cannot be read as an image" in run(folder)[2].splitlines()[-2]
    assert "the word behind" in error_line(run(folder, "")) and "is empty" in error_line(run(folder, ""))


@pytest.mark.parametrize("output", ["file", "file/out", "/proc/none"])
def test_an_output_that_cannot_be_is_said_before_the_model_loads(run, folder, tmp_path, output):
    (tmp_path / "file").write_text("mine")
    line = error_line(run(folder, output=tmp_path / output, checkpoint="none.pt"))
    assert "--output" in line and output in line and "cannot be written" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("flags, says", [
    (["--score-threshold", "1.5"], "--score-threshold: must be from 0 to 1, not 1.5"),
    (["--score-threshold", "nan"], "--score-threshold: must be from 0 to 1, not nan"),
    (["--score-threshold", "half"], "--score-threshold: invalid number value: 'half'"),
    (["--max-detections", "0"], "--max-detections: must be 1 or more, not 0"),
    (["--device", "meta"], "--device meta: cannot be used here"),
    (["--device", "mps"], "--device mps: cannot be used here"),
    (["--device", "xpu"], "--device xpu: cannot be used here"),
    (["--device", "cuda:99"], "--device cuda"),
])  # fmt: skip
def test_wrong_flags(run, folder, tmp_path, flags, says):
    if flags[1] == "mps" and torch.backends.mps.is_available() or flags[1] == "xpu" and torch.xpu.is_available():
        pytest.skip("the device is there")
    assert says in error_line(run(folder, *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value, says", [
    (float("nan"), "bad.pt: heads.mask_head.layers.2.bias holds NaN or infinity"),
    (3e38, "the model predicts NaN or infinity"),
])  # fmt: skip
def test_predictions_that_are_no_numbers(run, folder, tmp_path, small_checkpoint, value, says):
    content = torch.load(small_checkpoint, weights_only=True)
    content["model"]["heads.mask_head.layers.2.bias"] += value
    torch.save(content, tmp_path / "bad.pt")
    assert says in error_line(run(folder, checkpoint=tmp_path / "bad.pt"))


# What is kept


def test_a_full_disk_costs_only_what_it_does_not_take(run, folder, tmp_path):
    picture((500, 500)).save(folder / "c.png")  # noise, which does not compress
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        result = run(folder, "--max-detections", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large)" in error_line(result) and "2 of 3 images" in result[1]
    assert [r["image_id"] for r in read(tmp_path / "out", "detections")] == [1, 2]
    assert [entry["overlay"] for entry in read(tmp_path / "out", "images")] == ["a.png", "b.png", None]
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_list_stays_whole_where_the_disk_ends(tmp_path):
    (tmp_path / "list.json").write_text("[]\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        predict.append(tmp_path / "list.json", [])
        predict.append(tmp_path / "list.json", [{"a": 1}, {"a": 2}])
        with pytest.raises(OSError):
            predict.append(tmp_path / "list.json", [{"a": "x" * 100}] * 50)
        predict.append(tmp_path / "list.json", [{"a": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(tmp_path, "list") == [{"a": 1}, {"a": 2}, {"a": 3}]


def no_memory():
    torch.empty(10**15)


def no_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def no_operation():
    raise NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device.")


@pytest.mark.parametrize("fault, says", [
    (no_memory, "out of memory (4000000000000000 bytes asked for)"),
    (no_gpu_memory, "out of memory (2.00 GiB asked for)"),
    (no_operation, "the device cannot run the model"),
])  # fmt: skip
def test_what_the_machine_lacks_is_one_line(run, folder, tmp_path, monkeypatch, fault, says):
    calls = []

    def second_time_fails(*args, **settings):
        calls.append(1)
        return fault() if len(calls) > 1 else detect(*args, **settings)

    monkeypatch.setattr(predict, "detect", second_time_fails)
    result = run(folder)
    assert says in error_line(result) and "1 of 2 images" in result[1]
    assert {r["image_id"] for r in read(tmp_path / "out", "detections")} == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_done(small_checkpoint, tmp_path, number):
    (tmp_path / "in").mkdir()
    for i in range(400):
        picture((64, 64), i).save(tmp_path / "in" / f"{i:03}.png")
    flags = ["--checkpoint", small_checkpoint, "--output", tmp_path / "out", "--score-threshold", "0"]
    process = program("predict", *flags, "--device", "cpu", tmp_path / "in", output=tmp_path / "predict")
    process.until((tmp_path / "out" / "003.png").exists)
    process.signal(number)
    assert process.wait() == 130
    printed, errors = process.out, process.err
    assert errors.endswith("predict.py: interrupted\n") and "Traceback" not in errors
    entries, results = read(tmp_path / "out", "images"), read(tmp_path / "out", "detections")
    done = [entry["id"] for entry in entries if entry["overlay"]]
    assert 3 <= len(done) < 400 == len(entries) and f"{len(done)} of 400 images" in printed
    assert {i: 100 for i in done}.items() <= {i: sum(r["image_id"] == i for r in results) for i in range(401)}.items()
    assert not list((tmp_path / "out").glob("*.tmp"))
