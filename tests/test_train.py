"""train.py: schedules, sampling, gradients over batches and processes, exact resume, failures, what it says."""

import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toys
from PIL import Image
from programs import SMALL, TRAINING, Process, assert_same_run, checkpoint, group, log, program
from scipy.optimize import linear_sum_assignment
from torch.nn.parallel import DistributedDataParallel

import cli
import data
import matcher
import train
from cli import open_split
from config import Config, InputError
from data import collate, train_keys
from formats.images import DataError
from losses import SetCriterion
from model import DIMaskDINO, build_model
from train import backward, lr_factor, make_schedule, parameter_groups, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# Schedules


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--preset dimaskdino_r50 --schedule 12ep", (16, 88_500, [81_125], 1e-4)),
        ("--preset dimaskdino_r50 --schedule 24ep", (16, 177_000, [147_500], 1e-4)),
        ("--preset maskdino_r50 --schedule 50ep", (16, 368_750, [327_778, 355_092], 1e-4)),
        ("--preset dimaskdino_r50 --schedule bdd68ep", (8, 59_500, [43_750], 1e-4)),
        ("--preset dimaskdino_r50 --schedule 12ep --batch-size 32", (32, 44_250, [40_562], 2e-4)),
        ("--preset dimaskdino_r50 --schedule 12ep --batch-size 4 --accumulate 2", (4, 177_000, [162_250], 0.5e-4)),
        ("--preset dimaskdino_r50 --schedule 12ep --batch-size 8 --lr 3e-4", (8, 177_000, [162_250], 3e-4)),
        ("--preset dimaskdino_r50 --epochs 2 --milestones 100 150", (16, 125, [100, 150], 1e-4)),
        ("--preset dimaskdino_r50", (16, 750, [688], 1e-4)),
        ("--preset dimaskdino_r50 --lr 0", (16, 750, [688], 0)),
    ],
)
def test_schedules(flags, expected):
    """The published numbers for the published batch size, as many images for another; 1000 training images."""
    schedule = make_schedule(parse_arguments(flags.split()), num_images=1000)
    assert (schedule.batch_size, schedule.iterations, schedule.milestones) == expected[:3]
    assert schedule.lr == pytest.approx(expected[3]) and schedule.backbone_lr == pytest.approx(0.1 * expected[3])


def test_tiny_has_its_own_schedule():
    schedule = make_schedule(parse_arguments([]), num_images=2000)
    assert schedule._asdict() == {
        "batch_size": 16, "step_size": 16, "iterations": 1500, "milestones": [1200, 1425], "lr": 1e-3,
        "backbone_lr": 1e-3, "warmup": 100,
    }  # fmt: skip


def test_small_follows_the_number_of_images():
    schedules = [make_schedule(parse_arguments(["--preset", "small"]), num_images=n) for n in (435, 40)]
    assert schedules[0]._asdict() == {
        "batch_size": 8, "step_size": 8, "iterations": 3263, "milestones": [2600, 3100], "lr": 8e-4,
        "backbone_lr": pytest.approx(8e-5), "warmup": 50,
    }  # fmt: skip
    assert (schedules[1].iterations, schedules[1].milestones, schedules[1].warmup) == (300, [239, 285], 30)


def test_zero_is_a_value():
    schedule = make_schedule(parse_arguments("--warmup 0 --backbone-lr 0".split()), num_images=1000)
    assert (schedule.warmup, schedule.backbone_lr, schedule.lr) == (0, 0, 1e-3)


def test_learning_rate():
    factors = [lr_factor(i, milestones=[6, 8], warmup=3) for i in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_parameter_groups():
    """Each parameter once; weight decay of all but norms and embeddings; a backbone of rate 0 is left out."""
    model = build_model("tiny")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, 1e-4)
    assert sorted(names.values()) == sorted(names[p] for settings in groups for p in settings["params"])
    for settings in groups:
        for name in map(names.get, settings["params"]):
            assert settings["lr"] == settings["base_lr"] == (1e-4 if name.startswith("backbone") else 1e-3)
            plain = "norm" in name or "embedding" in name or ".bn" in name
            assert not (plain and settings["weight_decay"]), name
    decays = {names[p]: settings["weight_decay"] for settings in groups for p in settings["params"]}
    assert decays["encoder.level_embed"] == decays["backbone.body.conv1.weight"] == 0.05
    assert decays["denoising.label_embedding.weight"] == decays["backbone.body.bn1.weight"] == 0
    assert len(parameter_groups(model, 1e-3, 1e-3)) == len(groups)  # so that a resumed training may change its rates
    frozen = parameter_groups(model, 1e-3, 0)
    assert {names[p] for settings in frozen for p in settings["params"]} == {
        name for name in names.values() if not name.startswith("backbone")
    }


# Sampling


def batches(count, **kwargs):
    return list(islice(train_keys(**kwargs), count))


def test_every_epoch_is_another_permutation():
    positions = [item for batch in batches(9, num_images=10, batch_size=4, seed=3) for item in batch]
    epochs = [[index for index, _ in positions[start : start + 10]] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({seed for _, seed in positions}) == len(positions)  # each with an augmentation of its own
    assert batches(9, num_images=10, batch_size=4, seed=3) != batches(9, num_images=10, batch_size=4, seed=4)


def test_processes_share_every_batch():
    whole = batches(5, num_images=7, batch_size=6, seed=0)
    parts = [batches(5, num_images=7, batch_size=6, seed=0, rank=rank, world=3) for rank in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(sum(shares, [])) and all(len(share) == 2 for share in shares)


def test_sampling_goes_on_where_it_stopped():
    rest = batches(2, num_images=7, batch_size=3, seed=0, start=12)
    assert batches(6, num_images=7, batch_size=3, seed=0)[4:] == rest


def test_another_split_draws_the_same_images():
    """Images and their augmentations depend on the position in training, not on the batches it is cut into."""
    whole = batches(4, num_images=7, batch_size=4, seed=0)
    halves = batches(8, num_images=7, batch_size=2, seed=0)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole


# Gradients of a step, whatever it is made of


@pytest.fixture
def fixed_points(monkeypatch):
    """The same "random" numbers for every mask, so that a step's parts draw what the whole draws."""
    fix_points(monkeypatch)


def fix_points(patch):
    original = torch.rand

    def rand(*shape, **options):
        if len(shape) < 3:  # not points of masks, (N, P, 2)
            return original(*shape, **options)
        numbers = original(shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return numbers.to(options["dtype"]).expand(shape).contiguous()

    patch.setattr(torch, "rand", rand)


@pytest.fixture
def no_ties(monkeypatch):
    """Fails the test where rounding could choose between two assignments of queries to targets.

    After the test, the cost of the best assignment of every image and set that gives one of its pairs up is compared
    with that of the best. (In an untrained model boxes of several queries are equal, and with them such costs.)
    """
    gaps = []

    def watched(costs):
        costs = np.asarray(costs)
        rows, columns = pairs = linear_sum_assignment(costs)
        for pair in zip(rows, columns, strict=True):
            others = costs.copy()
            others[pair] = 1e6
            gaps.append(others[linear_sum_assignment(others)].sum() - costs[pairs].sum())
        return pairs

    monkeypatch.setattr(matcher, "linear_sum_assignment", watched)
    yield
    assert gaps and min(gaps) > 1e-9  # rounding changes costs in float64 by about 1e-14


def small_model(**settings):
    """In float64, without noise; without denoising queries as a default."""
    return toys.model(**({"noise_scale": 0.0, "denoising_queries": 0} | settings)).double()


def samples(shapes, count=8):
    """A batch of augmented training images; float64, since equal sums in float32 differ in the seventh digit."""
    args = parse_arguments(["--data-root", str(shapes)])
    dataset = open_split(args, "train", augmentation=(64, (0.8, 1.25)))
    torch.manual_seed(1)
    images, targets = collate([dataset[i] for i in range(count)])
    return [image.double() for image in images], [t | {"boxes": t["boxes"].double()} for t in targets]


def first_instances(targets, *counts):
    """Targets with so many of their instances, repeated where they are fewer."""
    cut = []
    for target, count in zip(targets, counts, strict=True):
        index = torch.arange(count) % max(1, len(target["labels"]))
        cut.append(target | {name: target[name][index] for name in ("labels", "boxes", "masks")})
    return cut


def gradients(parts, model=None, **options):
    model = model or small_model()
    terms, _ = backward(model, SetCriterion(model.config), parts, **options)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, terms


def assert_close(ours, theirs, rtol=1e-5):
    """Gradients equal relative to the size of each parameter's."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= rtol * gradient.norm() + 1e-12, name


def test_accumulated_batches_are_one(shapes, fixed_points, no_ties):
    """Four batches of two give the gradients and losses of one of eight, though their counts of instances differ."""
    images, targets = samples(shapes)
    assert len({len(target["labels"]) for target in targets}) > 2
    whole, terms = gradients([(images, targets)])
    parts, summed = gradients([(images[i : i + 2], targets[i : i + 2]) for i in range(0, 8, 2)])
    assert_close(parts, whole)
    assert any(gradient.abs().max() > 0 for gradient in whole.values())
    assert {n: float(v) for n, v in summed.items()} == pytest.approx({n: float(v) for n, v in terms.items()}, rel=1e-6)


def test_a_part_without_instances(shapes, fixed_points, no_ties):
    images, targets = samples(shapes, 4)
    targets = first_instances(targets, 2, 2, 0, 0)
    whole, _ = gradients([(images, targets)])
    parts, _ = gradients([(images[i : i + 2], targets[i : i + 2]) for i in (0, 2)])
    assert_close(parts, whole)
    assert all(gradient is not None for gradient in parts.values())


def part_of_two(rank, shapes, output):
    """What one of two processes makes of its share of several steps."""
    dist.init_process_group("gloo")
    images, targets = samples(shapes)
    share = lambda first, targets: (images[first + rank : first + 4 : 2], targets[first + rank : first + 4 : 2])
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        fix_points(patch)
        for name, instances, denoising in (("plain", targets, 0), ("equal", first_instances(targets, *[3] * 8), 30)):
            model = small_model(denoising_queries=denoising)
            terms, _ = backward(
                DistributedDataParallel(model), SetCriterion(model.config), [share(0, instances), share(4, instances)]
            )
            found[name] = {n: p.grad for n, p in model.named_parameters()}, terms["loss"]
    for name, counts in (("groups", (3, 40)), ("empty", (3, 0))):
        model = small_model(denoising_queries=100)
        groups = []
        model.register_forward_hook(lambda *result: groups.append(result[-1].get("dn_outputs", {}).get("num_groups")))  # noqa: B023
        batch = [images[rank]], first_instances(targets[rank : rank + 1], counts[rank])
        backward(DistributedDataParallel(model), SetCriterion(model.config), [batch])
        found[name] = groups, {n: p.grad for n, p in model.named_parameters()}
    torch.save(found, f"{output}.{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(shapes, fixed_points, no_ties, tmp_path):
    """Two processes, two batches each, give the gradients of one batch of eight in one process.

    Denoising groups follow the images of each process: off, or with as many instances in every image, for the equality.
    """
    start = lambda rank, **options: Process(part_of_two, rank, str(shapes), str(tmp_path / "two"), **options)
    for process in group(start, tmp_path / "process"):
        assert process.wait() == 0, process.err
    found = [torch.load(tmp_path / f"two.{rank}.pt") for rank in (0, 1)]
    images, targets = samples(shapes)
    for name, instances, denoising in (("plain", targets, 0), ("equal", first_instances(targets, *[3] * 8), 30)):
        whole, terms = gradients([(images, instances)], small_model(denoising_queries=denoising))
        assert ("loss_ce_dn" in terms) == (denoising > 0)
        for part in found:
            assert_close(part[name][0], whole)
        assert sum(float(part[name][1]) for part in found) / 2 == pytest.approx(float(terms["loss"]), rel=1e-6)

    assert [part["groups"][0] for part in found] == [[33], [2]]
    assert [part["empty"][0] for part in found] == [[33], [None]]
    for name in ("groups", "empty"):  # both have all gradients, the same ones
        assert_close(found[0][name][1], found[1][name][1], rtol=0)


# Resuming


def killed_run(flags, moment, writes):
    """train.py in a process that kills itself: after so many seconds, or half-way through its checkpoint `writes`, and
    in any case at the second: no attempt gets farther, so that ten do not reach the end.
    """
    save, count = torch.save, 0

    def counted_save(content, file):
        nonlocal count
        count += 1
        if count == writes:
            save(content, file)
            file.truncate(file.tell() // 2)
            file.flush()
        if count in (writes, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    torch.save = counted_save
    if not writes:
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
    sys.argv = ["train.py", *flags]
    train.main()


def test_killed_ten_times_and_resumed(run, shapes, uninterrupted, tmp_path):
    """Kill -9 at ten moments, some while a checkpoint is written: weights and log are the same, bit for bit."""
    flags = ["--output", tmp_path / "out", *SMALL, "--save-every", 1, "--resume"]
    child = [str(flag) for flag in ["--data-root", shapes, *flags]]
    draw, moments = random.Random(0), []
    for _ in range(10):
        moments.append((draw.uniform(0.1, 2.0), draw.choice([None, None, 1, 2])))
        assert Process(killed_run, child, *moments[-1], output=tmp_path / "child").wait() == -signal.SIGKILL
    assert sum(writes is not None for _, writes in moments) >= 2
    run(*flags)
    assert_same_run(tmp_path / "out", uninterrupted)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_signal_writes_a_checkpoint(run, shapes, uninterrupted, tmp_path, capsys):
    """A signal ends the program cleanly, with a checkpoint behind the step that it came in, from which it goes on."""
    output = tmp_path / "out"
    flags = ["--output", output, *SMALL, "--save-every", 2, "--workers", 1]
    process = program("train", "--data-root", shapes, *flags, output=tmp_path / "train")
    process.until((output / "checkpoint.pt").exists)
    with pytest.raises(InputError, match="out: another program writes to this folder; choose another --output"):
        run(*flags, "--resume")
    process.signal(signal.SIGTERM)
    assert process.wait() == 0 and "Traceback" not in process.err, process.err
    assert "stopped after iteration" in process.out and "--resume" in process.out
    stopped = checkpoint(output)["iteration"]
    assert 2 <= stopped < 12
    run(*flags, "--resume")
    assert f"resuming {output / 'checkpoint.pt'} after iteration {stopped}" in capsys.readouterr().out
    assert_same_run(output, uninterrupted)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_second_signal_ends_it_at_once(workers, shapes, tmp_path):
    """While it waits for a file that does not come, as on a disk behind a network."""
    shutil.copytree(shapes, tmp_path / "shapes")
    files, opened = sorted((tmp_path / "shapes/images/train2017").iterdir()), []
    for path in files:
        path.unlink()
        os.mkfifo(path)

    def reads():
        for path in files:
            with contextlib.suppress(OSError):  # nobody reads this one
                opened.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        return bool(opened)

    flags = ["--data-root", tmp_path / "shapes", *SMALL, "--no-eval", "--workers", workers]
    process = program("train", *flags, "--output", tmp_path / "out", output=tmp_path / "train")
    process.until(reads)
    process.signal(signal.SIGTERM)
    process.signal(signal.SIGINT)  # without a pause, as torchrun and `timeout` do, which send one twice
    process.until(lambda: "a second signal ends it" in process.err)
    time.sleep(0.7)
    process.signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM and "Traceback" not in process.err


def test_last_two_and_best_are_kept(uninterrupted):
    assert {path.name for path in uninterrupted.glob("*.pt")} == {"checkpoint.pt", "previous.pt", "best.pt"}
    assert checkpoint(uninterrupted)["iteration"] == 12 and checkpoint(uninterrupted, "previous.pt")["iteration"] == 10
    evaluations = [entry for entry in log(uninterrupted) if "box" in entry]
    totals = [entry["box"]["AP"] + entry["mask"]["AP"] for entry in evaluations]
    best = evaluations[totals.index(max(totals))]
    assert checkpoint(uninterrupted, "best.pt")["iteration"] == best["iteration"]
    assert json.loads((uninterrupted / "eval.json").read_text())["box"] == evaluations[-1]["box"]
    assert [entry["epoch"] for entry in evaluations] == [1, 2, 3, 4]
    assert {path.name for path in uninterrupted.glob("*.png")} == {f"epoch_00{epoch}.png" for epoch in (1, 2, 3, 4)}
    with Image.open(uninterrupted / "epoch_001.png") as picture:
        assert picture.height >= 2 * 320
    assert all(math.isfinite(entry["loss"]) for entry in log(uninterrupted) if "loss" in entry)
    last = checkpoint(uninterrupted)
    assert last["epoch"] == 4 and last["config"]["num_classes"] == len(last["classes"]) == 10


def test_the_best_of_all_evaluations_is_kept(run, tmp_path, monkeypatch):
    """By the sum of box and mask AP, also over an interruption; of equal ones the first."""
    pairs = iter([(3.0, 1.0), (2.0, 4.0), (5.0, None), (1.0, 5.0)])
    monkeypatch.setattr(train, "find_results", lambda *args, **options: [[]])
    monkeypatch.setattr(train, "save_picture", lambda *_: None)
    scores = lambda *_: {kind: {"AP": ap} for kind, ap in zip(("box", "mask"), next(pairs), strict=True)}
    monkeypatch.setattr(train, "score", scores)
    for stop in (6, 12):
        run("--output", tmp_path / "out", *SMALL, "--max-iterations", stop, "--resume")
        assert checkpoint(tmp_path / "out", "best.pt")["iteration"] == 6


def test_an_interrupted_evaluation_is_made_up_for(run, uninterrupted, tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise InputError("stopped")

    flags = ["--output", tmp_path / "out", *SMALL, "--save-every", 2]
    with monkeypatch.context() as patch, pytest.raises(InputError, match="checkpoint.pt holds iteration 3"):
        patch.setattr(train, "find_results", stopped)
        run(*flags)
    run(*flags, "--resume")
    assert_same_run(tmp_path / "out", uninterrupted)


def test_rates_reach_the_optimizer(run, tmp_path):
    """Warm-up, milestones, the backbone's own rate; and other rates where training goes on."""
    flags = ["--output", tmp_path / "out", *SMALL, "--no-eval", "--warmup", 1, "--milestones", 3]
    for stop, lr, backbone_lr, expected in ((1, 4e-3, 1e-3, [2e-3, 5e-4]), (4, 8e-3, 3e-3, [8e-4, 3e-4])):
        run(*flags, "--lr", lr, "--backbone-lr", backbone_lr, "--max-iterations", stop, "--resume")
        rates = {group["lr"] for group in checkpoint(tmp_path / "out")["optimizer"]["param_groups"]}
        assert sorted(rates, reverse=True) == pytest.approx(expected)


# Several processes


def test_torchrun_trains_as_one_process_does(shapes, tmp_path):
    """The program itself under torchrun: one log, one checkpoint, every image once, and nothing but its own words."""
    flags = ["--data-root", shapes, "--output", tmp_path / "out", *TRAINING, "--epochs", 1, "--warmup", 1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    process = subprocess.run([*command, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "arning" not in process.stderr
    entries = log(tmp_path / "out")
    assert [entry["epoch"] for entry in entries if "box" in entry] == [1]
    assert checkpoint(tmp_path / "out")["iteration"] == 3
    assert process.stdout.count("images of 10 classes to train on") == 1


def two_programs(tmp_path, *flags, by_rank=None):
    """train.py in two processes, by_rank[rank] being flags of one alone; their list."""
    start = lambda rank, **options: program("train", *flags, *(by_rank or {}).get(rank, []), **options)
    return group(start, tmp_path / "train")


def test_nodes_that_differ(shapes, uninterrupted, tmp_path):
    """One process has the checkpoint and the other has not: both end before the first step, and one says why."""
    other = tmp_path / "other"
    flags = ["--data-root", shapes, *SMALL, "--resume", "--output"]
    processes = two_programs(tmp_path, *flags, by_rank={0: [uninterrupted], 1: [other, "--lr", 1]})
    assert [process.wait() for process in processes] == [1, 1]
    first, second = (process.err for process in processes)
    assert (
        "warning: iteration: 12 in process 0, 0 in process 1" in first and "warning: lr: 0.00025 in process 0" in first
    )
    assert "the processes differ in iteration, seconds, lr, backbone_lr" in first.splitlines()[-1]
    assert "Traceback" not in first + second and "error" not in second and not other.exists()


def test_an_error_in_one_process_ends_all(shapes, tmp_path):
    flags = ["--data-root", shapes, *SMALL, "--output", tmp_path / "out"]
    processes = two_programs(tmp_path, *flags, by_rank={1: ["--init", tmp_path / "none.pt"]})
    assert [process.wait() for process in processes] == [1, 1]
    assert [process.err.count("error: ") for process in processes] == [0, 1]
    assert "none.pt: no such file" in processes[1].err and "Traceback" not in processes[0].err + processes[1].err


def test_a_signal_in_one_process_while_it_evaluates(shapes, tmp_path):
    """All stop, with a checkpoint, and nobody waits for the one that is gone."""
    output = tmp_path / "out"
    flags = ["--data-root", shapes, *SMALL, "--output", output, "--test-size", 512, 512]
    flags += [
        "--val-json",
        shapes / "annotations/instances_train2017.json",
        "--val-images",
        shapes / "images/train2017",
    ]
    processes = two_programs(tmp_path, *flags)
    processes[1].until((output / "checkpoint.pt").exists)  # written at the end of the epoch; the evaluation is next
    processes[1].signal(signal.SIGHUP)
    assert [process.wait() for process in processes] == [0, 0], processes[0].err
    assert "stopped after iteration 3" in processes[0].out and "AP" not in processes[0].out
    assert "Traceback" not in processes[0].err + processes[1].err


# Steps that fail, precision, frozen parts


def test_a_loss_that_is_not_finite(run, uninterrupted, tmp_path, monkeypatch):
    """Training ends with the images' ids, the terms and the state before the step."""
    forward, calls = SetCriterion.forward, []

    def broken(self, outputs, targets, num_instances=None):
        calls.append([target["image_id"] for target in targets])
        terms = forward(self, outputs, targets, num_instances)
        if len(calls) == 11:
            terms["loss_giou_1"] = terms["loss_giou_1"] * math.nan
        return terms

    monkeypatch.setattr(SetCriterion, "forward", broken)
    with pytest.raises(InputError) as error:
        run("--output", tmp_path / "out", *SMALL, "--save-every", 2, "--no-eval")
    assert "iteration 11: loss_giou_1 not finite" in str(error.value) and str(calls[10]) in str(error.value)
    before = checkpoint(tmp_path / "out", "nonfinite.pt")
    reference = checkpoint(uninterrupted, "previous.pt")  # behind iteration 10
    assert before["iteration"] == 10
    for name, value in reference["model"].items():
        assert torch.equal(before["model"][name], value), name
    for key, state in reference["optimizer"]["state"].items():
        assert torch.equal(before["optimizer"]["state"][key]["exp_avg_sq"], state["exp_avg_sq"])
    assert before["window"].keys() == reference["window"].keys() and math.isfinite(before["window"]["loss"])
    assert checkpoint(tmp_path / "out")["iteration"] == 10


def test_a_gradient_that_is_not_finite(run, tmp_path, monkeypatch):
    """The step does not take place."""
    clip = torch.nn.utils.clip_grad_norm_

    def overflow(parameters, *args):
        parameters = list(parameters)
        parameters[0].grad.fill_(math.inf)
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(InputError, match="iteration 1: the gradient not finite"):
        run("--output", tmp_path / "out", *SMALL, "--no-eval")
    assert checkpoint(tmp_path / "out", "nonfinite.pt")["iteration"] == 0


def test_float16_gradients_that_overflow(run, tmp_path, monkeypatch):
    """They are no error: the step is left out, and the loss is scaled less."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**100))
    run("--output", tmp_path / "out", *SMALL, "--precision", "float16", "--no-eval", "--max-iterations", 1)
    found = checkpoint(tmp_path / "out")
    torch.manual_seed(0)
    before = DIMaskDINO(Config(**found["config"])).state_dict()
    assert found["iteration"] == 1 and found["scaler"]["scale"] == 2.0**99
    assert all(torch.equal(found["model"][name], value) for name, value in before.items())


def test_rates_that_are_too_high(run, tmp_path):
    """Training that diverges ends in the message, and not in a traceback of what cannot go on with its numbers."""
    with pytest.raises(InputError, match="not finite on images .*nonfinite.pt.*lower --lr"):
        run("--output", tmp_path / "out", *SMALL, "--epochs", 20, "--warmup", 0, "--lr", 1e4, "--no-eval")
    assert checkpoint(tmp_path / "out", "nonfinite.pt")["iteration"] >= 1


def test_precision(run, tmp_path):
    """Activations in half precision, losses and weights in float32; the losses stay near those of float32."""
    losses = {}
    for precision in ("auto", "float32", "bfloat16", "published"):
        output = tmp_path / precision
        run("--output", output, *SMALL, "--max-iterations", 1, "--no-eval", "--precision", precision)
        found = checkpoint(output)
        assert all(x.dtype == torch.float32 for x in found["model"].values() if x.is_floating_point())
        losses_of_run = torch.tensor([*found["window"].values()], dtype=torch.float64)  # of one iteration
        assert torch.equal(losses_of_run.float().double(), losses_of_run)
        assert not torch.equal(losses_of_run.bfloat16().double(), losses_of_run)
        assert bool(found["scaler"]) == (precision == "published")
        losses[precision] = found["window"]["loss"]
    assert losses["auto"] == losses["float32"]  # on the CPU
    for precision in ("bfloat16", "published"):
        assert losses[precision] != losses["float32"]
        assert losses[precision] == pytest.approx(losses["float32"], rel=0.05)


def test_a_frozen_backbone(run, tmp_path, monkeypatch):
    """--backbone-lr 0: no change, no gradient, evaluation mode; with all else as ever."""
    modes, forward = [], train.DIMaskDINO.forward

    def watched(self, *args, **options):
        modes.append((self.training, self.backbone.training))
        return forward(self, *args, **options)

    monkeypatch.setattr(train.DIMaskDINO, "forward", watched)
    run("--output", tmp_path / "out", *SMALL, "--backbone-lr", 0, "--max-iterations", 2, "--no-eval")
    torch.manual_seed(0)
    after = checkpoint(tmp_path / "out")
    before, after = DIMaskDINO(Config(**after["config"])).state_dict(), after["model"]
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed and not any(name.startswith("backbone") for name in changed)
    assert modes == [(True, False)] * 2


# What is trained on, and what is said about it


def test_what_is_said(run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    flags = "--selections 6,3 --denoising-queries 2 --max-iterations 2 --accumulate 2 --no-eval --warmup 100".split()
    monkeypatch.setattr(cli.Progress, "EVERY", 0.0)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    run("--output", output, *SMALL, *flags)
    printed = capsys.readouterr()
    number = r"[\d.e+-]+"
    line = rf"train: 2 of 2 iterations, .*, 00:00 left, loss={number}, class={number}, box={number}, mask={number}, "
    assert re.search(rf"{line}lr=9.9e-6, images_per_second={number}, waiting={number}\n", printed.err), printed.err
    assert "warning: SLURM_NTASKS is 2 and WORLD_SIZE not set: each process works alone" in printed.err
    lines = printed.out.splitlines()
    start = lines.index("12 images of 10 classes to train on, no evaluation")
    assert lines[start + 1].startswith("2 iterations, 1.33 epochs; warm-up: 100; learning rate 0.0005, ")
    assert lines[start + 2] == f"8 images an iteration, 4 x 1 processes x 2 batches; on cpu; output in {output}"
    assert "warning: the warm-up takes 100 of 2 iterations" in printed.err
    assert "of 12 images hold more instances than the model has queries, up to" in printed.err
    assert "of 12 images hold more instances than the 2 denoising queries: a batch with one of them" in printed.err
    assert not list(output.glob("*.png")) and not (output / "best.pt").exists() and not (output / "eval.json").exists()


@pytest.mark.parametrize("flags, warned", [(["--selections", "6"], 1), (["--no-di"], 0)])
def test_de_imbalance_with_one_selection(shapes, tmp_path, capsys, flags, warned):
    """As `--preset maskdino_r50 --di` has it."""
    args = parse_arguments(["--data-root", str(shapes), "--output", str(tmp_path / "out"), *SMALL, *flags])
    train.Trainer(args, CPU, 0, 1).describe()
    assert capsys.readouterr().err.count("warning: with one selection De-Imbalance changes nothing") == warned


def changed_copy(shapes, target, change):
    """The paths of annotation files that went through change(content, split), and the flags that name all files."""
    flags = []
    for split in ("train", "val"):
        content = json.loads((shapes / f"annotations/instances_{split}2017.json").read_text())
        change(content, split)
        path = target / f"{split}.json"
        path.write_text(json.dumps(content))
        flags += [f"--{split}-json", str(path), f"--{split}-images", str(shapes / f"images/{split}2017")]
    return flags


def test_images_without_instances(shapes, tmp_path):
    """They are background with --keep-empty, and are left out otherwise; both train, and both sorts are evaluated."""

    def change(content, split):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] > (4 if split == "train" else 2)]

    flags = [*changed_copy(shapes, tmp_path, change), "--seed", "1"]
    for number, more in ((8, []), (12, ["--keep-empty", "--no-eval"])):
        args = parse_arguments([*flags, *more, *SMALL, "--epochs", "2", "--output", str(tmp_path / str(number))])
        trainer = train.Trainer(args, CPU, 0, 1)
        assert len(trainer.train_set) == number
        trainer.run()
        assert trainer.iteration == number // 2 and (trainer.val_set is None) == ("--no-eval" in more)
    assert [entry["epoch"] for entry in log(tmp_path / "8") if "box" in entry] == [1, 2]


def test_an_image_that_cannot_be_read(run, shapes, uninterrupted, tmp_path, monkeypatch):
    """It is read twice; then a line names it and the checkpoint, from which training goes on as if it had not been."""
    [index, _], *_ = next(train_keys(12, 4, seed=0, start=8))
    failures, opened = [True, True], Image.open
    bad = f"{index + 1:012}.png"

    def moody(file):
        if Path(file.name).name == bad and "train" in file.name and failures and failures.pop(0):
            raise OSError("image file is truncated")
        return opened(file)

    flags = ["--output", tmp_path / "out", *SMALL]
    monkeypatch.setattr(Image, "open", moody)
    with pytest.raises(InputError, match=f"{bad}: cannot be read as an image .*checkpoint.pt holds iteration 2: --res"):
        run(*flags)
    assert checkpoint(tmp_path / "out")["iteration"] == 2
    failures[:] = [True, False]
    run(*flags, "--resume", "--save-every", 2)
    assert not failures
    assert_same_run(tmp_path / "out", uninterrupted)


def test_shared_memory_that_is_full(run, tmp_path, monkeypatch):
    """As in a container with 64 MB of it: one line, and nobody waits for a batch that does not come."""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(RuntimeError) as error:
        run("--output", tmp_path / "out", *SMALL, "--workers", 1)
    assert re.search("/dev/shm.*--shm-size.*--workers 0", cli.reason_of(error.value))


def few_files(shapes):
    """A batch of 128 under a limit of 256 open files, which can take a fifth of its tensors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    dataset = open_split(parse_arguments(["--data-root", shapes]), "train", augmentation=(32, (0.8, 1.25)))
    batches = data.train_batches(dataset, 128, 0, 0, 0, 1, workers=1, pin_memory=False)
    images, _ = next(batches)
    assert len(images) == 128


def test_few_open_files(shapes, tmp_path):
    process = Process(few_files, str(shapes), output=tmp_path / "few")
    assert process.wait(60) == 0, process.err


def test_a_picture_that_a_worker_cannot_read(shapes, tmp_path):
    """The error of another process comes out as one line, which names the checkpoint."""
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    image = sorted((root / "images" / "val2017").iterdir())[-1]
    image.write_bytes(image.read_bytes()[:300])
    flags = ["--data-root", root, "--output", tmp_path / "out", *SMALL, "--workers", 1, "--epochs", 1]
    process = program("train", *flags, output=tmp_path / "train")
    assert process.wait() == 1 and "Traceback" not in process.err
    [line] = [line for line in process.err.splitlines() if "error:" in line]
    assert image.name in line and line.endswith("checkpoint.pt holds iteration 3: --resume goes on from there")


def test_a_class_less_in_val(shapes, tmp_path):
    """Classes are matched by name: AP does not depend on the ids that val gives them, or on the classes it lacks."""

    def renumber(content, split):
        if split == "val":
            gone = content["categories"].pop(0)["id"]
            content["annotations"] = [
                a | {"category_id": 100 - a["category_id"]} for a in content["annotations"] if a["category_id"] != gone
            ]
            for category in content["categories"]:
                category["id"] = 100 - category["id"]

    def unknown(content, split):
        content["categories"][0]["name"] += f" of {split}"

    args = [*SMALL, "--output", str(tmp_path / "out")]
    trainer = train.Trainer(parse_arguments([*changed_copy(shapes, tmp_path, renumber), *args]), CPU, 0, 1)
    assert [trainer.train_set.classes[label] for label in trainer.labels] == trainer.val_set.classes
    with pytest.raises(DataError, match="circle of val"):
        train.Trainer(parse_arguments([*changed_copy(shapes, tmp_path, unknown), *args]), CPU, 0, 1)


def test_without_augmentation_images_are_as_in_the_evaluation(shapes, tmp_path):
    json_file, images = str(shapes / "annotations/instances_train2017.json"), str(shapes / "images/train2017")
    flags = ["--train-json", json_file, "--val-json", json_file, "--train-images", images, "--val-images", images]
    flags += ["--test-size", "48", "48", "--train-size", "96", "--output", str(tmp_path / "out")]

    def samples(*more):
        trainer = train.Trainer(parse_arguments([*flags, *more]), CPU, 0, 1)
        return trainer.train_set[3], trainer.val_set[3][0], trainer.val_set.ground_truth(3)[1]

    (image, target), expected, truth = samples("--no-augmentation")
    assert image.shape == (3, 48, 48) and torch.equal(image, expected)
    assert torch.equal(target["masks"], truth["masks"]) and torch.equal(target["boxes"], truth["boxes"])
    assert samples()[0][0].shape == (3, 96, 96)
