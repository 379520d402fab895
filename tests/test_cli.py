"""cli.py: flags that name data, devices and processes; bad files and flags end a program with one line that names them.

The programs run in this process, as their files do at their end; `test_as_a_user_sees_it` starts a real one.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from programs import NARROW, Process, group
from programs import program as start_program

import cli
import distributed
import eval as evaluation
import predict
import shapes as generated
import train
from config import InputError
from formats.bdd100k import BDD100K_CLASSES
from formats.images import DataError
from shapes import make_shapes

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"train.py": train.main, "eval.py": evaluation.main, "predict.py": predict.main}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of undamaged files: `coco`, `bdd100k`, and a checkpoint for each."""
    root = tmp_path_factory.mktemp("good")
    make_shapes(root / "coco", train=4, val=2, size=64)
    categories = json.loads((root / "coco/annotations/instances_val2017.json").read_bytes())["categories"]
    toys.save_untrained(root / "coco.pt", [category["name"] for category in categories], backbone=NARROW)
    toys.save_untrained(root / "bdd100k.pt", BDD100K_CLASSES, backbone=NARROW)
    for split in ("train", "val"):
        bitmasks, images = root / f"bdd100k/labels/ins_seg/bitmasks/{split}", root / f"bdd100k/images/10k/{split}"
        bitmasks.mkdir(parents=True)
        images.mkdir(parents=True)
        for name in ("a", "b"):
            pixels = np.zeros((48, 64, 4), np.uint8)
            pixels[5:30, 10:40] = 3, 0, 0, 1
            pixels[30:40, 20:60] = 1, 4, 1, 2
            Image.fromarray(pixels).save(bitmasks / f"{name}.png")
            Image.fromarray(pixels[:, :, :3] * 50).save(images / f"{name}.jpg")
    return root


@pytest.fixture
def folder(good, tmp_path):
    """A copy of them, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "files"))


def command(program_and_data):
    """How to call a program when all is well, e.g. "train coco"; DIR stands for the folder of files."""
    program, data = program_and_data.split()
    if program == "predict":
        flags = ["--output", "DIR/out", f"DIR/{PHOTOS}"]
    else:
        flags = ["--data", data, "--data-root", f"DIR/{data}", "--workers", "0"]
    if program == "train":
        flags += ["--output", "DIR/out", "--batch-size", "2", "--epochs", "1", "--train-size", "64"]
        flags += ["--preset", "tiny", "--test-size", "64", "64"]
    else:
        flags += ["--checkpoint", f"DIR/{data}.pt"]
    return [f"{program}.py", *flags, "--device", "cpu"]


def run(capsys, monkeypatch, folder, command):
    """Run a program in this process; returns its exit status and its message on stderr."""
    monkeypatch.setattr(sys, "argv", [part.replace("DIR", str(folder)) for part in command])
    try:
        cli.run_program(PROGRAMS[command[0]])
    except SystemExit as end:
        if isinstance(end.code, str):  # as Python does with it at the end of a program
            return 1, end.code
        return end.code, capsys.readouterr().err
    return 0, ""


# --- what can be done to a file


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def text(content):
    return lambda path: path.write_text(content)


def edit(change):
    """Change the dictionary in an annotation file."""

    def edit_file(path):
        content = json.loads(path.read_bytes())
        change(content)
        path.write_text(json.dumps(content))

    return edit_file


def first(**values):
    return edit(lambda content: content["annotations"][0].update(values))


def every(table, **values):
    return edit(lambda content: [entry.update(values) for entry in content[table]])


def image(mode, size):
    return lambda path: Image.new(mode, size).save(path)


def pixel(*value):
    """Change one pixel of a bitmask."""

    def edit_file(path):
        with Image.open(path) as bitmask:
            bitmask.load()
        bitmask.putpixel((0, 0), value)
        bitmask.save(path)

    return edit_file


def bitmasks(*value):
    """Fill all bitmasks in a folder with one value."""
    return lambda path: [Image.new("RGBA", (64, 48), value).save(file) for file in sorted(path.iterdir())]


def save(content):
    return lambda path: torch.save(content, path)


def copy_of(name):
    return lambda path: shutil.copy(path.parent / name, path)


TRAIN, VAL = "coco/annotations/instances_train2017.json", "coco/annotations/instances_val2017.json"
PHOTOS, PHOTO = "coco/images/val2017", "coco/images/val2017/000000000001.png"
MASKS, MASK = "bdd100k/labels/ins_seg/bitmasks/train", "bdd100k/labels/ins_seg/bitmasks/train/a.png"
MASKED = "bdd100k/images/10k/train/a.jpg"
NAN, SHORT = float("nan"), {"size": [64, 64], "counts": [3, 5]}
FILES = {  # what is wrong: the program and its data, the file, what is done to it, what the line says besides its name
    "annotation file missing": ("train coco", TRAIN, remove, "has neither"),
    "annotation file cut off": ("train coco", TRAIN, cut, "is not JSON"),
    "annotation file empty": ("eval coco", VAL, text(""), "is not JSON"),
    "annotation file of another kind": ("eval coco", VAL, text("[1, 2]"), "not in COCO format"),
    "image folder missing": ("train coco", "coco/images/train2017", remove, "put the train images there"),
    "image missing": ("eval coco", PHOTO, remove, "1 of 2 images are not in"),
    "image cut off": ("eval coco", PHOTO, cut, "cannot be read as an image"),
    "image of another size": ("eval coco", PHOTO, image("RGB", (32, 64)), "image is 32x64, .* 64x64"),
    "photograph is a text": ("predict coco", PHOTO, text("no image"), "could not be done"),
    "photographs missing": ("predict coco", PHOTOS, remove, "no such image or folder"),
    "checkpoint missing": ("eval coco", "coco.pt", remove, "no such file"),
    "checkpoint cut off": ("predict coco", "coco.pt", cut, "perhaps truncated"),
    "checkpoint of another kind": ("eval coco", "coco.pt", save({"weights": torch.ones(2)}), "not a checkpoint"),
    "checkpoint of other classes": ("eval coco", "coco.pt", copy_of("bdd100k.pt"), "'circle', .* 'pedestrian'"),
    # annotations
    "no images": ("train coco", TRAIN, edit(lambda content: content.update(images=[])), "the data set is empty"),
    "two points": ("train coco", TRAIN, every("annotations", segmentation=[[1, 1, 5, 5]]), "no annotation is left"),
    "polygon of NaN": ("train coco", TRAIN, first(segmentation=[[1, 1, 5, 5, 9, NAN]]), "1: polygon with coordinates"),
    "RLE of another size": ("eval coco", VAL, first(segmentation={"size": [9, 9]}), "annotation 1: RLE of size"),
    "RLE too short": ("eval coco", VAL, first(segmentation=SHORT), "annotation 1: RLE whose counts do not add up"),
    "box without width": ("train coco", TRAIN, every("annotations", bbox=[1, 1, 0, 5]), "annotation 1: box .*no area"),
    "unknown category": ("train coco", TRAIN, first(category_id=99), "annotation 1: unknown category id 99"),
    "unknown image": ("train coco", TRAIN, every("annotations", image_id=99), "no annotation is left"),
    "two images of one id": ("train coco", TRAIN, every("images", id=1), "id 1 occurs twice in 'images'"),
    "only crowds": ("train coco", TRAIN, every("annotations", iscrowd=1), "no image has an instance to train on"),
    # BDD100K
    "bitmask folder missing": ("train bdd100k", MASKS, remove, "no such folder"),
    "bitmask missing": ("train bdd100k", MASK, remove, "a.jpg: .*bitmasks/train has no a.png"),
    "its image missing": ("train bdd100k", MASKED, remove, "a.png: .*10k/train has no a.jpg"),
    "its image is a text": ("train bdd100k", MASKED, text("x"), "cannot be read as an image"),
    "bitmask cut off": ("train bdd100k", MASK, cut, "cannot be read as an image"),
    "bitmask in RGB": ("train bdd100k", MASK, image("RGB", (64, 48)), "is RGB, not RGBA"),
    "bitmask with a palette": ("train bdd100k", MASK, image("P", (64, 48)), "is P, not RGBA"),
    "bitmask of another size": ("train bdd100k", MASK, image("RGBA", (48, 64)), "is 48x64, its image 64x48"),
    "category 9": ("train bdd100k", MASK, pixel(9, 0, 0, 7), "category 9 and instance id 7"),
    "instance without category": ("train bdd100k", MASK, pixel(0, 0, 0, 255), "category 0 and instance id 255"),
    "category without instance": ("train bdd100k", MASK, pixel(3, 0, 0, 0), "category 3 and instance id 0"),
    "instance of two categories": ("train bdd100k", MASK, pixel(4, 0, 0, 1), "instance 1 has pixels of several"),
    "no instance": ("train bdd100k", MASKS, bitmasks(0, 0, 0, 0), "no instance in 2 bitmasks"),
    "only ignored ones": ("train bdd100k", MASKS, bitmasks(3, 1, 0, 1), "no image has an instance to train on"),
}  # fmt: skip
FLAGS = {  # what is wrong: the program and its data, the flags, what the line says
    "an empty word": ("eval coco", ["--data-root", ""], "the word behind --data-root is empty; is a variable"),
    "an empty value": ("train coco", ["--init="], "the word behind --init is empty; is a variable"),
    "annotations without images": ("train coco", ["--train-json", f"DIR/{TRAIN}"], "--train-images is missing"),
    "images without annotations": ("eval coco", ["--val-images", f"DIR/{PHOTOS}"], "together: --val-json is missing"),
    "unknown data": ("eval coco", ["--data", "voc"], "--data: invalid choice: 'voc'"),
    "unknown preset": ("train coco", ["--preset", "huge"], "--preset: invalid choice: 'huge'"),
    "negative workers": ("train coco", ["--workers", "-1"], "--workers: must be 0 or more"),
    "workers in words": ("eval coco", ["--workers", "two"], "--workers: invalid"),
    "no batch": ("eval coco", ["--batch-size", "0"], "--batch-size: must be 1 or more, not 0"),
    "no checkpoint": ("eval coco", ["--checkpoint", "DIR"], "is a folder; give the checkpoint file"),
    "unknown device": ("train coco", ["--device", "abacus"], "--device abacus: cannot be used here"),
    "unknown precision": ("train coco", ["--precision", "int8"], "--precision: invalid choice: 'int8'"),
    "unknown schedule": ("train coco", ["--schedule", "13ep"], "--schedule: invalid choice: '13ep'"),
    "epochs in words": ("train coco", ["--epochs", "x"], "--epochs: invalid number value: 'x'"),
    "negative rate": ("train coco", ["--lr", "-1"], "--lr: must be 0 or more, not -1"),
    "rate of NaN": ("train coco", ["--backbone-lr", "nan"], "--backbone-lr: must be 0 or more, not nan"),
    "negative warm-up": ("train coco", ["--warmup", "-3"], "--warmup: must be 0 or more"),
    "negative seed": ("train coco", ["--seed", "-1"], "--seed: must be from 0 to 9223372036854775807, not -1"),
    "huge seed": ("train coco", ["--seed", "9" * 20], "--seed: must be from 0 to 9223372036854775807, not 9999"),
    "selections that grow": ("train coco", ["--selections", "30,60"], r"selections \(30, 60\)"),
    "settings that do not fit": ("train coco", ["--guidance", "t_s2", "--no-di"], "guidance t_s2"),
    "start from nothing": ("train coco", ["--init", "DIR/none.pt"], "none.pt: no such file"),
    "backbone from nothing": ("train coco", ["--backbone-weights", "DIR/swin.pth"], "swin.pth"),
    "output in a file": ("train coco", ["--output", "DIR/coco.pt/out"], "coco.pt"),
    "no classifier as backbone": (
        "train coco", ["--backbone", "fasterrcnn_resnet50_fpn"], "backbone 'fasterrcnn_resnet50_fpn': choose "
    ),
    "unknown backbone": ("train coco", ["--backbone", "vgg16"], "backbone 'vgg16': choose "),
}  # fmt: skip
if not torch.cuda.is_available():
    FLAGS["no GPU"] = ("eval coco", ["--device", "cuda"], "--device cuda: no usable CUDA GPU")
    FLAGS["no GPU to train on"] = ("train coco", ["--device", "cuda"], "--device cuda: no usable CUDA GPU")


def error_line(status, message):
    """The one error line of a program that failed; argparse prints its usage before it."""
    assert status not in (0, None), "the program did not fail"
    assert "Traceback" not in message
    [line] = [line for line in message.strip().splitlines() if "error: " in line]
    assert message.strip().endswith(line)
    return line


@pytest.mark.parametrize("case", FILES)
def test_damaged_file(folder, capsys, monkeypatch, case):
    program, file, damage, says = FILES[case]
    damage(folder / file)
    line = error_line(*run(capsys, monkeypatch, folder, command(program)))
    assert Path(file).name in line and re.search(says, line), line
    assert not (folder / "out").exists() or program.startswith("predict")


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flags(good, capsys, monkeypatch, case):
    program, flags, says = FLAGS[case]
    line = error_line(*run(capsys, monkeypatch, good, [*command(program), *flags]))
    assert re.search(says, line), line
    assert not (good / "out").exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_ends_well(capsys, monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.run_program(PROGRAMS[program])
    assert end.value.code == 0 and "--device" in capsys.readouterr().out


def test_as_a_user_sees_it(folder):
    program, file, damage, says = FILES["checkpoint cut off"]
    damage(folder / file)
    name, *flags = command(program)
    arguments = [sys.executable, ROOT / name, *(flag.replace("DIR", str(folder)) for flag in flags)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    line = error_line(result.returncode, result.stderr)
    assert line.startswith(f"{name}: error: ") and Path(file).name in line and re.search(says, line), line


@pytest.mark.parametrize("data", ["coco", "bdd100k"])
def test_undamaged_files_train_and_evaluate(folder, capsys, monkeypatch, data):
    """What the cases above start from is sound."""
    for name in ("train", "eval"):
        status, message = run(capsys, monkeypatch, folder, command(f"{name} {data}"))
        assert status == 0, message
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["box"].keys() == log[-1]["mask"].keys()
    assert list((folder / "out").glob("*.png"))


# What becomes of the words


def evaluate_with(streams, flags):
    """eval.py where stdout and stderr are `streams`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if streams == "closed":
            os.close(number)
            setattr(sys, name, None)  # as Python does where the shell has closed it
        elif streams == "pipe":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, number)
        elif streams == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        else:
            setattr(sys, name, open(number, "w", encoding=streams, closefd=False))
    sys.argv = ["eval.py", *map(str, flags)]
    evaluation.save_classes = lambda *_: None  # a chart takes longer than all the rest
    cli.run_program(evaluation.main)


def test_words_that_nobody_takes(good, tmp_path):
    """Closed, broken, full and narrow streams change no file and no status; what a narrow one lacks is escaped."""
    checkpoint = torch.load(good / "coco.pt", weights_only=True)
    names = {name: f"{name} 너트" for name in checkpoint["classes"]}
    torch.save(checkpoint | {"classes": list(names.values())}, tmp_path / "korean.pt")
    content = json.loads((good / VAL).read_text())
    content["categories"] = [c | {"name": names[c["name"]]} for c in content["categories"]]
    (tmp_path / "val.json").write_text(json.dumps(content))
    flags = ["--val-json", tmp_path / "val.json", "--val-images", good / PHOTOS, "--checkpoint", tmp_path / "korean.pt"]
    flags += ["--device", "cpu", "--workers", 0, "--per-class"]
    processes = {}
    for streams in ("utf-8", "cp1252", "closed", "pipe", "full"):
        files = ["--output", tmp_path / f"{streams}.json", "--results", tmp_path / f"{streams}.results.json"]
        processes[streams] = Process(evaluate_with, streams, [*flags, *files], output=tmp_path / streams)
    for streams, process in processes.items():
        assert process.wait() == 0, (streams, process.err)
        for kind in ("json", "results.json"):
            assert (tmp_path / f"{streams}.{kind}").read_text() == (tmp_path / f"utf-8.{kind}").read_text()
    assert "너트" in processes["utf-8"].out and r"\ub108\ud2b8" in processes["cp1252"].out
    assert processes["closed"].out == processes["pipe"].out == ""


def test_processes_share_an_evaluation(good, tmp_path):
    """eval.py under torchrun: the same numbers and results, which the first process alone prints and writes."""
    name, *flags = (part.replace("DIR", str(good)) for part in command("eval coco"))

    def start(rank, **options):
        files = ["--output", tmp_path / f"{rank}.json", "--results", tmp_path / f"{rank}.results.json"]
        return start_program("eval", *flags, "--per-layer", *files, **options)

    alone, *pair = start("alone", output=tmp_path / "alone"), *group(start, tmp_path / "pair")
    assert [process.wait() for process in (alone, *pair)] == [0, 0, 0], pair[0].err
    assert pair[1].out == "" and not (tmp_path / "1.json").exists()
    assert pair[0].out.splitlines()[:3] == alone.out.splitlines()[:3]
    for kind in ("json", "results.json", "results.segm.json"):
        assert (tmp_path / f"0.{kind}").read_text() == (tmp_path / f"alone.{kind}").read_text()


# Which data is meant


def data_flags(*flags, **more):
    parser = argparse.ArgumentParser()
    cli.add_data_arguments(parser)
    return SimpleNamespace(**vars(parser.parse_args([str(flag) for flag in flags])), **more)


def files_of(root, *splits):
    flags = []
    for split in splits:
        flags += [f"--{split}-json", root / f"coco/annotations/instances_{split}2017.json"]
        flags += [f"--{split}-images", root / f"coco/images/{split}2017"]
    return flags


def test_one_split_alone(good, monkeypatch):
    """The missing flags are named, and --no-eval where the program has it; nothing is generated."""
    monkeypatch.setattr(cli, "make_shapes", lambda *args, **options: pytest.fail("images were generated"))
    only = data_flags(*files_of(good, "train"))
    cli.generate_shapes(only)
    assert len(cli.open_split(only, "train")) == 4
    with pytest.raises(DataError, match="^--val-json and --val-images are missing: .* other split alone$"):
        cli.open_split(only, "val")
    only.evaluate = True  # as of train.py
    with pytest.raises(DataError, match="--val-json and --val-images are missing.*--no-eval"):
        cli.open_split(only, "val")
    for more in ([], ["--data", "shapes"], ["--data", "coco"]):
        with pytest.raises(DataError, match="--train-json and --train-images are missing"):
            cli.open_split(data_flags(*files_of(good, "val"), *more), "train")
    for kind in ("coco", "bdd100k"):
        with pytest.raises(DataError, match=f"--data {kind} needs --data-root, or --train-json and --train-images"):
            cli.open_split(data_flags("--data", kind), "train")
    both = data_flags(*files_of(good, "train", "val"))
    assert len(cli.open_split(both, "train")) == 4 and len(cli.open_split(both, "val")) == 2
    mixed = data_flags("--data-root", good / "coco", *files_of(good, "val"))
    assert len(cli.open_split(mixed, "train")) == 4 and len(cli.open_split(mixed, "val")) == 2


def test_shapes_are_generated_where_nothing_is_named(tmp_path, monkeypatch):
    made = []

    def small(root, hard=False):
        made.append((str(root), hard))
        make_shapes(root, train=3, val=2, size=64, hard=hard)

    monkeypatch.setattr(cli, "make_shapes", small)
    monkeypatch.chdir(tmp_path)
    assert len(cli.open_split(data_flags(), "val")) == 2
    assert len(cli.open_split(data_flags("--data", "shapes-hard"), "train")) == 3
    assert len(cli.open_split(data_flags("--data", "shapes", "--data-root", tmp_path / "a"), "val")) == 2
    assert made == [("runs/shapes", False), ("runs/shapes-hard", True), (str(tmp_path / "a"), False)]
    assert len(cli.open_split(data_flags("--data-root", tmp_path / "a"), "val")) == 2 and len(made) == 3


def test_images_without_instances_are_kept_on_request(good, tmp_path):
    content = json.loads((good / "coco/annotations/instances_train2017.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] > 1]
    (tmp_path / "train.json").write_text(json.dumps(content))
    flags = ["--train-json", tmp_path / "train.json", "--train-images", good / "coco/images/train2017"]
    assert len(cli.open_split(data_flags(*flags), "train")) == 3
    assert len(cli.open_split(data_flags(*flags, keep_empty=True), "train")) == 4


def generate(root):
    make_shapes(root, train=30, val=5, size=64)
    for split in ("train", "val"):
        names = {image["file_name"] for image in json.loads(
            (root / f"annotations/instances_{split}2017.json").read_text())["images"]}  # fmt: skip
        for name in names:
            with Image.open(root / f"images/{split}2017" / name) as image:
                image.load()


def test_two_machines_generate_on_one_disk(tmp_path):
    """At once: each finds whole files when it is done, and nothing else is left."""
    processes = [Process(generate, tmp_path / "shapes", output=tmp_path / name) for name in ("a", "b", "c")]
    assert [process.wait() for process in processes] == [0, 0, 0], processes[0].err
    assert not list((tmp_path / "shapes").rglob("*.tmp"))
    assert len(list((tmp_path / "shapes").rglob("*.png"))) == 35


def test_stale_shapes_are_made_anew(tmp_path, monkeypatch):
    make_shapes(tmp_path, train=2, val=1, size=32)
    before = (tmp_path / "annotations/instances_val2017.json").stat().st_mtime_ns
    make_shapes(tmp_path, train=2, val=1, size=32)
    assert (tmp_path / "annotations/instances_val2017.json").stat().st_mtime_ns == before
    monkeypatch.setattr(generated, "SHAPES_VERSION", 99)
    make_shapes(tmp_path, train=2, val=1, size=32)
    assert (
        json.loads((tmp_path / "annotations/instances_val2017.json").read_text())["info"]["settings"]["version"] == 99
    )


# Devices, precision and processes


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    dtypes = {name: cli.autocast_dtype(name, cpu) for name in ("auto", "float32", "bfloat16", "published")}
    assert dtypes == {"auto": None, "float32": None, "bfloat16": torch.bfloat16, "published": torch.float16}
    assert cli.autocast_dtype("float16", torch.device("cuda")) == torch.float16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert cli.autocast_dtype("auto", torch.device("cuda")) == dtype
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cli.choose_device("cpu")
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("precision", ["bfloat16", "published"])
def test_evaluation_in_half_precision(good, capsys, monkeypatch, precision):
    assert run(capsys, monkeypatch, good, [*command("eval coco"), "--precision", precision]) == (0, "")


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "x"}, "RANK is 'x' and not a number"),
        ({"RANK": "2"}, "RANK is 2 of WORLD_SIZE 2 processes"),
        ({}, "RANK is None of WORLD_SIZE 2 processes"),
        ({"RANK": "0"}, "the 2 processes do not find each other .*MASTER_ADDR.*torchrun"),
        ({"RANK": "0", "cuda": 2}, "LOCAL_RANK is None, this node has 2 GPU.*torchrun"),
        ({"RANK": "0", "LOCAL_RANK": "2", "cuda": 2}, "LOCAL_RANK is 2, this node has 2 GPU.*--nproc_per_node"),
    ],
)
def test_processes_that_are_not_told_who_they_are(environment, message, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    gpus = environment.pop("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in ({"WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as error:
        distributed.join_processes(cli.choose_device("auto"))
    assert "\n" not in str(error.value)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.choose_device("cuda:1").index == 1
    with pytest.raises(InputError, match="--device cuda:2: there are 2 GPUs here"):
        cli.choose_device("cuda:2")


def talk(rank, output):
    """One of three processes: they exchange values, agree on an error, and find out that one has gone."""
    assert distributed.join_processes(torch.device("cpu"))[1:] == (rank, rank, 3)
    assert distributed.gather(rank * 10) == [0, 10, 20] and distributed.together(lambda: rank) == rank
    distributed.say(f"said by {rank}")
    distributed.require_same(lr=1.0)
    distributed.PATIENCE = 0.1
    while rank == 2 and not all("has waited" in Path(f"{output}.{other}.err").read_text() for other in (0, 1)):
        time.sleep(0.01)
    if rank < 2:  # 2 is gone, without a word
        cli.run_program(lambda: distributed.gather(None))


def disagree(rank):
    distributed.join_processes(torch.device("cpu"))

    def step():
        if rank:
            raise DataError(f"file of {rank}: is missing")

    cli.run_program(lambda: distributed.together(step))


def as_first_process():
    os.getpid = lambda: 1
    cli.run_program(lambda: (print("here", flush=True), time.sleep(60)))


def test_the_first_process_of_a_container_heeds_sigterm(tmp_path):
    process = Process(as_first_process, output=tmp_path / "first")
    process.until(lambda: (tmp_path / "first.out").exists() and "here" in process.out)
    process.signal(signal.SIGTERM)
    assert process.wait() == 143


@pytest.mark.parametrize(
    "error, says",
    [
        (RuntimeError("Too many open files."), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer --workers"),
    ],
)
def test_limits_of_the_machine_are_one_line(error, says):
    assert says in cli.reason_of(error)


def test_a_notebooks_backend_that_is_not_installed():
    pytest.importorskip("matplotlib")
    code = "import cli, importlib; cli.run_program(lambda: importlib.import_module('matplotlib.figure'))"
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_processes_agree(tmp_path):
    start = lambda function, *more: lambda rank, **options: Process(function, rank, *more, **options)
    processes = group(start(talk, tmp_path / "talk"), tmp_path / "talk", world=3)
    assert [process.wait() for process in processes] == [1, 1, 0]
    assert [process.out for process in processes] == ["said by 0\n", "", ""]
    for rank in (0, 1):
        assert f"another process than {rank} has ended or is out of reach" in processes[rank].err
        assert processes[rank].err.startswith(f"process {rank} has waited 0 s for the others\n")
        assert "Traceback" not in processes[rank].err
    processes = group(start(disagree), tmp_path / "disagree", world=3)
    assert [process.wait() for process in processes] == [1, 1, 1]
    assert [process.err.count("error: ") for process in processes] == [0, 1, 0]
    assert processes[1].err.endswith("error: file of 1: is missing\n")
