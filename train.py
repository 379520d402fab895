"""Trains a model: without arguments, preset `tiny` on generated shapes, on a GPU if there is one."""

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbone import load_backbone_weights
from data import DataError, collate, eval_transform, train_transform
from eval import add_data_arguments, evaluate, open_split, percent, run_program
from losses import SetCriterion
from model import (
    GUIDANCE,
    POSITION_TOKENS,
    PRESETS,
    DIMaskDINO,
    InputError,
    check_config,
    choose_device,
    read_checkpoint,  # fmt: skip
    save_checkpoint,
)
from predict import draw_instances, predict, save_png

# What the flags default to: the published recipe, and what trains `tiny` on two CPU cores in minutes.
PUBLISHED = {
    "epochs": 12,
    "batch_size": 16,
    "lr": 1e-4,
    "backbone_lr": 1e-5,
    "lr_drops": [81_125 / 88_500],
    "warmup": 0,
}
RECIPES = {
    "tiny": {"epochs": 10, "batch_size": 16, "lr": 1e-3, "backbone_lr": 1e-3, "lr_drops": [0.8, 0.95], "warmup": 100}
}


def parameter_groups(model, lr, backbone_lr, weight_decay):
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


def lr_factor(iteration, total, drops, warmup):
    """Factor on the learning rate: linear over the first `warmup` iterations, x 0.1 behind each fraction in `drops`."""
    return min(1.0, (iteration + 1) / (warmup + 1)) * 0.1 ** sum(iteration >= drop * total for drop in drops)


def to_device(targets, device):
    """The tensors of the targets on the device; the rest as it is."""
    return [
        {
            name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in target.items()
        }
        for target in targets
    ]


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


def selections(text):
    """ "600,300" -> (600, 300); ValueError for anything else."""
    return tuple(int(size) for size in text.split(","))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="the model (default: tiny)")
    parser.add_argument(
        "--output",
        default="runs/train",
        metavar="DIR",
        help="folder for checkpoints, log and pictures (default: runs/train)",
    )
    parser.add_argument(
        "--backbone-weights",
        metavar="NAME-OR-FILE",
        help="pretrained backbone: torchvision's name, e.g. ResNet50_Weights.IMAGENET1K_V1, or a file of torchvision, "
        "Microsoft's Swin or Detectron2 (default: random)",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="allow --backbone-weights to be a pickle, such as Detectron2's .pkl, which can run any program it holds",
    )
    parser.add_argument(
        "--grad-checkpoint", action="store_true", help="save memory: compute the layers twice instead of storing them"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --output, if there is one"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, sampling and augmentation (default: 0)")
    group = parser.add_argument_group("training, with the published recipe (or the one for tiny) as default")
    group.add_argument("--epochs", type=int, help="passes over the training images")
    group.add_argument("--batch-size", type=int, help="images per iteration")
    group.add_argument("--lr", type=float, help="learning rate")
    group.add_argument("--backbone-lr", type=float, help="learning rate of the backbone")
    group.add_argument(
        "--lr-drops",
        type=float,
        nargs="+",
        metavar="FRACTION",
        help="fractions of the training behind which the rates drop to a tenth",
    )
    group.add_argument("--warmup", type=int, help="iterations in which the rates rise from zero")
    group.add_argument("--train-size", type=int, help="side of the training crops in pixels")
    group.add_argument(
        "--train-scale",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="range of the factor by which images are scaled before the crop",
    )
    group.add_argument(
        "--test-size",
        type=int,
        nargs=2,
        metavar=("SHORTER", "LONGER"),
        help="shorter side of test images, and longer side at most",
    )
    group.add_argument("--max-iterations", type=int, help="stop after this many iterations")
    parser.add_argument(
        "--eval-every",
        type=int,
        default=1,
        metavar="EPOCHS",
        help="evaluate after every so many epochs and after the last (default: 1)",
    )
    add_data_arguments(parser)
    group = parser.add_argument_group("ablations of the paper, Tables 3-9 (default: as in the preset)")
    group.add_argument("--no-di", dest="di", action="store_false", default=None, help="without De-Imbalance")
    group.add_argument("--no-bato", dest="bato", action="store_false", default=None, help="without BATO")
    group.add_argument("--guidance", choices=GUIDANCE, help="tokens that guide BATO; cuts the pipeline behind them")
    group.add_argument(
        "--no-gtg", dest="gtg", action="store_false", default=None, help="the queries themselves guide BATO"
    )
    group.add_argument("--selections", type=selections, metavar="N,...", help="sizes of the selections, e.g. 600,300")
    group.add_argument("--decoder-layers", type=int, metavar="N", help="layers of the decoder")
    group.add_argument("--box-loss-scale", type=float, metavar="F", help="factor on the weights of the box losses")
    group.add_argument("--position-tokens", choices=POSITION_TOKENS, help="boxes that enter the decoder")
    args = parser.parse_args(argv)
    for name, value in (PUBLISHED | RECIPES.get(args.preset, {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main():
    args = parse_arguments()
    device = choose_device(args.device)
    output = Path(args.output)
    checkpoint_path, log_path = output / "checkpoint.pt", output / "log.jsonl"

    names = ("train_size", "train_scale", "test_size", "di", "bato", "guidance", "gtg", "selections", "decoder_layers",
             "box_loss_scale", "position_tokens")  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items() if v is not None}
    config = replace(PRESETS[args.preset], grad_checkpoint=args.grad_checkpoint, **settings)
    train_set = open_split(args, "train", train_transform(config.train_size, config.train_scale))
    val_set = open_split(args, "val", eval_transform(*config.test_size))
    if train_set.classes != val_set.classes:
        raise DataError("the training and the validation annotations differ in their categories; they must be the same")
    config = replace(config, num_classes=len(train_set.classes))

    torch.manual_seed(args.seed)
    model = DIMaskDINO(config)
    if args.backbone_weights:
        try:
            load_backbone_weights(model.backbone, args.backbone_weights, args.trust_pickle)
        except (ValueError, OSError) as error:
            raise InputError(str(error)) from None
    elif config.frozen_batch_norm and not args.resume:
        print("train.py: the backbone starts from random weights; --backbone-weights takes pretrained ones")
    model.to(device)
    criterion = SetCriterion(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.backbone_lr, weight_decay=0.05), fused=True)

    epoch, iteration, seconds = 0, 0, 0.0
    if args.resume and checkpoint_path.exists():
        checkpoint = read_checkpoint(checkpoint_path)
        check_config(checkpoint_path, checkpoint, config)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        epoch, iteration, seconds = (checkpoint[name] for name in ("epoch", "iteration", "seconds"))
        print(f"resuming {checkpoint_path} after epoch {epoch}")
        truncate_log(log_path, iteration)
    elif args.resume:
        print(f"nothing to resume in {output}: starting anew")
    elif checkpoint_path.exists():
        raise InputError(f"{checkpoint_path}: exists; continue it with --resume or choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    log = open(log_path, "a", buffering=1)

    sampling = torch.Generator()
    loader = DataLoader(train_set, args.batch_size, shuffle=True, collate_fn=collate, generator=sampling,
                        num_workers=args.workers, pin_memory=device.type == "cuda")  # fmt: skip
    total = args.epochs * len(loader)
    stop = min(total, args.max_iterations or total)
    progress = tqdm(total=stop, initial=iteration, desc="train", disable=None)
    clock = time.perf_counter() - seconds
    while iteration < stop:
        # All randomness of an epoch follows from the seed and its number, so that resuming repeats nothing.
        sampling.manual_seed(1000 * args.seed + epoch)
        torch.manual_seed(1000 * args.seed + epoch)
        model.train()
        sums, images_seen, since = {}, 0, time.perf_counter()
        for images, targets in loader:
            factor = lr_factor(iteration, total, args.lr_drops, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            images = [image.to(device, non_blocking=True) for image in images]
            targets = to_device(targets, device)
            terms = criterion(model(images, targets), targets)
            loss = sum(criterion.weights[name] * term for name, term in terms.items())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()

            iteration += 1
            images_seen += len(images)
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0) + term.detach()
            progress.update()
            if iteration % 20 == 0 or iteration == stop:
                rate = images_seen / (time.perf_counter() - since)
                means = {name: float(value) / math.ceil(images_seen / args.batch_size) for name, value in sums.items()}
                if not math.isfinite(means["loss"]):
                    bad = ", ".join(name for name, value in means.items() if not math.isfinite(value))
                    raise InputError(f"{output}: the loss is not finite at iteration {iteration} ({bad}); lower --lr")
                lr = args.lr * factor
                progress.set_postfix(loss=f"{means['loss']:.2f}", lr=f"{lr:.1e}", images_per_s=f"{rate:.1f}")
                entry = {"epoch": epoch, "iteration": iteration, "seconds": time.perf_counter() - clock, "lr": lr}
                log.write(json.dumps(entry | {"images_per_second": rate} | means) + "\n")
                sums, images_seen, since = {}, 0, time.perf_counter()
            if iteration == stop:
                break
        epoch += 1
        seconds = time.perf_counter() - clock
        if epoch % args.eval_every == 0 or iteration == stop:
            scores = evaluate(model, val_set, device, args.workers)
            save_picture(model, val_set, device, output / f"epoch_{epoch:03d}.png")
            log.write(json.dumps({"epoch": epoch, "iteration": iteration, "seconds": seconds} | scores) + "\n")
            box, mask = (scores[kind]["AP"] for kind in ("box", "mask"))
            progress.write(f"epoch {epoch}: box AP {percent(box)}, mask AP {percent(mask)} after {seconds:.0f} s")
        save_checkpoint(
            checkpoint_path,
            {
                "model": model.state_dict(),
                "config": asdict(config),
                "classes": train_set.classes,
                "category_ids": train_set.category_ids,
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
                "iteration": iteration,
                "seconds": seconds,
            },
        )
    progress.close()


def truncate_log(path, iteration):
    """Drop the lines of a log that were written behind this iteration, since they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["iteration"] <= iteration]
        path.write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    run_program(main)
