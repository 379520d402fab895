"""Scores a finished run of any of the systems, at each decoder layer and for each class:
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
from detections import detect
from experiments.real_images import mask_rcnn
from formats.coco import coco_paths


def open_run(folder):
    """The detector of a run's checkpoint, and the two sides of its test size.

    The detector takes images as `eval_transform` gives them and output sizes, and returns per decoder layer, from 0 on,
    the detections of each image; a single layer for Mask R-CNN.
    """
    path = Path(folder) / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    if config.get("system") == "mask_rcnn":
        model = mask_rcnn.build_mask_rcnn(len(checkpoint["classes"]), **config["model"])
        model.load_state_dict(checkpoint["model"])
        return lambda images, sizes: [mask_rcnn.detect(model, images, sizes)], config["test_size"]
    model, _ = load_model(path)
    layers = range(model.config.decoder_layers + 1)
    return partial(detect, model, layers=layers), model.config.test_size


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
    (Path(args.run) / "scores.json").write_text(json.dumps(mask_rcnn.score(detector, dataset)) + "\n")


if __name__ == "__main__":
    run_program(main)
