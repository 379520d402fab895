"""checkpoint.py: files written whole or not at all, the newest one, what a training resumes, what it starts from."""

import errno
import fcntl
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from programs import SMALL, TRAINING, Process, assert_same_run, checkpoint, copy_of, log, program

import checkpoint as checkpoints
import cli
from backbone import ResNet
from checkpoint import Output, load_init, load_model, load_starting_point, read_checkpoint, read_log, save_checkpoint
from config import PRESETS, Config, InputError
from model import DIMaskDINO, build_model
from train import parse_arguments
from weights import WRAPPERS, read_weights

# Files


def test_a_file_that_cannot_be_written(tmp_path):
    """One line, and what was there stays; the file before the last one is kept under its name."""
    path = tmp_path / "checkpoint.pt"
    for number in (1, 2):
        save_checkpoint(path, {"number": number}, keep="previous.pt")
    assert checkpoint(tmp_path)["number"] == 2 and checkpoint(tmp_path, "previous.pt")["number"] == 1
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match="folder.pt: cannot be written .*untouched"):
        save_checkpoint(tmp_path / "folder.pt", {"number": 3})
    assert checkpoint(tmp_path)["number"] == 2 and not list(tmp_path.glob("*.tmp"))


def test_log_is_cut_where_training_goes_on(tmp_path):
    """Entries behind the checkpoint, a damaged line and a torn last one go."""
    path = tmp_path / "log.jsonl"
    assert read_log(path, 5) == []
    path.write_bytes(b'{"iteration": 2}\n{"iter\xff\n{"iteration": 4, "box": 1}\n{"iteration": 6}\n{"itera')
    entries = [{"iteration": 2}, {"iteration": 4, "box": 1}]
    assert read_log(path, 5) == entries == log(tmp_path)


# Resuming


def test_a_damaged_checkpoint_is_passed_over(run, uninterrupted, tmp_path, capsys):
    output = copy_of(uninterrupted, tmp_path / "out")
    (output / "checkpoint.pt").write_bytes((output / "checkpoint.pt").read_bytes()[:1000])
    run("--output", output, *SMALL, "--save-every", 2, "--resume")
    printed = capsys.readouterr()
    assert "checkpoint.pt" in printed.err and f"resuming {output / 'previous.pt'} after iteration 10" in printed.out
    assert_same_run(output, uninterrupted)
    (output / "checkpoint.pt").unlink()
    resumed = Output(output, resume=True)
    resumed.begin(10)
    assert (output / "checkpoint.pt").samefile(output / "previous.pt")
    resumed.lock.close()
    for name in ("checkpoint.pt", "previous.pt"):
        (output / name).write_bytes(b"PK")
    with pytest.raises(InputError, match="previous.pt: is a text, not weights"):
        run("--output", output, *SMALL, "--resume")


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--batch-size 2", "images_per_iteration 4 instead of 2"),
        ("--accumulate 2", "images_per_iteration 4 instead of 8"),
        ("--seed 5", "seed 0 instead of 5"),
        ("--no-augmentation", "augment True instead of False"),
        ("--keep-empty", "keep_empty False instead of True"),
        ("--backbone-lr 0", "frozen_backbone False instead of True"),
        ("--decoder-layers 3", "decoder_layers 2 instead of 3"),
        ("--no-bato", "bato True instead of False"),
        ("--selections 30", "selections"),
    ],
)
def test_other_settings_are_not_resumed(flags, named, run, uninterrupted):
    with pytest.raises(InputError, match=f"{named}.*--init"):
        run("--output", uninterrupted, *SMALL, "--resume", *flags.split())


def test_a_longer_schedule_in_another_split_is_resumed(run, uninterrupted, tmp_path, capsys):
    """As many images per iteration, in two batches: goes on; so it does with a rate of its own for the backbone, and
    with --grad-checkpoint, as nothing changes. The earlier end's eval.json goes, its means are of 12 of 20 iterations.
    """
    output = copy_of(uninterrupted, tmp_path / "out")
    [entry] = [entry for entry in log(output) if "loss" in entry]
    assert checkpoint(output)["window"]["loss"] == pytest.approx(12 * entry["loss"])
    split = ["--batch-size", 2, "--accumulate", 2, "--grad-checkpoint", "--no-eval", "--backbone-lr", 1e-5]
    run("--output", output, *SMALL, "--epochs", 5, "--resume", *split)
    assert "the schedule has changed in batch_size, iterations, milestones" in capsys.readouterr().out
    assert checkpoint(output)["iteration"] == 15 and not (output / "eval.json").exists()
    run("--output", output, *SMALL, "--epochs", 3, "--resume", *split)
    assert "warning: 15 iterations are made, 9 are asked for" in capsys.readouterr().err


def test_existing_run_is_not_overwritten(run, uninterrupted, tmp_path):
    """Nor is any file of one, nor its best checkpoint where there is none to resume."""
    before = {path: path.read_bytes() for path in uninterrupted.iterdir()}
    with pytest.raises(InputError, match="holds checkpoint.pt, previous.pt, best.pt, log.jsonl .*--resume"):
        run("--output", uninterrupted, *SMALL)
    assert {path: path.read_bytes() for path in uninterrupted.iterdir()} == before
    for name, more in (("previous.pt", []), ("best.pt", []), ("best.pt", ["--resume"]), ("log.jsonl", [])):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
        with pytest.raises(InputError, match=f"holds {name} of an earlier training; .* another --output"):
            run("--output", tmp_path, *SMALL, *more)
        (tmp_path / name).unlink()
    # Nor a log with evaluations, whose checkpoints were taken away, or one of another program.
    for text, says in (('{"iteration": 9, "box": {}}', "holds log.jsonl of"), ('{"a": 1}', "is not the log")):
        (tmp_path / "log.jsonl").write_text(text + "\n")
        with pytest.raises(InputError, match=f"{says} .* another --output"):
            run("--output", tmp_path, *SMALL, "--resume")
        assert (tmp_path / "log.jsonl").read_text() == text + "\n"


def test_nothing_to_resume(run, tmp_path, capsys):
    """A training that was ended before its first checkpoint begins anew; what it left in the log goes."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text('{"iteration": 20, "loss": 1.0}\n')
    run("--output", tmp_path / "out", *SMALL, "--resume", "--max-iterations", 1)
    assert f"nothing to resume in {tmp_path / 'out'}: starting anew" in capsys.readouterr().out
    assert checkpoint(tmp_path / "out")["iteration"] == 1 and log(tmp_path / "out") == []


def test_a_file_system_without_locks(run, tmp_path, monkeypatch, capsys):
    """One warning, and the training goes on."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    run("--output", tmp_path / "out", *SMALL, "--max-iterations", 1, "--no-eval")
    assert capsys.readouterr().err.count("out/.lock: cannot be locked (No locks available)") == 1
    assert checkpoint(tmp_path / "out")["iteration"] == 1


def read_as_another_user(read, path):
    os.chdir(path.parent)  # the folders above are the first user's alone
    if os.geteuid() == 0:
        os.setuid(12345)
    cli.run_program(lambda: read(path.name))


def test_a_file_without_rights(small_checkpoint, tmp_path):
    """The line says so, of a checkpoint of ours and of weights of others."""
    path = Path(shutil.copy(small_checkpoint, tmp_path / "c.pt"))
    tmp_path.chmod(0o755)
    path.chmod(0)
    for read in (read_checkpoint, read_weights):
        process = Process(read_as_another_user, read, path, output=tmp_path / "read")
        assert process.wait() == 1
        why = "cannot be read (Permission denied); check the disk and its rights"
        assert process.err.endswith(f"error: c.pt: {why}\n")


def test_full_disk(shapes, tmp_path):
    """No room for a second checkpoint on a small disk: one clear line, and the first one still loads."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        flags = ["--data-root", shapes, "--output", disk / "out", *SMALL, "--save-every", 1]
        process = program("train", *flags, output=tmp_path / "train")
        assert process.wait() == 1 and "Traceback" not in process.err
        [line] = [line for line in process.err.splitlines() if "error:" in line]
        assert "checkpoint.pt: cannot be written" in line
        assert checkpoint(disk / "out")["iteration"] == 1
        assert not list((disk / "out").glob("*.tmp"))
    finally:
        subprocess.run(["umount", disk], check=True)


# Starting points


def test_init_from_other_classes(run, shapes, uninterrupted, tmp_path, capsys):
    """What fits is loaded; what belongs to classes starts anew where these differ; both are listed."""
    source = checkpoint(uninterrupted)
    run("--output", tmp_path / "same", *SMALL, "--init", uninterrupted / "checkpoint.pt", "--max-iterations", 1)
    printed = capsys.readouterr().out
    assert f"{len(source['model'])} of {len(source['model'])} entries loaded" in printed
    source["classes"] = [f"other {name}" for name in source["classes"]]
    save_checkpoint(tmp_path / "other.pt", source)
    model = DIMaskDINO(Config(**source["config"]))
    lines = load_init(model, tmp_path / "other.pt", ["a", "b"])
    fresh = "heads.class_head.weight, heads.class_head.bias, denoising.label_embedding.weight"
    assert fresh in lines[1] or set(fresh.split(", ")) <= set(lines[1].split(": ")[1].split(", "))
    assert torch.equal(model.heads.box_head.layers[0].weight, source["model"]["heads.box_head.layers.0.weight"])
    assert not torch.equal(model.heads.class_head.weight, source["model"]["heads.class_head.weight"])
    save_checkpoint(tmp_path / "foreign.pt", source | {"model": {"weight": torch.zeros(3)}})
    with pytest.raises(InputError, match="foreign.pt: nothing in it fits"):
        load_init(model, tmp_path / "foreign.pt", ["a"])


def test_backbone_weights_by_default(run, tmp_path, monkeypatch):
    """Real training starts from ImageNet weights; where they cannot be loaded, the error says where to put them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "torch.hub.download_url_to_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network"))
    )
    flags = ["--output", tmp_path / "out", "--preset", "dimaskdino_r50", *TRAINING]
    with pytest.raises(InputError, match=f"no network.*put it into {tmp_path / 'cache'}.*--backbone-weights none"):
        run(*flags)
    assert not (tmp_path / "out").exists()
    loaded = []
    monkeypatch.setattr(checkpoints, "load_backbone_weights", lambda backbone, source, trust: loaded.append(source))
    model = build_model("tiny", backbone="resnet50", frozen_batch_norm=True)
    load_starting_point(model, parse_arguments([]), [])
    assert isinstance(model.backbone, ResNet) and loaded == ["ResNet50_Weights.IMAGENET1K_V1"]
    load_starting_point(model, parse_arguments(["--backbone-weights", "none"]), [])
    assert len(loaded) == 1
    model.config = PRESETS["dimaskdino_swin_l"]
    with pytest.raises(InputError, match="swin_large_patch4_window12_384_22k.pth"):
        load_starting_point(model, parse_arguments([]), [])


# Files that went through other hands: prefixes, wrappers, damage, names of classes


@pytest.fixture
def content(small_checkpoint):
    return torch.load(small_checkpoint, weights_only=True)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_prefixes_are_taken_off(content, tmp_path, prefix):
    weights = content["model"]
    model, _ = load_model(saved(tmp_path, content | {"model": {prefix + name: x for name, x in weights.items()}}))
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_parts_may_have_been_compiled(content, tmp_path):
    weights = {name.replace("encoder.", "encoder._orig_mod."): x for name, x in content["model"].items()}
    load_model(saved(tmp_path, content | {"model": weights}))


@pytest.mark.parametrize("wrapper", WRAPPERS[1:])
def test_weights_are_found_and_where_they_were_is_said(content, tmp_path, capsys, wrapper):
    content[wrapper] = content.pop("model")
    model, checkpoint = load_model(saved(tmp_path, content))
    assert wrapper in capsys.readouterr().err
    assert torch.equal(checkpoint["model"]["heads.norm.weight"], model.heads.norm.weight)


def test_numbers_of_the_config_come_back_as_tuples(content, tmp_path):
    config = content["config"] | {"selections": [60, 30], "test_size": [64, 64], "train_scale": [0.8, 1.25]}
    model, checkpoint = load_model(saved(tmp_path, content | {"config": config}))
    assert checkpoint["config"] == content["config"] and model.config.selections == (60, 30)


def fails(path, says):
    with pytest.raises(InputError, match=says) as error:
        load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_names_of_classes_that_are_too_few(content, tmp_path):
    fails(saved(tmp_path, content | {"classes": content["classes"][:9]}), "holds 9 classes for 10 classes")
    fails(saved(tmp_path, content | {"category_ids": [1, 2]}), "holds 2 category_ids for 10 classes")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(content, tmp_path, value):
    content["model"]["bato.norm.bias"][3] = value
    fails(saved(tmp_path, content), "bato.norm.bias holds NaN or infinity")


def test_what_does_not_fit_is_named_and_the_list_is_cut(content, tmp_path):
    content["config"]["decoder_layers"] = 9
    fails(saved(tmp_path, content), r"do not fit \(in decoder_layers: missing: decoder.layers.3.*; and \d+ more\)")
    content["config"]["depth"] = 3
    fails(saved(tmp_path, content), "its config is not one of this version .*depth")


def test_what_is_no_checkpoint_is_called_what_it_is(content, tmp_path):
    path = tmp_path / "file.pt"
    for text, says in (
        ("<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "is a Git LFS pointer"),
        ("hello", "is a text"),
        ("", "is empty"),
    ):
        path.write_text(text)
        fails(path, says)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.json", "{}")
    fails(path, "is an archive without a checkpoint, perhaps of export.py")
    fails(tmp_path / "none.pt", "no such file")
    torch.save({"state_dict": content["model"]}, path)
    fails(path, "run convert.py on a released one .*tensors in it, but no 'config' and no 'classes'")
    torch.save(content | {"config": torch.nn.Linear(1, 1)}, path)  # an object, which only a pickle can open
    with pytest.raises(InputError, match="only Python's pickle can open it.*convert.py"):
        read_checkpoint(path)
