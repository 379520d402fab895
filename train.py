"""Trains a model, in one process or under torchrun; without arguments, preset `tiny` on generated shapes."""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import check_config, link, load_starting_point, newest_checkpoint, save_checkpoint
from cli import add_data_arguments, choose_device, gather, open_split, positive, run_program
from config import PRESETS, InputError, add_config_arguments, config_from
from data import SeededDataset, TrainSampler, collate, eval_transform, seed_of, train_transform
from drawing import draw_instances, save_png
from eval import evaluate, percent
from images import DataError
from losses import SetCriterion
from model import DIMaskDINO
from predict import predict

# The published recipes: iterations, the batch size they are for, and the iterations at which the rates drop to a tenth.
SCHEDULES = {
    "12ep": (88_500, 16, [81_125]),
    "24ep": (177_000, 16, [147_500]),
    "50ep": (368_750, 16, [327_778, 355_092]),
    "bdd68ep": (59_500, 8, [43_750]),  # BDD100K: 68 epochs of 7,000 images, the drop at epoch 50
}
LEARNING_RATE, BACKBONE_FACTOR, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 0.05, 0.01
TINY = SimpleNamespace(epochs=12, batch_size=16, lr=1e-3, backbone_factor=1.0, drops=[0.8, 0.95], warmup=100)
LOG_EVERY = 20  # iterations


def parse_arguments(argv=None):
    """The flags as a namespace; what is left out is None where `plan` chooses by preset and schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="the model (default: tiny)")
    add("--output", default="runs/train", metavar="DIR", help="checkpoints, log, pictures (default: runs/train)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output, if there is one")
    add("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default: auto)")
    add("--seed", type=int, default=0, help="seed of weights, sampling, augmentation and losses (default: 0)")
    add_data_arguments(parser)

    add = parser.add_argument_group("starting point").add_argument
    add(
        "--backbone-weights",
        metavar="NAME-OR-FILE",
        help="pretrained backbone: torchvision's name, e.g. ResNet50_Weights.IMAGENET1K_V1; a file of torchvision, "
        "Microsoft's Swin or Detectron2; or none (default: torchvision's ImageNet weights; for tiny, none)",
    )
    add("--init", metavar="CKPT", help="start from the weights of a checkpoint, also one for other classes")
    add(
        "--trust-pickle",
        action="store_true",
        help="allow --backbone-weights to be a pickle, such as Detectron2's .pkl, which can run any program it holds",
    )

    add = parser.add_argument_group("schedule; the default is the published one, or that of tiny").add_argument
    add(
        "--schedule",
        choices=SCHEDULES,
        help="a published number of iterations, stretched for another batch size (default: 12 epochs of the data)",
    )
    add("--epochs", type=positive, help="passes over the training images, instead of the schedule's length")
    add("--batch-size", type=positive, help="images per forward pass, over all processes (default: 16; bdd68ep: 8)")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches per optimizer step (default: 1)")
    add(
        "--lr", type=float, help="learning rate (default: 1e-4 for the schedule's images per step, in proportion to it)"
    )
    add("--backbone-lr", type=float, help="learning rate of the backbone (default: a tenth of the other)")
    add("--milestones", type=positive, nargs="+", metavar="ITERATION", help="where the rates drop to a tenth")
    add("--warmup", type=int, metavar="ITERATIONS", help="rates rise from zero (default: 0; for tiny, 100)")
    add("--max-iterations", type=positive, help="stop after this many iterations of the schedule")
    add("--eval-every", type=positive, default=1, metavar="EPOCHS", help="evaluate so often and at the end (default 1)")
    add("--per-layer", action="store_true", help="evaluate every decoder layer, not the last alone")
    add(
        "--no-augmentation",
        dest="augment",
        action="store_false",
        help="train on the images as the evaluation sees them: to see whether a model can learn its training images",
    )
    add("--save-every", type=positive, default=1000, metavar="ITERATIONS", help="and at epochs' ends (default: 1000)")

    add(
        "--precision",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the model's activations (default: auto, bfloat16 on a GPU that has it, float16 on others, float32 on "
        "the CPU); matching and losses are in float32",
    )
    add_config_arguments(parser)
    return parser.parse_args(argv)


def plan(args, num_images):
    """What the flags and the number of training images make of the schedule: a namespace with

    batch_size and step_size  images per forward pass and per optimizer step, over all processes
    iterations, milestones    of the whole schedule: its optimizer steps, and those at which the rates drop to a tenth
    lr, backbone_lr, warmup   the highest rates, and the iterations in which they rise to them
    """
    if args.preset == "tiny" and not args.schedule:
        epochs, published_batch, drops, lr, factor, warmup = (
            TINY.epochs, TINY.batch_size, TINY.drops, TINY.lr, TINY.backbone_factor, TINY.warmup
        )  # fmt: skip
    else:
        length, published_batch, drops = SCHEDULES[args.schedule or "12ep"]
        drops = [drop / length for drop in drops]
        epochs, lr, factor, warmup = 12, LEARNING_RATE, BACKBONE_FACTOR, 0
    batch_size = args.batch_size or published_batch
    step_size = batch_size * args.accumulate
    if args.schedule and not args.epochs:
        iterations = round(length * published_batch / step_size)
    else:
        iterations = math.ceil((args.epochs or epochs) * num_images / step_size)
    lr = args.lr or lr * step_size / published_batch
    return SimpleNamespace(
        batch_size=batch_size,
        step_size=step_size,
        iterations=iterations,
        milestones=args.milestones or [round(drop * iterations) for drop in drops],
        lr=lr,
        backbone_lr=args.backbone_lr or lr * factor,
        warmup=warmup if args.warmup is None else args.warmup,
    )


def lr_factor(iteration, milestones, warmup):
    """Factor on the rates: linear over the first `warmup` iterations, a tenth from each milestone on."""
    return min(1.0, (iteration + 1) / (warmup + 1)) * 0.1 ** sum(iteration >= milestone for milestone in milestones)


def parameter_groups(model, lr, backbone_lr, weight_decay=WEIGHT_DECAY):
    """AdamW's groups: the backbone has its own rate; norms, embeddings, relative-position tables no weight decay."""
    norms = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)
    groups = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            decayed = not (isinstance(module, norms) or name in ("level_embed", "relative_position_bias_table"))
            rate = backbone_lr if module_name.startswith("backbone") else lr
            groups.setdefault((rate, weight_decay if decayed else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def quiet_worker(_):
    """Loader processes leave signals to the main process, which writes a checkpoint, and end when it tells them.

    Not by a signal, at which the main process would take them for broken.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def read_log(path, iteration):
    """The entries of a log up to this iteration; those behind it, which will be written again, and a torn line go."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the process was killed while it wrote the line
            entries.append(json.loads(line))
    entries = [entry for entry in entries if entry["iteration"] <= iteration]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    os.replace(temporary, path)
    return entries


def to_device(batch, device):
    """(images, targets) of `collate` on the device; what is no tensor stays as it is."""
    images, targets = batch
    move = lambda value: value.to(device, non_blocking=True) if torch.is_tensor(value) else value  # noqa: E731
    return [move(image) for image in images], [{k: move(v) for k, v in target.items()} for target in targets]


def autocast_dtype(precision, device):
    """The dtype of the activations for --precision on this device; None: float32, without autocast."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if precision == "float16" and device.type == "cpu":
        raise InputError("--precision float16: needs a GPU; the CPU has bfloat16 and float32")
    return None if precision == "float32" else getattr(torch, precision)


def backward(model, criterion, batches, autocast=None, scaler=None, stopping=False):
    """Adds the gradients of one optimizer step to those there, as if all batches of all processes were one.

    batches: [(images, targets), ...] on the model's device; autocast: dtype of the activations, None for the model's.
    Returns the terms {name: scalar}, "loss" among them, of which the mean over the processes is that of the whole, and
    whether any process is `stopping`.
    """
    counts = [len(target["labels"]) for _, targets in batches for target in targets]
    everywhere = gather((sum(counts), stopping))
    num_instances = max(1.0, sum(count for count, _ in everywhere) / len(everywhere))
    sums = {}
    for number, (images, targets) in enumerate(batches, start=1):
        waits = isinstance(model, DistributedDataParallel) and number < len(batches)
        with model.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(images[0].device.type, autocast, enabled=autocast is not None):
                outputs = model(images, targets)
            terms = criterion(outputs, targets, num_instances)
            loss = sum(criterion.weights[name] * term for name, term in terms.items())
            (scaler.scale(loss) if scaler else loss).backward()
        for name, term in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + term.detach()
    return sums, any(stop for _, stop in everywhere)


def save_picture(model, dataset, device, path, count=6):
    """PNG of the first images of a data set, the ground truth in the upper row and the predictions below."""
    columns = []
    for index in range(min(count, len(dataset))):
        image, target = dataset[index]
        pixels = (image * 255).round().to(torch.uint8)
        found = predict(model, pixels, device, score_threshold=0.3)
        pair = [draw_instances(pixels, instances, dataset.classes) for instances in (target, found)]
        columns.append(torch.cat(pair, 1))
    height = max(column.shape[1] for column in columns)
    columns = [nn.functional.pad(column, (0, 4, 0, height - column.shape[1]), value=255) for column in columns]
    save_png(torch.cat(columns, 2), path)


class Trainer:
    """One process's part of a training: what it trains, how far it is, and what it writes.

    Of the `world` processes only that of rank 0 prints and writes. Raises InputError or DataError for bad input.
    """

    def __init__(self, args, device, rank, world):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        self.output = Path(args.output)
        config = config_from(args)
        if rank > 0:
            dist.barrier()  # the first process generates `shapes`, and finds what is wrong with the files
        plain = eval_transform(*config.test_size)
        augmented = train_transform(config.train_size, config.train_scale)
        self.train_set = open_split(args, "train", augmented if args.augment else plain)
        self.val_set = open_split(args, "val", plain)
        if self.train_set.classes != self.val_set.classes:
            raise DataError("training and validation annotations differ in their categories; make them the same")
        if rank == 0 and world > 1:
            dist.barrier()
        config = replace(config, num_classes=len(self.train_set.classes))
        self.schedule = plan(args, len(self.train_set))
        if self.schedule.batch_size % world:
            raise InputError(f"--batch-size {self.schedule.batch_size}: is not a multiple of the {world} processes")

        torch.manual_seed(args.seed)
        self.model = DIMaskDINO(config)
        resumed = newest_checkpoint(self.output) if args.resume else None
        if args.resume and not resumed:
            self.say(f"nothing to resume in {self.output}: starting anew")
        elif not args.resume and (self.output / "checkpoint.pt").exists():
            raise InputError(f"{self.output}: holds checkpoint.pt; go on with --resume or choose another --output")
        if not resumed:
            for line in load_starting_point(self.model, args, self.train_set.classes):
                self.say(line)
        self.model.to(device)
        self.criterion = SetCriterion(config)
        groups = parameter_groups(self.model, self.schedule.lr, self.schedule.backbone_lr)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.autocast = autocast_dtype(args.precision, device)
        self.scaler = torch.amp.GradScaler(device.type) if self.autocast == torch.float16 else None

        # What the order of the images and all random numbers depend on, with the iteration and the process.
        self.settings = {name: getattr(args, name) for name in ("seed", "accumulate", "augment")}
        self.settings["batch_size"] = self.schedule.batch_size
        self.iteration, self.seconds = 0, 0.0
        self.window = {}  # sums of the terms since the last line of the log
        self.evaluations = []  # their lines in the log
        if resumed:
            self.resume(*resumed)
        if rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            self.log = open(self.output / "log.jsonl", "a", buffering=1)
        self.clock = time.perf_counter() - self.seconds  # when it would have begun without interruption
        self.last_step = None  # its images' ids and its terms
        self.last_step_bad = torch.zeros(1, pin_memory=device.type == "cuda")  # on the host: 1 if it changed nothing
        self.signals, self.evaluating = [], False

    def say(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def resume(self, path, checkpoint):
        if "optimizer" not in checkpoint:
            raise InputError(f"{path}: holds no state of a training; start from its weights with --init")
        check_config(path, checkpoint, self.model.config, **self.settings)
        self.model.load_state_dict(checkpoint["model"])
        rates = [group["base_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["base_lr"] = rate  # the flags', which may be new
        if self.scaler and checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.iteration, self.seconds = checkpoint["iteration"], checkpoint["seconds"]
        self.window = {name: value.to(self.device) for name, value in checkpoint["window"].items()}
        self.say(f"resuming {path} after iteration {self.iteration}")
        if changed := [k for k, v in vars(self.schedule).items() if checkpoint["schedule"].get(k) != v]:
            self.say(f"the schedule has changed in {', '.join(changed)}")
        if self.rank == 0:
            self.evaluations = [e for e in read_log(self.output / "log.jsonl", self.iteration) if "box" in e]

    def save(self, name="checkpoint.pt", keep=None):
        """Write all that going on needs: `settings` and `iteration` give the sampler's position and random states."""
        if self.rank > 0:
            return
        content = {
            "model": self.model.state_dict(),
            "config": asdict(self.model.config),
            "classes": self.train_set.classes,
            "category_ids": self.train_set.category_ids,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "schedule": vars(self.schedule),
            "settings": self.settings,
            "epoch": self.epoch(self.iteration),
            "iteration": self.iteration,
            "seconds": time.perf_counter() - self.clock,
            "window": {name: value.cpu() for name, value in self.window.items()},
        }
        save_checkpoint(self.output / name, content, keep)

    def epoch(self, iteration):
        """Whole passes over the training images after so many iterations."""
        return iteration * self.schedule.step_size // len(self.train_set)

    def ends_epoch(self, divisor=1):
        """Whether the last iteration ended an epoch whose number the divisor divides, or the training."""
        before, now = self.epoch(self.iteration - 1), self.epoch(self.iteration)
        return self.iteration > 0 and (now // divisor > before // divisor or self.iteration == self.schedule.iterations)

    def on_signal(self, number, frame):
        self.signals.append(number)
        if self.evaluating:  # behind the checkpoint; the evaluation is done again
            self.say(f"stopped after iteration {self.iteration}; --resume goes on from there")
            sys.exit()

    def run(self):
        """Train to the end of the schedule, to --max-iterations, or to SIGINT or SIGTERM."""
        args, schedule = self.args, self.schedule
        stop = min(schedule.iterations, args.max_iterations or schedule.iterations)
        start = self.iteration * schedule.step_size
        sampler = TrainSampler(len(self.train_set), schedule.batch_size, args.seed, start, self.rank, self.world)
        loader = DataLoader(
            SeededDataset(self.train_set), batch_sampler=sampler, collate_fn=collate, num_workers=args.workers,
            pin_memory=self.device.type == "cuda", worker_init_fn=quiet_worker,
        )  # fmt: skip
        batches = iter(loader) if self.iteration < stop else None
        model = DistributedDataParallel(self.model, broadcast_buffers=False) if self.world > 1 else self.model
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.progress = tqdm(total=stop, initial=self.iteration, desc="train", disable=self.rank > 0 or None)
        self.since, self.waited, self.seen = time.perf_counter(), 0.0, 0  # begin, waiting, images of a line of the log

        evaluated = any(entry["iteration"] == self.iteration for entry in self.evaluations)
        if self.ends_epoch(args.eval_every) and not gather(evaluated)[0]:  # was interrupted in it
            self.evaluate()
        stopping = False
        while self.iteration < stop and not stopping:
            stopping = self.step(model, batches)
            if self.ends_epoch() or self.iteration == stop or self.iteration % args.save_every == 0 or stopping:
                self.check_last_step(wait=True)
                self.save(keep="previous.pt")
            if self.ends_epoch(args.eval_every) and not stopping:
                self.evaluate()
        self.progress.close()
        if stopping:
            self.say(f"stopped after iteration {self.iteration}; --resume goes on from there")

    def step(self, model, batches):
        """One optimizer step. Returns whether a signal asks to stop, here or in another process."""
        model.train()
        torch.manual_seed(seed_of(self.args.seed, 2, self.iteration, self.rank))
        factor = lr_factor(self.iteration, self.schedule.milestones, self.schedule.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        before = time.perf_counter()
        batches = [next(batches) for _ in range(self.args.accumulate)]
        self.waited += time.perf_counter() - before
        batches = [to_device(batch, self.device) for batch in batches]
        self.optimizer.zero_grad()
        terms, stopping = backward(
            model, self.criterion, batches, self.autocast, self.scaler, stopping=bool(self.signals)
        )
        self.check_last_step()  # nothing waits for its flag here: the matcher has waited for what came behind it

        bad = ~terms["loss"].isfinite()
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        if not self.scaler:  # it skips steps with infinite gradients itself, and goes on with a smaller scale
            bad = bad | ~norm.isfinite()
        bad = bad.float()
        if self.world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad  # 1: the fused step changes nothing
            self.optimizer.step()
        self.last_step_bad.copy_(bad, non_blocking=True)
        self.last_step = [target["image_id"] for _, targets in batches for target in targets], terms

        self.iteration += 1
        self.seen += self.schedule.step_size
        for name, term in terms.items():
            self.window[name] = self.window.get(name, 0) + term
        self.progress.update()
        if self.iteration % LOG_EVERY == 0 or self.iteration == self.schedule.iterations:
            self.check_last_step(wait=True)
            self.write_log(self.schedule.lr * factor)
        return stopping

    def check_last_step(self, wait=False):
        """Raise InputError if the last step's loss or gradient was not finite, in which case it changed nothing."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize()
        if not self.last_step_bad:
            return
        image_ids, terms = self.last_step
        found = gather((image_ids, [name for name, term in terms.items() if not math.isfinite(term)]))
        image_ids = [image_id for ids, _ in found for image_id in ids]
        names = sorted({name for _, names in found for name in names if name != "loss"}) or ["the gradient"]
        self.iteration -= 1
        self.window = {}
        self.save("nonfinite.pt")
        raise InputError(
            f"{self.output}: iteration {self.iteration + 1}: {', '.join(names)} not finite on images {image_ids}; the "
            "state before it is in nonfinite.pt; look at these images, or lower --lr"
        )

    def write_log(self, lr):
        """A line of the log and the progress bar's numbers: means over the iterations since the last line."""
        steps = (self.iteration - 1) % LOG_EVERY + 1
        means = {name: float(value) / steps for name, value in self.window.items()}
        everywhere = gather(means)
        self.window = {}
        if self.rank > 0:
            return
        means = {name: sum(terms[name] for terms in everywhere) / self.world for name in means}
        now = time.perf_counter()
        entry = {
            "epoch": self.epoch(self.iteration),
            "iteration": self.iteration,
            "seconds": now - self.clock,
            "lr": lr,
            "images_per_second": self.seen / (now - self.since),
            "waiting": self.waited / (now - self.since),  # share of the time in which there was no batch
        }
        shown = {"loss": f"{means['loss']:.2f}"}
        kinds = {"class": ("loss_ce",), "box": ("loss_bbox", "loss_giou"), "mask": ("loss_mask", "loss_dice")}
        for kind, names in kinds.items():
            weighted = [self.criterion.weights[n] * mean for n, mean in means.items() if n.startswith(names)]
            shown[kind] = f"{sum(weighted):.2f}"
        shown |= {"lr": f"{lr:.1e}", "img/s": f"{entry['images_per_second']:.1f}", "wait": f"{entry['waiting']:.0%}"}
        if self.device.type == "cuda":
            entry["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            shown["GiB"] = f"{entry['gpu_gib']:.1f}"
        self.log.write(json.dumps(entry | means) + "\n")
        self.progress.set_postfix(shown)
        self.since, self.waited, self.seen = now, 0.0, 0

    def evaluate(self):
        """Evaluate, draw predictions, write both, and keep the checkpoint if it is the best so far."""
        self.evaluating = True
        if self.signals:
            self.on_signal(self.signals[0], None)
        scores = evaluate(self.model, self.val_set, self.device, self.args.workers, per_layer=self.args.per_layer)
        self.evaluating = False
        if self.rank == 0:
            epoch, seconds = self.epoch(self.iteration), time.perf_counter() - self.clock
            save_picture(self.model, self.val_set, self.device, self.output / f"epoch_{epoch:03d}.png")
            total = lambda entry: (entry["box"]["AP"] or 0) + (entry["mask"]["AP"] or 0)  # noqa: E731
            if all(total(scores) > total(entry) for entry in self.evaluations):
                link(self.output / "checkpoint.pt", "best.pt")
            self.evaluations.append({"epoch": epoch, "iteration": self.iteration, "seconds": seconds} | scores)
            if self.iteration == self.schedule.iterations:
                (self.output / "eval.json").write_text(json.dumps(scores, indent=1) + "\n")
            self.log.write(json.dumps(self.evaluations[-1]) + "\n")
            box, mask = (percent(scores[kind]["AP"]) for kind in ("box", "mask"))
            self.progress.write(f"epoch {epoch}: box AP {box}, mask AP {mask} after {seconds:.0f} s")
        self.since, self.waited, self.seen = time.perf_counter(), 0.0, 0


def main():
    args = parse_arguments()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    device = choose_device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # gloo also on GPUs: the few numbers that the processes exchange in every step are on the host.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    Trainer(args, device, rank, world).run()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
