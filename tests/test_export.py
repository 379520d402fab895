"""export.py: the files run without this repository, at any size and batch, and equal the model."""

import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import toys
from torch._inductor import config as inductor

import backbone
import export
from cli import run_program
from config import PRESETS, InputError
from detections import postprocess
from export import Detector, dynamic_sizes, write

SIZES = [(1, 96, 96), (2, 128, 96), (1, 160, 224)]
# No more layers than there are kinds of: tracing takes its time for every operation.
SMALL = {"interaction_layers": 1, "encoder_feedforward_dim": 64, "feedforward_dim": 64, "frozen_batch_norm": True}
MASK_DINO = {"di": False, "bato": False, "decoder_layers": 1}

# Where no module of this repository is found.
ELSEWHERE = """
import json, onnxruntime, sys, torch
from pathlib import Path
images, found = torch.load("images.pt"), {}
for path in map(str, Path().glob("model.*")):
    if path.endswith(".onnx"):
        session = onnxruntime.InferenceSession(path)
        found[path] = [[torch.from_numpy(x) for x in session.run(None, {"images": x.numpy()})] for x in images]
        bounds = session.get_modelmeta().custom_metadata_map["bounds"]
    else:
        extra = {"bounds": ""}
        model = torch.export.load(path, extra_files=extra).module()
        found[path] = [list(model(x)) for x in images]
        bounds = extra["bounds"]
    assert json.loads(bounds) == {"height": [64, 4096, 32]}, bounds
torch.save(found, "found.pt")
assert not {"attention", "model", "export"} & set(sys.modules)
"""


def small_model(**settings):
    """A small model: scores and boxes so far apart that rounding changes no order, mask logits of about 1."""
    model = toys.model(**SMALL | settings).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.heads.mask_head.layers[-1].weight.data *= 0.1
    return model


def test_files_for_any_size(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    detector = Detector(small_model(), max_detections=20).eval()
    dynamic, _ = dynamic_sizes(detector.model.config)
    images = [torch.rand(batch, 3, height, width) for batch, height, width in SIZES]
    with torch.no_grad():
        program = torch.export.export(detector, (torch.rand(2, 3, 160, 224),), dynamic_shapes=dynamic, strict=False)
        results = [detector(batch) for batch in images]
    for suffix in ("onnx", "pt2"):
        write(program, tmp_path / f"model.{suffix}", {"height": [64, 4096, 32]})
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == {"model.onnx", "model.pt2"}
    for path, outputs in found.items():  # in the same order: masks and boxes are those of the same queries
        for batch, expected, ours in zip(images, results, outputs, strict=True):
            assert torch.equal(ours[1], expected[1]), path
            for x, y, unit in zip(ours, expected, (1, 1, max(batch.shape[2:]), 1), strict=True):
                torch.testing.assert_close(x / unit, y / unit, atol=1e-4, rtol=0)  # boxes: of the image


def test_detector_gives_the_detections_of_postprocess():
    model = small_model()
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        scores, labels, boxes, masks = Detector(model, max_detections=20)(images)
        expected = postprocess(model(images), [(96, 128)] * 2, [(96, 128)] * 2, topk=20)
    for b, detections in enumerate(expected):
        torch.testing.assert_close(scores[b], detections["scores"])
        assert torch.equal(labels[b], detections["labels"])
        torch.testing.assert_close(boxes[b], detections["boxes"])
        full = torch.nn.functional.interpolate(masks[b, None], (96, 128), mode="bilinear", align_corners=False)[0] > 0
        assert torch.equal(full, detections["masks"])


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """A function: export.py with these flags, in this process and in a folder of its own; its status, what it says."""

    def call(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["export.py", *flags])
        try:
            run_program(export.main)
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return call


@pytest.fixture
def swin(tmp_path, monkeypatch):
    """In that folder, c.pt: a checkpoint of a Mask DINO with a small Swin transformer."""
    monkeypatch.setitem(backbone.SWINS, "swin_small", (32, 2, 7, 0.0))
    toys.save(tmp_path / "c.pt", small_model(backbone="swin_small", **MASK_DINO))


@pytest.mark.parametrize(
    "file, flags", [("swin.pt2", []), ("mask_dino.pt2", ["--half"]), (os.fsdecode(b"mask_dino \xff.onnx"), [])]
)
def test_program_says_how_far_the_file_is_from_the_model(file, flags, program, swin, tmp_path):
    """At one size: Mask DINO's operators are some of DI-MaskDINO's, and tracing for all sizes takes a minute."""
    if file.endswith(".onnx"):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    if file.startswith("mask_dino"):
        toys.save(tmp_path / "c.pt", small_model(**MASK_DINO))
    status, said = program("c.pt", file, "--size", "96", "160", "--max-detections", "7", *flags)
    assert status == 0
    written, takes, checked = said.splitlines()
    assert written.startswith(f"{file.encode(errors='backslashreplace').decode()}: written in")
    assert takes == "takes batch 1 to 1, height 96 to 96, width 160 to 160, in steps of 32 pixels"
    assert checked.startswith("1 x 96 x 160: largest difference")
    scores, *others = map(float, re.findall(r"([\d.e+-]+) in ", checked.partition(":")[2]))
    assert len(others) == 2
    if flags:  # bfloat16 rounds to 0.4 %, by which tokens that are nearly equal change places
        assert scores < 0.01
    else:
        assert max(scores, *others) < 1e-4
    export.check_output(tmp_path / file, False, False)  # which may be written again
    detections = export.open_file(tmp_path / file)(torch.rand(1, 3, 96, 160))
    assert [x.shape for x in detections] == [(1, 7), (1, 7), (1, 7, 4), (1, 7, 24, 40)]
    assert [x.dtype for x in detections] == [torch.float32, torch.int64, torch.float32, torch.float32]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["c.pt", "out.txt"], "out.txt: the suffix says the format"),
        (["c.pt", "nowhere/out.pt2"], "nowhere/out.pt2: cannot be written (No such file or directory)"),
        (["c.pt", "out.onnx", "--size", "64", "64", "--compile"], "--compile is for .pt2"),
        (["c.pt", "out.onnx", "--half"], "--half is for .pt2"),
        (["c.pt", "out.pt2", "--size", "96", "100"], "--size 96 100: both must be multiples of 32"),
        (["c.pt", "out.pt2"], "--size is needed for a Swin backbone"),
        (["c.pt", "out.pt2", "--compile"], "--compile needs --size"),
        (["missing.pt", "c.pt/out.pt2"], "c.pt/out.pt2: cannot be written (Not a directory)"),
        (["missing.pt", "folder.pt2"], "folder.pt2: is a folder"),
        (["c.pt", "theirs.onnx"], "theirs.onnx: exists, and only a file of export.py is replaced"),
        (["missing.pt", "out.pt2"], "missing.pt: no such"),
    ],
)
def test_bad_input_is_one_line(flags, message, program, swin, tmp_path):
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "theirs.onnx").write_bytes(b"another program's")
    (tmp_path / "out.pt2").touch()
    status, _ = program(*flags)
    assert message in status and "\n" not in status


def test_sizes_that_a_file_takes():
    for preset, most, sides in (
        ("tiny", 4096, [96, 4096]),
        ("small", 1000, [96, 992]),
        ("maskdino_r50", 512, [128, 512]),
    ):
        assert dynamic_sizes(PRESETS[preset], most)[1] == {"batch": [1, 64], "height": sides, "width": sides}
    with pytest.raises(InputError, match="--max-size 192: must be 224 or more for this model; or give --size"):
        dynamic_sizes(PRESETS["dimaskdino_r50"], 192)


def test_a_disk_without_room_is_said_before_tracing(program, swin, monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    status, _ = program("c.pt", "out.pt2", "--size", "64", "64")
    assert "out.pt2: 0 MB are free, " in status and "\n" not in status


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    program = torch.export.export(torch.nn.Linear(99, 999), (torch.rand(1, 99),))
    (tmp_path / "out.pt2").write_text("earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            write(program, tmp_path / "out.pt2", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_compiling_without_a_compiler_is_one_line(program):
    with inductor.patch({"cpp.cxx": ("/no/compiler",)}):
        status, _ = program("c.pt", "out.pt2", "--compile", "--size", "64", "64")
    assert "--compile: needs a C++ compiler" in status and "\n" not in status
