"""Trains a model, in one process or under torchrun; without arguments, preset `tiny` on generated shapes."""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, namedtuple
from dataclasses import asdict, replace
from itertools import chain

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cli
import distributed
from config import PRESETS, InputError
from data import seed_of, to_device, train_batches
from detections import detect
from drawing import draw_rows, save_png
from eval import find_results, percent, score
from files import write_whole
from formats.coco import check_sizes, match_classes
from losses import KINDS, SetCriterion
from model import DIMaskDINO

WEIGHT_DECAY, CLIP_NORM = 0.05, 0.01
LOG_EVERY = 20  # iterations

# A schedule: so many iterations of so many images, where the rates drop to a tenth, the rate and what goes with it; and
# how many epochs it is stretched over where no --schedule is given.
Recipe = namedtuple(
    "Recipe", "iterations batch_size milestones lr backbone_factor warmup epochs", defaults=(1e-4, 0.1, 0, 12)
)
RECIPES = {
    "12ep": Recipe(88_500, 16, (81_125,)),
    "24ep": Recipe(177_000, 16, (147_500,)),
    "50ep": Recipe(368_750, 16, (327_778, 355_092)),
    "bdd68ep": Recipe(59_500, 8, (43_750,)),  # BDD100K: 68 epochs of 7,000 images, the drop at epoch 50
    "small": Recipe(3_263, 8, (2_600, 3_100), lr=8e-4, warmup=50, epochs=60),  # 60 epochs of 435 images
    "tiny": Recipe(1_500, 16, (1_200, 1_425), lr=1e-3, backbone_factor=1.0, warmup=100),  # 12 epochs of `shapes`
}


def parse_arguments(argv=None):
    """The flags as a namespace; what is left out is None where `make_schedule` chooses by preset and schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="The model (default: tiny).")
    add("--output", default="runs/train", metavar="DIR", help="For checkpoints, log, pictures (default: runs/train).")
    add("--resume", action="store_true", help="Go on from the newest checkpoint in --output, if there is one.")
    seed = cli.at_least(0, int, 2**63 - 1)
    add("--seed", type=seed, default=0, help="Of weights, sampling, augmentation and losses (default: 0).")
    cli.add_model_arguments(parser)
    cli.add_data_arguments(parser)
    checkpoint.add_start_arguments(parser)
    add("--keep-empty", action="store_true", help="Train on the images without instances too, as background.")
    add("--no-augmentation", dest="augment", action="store_false", help="Train on images as the evaluation sees them.")

    add = parser.add_argument_group("schedule; the default is the published one, or small's or tiny's").add_argument
    length = "A published one, or a preset's, for any batch size (default: 12 epochs; small: 60)."
    add("--schedule", choices=RECIPES, help=length)
    add("--epochs", type=cli.positive, help="Passes over the training images, instead of the schedule's length.")
    batch = "Images per forward pass, over all processes (default: 16; bdd68ep, small: 8)."
    add("--batch-size", type=cli.positive, help=batch)
    add("--accumulate", type=cli.positive, default=1, metavar="N", help="Batches per optimizer step (default: 1).")
    rate = "The learning rate (default: 1e-4; small: 8e-4; tiny: 1e-3; for other batch sizes in proportion)."
    add("--lr", type=cli.not_negative, help=rate)
    backbone = "That of the backbone; 0 freezes it (default: a tenth of --lr; tiny: the same)."
    add("--backbone-lr", type=cli.not_negative, help=backbone)
    add("--milestones", type=cli.positive, nargs="+", metavar="ITERATION", help="Where the rates drop to a tenth.")
    add("--warmup", type=cli.count, metavar="ITERATIONS", help="Rates rise from zero (default: 0; tiny 100, small 50).")
    add("--max-iterations", type=cli.positive, help="Stop after this many iterations of the schedule.")
    add("--save-every", type=cli.positive, default=1000, metavar="N", help="So many iterations (default: 1000).")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=cli.positive, default=1, metavar="EPOCHS", help="So often and at the end (default: 1).")
    add("--no-eval", dest="evaluate", action="store_false", help="Train without evaluation, and without its images.")
    add("--per-layer", action="store_true", help="Evaluate every decoder layer, not the last alone.")
    cli.add_config_arguments(parser)
    return parser.parse_args(argv)


Schedule = namedtuple("Schedule", "batch_size step_size iterations milestones lr backbone_lr warmup")


def make_schedule(args, num_images):
    """What the flags and the number of training images make of the schedule:

    batch_size and step_size  images per forward pass and per optimizer step, over all processes
    iterations, milestones    of the whole schedule: its optimizer steps, and those at which the rates drop to a tenth
    lr, backbone_lr, warmup   the highest rates, and the iterations in which they rise to them
    """
    recipe = RECIPES[args.schedule or (args.preset if args.preset in RECIPES else "12ep")]
    given = lambda value, default: default if value is None else value  # 0 is a value
    batch_size = given(args.batch_size, recipe.batch_size)
    step_size = batch_size * args.accumulate
    iterations = math.ceil(given(args.epochs, recipe.epochs) * num_images / step_size)
    if args.schedule and args.epochs is None:
        iterations = round(recipe.iterations * recipe.batch_size / step_size)
    milestones = given(args.milestones, [round(m / recipe.iterations * iterations) for m in recipe.milestones])
    lr = given(args.lr, recipe.lr * step_size / recipe.batch_size)
    backbone_lr = given(args.backbone_lr, lr * recipe.backbone_factor)
    warmup = given(args.warmup, min(recipe.warmup, iterations // 10))
    return Schedule(batch_size, step_size, iterations, milestones, lr, backbone_lr, warmup)


def lr_factor(iteration, milestones, warmup):
    """Factor on the rates: linear over the first `warmup` iterations, a tenth from each milestone on."""
    return min(1.0, (iteration + 1) / (warmup + 1)) * 0.1 ** sum(iteration >= milestone for milestone in milestones)


def parameter_groups(model, lr, backbone_lr):
    """AdamW's groups, the same whatever the rates: the backbone, left out where its rate is 0, and the rest have their
    own, with weight decay and, for norms, embeddings and relative-position tables, without. Frozen norms are in none.
    """
    norms = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)
    groups = {}
    for module_name, module in model.named_modules():
        in_backbone = module_name.startswith("backbone")
        if in_backbone and backbone_lr == 0:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            decayed = not (isinstance(module, norms) or name == "relative_position_bias_table")
            rate, decay = backbone_lr if in_backbone else lr, WEIGHT_DECAY if decayed else 0.0
            group = {"params": [], "lr": rate, "base_lr": rate, "weight_decay": decay}
            groups.setdefault((in_backbone, decay), group)["params"].append(parameter)
    return list(groups.values())


def backward(model, criterion, batches, autocast=None, scaler=None, stopping=False):
    """Adds the gradients of one optimizer step to those there, as if all batches of all processes were one.

    batches: [(images, targets), ...] on the model's device; autocast: dtype of the activations, None for the model's.
    Returns the terms {name: scalar}, "loss" among them, of which the mean over the processes is that of the whole, and
    whether any process is `stopping`.
    """
    count = sum(len(target["labels"]) for _, targets in batches for target in targets)
    counts, stopping = zip(*distributed.gather((count, stopping)), strict=True)
    num_instances = max(1.0, sum(counts) / len(counts))
    sums = Counter()  # whose `update` adds
    for number, (images, targets) in enumerate(batches, start=1):
        waits = isinstance(model, DistributedDataParallel) and number < len(batches)
        with model.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(images[0].device.type, autocast, enabled=autocast is not None):
                outputs = model(images, targets)
            terms = criterion(outputs, targets, num_instances)
            loss = criterion.total(terms)
            (scaler.scale(loss) if scaler else loss).backward()
        sums.update({name: term.detach() for name, term in {"loss": loss, **terms}.items()})
    return sums, any(stopping)


def save_picture(model, classes, dataset, path):
    """PNG of the first six images of a data set, the ground truth in the upper row and the detections below."""
    columns = []
    for image, target in map(dataset.ground_truth, range(min(6, len(dataset)))):
        [[found]] = detect(model, [image], score_threshold=0.3)
        columns.append([(image, target, dataset.classes), (image, found, classes)])
    write_whole(path, lambda temporary: save_png(draw_rows(columns), temporary))


class Trainer:
    """One process's part of a training: what it trains, how far it is, and what it writes.

    Of the `world` processes only that of rank 0 prints and writes. Raises InputError or DataError for bad input.
    """

    def __init__(self, args, device, rank, world):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        config = cli.config_from(args)
        augmentation = (config.train_size, config.train_scale) if args.augment else None
        self.train_set = cli.open_split(args, "train", config.test_size, augmentation)
        self.val_set = cli.open_split(args, "val", config.test_size) if args.evaluate else None
        if self.val_set is not None:
            check_sizes(self.val_set.coco.dataset, self.val_set.image_dir)
            self.labels = match_classes(self.train_set.classes, self.val_set.classes)
        self.schedule = make_schedule(args, len(self.train_set))
        if self.schedule.batch_size % world:
            raise InputError(f"--batch-size {self.schedule.batch_size}: is not a multiple of the {world} processes")
        self.frozen = self.schedule.backbone_lr == 0
        self.stop = min(self.schedule.iterations, args.max_iterations or self.schedule.iterations)
        # With the iteration and the process, all that images and random numbers depend on, and what is trained.
        self.settings = {"seed": args.seed, "augment": args.augment, "keep_empty": args.keep_empty,
                         "images_per_iteration": self.schedule.step_size, "frozen_backbone": self.frozen,
                         "classes": self.train_set.classes}  # fmt: skip
        self.iteration, self.seconds = 0, 0.0
        self.saved, self.stepping = 0, False  # the iteration of checkpoint.pt; whether the weights are half changed
        self.window = Counter()  # sums of the terms since the last line of the log
        self.signals = []  # when the first one came
        self.output = checkpoint.Output(args.output, args.resume)
        self.build(replace(config, num_classes=len(self.train_set.classes)))

    def build(self, config):
        """Build the model and what trains it, in the state from which the training goes on, and say which that is."""
        torch.manual_seed(self.args.seed)
        self.model, resumed = DIMaskDINO(config), self.output.resumed
        if not resumed:
            lines = [f"nothing to resume in {self.output.folder}: starting anew"] * self.args.resume
            lines += checkpoint.load_starting_point(self.model, self.args, self.train_set.classes)
        self.model.to(self.device)
        self.model.backbone.requires_grad_(not self.frozen)
        self.autocast = cli.prepare_model(self.model, self.args, self.device)
        self.criterion = SetCriterion(config)
        self.groups = parameter_groups(self.model, self.schedule.lr, self.schedule.backbone_lr)
        self.optimizer = torch.optim.AdamW(self.groups, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        if resumed:
            states = self.model, self.optimizer, self.scaler
            lines = checkpoint.restore(*resumed, *states, self.settings, self.schedule)
            self.iteration = self.saved = resumed[1]["iteration"]
            self.seconds, self.window = resumed[1]["seconds"], Counter(resumed[1]["window"])
        distributed.say("\n".join(lines))

    def describe(self):
        """Print in three lines what is going to be done, and warn of what is probably not meant."""
        schedule, stop, images = self.schedule, self.stop, len(self.train_set)
        evaluated = f"{len(self.val_set)} images to evaluate on" if self.val_set else "no evaluation"
        distributed.say(
            f"{images} images of {len(self.train_set.classes)} classes to train on, {evaluated}\n"
            f"{stop} iterations, {stop * schedule.step_size / images:.3g} epochs; warm-up: {schedule.warmup}; "
            f"learning rate {schedule.lr:.3g}, backbone {schedule.backbone_lr:.3g}; tenths from {schedule.milestones}\n"
            f"{schedule.step_size} images an iteration, {schedule.batch_size // self.world} x {self.world} processes x "
            f"{self.args.accumulate} batches; on {self.device.type}; output in {self.output.folder}"
        )
        if self.iteration > stop:
            distributed.warn(f"{self.iteration} iterations are made, {stop} are asked for: nothing is left to train")
        if 2 * (warmup := schedule.warmup) >= stop:
            distributed.warn(f"the warm-up takes {warmup} of {stop} iterations: lower --warmup, or train longer")
        if self.model.config.di and not self.model.config.selections[1:]:
            distributed.warn("with one selection De-Imbalance changes nothing; give --selections two numbers")
        counts = [len(self.train_set.instances[image_id]) for image_id in self.train_set.image_ids]
        hold = lambda limit: f"{sum(n > limit for n in counts)} of {images} images hold more instances than"
        queries, denoising = self.model.config.selections[-1], self.model.config.denoising_queries
        if max(counts) > queries:
            advice = f"it can find {queries} in an image; the last number of --selections sets how many"
            distributed.warn(f"{hold(queries)} the model has queries, up to {max(counts)}: {advice}")
        if max(counts) > denoising > 0:
            advice = "trains without denoising, and learns more slowly; raise --denoising-queries"
            distributed.warn(f"{hold(denoising)} the {denoising} denoising queries: a batch with one of them {advice}")

    # The loop

    def run(self):
        """Train to the end of the schedule, to --max-iterations, or to a signal in any process; errors save first."""
        entries = distributed.together(lambda: self.output.begin(self.iteration))
        self.evaluations = [entry for entry in entries if "box" in entry]
        if self.rank == 0 and self.iteration < self.stop:
            (self.output.folder / "eval.json").unlink(missing_ok=True)  # of the end of a shorter schedule
        self.batches = train_batches(
            self.train_set, self.schedule.batch_size, self.args.seed, self.iteration * self.schedule.step_size,
            self.rank, self.world, self.args.workers, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        self.parallel = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.listen()
        self.clock = time.perf_counter() - self.seconds  # when it would have begun without interruption
        self.begin_window()
        progress = cli.Progress("train", self.stop, self.iteration, "iterations")
        every, stopping = self.args.eval_every, False
        with contextlib.closing(self.batches), self.saving_first(), progress as self.progress:
            evaluated = any(entry["iteration"] == self.iteration for entry in self.evaluations)
            if self.ends_epoch(every) and not distributed.gather(evaluated)[0]:
                stopping = self.evaluate()  # it was interrupted in this one
            while self.iteration < self.stop and not stopping:
                stopping = self.step()
                due = self.ends_epoch() or self.iteration == self.stop or self.iteration % self.args.save_every == 0
                if due or stopping:
                    self.save()
                if self.ends_epoch(every) and not stopping:
                    stopping = self.evaluate()
        if stopping:
            distributed.say(f"stopped after iteration {self.iteration}; --resume goes on from there")

    def epoch(self, iteration):
        """Whole passes over the training images after so many iterations."""
        return iteration * self.schedule.step_size // len(self.train_set)

    def ends_epoch(self, divisor=1):
        """Whether the last iteration ended an epoch whose number the divisor divides, or the training."""
        before, now = self.epoch(self.iteration - 1), self.epoch(self.iteration)
        return self.iteration > 0 and (now // divisor > before // divisor or self.iteration == self.schedule.iterations)

    def step(self):
        """One iteration. Returns whether a signal is to end the training, in whichever process."""
        self.model.train()
        self.model.backbone.train(not self.frozen)
        torch.backends.cudnn.benchmark = self.args.augment  # crops are of one size
        factor = lr_factor(self.iteration, self.schedule.milestones, self.schedule.warmup)
        for group, flags in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = flags["base_lr"] * factor  # a checkpoint that was resumed may be of other rates
        before = time.perf_counter()
        batches = distributed.together(
            lambda: [to_device(next(self.batches), self.device) for _ in range(self.args.accumulate)]
        )
        self.waited += time.perf_counter() - before
        torch.manual_seed(seed_of(self.args.seed, 2, self.iteration, self.rank))
        self.optimizer.zero_grad()
        stopping = bool(self.signals)
        terms, stopping = backward(self.parallel, self.criterion, batches, self.autocast, self.scaler, stopping)
        self.scaler.unscale_(self.optimizer)  # which, as all of the scaler, does nothing but for float16
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        terms = self.agree(terms, norm, batches)
        self.stepping = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.iteration += 1
        self.stepping = False
        self.count(terms, self.schedule.lr * factor)
        return stopping

    def agree(self, terms, norm, batches):
        """The terms as numbers, means over the processes, of which some may have no denoising terms.

        Raises InputError, before the step, if the loss or the gradient's norm is not finite in any process. With a
        scaler, gradients that overflow are not an error: it skips the step and goes on with a smaller scale.
        """
        numbers = dict(zip(terms, torch.stack([*terms.values()]).tolist(), strict=True))
        overflows = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        finite = math.isfinite(numbers["loss"]) and (overflows or math.isfinite(norm))
        images = [target["image_id"] for _, targets in batches for target in targets]
        parts, finite, images = zip(*distributed.gather((numbers, finite, images)), strict=True)
        names = dict.fromkeys(chain(*parts))
        means = {name: sum(numbers.get(name, 0) for numbers in parts) / self.world for name in names}
        if not all(finite):
            bad = ", ".join(name for name in sorted(means) if name != "loss" and not math.isfinite(means[name]))
            self.save("nonfinite.pt", keep=None)
            where = f"{self.output.folder}: iteration {self.iteration + 1}: {bad or 'the gradient'} not finite"
            advice = "the state before it is in nonfinite.pt; look at these images, or lower --lr"
            distributed.end_if(InputError(f"{where} on images {[*chain(*images)]}; {advice}"))
        return means

    def evaluate(self):
        """Evaluate, write the numbers and a picture, and keep the checkpoint if it is the best so far.

        Returns whether a signal stopped it, here or in another process; resuming evaluates again.
        """
        if self.val_set is None:
            return False
        torch.backends.cudnn.benchmark = False  # images are of many sizes
        results = find_results(
            self.model, self.val_set, self.args.workers, self.args.per_layer,
            autocast=self.autocast, labels=self.labels, stopping=lambda: len(self.signals) > 0,
        )  # fmt: skip
        if results is not None and self.rank == 0:
            scores = score(self.val_set, results)
            folder, entry = self.output.folder, self.now() | scores
            totals = [sum(entry[kind]["AP"] or 0 for kind in ("box", "mask")) for entry in [*self.evaluations, entry]]
            if totals[-1] > max(totals[:-1], default=-1):
                checkpoint.link(folder / "checkpoint.pt", "best.pt")
            self.evaluations.append(entry)
            if self.iteration == self.schedule.iterations:
                write_whole(folder / "eval.json", json.dumps(scores, indent=1) + "\n")
            self.output.log.write(json.dumps(entry) + "\n")
            save_picture(self.model, self.train_set.classes, self.val_set, folder / f"epoch_{entry['epoch']:03d}.png")
            box, mask = (percent(scores[kind]["AP"]) for kind in ("box", "mask"))
            self.progress.say(f"epoch {entry['epoch']}: box AP {box}, mask AP {mask} after {entry['seconds']:.0f} s")
        self.begin_window()
        return results is None

    # What ends it early

    def listen(self):
        """From now on, the first signal ends the training at the next step, and the second at once."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signals.append(time.monotonic())
        if len(self.signals) == 1:
            print("stopping after this iteration; a second signal ends it at once", file=sys.stderr, flush=True)
        # torchrun passes on what the terminal has sent to all processes, and `timeout` sends twice: that is one signal.
        elif self.signals[-1] - self.signals[0] > (5.0 if "WORLD_SIZE" in os.environ else 0.5):
            for process in multiprocessing.active_children():  # they may wait for a disk
                process.kill()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # as the first process of a container, which the system spares

    @contextlib.contextmanager
    def saving_first(self):
        """An error that ends the block saves what there is, as far as it can, and says what can be resumed."""
        try:
            yield
        except (Exception, SystemExit) as error:  # SystemExit: the error is in another process
            self.optimizer.zero_grad()  # for the sake of memory
            if self.iteration > self.saved and not self.stepping:
                with contextlib.suppress(Exception):  # the disk may be what is to blame
                    self.save()
            place = f"{self.output.folder / 'checkpoint.pt'} holds iteration {self.saved}: --resume goes on from there"
            if self.saved and (reason := cli.reason_of(error)):
                raise InputError(f"{reason}; {place}") from error
            if self.saved:
                distributed.warn(place)
            raise

    # What is written

    def now(self):
        """How far the training is: whole epochs, iterations, and seconds, those before an interruption included."""
        seconds = time.perf_counter() - self.clock
        return {"epoch": self.epoch(self.iteration), "iteration": self.iteration, "seconds": seconds}

    def save(self, name="checkpoint.pt", keep="previous.pt"):
        """Write all that going on needs: `settings` and `iteration` give the sampler's position and random states."""
        if self.rank == 0:
            content = {"model": self.model.state_dict(), "config": asdict(self.model.config)}
            content |= {"classes": self.train_set.classes, "category_ids": self.train_set.category_ids}
            content |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            content |= {"schedule": self.schedule._asdict(), "settings": self.settings, "window": dict(self.window)}
            checkpoint.save_checkpoint(self.output.folder / name, content | self.now(), keep)
        if name == "checkpoint.pt":
            self.saved = self.iteration

    def begin_window(self):
        """Begin to measure time for a line of the log: its begin, seconds without a batch, and images."""
        self.since, self.waited, self.seen = time.perf_counter(), 0.0, 0

    def count(self, terms, lr):
        """Add the terms of an iteration to the window; at its end, a line of the log: means over its iterations."""
        self.seen += self.schedule.step_size
        self.window.update(terms)
        steps = (self.iteration - 1) % LOG_EVERY + 1
        means = {name: value / steps for name, value in self.window.items()}
        span = time.perf_counter() - self.since
        rates = {"lr": lr, "images_per_second": self.seen / span, "waiting": self.waited / span}
        if self.device.type == "cuda":
            rates["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        of_kind = lambda names: {name: mean for name, mean in means.items() if name.startswith(names)}
        weighted = {kind: self.criterion.total(of_kind(names)) for kind, names in KINDS.items()}
        self.progress.step(loss=means["loss"], **weighted, **rates)
        if steps == LOG_EVERY or self.iteration == self.schedule.iterations:
            if self.rank == 0:
                self.output.log.write(json.dumps(self.now() | rates | means) + "\n")
            self.begin_window()
        if steps == LOG_EVERY:
            self.window.clear()


def main():
    args = parse_arguments()
    device, rank, local_rank, world = distributed.join_processes(cli.choose_device(args.device))
    distributed.together(lambda: local_rank == 0 and cli.generate_shapes(args))
    trainer = distributed.together(lambda: Trainer(args, device, rank, world))
    distributed.require_same(
        iteration=trainer.iteration, seconds=trainer.seconds, device=device.type, precision=str(trainer.autocast),
        **trainer.settings, **trainer.schedule._asdict(), **asdict(trainer.model.config),
    )  # fmt: skip
    trainer.describe()
    trainer.run()


if __name__ == "__main__":
    cli.run_program(main)
