"""The rival, torchvision's Mask R-CNN on an FPN of the same backbone, trained on one core:
python -m experiments.real_images.mask_rcnn --data-root DIR --epochs N --output DIR.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from backbone import build_backbone
from checkpoint import read_checkpoint, read_log, save_checkpoint
from cli import positive, run_program
from config import InputError
from data import CocoInstances, seed_of, train_batches
from eval import average_precision
from formats.coco import coco_paths, coco_results
from train import RECIPES, lr_factor
from weights import load_backbone_weights

CLIP_NORM = 10.0
LOG_EVERY, SAVE_EVERY = 20, 100  # iterations


class Pyramid(torch.nn.Module):
    """A backbone of backbone.py with torchvision's FPN on its four maps, 256 channels, and the pooled map above."""

    out_channels = 256

    def __init__(self, name):
        super().__init__()
        self.body = build_backbone(name)
        self.fpn = FeaturePyramidNetwork(self.body.channels, self.out_channels, LastLevelMaxPool())

    def forward(self, images):
        """images (B, 3, H, W), normalised. Returns {name: map (B, 256, H/s, W/s)}, s = 4, 8, 16, 32, 64."""
        return self.fpn(dict(zip("0123", self.body(images), strict=True)))


def build_mask_rcnn(num_classes, backbone="mobilenet_v2", samples=64):
    """Mask R-CNN with a randomly initialised backbone; labels begin with 1.

    samples: boxes per image on which the heads learn, a quarter of them positive; torchvision's 512 is for GPUs
    """
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(
        Pyramid(backbone), num_classes + 1, rpn_anchor_generator=anchors, box_batch_size_per_image=samples,
        _skip_resize=True,
    )  # fmt: skip


def build_optimizer(model, args):
    """AdamW as for the other systems, or SGD as in torchvision's reference; the pretrained backbone at a lower rate."""
    body = list(model.backbone.body.parameters())
    of_body = set(body)
    rest = [parameter for parameter in model.parameters() if parameter not in of_body]
    groups = [{"params": rest, "base_lr": args.lr}, {"params": body, "base_lr": args.lr * args.backbone_factor}]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(groups, args.lr, weight_decay=0.05, fused=True)


def rcnn_targets(targets, height, width):
    """Targets of `collate` for a batch padded to height x width, as Mask R-CNN takes them."""
    scale = torch.tensor([width, height] * 2)
    return [
        {
            "boxes": box_convert(target["boxes"], "cxcywh", "xyxy") * scale,
            "labels": target["labels"] + 1,
            "masks": target["masks"].to(torch.uint8),
        }
        for target in targets
    ]


@torch.inference_mode()
def detect(model, images, output_sizes):
    """{scores, labels, boxes, masks} of images of `eval_transform`, as `detections.postprocess` gives them.

    Without the resizing that Mask R-CNN would do: it sees what the other systems see.
    """
    model.eval()
    normalised = [model.transform.normalize(image) for image in images]
    sizes = [tuple(image.shape[-2:]) for image in images]
    batch = ImageList(model.transform.batch_images(normalised, 32), sizes)
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features)
    found, _ = model.roi_heads(features, proposals, sizes)
    found = model.transform.postprocess(found, sizes, output_sizes)
    return [f | {"labels": f["labels"] - 1, "masks": f["masks"][:, 0] > 0.5} for f in found]


def score(detector, dataset):
    """[AP of each layer, as `average_precision` gives it] of a detector: a function of images, as
    `eval_transform` gives them, and output sizes, which returns per layer the detections of each image.
    """
    results = None
    for image, target in dataset:  # one at a time: padding would change what a model sees
        layers = detector([image], [target["original_size"]])
        results = results or [[] for _ in layers]
        for found, [detections] in zip(results, layers, strict=True):
            found += coco_results(detections, target["image_id"], dataset.category_ids)
    return [average_precision(dataset.coco, found, dataset.image_ids) for found in results]


def step(model, optimizer, images, targets):
    """One step of the optimizer. Returns the terms of the loss. Raises InputError for a loss that is not finite."""
    model.train()
    padded = [torch.nn.functional.pad(i, (0, -i.shape[2] % 32, 0, -i.shape[1] % 32)) for i in images]
    terms = model(padded, rcnn_targets(targets, *padded[0].shape[1:]))
    loss = sum(terms.values())
    if not loss.isfinite():
        raise InputError(f"the loss is not finite on images {[t['image_id'] for t in targets]}; lower --lr")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return {"loss": loss.item()} | {name: term.item() for name, term in terms.items()}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data-root", required=True, metavar="DIR", help="folder of the data set in COCO's layout")
    add("--output", required=True, metavar="DIR", help="checkpoint, log and eval.json; a run in it goes on")
    add("--epochs", type=float, required=True, help="passes over the training images, also parts of one")
    add("--max-iterations", type=positive, help="stop after this many iterations of the schedule")
    often = "evaluate so often and at the end (default: 1)"
    add("--eval-every", type=positive, default=1, metavar="EPOCHS", help=often)
    add("--seed", type=int, default=0, help="seed of weights, sampling and augmentation (default: 0)")
    add("--batch-size", type=positive, default=2, help="images per step (default: 2)")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="(default: adamw, as for the other systems)")
    add("--lr", type=float, default=2e-4, help="learning rate (default: 2e-4)")
    add("--backbone-factor", type=float, default=0.1, help="factor on the rate for the backbone (default: 0.1)")
    add("--backbone", default="mobilenet_v2", help="as for train.py (default: mobilenet_v2)")
    add("--backbone-weights", metavar="NAME-OR-FILE", help="pretrained, as for train.py (default: none)")
    add("--samples", type=positive, default=64, help="boxes per image on which the heads learn (default: 64)")
    add("--train-size", type=positive, required=True, help="side of the training crops in pixels")
    add("--train-scale", type=float, nargs=2, required=True, metavar=("MIN", "MAX"), help="range of the scale jitter")
    add("--test-size", type=positive, nargs=2, required=True, metavar=("SHORTER", "LONGER"), help="sides at evaluation")
    args = parser.parse_args(argv)
    if not args.epochs > 0:
        parser.error(f"--epochs {args.epochs}: must be above 0")
    return args


class Run:
    """A training and its files; what is in the folder goes on. Written as train.py writes it, read by the same code."""

    def __init__(self, args):
        self.args, self.output = args, Path(args.output)
        augmentation = args.train_size, args.train_scale
        self.train_set = CocoInstances(*coco_paths(args.data_root, "train"), True, augmentation=augmentation)
        self.val_set = CocoInstances(*coco_paths(args.data_root, "val"), False, args.test_size)
        self.total = math.ceil(args.epochs * len(self.train_set) / args.batch_size)
        torch.manual_seed(args.seed)
        self.config = {"backbone": args.backbone, "samples": args.samples}
        self.model = build_mask_rcnn(len(self.train_set.classes), **self.config)
        if args.backbone_weights not in (None, "none"):
            load_backbone_weights(self.model.backbone.body, args.backbone_weights)
        self.optimizer = build_optimizer(self.model, args)
        recipe = RECIPES["small"]
        self.milestones = [round(m / recipe.iterations * self.total) for m in recipe.milestones]
        self.warmup = min(recipe.warmup, self.total // 10)
        self.iteration, self.seconds = 0, 0.0  # seconds of training, without evaluations
        self.output.mkdir(parents=True, exist_ok=True)
        if (self.output / "checkpoint.pt").exists():
            checkpoint = read_checkpoint(self.output / "checkpoint.pt")
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.iteration, self.seconds = checkpoint["iteration"], checkpoint["seconds"]
        entries = read_log(self.output / "log.jsonl", self.iteration)
        self.evaluated = {entry["iteration"] for entry in entries if "box" in entry}
        self.log = open(self.output / "log.jsonl", "a", buffering=1)

    def save(self):
        """Write the checkpoint, from which the run goes on."""
        config = {"system": "mask_rcnn", "test_size": self.args.test_size, "model": self.config}
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "config": config}
        content |= {"classes": self.train_set.classes, "iteration": self.iteration, "seconds": self.seconds}
        save_checkpoint(self.output / "checkpoint.pt", content)

    def write(self, values):
        """Write an entry of the log, a dictionary."""
        epoch = self.iteration * self.args.batch_size // len(self.train_set)
        entry = {"epoch": epoch, "iteration": self.iteration, "seconds": self.seconds} | values
        self.log.write(json.dumps(entry) + "\n")

    def ends_epoch(self):
        """Whether an epoch to evaluate after, or the training, ended with the last iteration."""
        now, before = ((self.iteration - i) * self.args.batch_size // len(self.train_set) for i in (0, 1))
        every = self.args.eval_every
        return self.iteration > 0 and (now // every > before // every or self.iteration == self.total)

    def evaluate(self):
        """Write AP to the log, and at the end of training to eval.json, which says that the run has finished."""
        [scores] = score(lambda *batch: [detect(self.model, *batch)], self.val_set)
        scores = {kind: scores[kind] for kind in ("box", "mask")}
        self.write(scores)
        box, mask = (scores[kind]["AP"] for kind in ("box", "mask"))
        print(f"iteration {self.iteration}: box AP {box}, mask AP {mask} after {self.seconds:.0f} s", flush=True)
        if self.iteration == self.total:
            (self.output / "eval.json").write_text(json.dumps(scores) + "\n")

    def train(self):
        """Train from where the run stands to its end, or to --max-iterations."""
        args, stop = self.args, min(self.total, self.args.max_iterations or self.total)
        batches = train_batches(
            self.train_set, args.batch_size, args.seed, self.iteration * args.batch_size, 0, 1, 0, False
        )
        if self.ends_epoch() and (self.iteration not in self.evaluated or self.iteration == self.total):
            self.evaluate()  # was interrupted in it
        since = self.seconds
        while self.iteration < stop:
            start = time.perf_counter()
            batch = next(batches)  # before the seed: a loader that starts draws a random number
            torch.manual_seed(seed_of(args.seed, 2, self.iteration))
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor(self.iteration, self.milestones, self.warmup)
            terms = step(self.model, self.optimizer, *batch)
            self.iteration += 1
            self.seconds += time.perf_counter() - start
            if self.iteration % LOG_EVERY == 0 or self.iteration == self.total:
                images = ((self.iteration - 1) % LOG_EVERY + 1) * args.batch_size
                self.write({"images_per_second": images / (self.seconds - since)} | terms)
                since = self.seconds
            if self.iteration % SAVE_EVERY == 0 or self.iteration == stop:
                self.save()
            if self.ends_epoch():
                self.evaluate()


def main():
    torch.set_num_threads(1)
    Run(parse_arguments()).train()


if __name__ == "__main__":
    run_program(main)
