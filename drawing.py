"""Pictures: instances over an image, and box and mask AP of every decoder layer as bars."""

import colorsys
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pycocotools import mask as mask_utils

from formats.images import DECODER_ERRORS

FILL = 70  # opacity of a mask's inside, of 255: what is below stays visible
MARK = "DI-MaskDINO drawing.py"  # in every PNG, so that no other is overwritten


def class_colour(label):
    """An RGB colour, 0 to 255, for a class: the same in every picture, far from those of the labels beside it."""
    hue, turn = (0.02 + label * 0.61803) % 1, label // 5 % 3  # the golden ratio spreads any number of hues evenly
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, (0.95, 0.6, 0.95)[turn], (1, 1, 0.75)[turn]))


def draw_instances(image, instances, classes):
    """Instances over an image: masks as a light fill with a contour, boxes, names on a ground of the class's colour.

    image (3, H, W) uint8; instances {labels (n,), boxes (n, 4) xyxy in its pixels, masks (n, H, W) bool or n of COCO's
    RLE, and for detections scores (n,), best first}; classes: names by label. Small images are enlarged so that names
    can be read; a name for which there is no room left is not drawn, its colour tells the class.
    Returns (3, H', W') uint8, H' and W' the same whole multiple of H and W.
    """
    factor = -(-512 // max(image.shape[1:])) if max(image.shape[1:]) < 512 else 1
    image = image.permute(1, 2, 0).cpu().numpy().repeat(factor, 0).repeat(factor, 1)
    canvas = Image.fromarray(np.ascontiguousarray(image))
    line = max(1, round(max(canvas.size) / 500))
    labels = instances["labels"].tolist()
    boxes = (instances["boxes"] * factor).tolist()
    for i in reversed(range(len(labels))):  # the best on top
        mask = instances["masks"][i]
        mask = mask_utils.decode(mask).view(bool) if isinstance(mask, dict) else mask.cpu().numpy()
        paste_mask(canvas, mask, factor, line, class_colour(labels[i]))
    draw = ImageDraw.Draw(canvas)
    for label, box in reversed(list(zip(labels, boxes, strict=True))):
        draw.rectangle(clipped(box, canvas.size), outline=class_colour(label), width=max(1, line // 2))
    scores = instances["scores"].tolist() if "scores" in instances else [None] * len(labels)
    names = [classes[i] + ("" if score is None else f" {score:.2f}") for i, score in zip(labels, scores, strict=True)]
    draw_names(draw, canvas.size, names, labels, boxes)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def clipped(box, size):
    """The part of a box xyxy inside a picture of (width, height), as whole pixels, at least one."""
    x0, y0, x1, y1 = (min(max(value, 0), end - 1) for value, end in zip(box, size * 2, strict=True))
    return [round(min(x0, x1)), round(min(y0, y1)), round(max(x0, x1)), round(max(y0, y1))]


def paste_mask(canvas, mask, factor, line, colour):
    """Fill a mask (H, W) bool, `factor` times enlarged, lightly, and draw a contour of at most `line` pixels in it."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return
    mask = np.ascontiguousarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    mask = mask.repeat(factor, 0).repeat(factor, 1)
    height, width = mask.shape
    line = max(1, min(line, min(height, width) // 12))  # of a small object something else remains to be seen
    padded, inner = np.pad(mask, line), mask.copy()
    for step in {line, (line + 1) // 2}:  # at this distance in every direction there is mask
        for y, x in ((line - step, line), (line + step, line), (line, line - step), (line, line + step)):
            inner &= padded[y : y + height, x : x + width]
    opacity = np.where(inner, np.uint8(FILL), mask * np.uint8(255))
    canvas.paste(colour, (columns[0].item() * factor, rows[0].item() * factor), Image.fromarray(opacity))


def draw_names(draw, size, names, labels, boxes):
    """Names in letters that contrast with their ground, the first ones first; none over another or over an object."""
    width, height = size
    font = ImageFont.load_default(max(11, round(max(size) / 65)))
    boxes = np.array([clipped(box, size) for box in boxes]).reshape(-1, 4)
    taken = np.zeros((0, 4))
    for i, (name, label, (x0, y0, x1, y1)) in enumerate(zip(names, labels, boxes.tolist(), strict=True)):
        left, top, right, bottom = draw.textbbox((0, 0), name, font=font)
        w, h = right + left, bottom + top  # the same margin on all sides
        # Above the box, inside it, below it, at its right end above and inside.
        for x, y in ((x0, y0 - h), (x0, y0), (x0, y1), (x1 - w, y0 - h), (x1 - w, y0), (x1 - w, y1)):
            x, y = max(0, min(x, width - w)), max(0, min(y, height - h))
            place = (x, y, x + w, y + h)
            if (covered(place, taken) > 0).any() or (covered(place, np.delete(boxes, i, 0)) > 0.5).any():
                continue
            taken = np.vstack([taken, place])
            colour = class_colour(label)
            bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
            draw.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
            draw.text((x, y), name, fill="black" if bright else "white", font=font)
            break


def covered(place, boxes):
    """The share (n,) of each of the boxes (n, 4) xyxy that one box xyxy covers."""
    low, high = np.maximum(boxes[:, :2], place[:2]), np.minimum(boxes[:, 2:], place[2:])
    return (high - low).clip(0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).clip(1).prod(1)


def side_by_side(pictures, titles):
    """Pictures (3, H, W) uint8 of one size beside each other, a title above each. Returns (3, H', W') uint8."""
    columns = []
    for picture, title in zip(pictures, titles, strict=True):
        width = picture.shape[2]
        size = max(11, round(max(picture.shape) / 40))
        strip = Image.new("RGB", (width, 2 * size), "white")
        ImageDraw.Draw(strip).text((width / 2, size), title, "black", ImageFont.load_default(size), anchor="mm")
        column = torch.cat([torch.from_numpy(np.array(strip)).permute(2, 0, 1), picture], 1)
        columns += [column, column.new_full((3, column.shape[1], max(4, width // 100)), 255)]
    return torch.cat(columns[:-1], 2)


def save_png(image, path):
    """Write a (3, H, W) uint8 image as PNG, with a mark by which `is_drawing` knows it."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, format="PNG", compress_level=3, pnginfo=mark)


def is_drawing(path):
    """Whether a file is a picture that `save_png` wrote."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except DECODER_ERRORS:
        return False


def draw_layers(axes, box, mask, box_sd=0, mask_sd=0):
    """Draw bars of box AP and mask AP side by side per layer, with box - mask above them, as Fig. 1 (c, d) does.

    axes: of matplotlib; box, mask: AP per layer in percent, from layer 0 on; box_sd, mask_sd: lengths of error bars.
    """
    layers = np.arange(len(box))
    box, mask = (np.array(values, dtype=float) for values in (box, mask))  # None becomes NaN, which has no bar
    error = {"capsize": 2, "ecolor": "black" if np.any(box_sd) else "none"}
    axes.bar(layers - 0.2, box, 0.38, yerr=box_sd, label="box AP", color="tab:orange", **error)
    axes.bar(layers + 0.2, mask, 0.38, yerr=mask_sd, label="mask AP", color="tab:blue", **error)
    for layer, top, gap in zip(layers, np.fmax(box + box_sd, mask + mask_sd), box - mask, strict=True):
        if np.isfinite(gap):
            axes.annotate(f"{gap:+.1f}", (layer, top), (0, 5), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(layers, ["input", *map(str, layers[1:])])
    axes.set_xlabel("decoder layer")
    axes.margins(y=0.15)


def draw_classes(axes, classes):
    """Draw horizontal bars of box AP and mask AP per class, the best class at the top, as of `average_precision`.

    Classes without an instance stand at the bottom, without bars.
    """
    values = {kind: [np.nan if entry[kind] is None else entry[kind] for entry in classes] for kind in ("box", "mask")}
    order = np.argsort(np.nan_to_num(np.add(values["box"], values["mask"]), nan=-1), kind="stable")
    for kind, offset, colour in (("box", 0.2, "tab:orange"), ("mask", -0.2, "tab:blue")):
        axes.barh(np.arange(len(order)) + offset, np.take(values[kind], order), 0.38, label=f"{kind} AP", color=colour)
    axes.set_yticks(range(len(order)), [classes[i]["name"] for i in order], fontsize=8, parse_math=False)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlabel("AP")
    axes.grid(axis="x", linewidth=0.5)
    axes.set_axisbelow(True)


def new_figure(path, width, height):
    """A matplotlib figure of that many inches and its axes; a line on stderr and None for both without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path}: not drawn, as matplotlib is not installed; python -m pip install matplotlib", file=sys.stderr)
        return None, None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save_layers(scores, path):
    """PNG of the bars of `draw_layers` for scores with "layers"; a line on stderr without matplotlib."""
    figure, axes = new_figure(path, 1.5 + 0.8 * len(scores["layers"]), 3.5)
    if figure:
        draw_layers(axes, *([entry[kind]["AP"] for entry in scores["layers"]] for kind in ("box", "mask")))
        axes.set_ylabel("AP (numbers: box - mask)")
        axes.legend(loc="upper left")
        figure.savefig(path, dpi=150)


def save_classes(scores, path):
    """PNG of the bars of `draw_classes` for scores with "classes"; a line on stderr without matplotlib."""
    figure, axes = new_figure(path, 6, 1 + 0.2 * len(scores["classes"]))
    if figure:
        draw_classes(axes, scores["classes"])
        figure.legend(loc="outside upper center", ncols=2)
        figure.savefig(path, dpi=min(150, 60_000 / figure.get_figheight()))  # matplotlib draws no more than 65,535 rows
