"""Evaluates a checkpoint: COCO box and mask AP of the last layer or, with --per-layer, of every decoder layer."""

import argparse
import contextlib
import io
import json
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import load_model
from cli import add_data_arguments, choose_device, gather, open_split, positive, run_program
from coco import coco_results
from config import InputError
from data import collate, eval_transform
from drawing import save_layers
from model import postprocess

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six numbers of a COCO evaluation, in its order


def average_precision(coco, results, image_ids):
    """{"box": {metric: percent}, "mask": {...}} by pycocotools; None where no instance has the metric's size."""
    scores = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        if not results:
            scores[name] = dict.fromkeys(METRICS, 0.0)
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            # loadRes computes the boxes from the masks where there are both, so that the boxes go alone.
            drop = "segmentation" if kind == "bbox" else "bbox"
            detected = coco.loadRes([{k: v for k, v in r.items() if k != drop} for r in results])
            evaluation = COCOeval(coco, detected, kind)
            evaluation.params.imgIds = image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        scores[name] = {
            m: None if s < 0 else 100 * float(s) for m, s in zip(METRICS, evaluation.stats[:6], strict=True)
        }
    return scores


@torch.inference_mode()
def evaluate(model, dataset, device, workers=0, per_layer=False, batch_size=4):
    """Box and mask AP of a model on a data set made with training=False.

    Returns {"box": {"AP": percent, ...}, "mask": {...}}, with per_layer also "layers": [{"layer": 0, "box": {...},
    "mask": {...}}, ...]: 0 is the decoder's input, the last is the last layer. Leaves the model in evaluation mode.
    """
    model.eval()
    # Padding changes what the model sees, so that only images of one size share a batch: each is as if it were alone.
    same_size = {}
    for index, image_id in enumerate(dataset.image_ids):
        entry = dataset.coco.imgs[image_id]
        same_size.setdefault((entry["height"], entry["width"]), []).append(index)
    batches = [some[i : i + batch_size] for some in same_size.values() for i in range(0, len(some), batch_size)]
    parallel = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    loader = DataLoader(dataset, batch_sampler=batches[rank::world], collate_fn=collate, num_workers=workers)
    results = [[] for _ in range(model.config.decoder_layers + 1 if per_layer else 1)]
    for images, targets in tqdm(loader, desc="evaluate", leave=False, disable=rank > 0 or None):
        outputs = model([image.to(device) for image in images], all_layers=per_layer)
        for layer, predictions in enumerate([*outputs.get("aux_outputs", []), outputs]):
            sizes = [t["size"] for t in targets], [t["original_size"] for t in targets]
            for target, detections in zip(targets, postprocess(predictions, *sizes), strict=True):
                results[layer] += coco_results(detections, target["image_id"], dataset.category_ids)
    everywhere = [None] * world
    if parallel:
        dist.gather_object(results, everywhere if rank == 0 else None)
    else:
        everywhere = [results]
    if rank > 0:
        return gather(None)[0]
    results = [sorted(chain(*layer), key=lambda result: result["image_id"]) for layer in zip(*everywhere, strict=True)]
    layers = [average_precision(dataset.coco, found, dataset.image_ids) for found in results]
    scores = layers[-1] | ({"layers": [{"layer": i} | s for i, s in enumerate(layers)]} if per_layer else {})
    return gather(scores)[0]


def percent(value):
    """A metric for printing."""
    return "    -" if value is None else f"{value:5.1f}"


def print_scores(scores):
    """Print the metrics and, where they are there, box AP, mask AP and their difference per layer."""
    print("       " + "  ".join(f"{metric:>5}" for metric in METRICS))
    for kind in ("box", "mask"):
        print(f"{kind:5}  " + "  ".join(percent(scores[kind][metric]) for metric in METRICS))
    if "layers" in scores:
        print("\nlayer      box AP  mask AP  box - mask")
        for entry in scores["layers"]:
            box, mask = entry["box"]["AP"], entry["mask"]["AP"]
            gap = None if None in (box, mask) else box - mask
            name = "0 (input)" if entry["layer"] == 0 else str(entry["layer"])
            print(f"{name:9}   {percent(box)}    {percent(mask)}       {percent(gap)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="checkpoint of train.py or convert.py")
    parser.add_argument("--per-layer", action="store_true", help="evaluate the decoder's input and every decoder layer")
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        help="also write the numbers to this JSON file, and with --per-layer a bar chart of them to FILE.png",
    )
    parser.add_argument("--batch-size", type=positive, default=4, help="images at a time, of one size (default: 4)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default: auto)")
    add_data_arguments(parser)
    args = parser.parse_args()

    device = choose_device(args.device)
    model, checkpoint = load_model(args.checkpoint, device)
    dataset = open_split(args, "val", eval_transform(*model.config.test_size))
    check_classes(args.checkpoint, checkpoint["classes"], dataset.classes)
    scores = evaluate(model, dataset, device, args.workers, args.per_layer, args.batch_size)
    print_scores(scores)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(scores, indent=1) + "\n")
        if args.per_layer:
            save_layers(scores, Path(args.output).with_suffix(".png"))


def check_classes(path, trained, present):
    """Raise InputError unless the checkpoint's class names are those of the data set, in the same order."""
    if len(trained) != len(present):
        raise InputError(
            f"{path}: was trained for {len(trained)} classes, the data set has {len(present)}; give the one it fits"
        )
    for a, b in zip(trained, present, strict=True):
        if a != b:
            raise InputError(f"{path}: was trained for class {a!r} where the data set has {b!r}; give the one it fits")


if __name__ == "__main__":
    run_program(main)
