"""train.py: schedules, sampling, gradients over batches and processes, exact resume, failures, what it says."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train
from cli import open_split
from config import InputError
from data import TrainSampler, collate, eval_transform, train_transform
from eval import evaluate
from losses import SetCriterion
from model import build_model
from programs import Process, group, program
from shapes import make_shapes
from train import backward, lr_factor, make_schedule, parameter_groups, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--batch-size 4 --workers 0 --device cpu --epochs 4".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small generated data set in COCO's layout: 12 images to train on."""
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=12, val=4, size=64)
    return root


@pytest.fixture(scope="module")
def run(shapes):
    """train.py's main with these flags, in this process; arguments and the handlers of signals are put back."""

    def main(*flags):
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", "--data-root", str(shapes), *map(str, flags)])
            try:
                train.main()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return main


def checkpoint(folder, name="checkpoint.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def log(folder):
    """The entries of a log without what tells the time."""
    times = "seconds", "images_per_second", "waiting"
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in times} for entry in entries]


def assert_same_run(folder, other):
    """Weights, state of the optimizer and log are equal, bit for bit."""
    ours, theirs = checkpoint(folder), checkpoint(other)
    assert ours["iteration"] == theirs["iteration"]
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    for key, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(ours["optimizer"]["state"][key][name], value)
    assert log(folder) == log(other)


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
    assert vars(schedule) == {
        "batch_size": 16, "step_size": 16, "iterations": 1500, "milestones": [1200, 1425], "lr": 1e-3,
        "backbone_lr": 1e-3, "warmup": 100,
    }  # fmt: skip


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
    assert sorted(names.values()) == sorted(names[p] for group in groups for p in group["params"])
    for group in groups:
        for name in map(names.get, group["params"]):
            assert group["lr"] == group["base_lr"] == (1e-4 if name.startswith("backbone") else 1e-3)
            plain = "norm" in name or "embedding" in name or ".bn" in name
            assert not (plain and group["weight_decay"]), name
    decays = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays["encoder.level_embed"] == decays["backbone.body.conv1.weight"] == 0.05
    assert decays["denoising.label_embedding.weight"] == decays["backbone.body.bn1.weight"] == 0
    frozen = parameter_groups(model, 1e-3, 0)
    assert {names[p] for group in frozen for p in group["params"]} == {
        name for name in names.values() if not name.startswith("backbone")
    }


# Sampling


def batches(count, **kwargs):
    sampler = iter(TrainSampler(**kwargs))
    return [next(sampler) for _ in range(count)]


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


def small_model(**overrides):
    torch.manual_seed(0)
    return build_model("tiny", **({"noise_scale": 0.0, "denoising_queries": 0} | overrides)).double()


def samples(shapes, count=8):
    """A batch of augmented training images; float64, since equal sums in float32 differ in the seventh digit."""
    args = parse_arguments(["--data-root", str(shapes)])
    dataset = open_split(args, "train", train_transform(64, (0.8, 1.25)))
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


def test_accumulated_batches_are_one(shapes, fixed_points):
    """Four batches of two give the gradients and losses of one of eight, though their counts of instances differ."""
    images, targets = samples(shapes)
    assert len({len(target["labels"]) for target in targets}) > 2
    whole, terms = gradients([(images, targets)])
    parts, summed = gradients([(images[i : i + 2], targets[i : i + 2]) for i in range(0, 8, 2)])
    assert_close(parts, whole)
    assert any(gradient.abs().max() > 0 for gradient in whole.values())
    assert {n: float(v) for n, v in summed.items()} == pytest.approx({n: float(v) for n, v in terms.items()}, rel=1e-6)


def test_a_part_without_instances(shapes, fixed_points):
    images, targets = samples(shapes, 4)
    targets = first_instances(targets, 2, 2, 0, 0)
    whole, _ = gradients([(images, targets)])
    parts, _ = gradients([(images[i : i + 2], targets[i : i + 2]) for i in (0, 2)])
    assert_close(parts, whole)
    assert all(gradient is not None for gradient in parts.values())


def part_of_two(rank, shapes, output):
    """What one of two processes makes of its share of several steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    images, targets = samples(shapes)
    share = lambda first, targets: (images[first + rank : first + 4 : 2], targets[first + rank : first + 4 : 2])  # noqa: E731
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
    torch.manual_seed(0)
    dataset = open_split(parse_arguments(["--data-root", shapes]), "val", eval_transform(64, 64))
    found["scores"] = evaluate(build_model("tiny"), dataset, CPU, per_layer=True, batch_size=1)
    torch.save(found, f"{output}.{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(shapes, fixed_points, tmp_path, monkeypatch):
    """Two processes, two batches each, give the gradients of one batch of eight in one process, and the same AP.

    Denoising groups follow the images of each process: off, or with as many instances in every image, for the equality.
    """
    start = lambda rank, **options: Process(part_of_two, rank, str(shapes), str(tmp_path / "two"), **options)  # noqa: E731
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

    monkeypatch.undo()
    torch.manual_seed(0)
    dataset = open_split(parse_arguments(["--data-root", str(shapes)]), "val", eval_transform(64, 64))
    scores = evaluate(build_model("tiny"), dataset, CPU, per_layer=True, batch_size=1)
    assert found[0]["scores"] == found[1]["scores"] == scores
