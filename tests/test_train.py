"""train.py: schedules, sampling, gradients over batches and processes, exact resume, failures, starting points."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import train
from backbone import ResNet
from checkpoint import save_checkpoint
from cli import open_split
from config import Config, InputError
from data import TrainSampler, collate
from losses import SetCriterion
from model import build_model
from shapes import make_shapes
from train import backward, lr_factor, parse_arguments, plan

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--batch-size 4 --workers 0 --device cpu --epochs 4".split()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small generated data set in COCO's layout: 12 images to train on."""
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=12, val=4, size=64)
    return root


@pytest.fixture
def run(shapes, monkeypatch):
    """train.py's main with these flags, in this process; the handlers of signals are put back."""

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "coco", "--data-root", str(shapes), *map(str, flags)])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            train.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return main


def program(*flags):
    command = [sys.executable, ROOT / "train.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


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
    ],
)
def test_schedules(flags, expected):
    """The published numbers for the published batch size, as many images for another; 1000 training images."""
    schedule = plan(parse_arguments(flags.split()), num_images=1000)
    assert (schedule.batch_size, schedule.iterations, schedule.milestones) == expected[:3]
    assert schedule.lr == pytest.approx(expected[3]) and schedule.backbone_lr == pytest.approx(0.1 * expected[3])


def test_learning_rate():
    factors = [lr_factor(i, milestones=[6, 8], warmup=3) for i in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


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


# Gradients of a step, whatever it is made of


@pytest.fixture
def fixed_points(monkeypatch):
    """The same "random" numbers for every mask, so that a step's parts draw what the whole draws."""

    original = torch.rand

    def rand(*shape, **options):
        if len(shape) < 3:  # not points of masks, (N, P, 2)
            return original(*shape, **options)
        numbers = original(shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return numbers.to(options["dtype"]).expand(shape).contiguous()

    monkeypatch.setattr(torch, "rand", rand)


def small_model():
    torch.manual_seed(0)
    return build_model("tiny", noise_scale=0.0).double()


def samples(shapes, count=8):
    """A batch of augmented training images; float64, since equal sums in float32 differ in the seventh digit."""
    args = parse_arguments(["--data", "coco", "--data-root", str(shapes)])
    dataset = open_split(args, "train", augmentation=(64, (0.8, 1.25)))
    torch.manual_seed(1)
    images, targets = collate([dataset[i] for i in range(count)])
    return [image.double() for image in images], [t | {"boxes": t["boxes"].double()} for t in targets]


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
    for target in targets[2:]:
        for name in ("labels", "boxes", "masks"):
            target[name] = target[name][:0]
    whole, _ = gradients([(images, targets)])
    parts, _ = gradients([(images[i : i + 2], targets[i : i + 2]) for i in (0, 2)])
    assert_close(parts, whole)
    assert all(gradient is not None for gradient in parts.values())


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import pytest, test_train as t
from torch.nn.parallel import DistributedDataParallel
from cli import open_split
from eval import evaluate

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
with pytest.MonkeyPatch.context() as patch:
    t.fixed_points.__wrapped__(patch)
    images, targets = t.samples({shapes!r})
    model = t.small_model()
    share = lambda first: (images[first + rank : first + 4 : world], targets[first + rank : first + 4 : world])
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    terms, _ = t.backward(wrapped, t.SetCriterion(model.config), [share(0), share(4)])
grads = {{name: parameter.grad for name, parameter in model.named_parameters()}}
torch.manual_seed(0)
model = t.build_model("tiny")
args = t.parse_arguments(["--data", "coco", "--data-root", {shapes!r}])
dataset = open_split(args, "val", (64, 64))
scores = evaluate(model, dataset, torch.device("cpu"), per_layer=True, batch_size=1)
torch.save({{"grads": grads, "scores": scores, "loss": terms["loss"]}}, f"{output}/{{rank}}.pt")
dist.destroy_process_group()
"""


def test_two_processes_are_one(shapes, fixed_points, tmp_path, monkeypatch):
    """Two processes, two batches each, give the gradients of one batch of eight in one process, and the same AP."""
    script = tmp_path / "worker.py"
    script.write_text(
        WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), shapes=str(shapes), output=str(tmp_path))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    whole, terms = gradients([samples(shapes)])
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for part in found:
        assert_close(part["grads"], whole)
    assert sum(float(part["loss"]) for part in found) / 2 == pytest.approx(float(terms["loss"]), rel=1e-6)

    monkeypatch.undo()
    torch.manual_seed(0)
    model = build_model("tiny")
    dataset = open_split(parse_arguments(["--data", "coco", "--data-root", str(shapes)]), "val", (64, 64))
    scores = train.evaluate(model, dataset, torch.device("cpu"), per_layer=True, batch_size=1)
    assert found[0]["scores"] == found[1]["scores"] == scores


def test_torchrun_trains_as_one_process_does(shapes, tmp_path):
    """The program itself under torchrun: one log, one checkpoint, every image once."""
    flags = ["--data", "coco", "--data-root", shapes, "--output", tmp_path / "out", *SMALL, "--epochs", 2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run([*command, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    entries = log(tmp_path / "out")
    assert [entry["epoch"] for entry in entries if "box" in entry] == [1, 2]
    assert checkpoint(tmp_path / "out")["iteration"] == 6


# Resuming


@pytest.fixture(scope="module")
def uninterrupted(shapes, tmp_path_factory):
    """The folder of a run of 12 iterations, three to an epoch."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    flags = ["--data", "coco", "--data-root", shapes, "--output", output, *SMALL, "--save-every", 2]
    process = program(*flags)
    assert process.returncode == 0, process.stderr
    return output


# Runs train.py again and again, each time in a process that kills itself: at a random moment, or in the middle of
# writing a checkpoint. A fork costs a tenth of the start of a new Python.
KILLER = """
import os, random, signal, sys, threading, time, traceback
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import train

random.seed({seed})
save = torch.save
attempts = killed = while_writing = 0
while True:
    attempts += 1
    moment, writes = random.uniform(0.1, {longest}), random.choice([None, None, 1, 2])
    child = os.fork()
    if child == 0:
        if killed < {kills}:
            count = 0
            def counted_save(content, file):
                global count
                count += 1
                if count == writes:
                    save(content, file)
                    file.truncate(file.tell() // 2)
                    file.flush()
                if count in (writes, 2):  # no attempt gets farther than one checkpoint: ten do not reach the end
                    os.kill(os.getpid(), signal.SIGKILL)
                save(content, file)
            torch.save = counted_save
            if not writes:
                threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
        sys.argv = ["train.py", *{flags!r}, "--resume"]
        try:
            train.main()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        killed += 1
        while_writing += bool(writes)
    elif os.WEXITSTATUS(status):
        sys.exit("an attempt failed")
    else:
        break
print(f"{{attempts}} attempts, {{killed}} killed, {{while_writing}} of them while writing")
"""


def test_killed_ten_times_and_resumed(shapes, uninterrupted, tmp_path):
    """Kill -9 at ten moments, some while a checkpoint is written: weights and log are the same, bit for bit."""
    output = tmp_path / "out"
    flags = ["--data", "coco", "--data-root", shapes, "--output", output, *SMALL, "--save-every", 1]
    script = KILLER.format(root=str(ROOT), seed=0, kills=10, longest=2.0, flags=[str(flag) for flag in flags])
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    words = process.stdout.splitlines()[-1].split()
    assert int(words[2]) == 10 and int(words[4]) >= 2, process.stdout
    assert_same_run(output, uninterrupted)
    assert not list(output.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_write_a_checkpoint(number, shapes, uninterrupted, tmp_path):
    """A signal ends the program cleanly, with a checkpoint behind the step that it came in, from which it goes on."""
    output = tmp_path / "out"
    flags = ["--data", "coco", "--data-root", shapes, "--output", output, *SMALL, "--save-every", 2, "--workers", 1]
    with subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (output / "checkpoint.pt").exists():
            time.sleep(0.05)
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in error
    assert "stopped after iteration" in out and "--resume" in out
    stopped = checkpoint(output)["iteration"]
    assert 2 <= stopped < 12
    resumed = program(*flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming {output / 'checkpoint.pt'} after iteration {stopped}" in resumed.stdout
    assert_same_run(output, uninterrupted)


def test_last_two_and_best_are_kept(uninterrupted):
    assert {path.name for path in uninterrupted.glob("*.pt")} == {"checkpoint.pt", "previous.pt", "best.pt"}
    assert checkpoint(uninterrupted)["iteration"] == 12 and checkpoint(uninterrupted, "previous.pt")["iteration"] == 10
    evaluations = [entry for entry in log(uninterrupted) if "box" in entry]
    totals = [entry["box"]["AP"] + entry["mask"]["AP"] for entry in evaluations]
    best = evaluations[totals.index(max(totals))]
    assert checkpoint(uninterrupted, "best.pt")["iteration"] == best["iteration"]
    assert json.loads((uninterrupted / "eval.json").read_text())["box"] == evaluations[-1]["box"]


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_damaged_checkpoint_is_passed_over(run, uninterrupted, tmp_path, capsys):
    output = copy_of(uninterrupted, tmp_path / "out")
    (output / "checkpoint.pt").write_bytes((output / "checkpoint.pt").read_bytes()[:1000])
    run("--output", output, *SMALL, "--save-every", 2, "--resume")
    said = capsys.readouterr()
    assert "checkpoint.pt" in said.err and f"resuming {output / 'previous.pt'} after iteration 10" in said.out
    assert_same_run(output, uninterrupted)
    for name in ("checkpoint.pt", "previous.pt"):
        (output / name).write_bytes(b"PK")
    with pytest.raises(InputError, match="previous.pt: not a readable checkpoint"):
        run("--output", output, *SMALL, "--resume")


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--batch-size 2", "batch_size 4 instead of 2"),
        ("--seed 5", "seed 0 instead of 5"),
        ("--accumulate 2", "accumulate 1 instead of 2"),
        ("--no-augmentation", "augment True instead of False"),
        ("--decoder-layers 2", "decoder_layers 3 instead of 2"),
        ("--no-bato", "bato True instead of False"),
        ("--selections 30", "selections"),
    ],
)
def test_other_settings_are_not_resumed(flags, named, run, uninterrupted):
    with pytest.raises(InputError, match=named):
        run("--output", uninterrupted, *SMALL, "--resume", *flags.split())


def test_a_longer_schedule_is_resumed(run, uninterrupted, tmp_path, capsys):
    output = copy_of(uninterrupted, tmp_path / "out")
    run("--output", output, *SMALL, "--epochs", 5, "--resume")
    assert "the schedule has changed in iterations, milestones" in capsys.readouterr().out
    assert checkpoint(output)["iteration"] == 15


def test_nothing_to_resume(run, tmp_path, capsys):
    run("--output", tmp_path / "out", *SMALL, "--resume", "--max-iterations", 1)
    assert f"nothing to resume in {tmp_path / 'out'}: starting anew" in capsys.readouterr().out
    assert checkpoint(tmp_path / "out")["iteration"] == 1


def test_full_disk(shapes, tmp_path):
    """No room for a second checkpoint on a small disk: one clear line, and the first one still loads."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        flags = ["--data", "coco", "--data-root", shapes, "--output", disk / "out", *SMALL, "--save-every", 1]
        process = program(*flags)
        assert process.returncode == 1 and "Traceback" not in process.stderr
        [line] = [line for line in process.stderr.splitlines() if "error:" in line]
        assert "checkpoint.pt: cannot be written" in line
        assert checkpoint(disk / "out")["iteration"] == 1
        assert not list((disk / "out").glob("*.tmp"))
    finally:
        subprocess.run(["umount", disk], check=True)


# Steps that fail, precision, starting points


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
        run("--output", tmp_path / "out", *SMALL, "--save-every", 2)
    assert "iteration 11: loss_giou_1 not finite" in str(error.value) and str(calls[10]) in str(error.value)
    before = checkpoint(tmp_path / "out", "nonfinite.pt")
    reference = checkpoint(uninterrupted, "previous.pt")  # behind iteration 10
    assert before["iteration"] == 10
    for name, value in reference["model"].items():
        assert torch.equal(before["model"][name], value), name
    assert checkpoint(tmp_path / "out")["iteration"] == 10


def test_without_augmentation_images_are_as_in_the_evaluation(shapes, tmp_path):
    json_file, images = str(shapes / "annotations/instances_train2017.json"), str(shapes / "images/train2017")
    flags = ["--train-json", json_file, "--val-json", json_file, "--train-images", images, "--val-images", images]
    flags += ["--test-size", "48", "48", "--train-size", "96", "--output", str(tmp_path / "out")]

    def samples(*more):
        trainer = train.Trainer(train.parse_arguments([*flags, *more]), torch.device("cpu"), 0, 1)
        return train.SeededDataset(trainer.train_set)[3, 0], (trainer.val_set[3][0], trainer.val_set.ground_truth(3)[1])

    (image, target), (expected, wanted) = samples("--no-augmentation")
    assert image.shape == (3, 48, 48) and torch.equal(image, expected)
    assert torch.equal(target["masks"], wanted["masks"]) and torch.equal(target["boxes"], wanted["boxes"])
    assert samples()[0][0].shape == (3, 96, 96)


def test_bfloat16(run, tmp_path):
    """Activations in bfloat16, losses and weights in float32; the losses stay near those of float32."""
    run("--output", tmp_path / "a", *SMALL, "--max-iterations", 1, "--precision", "bfloat16")
    run("--output", tmp_path / "b", *SMALL, "--max-iterations", 1)
    half, full = (checkpoint(tmp_path / name) for name in "ab")
    assert all(value.dtype == torch.float32 for value in half["window"].values())
    assert not torch.equal(half["window"]["loss"], full["window"]["loss"])
    assert float(half["window"]["loss"]) == pytest.approx(float(full["window"]["loss"]), rel=0.05)
    with pytest.raises(InputError, match="float16: needs a GPU"):
        run("--output", tmp_path / "c", *SMALL, "--precision", "float16")


def test_init_from_other_classes(run, shapes, uninterrupted, tmp_path, capsys):
    """What fits is loaded; what belongs to classes starts anew where these differ; both are listed."""
    source = checkpoint(uninterrupted)
    run("--output", tmp_path / "same", *SMALL, "--init", uninterrupted / "checkpoint.pt", "--max-iterations", 1)
    said = capsys.readouterr().out
    assert f"{len(source['model'])} of {len(source['model'])} entries loaded" in said
    source["classes"] = [f"other {name}" for name in source["classes"]]
    save_checkpoint(tmp_path / "other.pt", source)
    model = train.DIMaskDINO(Config(**source["config"]))
    lines = train.load_init(model, tmp_path / "other.pt", ["a", "b"])
    fresh = "heads.class_head.weight, heads.class_head.bias, label_embedding.weight"
    assert fresh in lines[1] or set(fresh.split(", ")) <= set(lines[1].split(": ")[1].split(", "))
    assert torch.equal(model.heads.box_head.layers[0].weight, source["model"]["heads.box_head.layers.0.weight"])
    assert not torch.equal(model.heads.class_head.weight, source["model"]["heads.class_head.weight"])
    save_checkpoint(tmp_path / "foreign.pt", source | {"model": {"weight": torch.zeros(3)}})
    with pytest.raises(InputError, match="foreign.pt: nothing in it fits"):
        train.load_init(model, tmp_path / "foreign.pt", ["a"])


def test_backbone_weights_by_default(run, tmp_path, monkeypatch):
    """Real training starts from ImageNet weights; where they cannot be loaded, the error says where to put them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "torch.hub.download_url_to_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network"))
    )
    flags = ["--output", tmp_path / "out", "--preset", "dimaskdino_r50", *SMALL]
    with pytest.raises(InputError, match=f"no network.*put it into {tmp_path / 'cache'}.*--backbone-weights none"):
        run(*flags)
    assert not (tmp_path / "out").exists()
    loaded = []
    monkeypatch.setattr(train, "load_backbone_weights", lambda backbone, source, trust: loaded.append(source))
    model = build_model("tiny", backbone="resnet50", frozen_batch_norm=True)
    train.load_starting_point(model, parse_arguments([]), [])
    assert isinstance(model.backbone, ResNet) and loaded == ["ResNet50_Weights.IMAGENET1K_V1"]
    train.load_starting_point(model, parse_arguments(["--backbone-weights", "none"]), [])
    assert len(loaded) == 1
    model.config = train.PRESETS["dimaskdino_swin_l"]
    with pytest.raises(InputError, match="swin_large_patch4_window12_384_22k.pth"):
        train.load_starting_point(model, parse_arguments([]), [])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--batch-size 0", "not a positive integer"),
        ("--epochs x", "invalid positive value"),
        ("--schedule 13ep", "invalid choice"),
        ("--selections 30,60", "selections (30, 60)"),
        ("--guidance t_s2 --no-di", "guidance t_s2"),
        ("--resume --init x.pt", "x.pt"),
    ],
)
def test_bad_flags(flags, message, shapes, tmp_path):
    process = program("--data", "coco", "--data-root", shapes, *flags.split(), "--output", tmp_path / "out")
    assert process.returncode != 0 and "Traceback" not in process.stderr
    assert message in process.stderr.splitlines()[-1]


def test_help_is_in_sentences():
    assert textwrap.dedent(program("--help").stdout).startswith("usage: train.py")
