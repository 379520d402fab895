"""The picture of README.md: ground truth above detections, and box AP - mask AP of every decoder layer beside them.

python -m experiments.readme_picture CHECKPOINT --data-root DIR --output docs/picture.jpg
"""

import argparse
import json
from pathlib import Path

import numpy as np

from checkpoint import load_model
from cli import count, run_program
from config import InputError
from data import CocoInstances
from detections import detect
from drawing import draw_rows
from formats.coco import coco_paths

RESULTS = Path(__file__).resolve().parent / "imbalance" / "results.json"
ROWS = {"neither": ("Mask DINO", "tab:orange"), "DI and BATO": ("DI-MaskDINO", "tab:blue")}  # of the study


def gaps(runs, row):
    """box AP - mask AP (runs, layers) of a row of the imbalance study, layer 0 being the decoder's input."""
    chosen = [run["layers"] for run in runs if run["row"] == row]
    return np.array([[layer["box"] - layer["mask"] for layer in layers] for layers in chosen])


def draw_gaps(axes, runs):
    """Draw the mean gap of every layer with its standard deviation over the seeds, a line for each of ROWS."""
    for shift, (row, (name, colour)) in zip((-0.04, 0.04), ROWS.items(), strict=True):
        values = gaps(runs, row)
        layers = np.arange(values.shape[1])
        style = {"color": colour, "marker": "o", "linewidth": 2, "capsize": 3, "label": name}
        axes.errorbar(layers + shift, values.mean(0), values.std(0, ddof=1), **style)
        first = values.mean(0)[0]
        axes.annotate(f"{first:.1f}".replace("-", "−"), (shift, first), (10, -4), textcoords="offset points")
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(layers, ["decoder's\ninput", *(f"layer\n{layer}" for layer in layers[1:])])
    axes.set_title("box AP − mask AP", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def columns(checkpoint, root, items, threshold):
    """What `draw_rows` draws of these items of the validation images: the ground truth, and below it the detections."""
    model, content = load_model(checkpoint)
    dataset = CocoInstances(*coco_paths(root, "val"), training=False, test_size=model.config.test_size)
    if wrong := [item for item in items if item >= len(dataset)]:
        raise InputError(f"--items {wrong[0]}: there are {len(dataset)} validation images, numbered from 0")
    for image, target in map(dataset.ground_truth, items):
        [[found]] = detect(model, [image], score_threshold=threshold)
        yield [(image, target, dataset.classes), (image, found, content["classes"])]


def draw(rows, runs):
    """A matplotlib Figure of the picture of `draw_rows` (3, H, W) and the plot of `draw_gaps`."""
    from matplotlib.figure import Figure

    height, width = rows.shape[1:]
    figure = Figure(figsize=(4.9 * width / height + 4, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[4.9 * width / height, 4])
    left.imshow(rows.permute(1, 2, 0).numpy(), interpolation="antialiased")
    left.set_yticks([height / 4, 3 * height / 4], ["ground truth", "detections"], rotation=90, va="center", fontsize=11)
    left.set_xticks([])
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    draw_gaps(right, runs)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint of train.py")
    add("--data-root", required=True, metavar="DIR", help="its data set in COCO's layout, for the validation images")
    add("--items", type=count, nargs="+", default=[0, 1, 2, 3], metavar="N", help="which of them (default: 0 1 2 3)")
    add("--score-threshold", type=float, default=0.3, metavar="S", help="of the detections (default: 0.3)")
    add("--output", required=True, metavar="FILE", help="where to write the picture")
    args = parser.parse_args()
    rows = draw_rows(list(columns(args.checkpoint, args.data_root, args.items, args.score_threshold)))
    figure = draw(rows, json.loads(RESULTS.read_text())["runs"])
    figure.savefig(args.output, dpi=130)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_program(main)
