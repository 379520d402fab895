"""Scores a finished run of any of the systems, at each decoder layer, with up to 100 and up to 400 detections an image:
python -m experiments.real_images.scoring RUN --data-root DIR.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from checkpoint import load_model, read_checkpoint
from cli import run_program
from data import CocoInstances
from detections import postprocess
from eval import average_precision
from experiments.real_images import mask_rcnn
from formats.coco import coco_paths, coco_results, encode_masks

LIMITS = (100, 400)  # COCO's number of detections per image, and one that reaches the fullest image


def open_run(folder):
    """The detector of a run's checkpoint, and the two sides of its test size.

    The detector takes images of `eval_transform` and output sizes, and returns per decoder layer, from 0 on, the
    detections of each image; a single layer for Mask R-CNN.
    """
    path = Path(folder) / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    if checkpoint["config"].get("system") == "mask_rcnn":
        config = checkpoint["config"]
        model = mask_rcnn.build_mask_rcnn(len(checkpoint["classes"]), **config["model"], max_detections=max(LIMITS))
        model.load_state_dict(checkpoint["model"])
        return lambda images, sizes: [mask_rcnn.detect(model, images, sizes)], config["test_size"]
    model, _ = load_model(path)
    return partial(detect_layers, model), model.config.test_size


@torch.inference_mode()
def detect_layers(model, images, output_sizes):
    """Detections of our models per layer and image, all queries; masks as RLE."""
    outputs = model(images, all_layers=True)
    sizes = [image.shape[1:] for image in images], output_sizes
    return [
        postprocess(layer, *sizes, topk=max(LIMITS), encode=encode_masks)
        for layer in (*outputs["aux_outputs"], outputs)
    ]


def score(detector, dataset):
    """{"100": [AP of each layer, as `average_precision` gives it], "400": [...]} of a detector of `open_run`."""
    results = None
    for image, target in dataset:  # one at a time: padding would change what a model sees
        layers = detector([image], [target["original_size"]])
        results = results or [[] for _ in layers]
        for found, [detections] in zip(results, layers, strict=True):
            found += coco_results(detections, target["image_id"], dataset.category_ids)
    return {str(limit): [average_precision(dataset.coco, found, dataset.image_ids, limit) for found in results]
            for limit in LIMITS}  # fmt: skip


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of the run; scores.json is written into it")
    parser.add_argument("--data-root", required=True, metavar="DIR", help="folder of the data set in COCO's layout")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    detector, test_size = open_run(args.run)
    dataset = CocoInstances(*coco_paths(args.data_root, "val"), False, test_size)
    (Path(args.run) / "scores.json").write_text(json.dumps(score(detector, dataset)) + "\n")


if __name__ == "__main__":
    run_program(main)
