"""The picture of README.md: ground truth above detections, and box AP - mask AP of every decoder layer beside them.

python -m experiments.readme_picture CHECKPOINT --data-root DIR --output docs/picture.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint import load_model
from cli import count, run_program
from config import InputError
from data import CocoInstances
from detections import detect
from drawing import draw_instances
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


def pairs(checkpoint, root, items, threshold):
    """Pictures (2, H, W, 3) uint8 of these items of the validation images: the ground truth, and the detections."""
    model, content = load_model(checkpoint)
    dataset = CocoInstances(*coco_paths(root, "val"), training=False, test_size=model.config.test_size)
    if wrong := [item for item in items if item >= len(dataset)]:
        raise InputError(f"--items {wrong[0]}: there are {len(dataset)} validation images, numbered from 0")
    for image, target in map(dataset.ground_truth, items):
        [[found]] = detect(model, [image], score_threshold=threshold)
        drawn = draw_instances(image, target, dataset.classes), draw_instances(image, found, content["classes"])
        yield [picture.permute(1, 2, 0).numpy() for picture in drawn]


def draw(columns, runs):
    """A matplotlib Figure: the pairs of pictures as columns of one height, and the plot of `draw_gaps`."""
    from matplotlib.figure import Figure

    widths = [above.shape[1] / above.shape[0] for above, _ in columns]
    plot = 1.5
    figure = Figure(figsize=(2.4 * (sum(widths) + plot), 4.9), layout="constrained")
    grid = figure.add_gridspec(2, len(columns) + 1, width_ratios=[*widths, plot])
    for column, pair in enumerate(columns):
        for row, picture in enumerate(pair):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture, interpolation="antialiased")
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(("ground truth", "detections")[row], fontsize=11)
    draw_gaps(figure.add_subplot(grid[:, -1]), runs)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint of train.py")
    add("--data-root", required=True, metavar="DIR", help="its data set in COCO's layout, for the validation images")
    add("--items", type=count, nargs="+", default=[0, 1, 2, 3], metavar="N", help="which of them (default: 0 1 2 3)")
    add("--score-threshold", type=float, default=0.3, metavar="S", help="of the detections (default: 0.3)")
    add("--output", required=True, metavar="FILE.png", help="where to write the picture")
    args = parser.parse_args()
    columns = list(pairs(args.checkpoint, args.data_root, args.items, args.score_threshold))
    figure = draw(columns, json.loads(RESULTS.read_text())["runs"])
    figure.savefig(args.output, dpi=130)
    with Image.open(args.output) as picture:  # a palette of 256 colours: a third of the bytes
        picture.convert("RGB").quantize(256).save(args.output, optimize=True)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_program(main)
