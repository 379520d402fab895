"""The figures of the paper, from any two checkpoints: python -m experiments.figures {layers,queries,tokens}.

layers   Fig. 1 (c, d): box and mask AP of the first and the last decoder layer of two models, and the gaps
queries  Fig. 1 (a, b), Fig. 3: boxes and masks of the same queries at these layers, two models side by side
tokens   the tokens that De-Imbalance selects, first and second, on the image

The paper's "0-th decoder layer" is read as layer 0 here: docs/ablations.md.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou, masks_to_boxes, nms
from torchvision.transforms.v2.functional import resize

from checkpoint import load_model
from cli import choose_device, positive, run_program
from config import InputError
from data import eval_transform
from detections import postprocess
from drawing import draw_instances, draw_layers
from files import explaining
from formats.images import read_image
from model import of_queries

LEVEL_COLOURS = {64: "#e6194b", 32: "#ffe119", 16: "#42d4f4", 8: "#3cb44b", 4: "#f032e6"}  # stride -> colour


def system_name(config):
    """What to call a model with these settings."""
    return {(True, True): "DI-MaskDINO", (True, False): "Mask DINO + DI", (False, True): "Mask DINO + BATO"}.get(
        (config.di, config.bato), "Mask DINO"
    )


def unique(names):
    """The names, with a number behind those that occur twice."""
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


# Fig. 1 (c, d)


def read_layers(path):
    """The "layers" in a file of eval.py --per-layer --output. Raises InputError for another file."""
    faults, what = (OSError, ValueError, LookupError, TypeError), f"{path}: no AP per layer can be read from it"
    with explaining(faults, what, "give a file of eval.py --per-layer --output"):
        layers = json.loads(Path(path).read_text())["layers"]
        _ = [layer[kind]["AP"] for layer in layers for kind in ("box", "mask")], layers[1]
    return layers


def bar_chart(models):
    """A matplotlib Figure of {name: layers of `read_layers`}: a panel each, with layers 0, 1 and the last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.2 * len(models), 3.6), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (name, layers) in zip(panels, models.items(), strict=True):
        chosen = {0: "0 (input)", 1: "1", len(layers) - 1: f"{len(layers) - 1} (last)"}
        draw_layers(axes, *([layers[layer][kind]["AP"] for layer in chosen] for kind in ("box", "mask")))
        axes.set_xticks(range(len(chosen)), list(chosen.values()))
        axes.set_title(name)
    panels[0].set_ylabel("AP (numbers: box - mask)")
    panels[0].legend(loc="upper left")
    return figure


# Fig. 1 (a, b), Fig. 3


@torch.inference_mode()
def detections_of_queries(model, image, count, device, size=None):
    """What the best `count` queries of the last layer are at every layer, from 0 on; of those on one object, the best.

    image (3, H, W) uint8 RGB; size: (H, W) of the results, by default the image's. Returns the queries' indices
    (count,) int64, best first, and a list with, per layer, {scores, labels, boxes, masks} of `postprocess` in that
    order, on the CPU. There are fewer than `count` where there are no more objects.
    """
    resized = eval_transform(image, *model.config.test_size).to(device)
    outputs = model([resized])
    sizes = [resized.shape[1:]], [size or image.shape[1:]]

    def detections(layer, queries):  # the best class of each query
        names = "pred_logits", "pred_boxes", "mask_embeddings", "pixel_features"
        parts = (of_queries({name: layer[name] for name in names}, [q]) for q in queries)
        single = [postprocess(part, *sizes, topk=1)[0] for part in parts]
        return {name: torch.cat([one[name] for one in single]).cpu() for name in single[0]}

    candidates = outputs["pred_logits"][0].amax(-1).topk(min(10 * count, outputs["pred_logits"].shape[1])).indices.cpu()
    found = detections(outputs, candidates)
    queries = candidates[nms(found["boxes"], found["scores"], 0.5)[:count]]
    return queries, [detections(layer, queries) for layer in (*outputs["aux_outputs"], outputs)]


def box_mask_agreement(detections):
    """Mean IoU of the predicted boxes with the boxes around the predicted masks; an empty mask counts as 0."""
    filled = detections["masks"].flatten(1).any(1)
    around = masks_to_boxes(detections["masks"][filled]).float() + torch.tensor([0, 0, 1, 1])
    return float(box_iou(detections["boxes"][filled].float(), around).diagonal().sum() / len(filled))


def query_sheet(models, images, count, layers, device):
    """A matplotlib Figure: a row for each image, a column for each layer of each of the two models.

    models [(name, model, classes)]; images [(name, (3, H, W) uint8)]; layers: numbers, -1 is the last.
    """
    from matplotlib.figure import Figure

    columns, width = len(models) * len(layers), 4.5
    heights = [width * image.shape[1] / image.shape[2] + 0.5 for _, image in images]
    figure = Figure(figsize=(width * columns, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False, height_ratios=heights)
    for row, (image_name, image) in zip(grid, images, strict=True):
        cells = iter(row)
        scale = min(1, 640 / max(image.shape[1:]))  # so that lines and names keep their size
        size = [round(side * scale) for side in image.shape[1:]]
        small = resize(image, size)
        for name, model, classes in models:
            queries, found = detections_of_queries(model, image, count, device, size)
            for layer in layers:
                detections, number = found[layer], layer % len(found)
                best = zip(found[-1]["labels"].tolist(), queries.tolist(), strict=True)
                names = [f"{classes[label]} {query}" for label, query in best]
                # A label for each query, so that it has the same colour in each layer.
                shown = {"labels": torch.arange(len(queries))} | {k: detections[k] for k in ("boxes", "masks")}
                axes = next(cells)
                axes.imshow(draw_instances(small, shown, names).permute(1, 2, 0).numpy())
                axes.set_axis_off()
                what = "layer 0 (input)" if number == 0 else f"layer {number}" + " (last)" * (number == len(found) - 1)
                title = f"{name}, {what}\nIoU of boxes and masks' boxes {box_mask_agreement(detections):.2f}"
                axes.set_title(title, fontsize=10)
        row[0].annotate(image_name, (0, 0.5), (-4, 0), "axes fraction", "offset points", rotation=90, va="center",
                        ha="right", fontsize=8)  # fmt: skip
    return figure


# The selections


def token_centres(config, height, width):
    """Centre and stride of every token of a padded input of height x width pixels: (S, 2) xy in pixels, (S,).

    In the order of the selections' indices: levels from coarse to fine, each row by row.
    """
    strides = [64, 32, 16, 8, 4][: config.num_levels]
    centres, sides = [], []
    for stride in strides:
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        # As fractions of the padded size: C6 may reach beyond it, and its cells divide it all the same.
        centres.append(torch.stack([(x + 0.5) / columns * width, (y + 0.5) / rows * height], -1).flatten(0, 1))
        sides += [stride] * (rows * columns)
    return torch.cat(centres), torch.tensor(sides)


@torch.inference_mode()
def selected_tokens(model, image, device):
    """Per selection the centres (k, 2) xy in the image's pixels and the strides (k,) of its tokens, best first.

    image (3, H, W) uint8. Returns {"selection 1 (T_s1)": (centres, strides), ...}: every selection but the first is
    among the tokens of the one before, and so are the queries that guide BATO among those of the last.
    """
    resized = eval_transform(image, *model.config.test_size).to(device)
    outputs = model([resized])
    padded = [32 * math.ceil(side / 32) for side in resized.shape[1:]]
    centres, strides = token_centres(model.config, *padded)
    centres = centres * torch.tensor([image.shape[2] / resized.shape[2], image.shape[1] / resized.shape[1]])
    found, tokens = {}, torch.arange(len(centres))
    selections = {f"selection {i} (T_s{i})": indices for i, indices in enumerate(outputs["selections"], start=1)}
    guiding = {} if outputs["guiding"] is None else {"guiding tokens": outputs["guiding"]}
    for name, indices in (selections | guiding).items():
        tokens = tokens[indices[0].cpu()]
        found[name] = centres[tokens], strides[tokens]
    return found


def token_sheet(models, images, device):
    """A matplotlib Figure: for each image and model a row with the image and the tokens of each selection upon it."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [(name, image, model_name, selected_tokens(model, image, device))
            for name, image in images for model_name, model, _ in models]  # fmt: skip
    columns, width = 1 + max(len(found) for *_, found in rows), 4.0
    heights = [width * image.shape[1] / image.shape[2] + 0.6 for _, image, _, _ in rows]
    figure = Figure(figsize=(width * columns, sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for panels, (name, image, model_name, found) in zip(grid, rows, strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        for axes in panels:
            axes.set_axis_off()
        panels[0].imshow(pixels)
        panels[0].set_title(name, fontsize=9)
        faded = (0.6 * pixels + 0.4 * 255).astype(np.uint8)
        for axes, (title, (centres, strides)) in zip(panels[1:], found.items(), strict=False):
            axes.imshow(faded, extent=(0, image.shape[2], image.shape[1], 0))
            for stride, colour in LEVEL_COLOURS.items():
                x, y = centres[strides == stride].T
                axes.plot(x, y, "o", color=colour, markersize=2 + 1.5 * math.log2(stride / 4), markeredgecolor="black",
                          markeredgewidth=0.4, clip_on=True)  # fmt: skip
            axes.set(xlim=(0, image.shape[2]), ylim=(image.shape[1], 0))  # tokens of the padding are outside
            outside = int(((centres[:, 0] > image.shape[2]) | (centres[:, 1] > image.shape[1])).sum())
            more = f", {outside} in the padding" if outside else ""
            axes.set_title(f"{model_name}: {title}\n{len(centres)} tokens{more}", fontsize=9)
    levels = max(model.config.num_levels for _, model, _ in models)
    handles = [Line2D([], [], linestyle="", marker="o", color=c) for c in list(LEVEL_COLOURS.values())[:levels]]
    labels = [f"stride {stride}" for stride in list(LEVEL_COLOURS)[:levels]]
    figure.legend(handles, labels, loc="outside lower center", ncols=levels, fontsize=9)
    return figure


def load(paths, device):
    """[(name, model, classes)] of checkpoints. Raises InputError."""
    found = [load_model(path, device) for path in paths]
    names = unique([system_name(model.config) for model, _ in found])
    return [(name, model, content["classes"]) for name, (model, content) in zip(names, found, strict=True)]


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Draws the figures of the paper: AP per layer (Fig. 1 c, d), the same queries at several layers "
        "(Fig. 1 a, b and Fig. 3), and the selected tokens."
    )
    figures = parser.add_subparsers(dest="figure", required=True)
    layers = figures.add_parser("layers", help="bars of box and mask AP at layers 0, 1 and the last, with the gaps")
    layers.add_argument("scores", nargs="+", metavar="FILE.json", help="files of eval.py --per-layer --output")
    layers.add_argument("--names", nargs="+", metavar="NAME", help="of the models (default: the files' folders)")
    queries = figures.add_parser("queries", help="boxes and masks of the same queries at the first and the last layer")
    best = "the best N of the last layer (default: 5)"
    queries.add_argument("--queries", type=positive, default=5, metavar="N", help=best)
    numbers = "0: the decoder's input; -1: the last (default: 0 -1)"
    queries.add_argument("--layers", type=int, nargs="+", default=[0, -1], metavar="N", help=numbers)
    tokens = figures.add_parser("tokens", help="the tokens of the first and the second selection")
    for figure in (queries, tokens):
        add = figure.add_argument
        add("images", nargs="+", metavar="IMAGE", help="image files")
        files = "of train.py or convert.py, side by side"
        add("--checkpoints", nargs="+", required=True, metavar="CKPT", help=files)
        add("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default: auto)")
    for figure in (layers, queries, tokens):
        figure.add_argument("--output", default="figure.png", metavar="FILE", help="the picture (default: figure.png)")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    with explaining(ImportError, "matplotlib is not installed", "python -m pip install matplotlib"):
        import matplotlib  # noqa: F401
    if not Path(args.output).resolve().parent.is_dir():
        raise InputError(f"{args.output}: its folder does not exist; create it first")
    if args.figure == "layers":
        names = args.names or [Path(path).resolve().parent.name for path in args.scores]
        if len(names) != len(args.scores):
            raise InputError(f"--names: {len(names)} names for {len(args.scores)} files; give one for each")
        figure = bar_chart(dict(zip(unique(names), map(read_layers, args.scores), strict=True)))
    else:
        device = choose_device(args.device)
        images = [(Path(path).name, read_image(path)) for path in args.images]
        models = load(args.checkpoints, device)
        if args.figure == "tokens":
            figure = token_sheet(models, images, device)
        else:
            fewest = min(model.config.decoder_layers for _, model, _ in models)
            for layer in args.layers:
                if not -fewest - 1 <= layer <= fewest:
                    raise InputError(f"--layers {layer}: the models have layers 0 to {fewest}, -1 is the last")
            figure = query_sheet(models, images, args.queries, args.layers, device)
    with explaining((ValueError, OSError), f"{args.output}: cannot be written"):
        figure.savefig(args.output, dpi=130)
    print(f"written: {args.output}")


if __name__ == "__main__":
    sys.argv[0] = "experiments.figures"
    run_program(main)
