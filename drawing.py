"""Pictures: instances over an image, and box and mask AP of every decoder layer as bars."""

import colorsys
import contextlib
import sys
import unicodedata
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pycocotools import mask as mask_utils
from torch.nn.functional import pad

from formats.images import DECODER_ERRORS

FILL = 70  # opacity of a mask's inside, of 255: what is below stays visible
# Fonts of Linux, Windows and macOS that Pillow looks for by their names; matplotlib, where it is installed, finds all.
FONTS = "DejaVuSans.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc", "NanumGothic.ttf", "wqy-microhei.ttc", "malgun.ttf"
FONTS += "msyh.ttc", "meiryo.ttc", "Arial Unicode.ttf", "AppleSDGothicNeo.ttc", "Hiragino Sans GB.ttc"
MARK = "DI-MaskDINO drawing.py"  # in every PNG, so that no other is overwritten


def class_colour(label):
    """An RGB colour, 0 to 255, for a class: the same in every picture, far from those of the labels beside it."""
    hue, turn = (0.02 + label * 0.61803) % 1, label // 5 % 3  # the golden ratio spreads any number of hues evenly
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, (0.95, 0.6, 0.95)[turn], (1, 1, 0.75)[turn]))


def draw_instances(image, instances, classes, letters=None):
    """Instances over an image: masks as a light fill with a contour, boxes, names on a ground of the class's colour.

    image (3, H, W) uint8; instances {labels (n,), boxes (n, 4) xyxy in its pixels, masks (n, H, W) bool or n of COCO's
    RLE, and for detections scores (n,), best first}; classes: names by label. Small images are enlarged so that names
    can be read; a name for which there is no room left is not drawn, its colour tells the class. letters: their size in
    pixels, in proportion to the image where it is None. Returns (3, H', W') uint8, the same whole multiple of H and W.
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
    scores = (
        [f" {score:.2f}" for score in instances["scores"].tolist()] if "scores" in instances else [""] * len(labels)
    )
    names = [(name + score, font) for (name, font), score in zip(lettering(classes, labels), scores, strict=True)]
    draw_names(draw, canvas.size, names, labels, boxes, letters or max(11, round(max(canvas.size) / 65)))
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


def lettering(classes, labels):
    """[(what is written for a label, the file of a font that has its letters or None for Pillow's own)] of labels.

    It is the name in one line; where that is empty, or no font of the system has all its letters, the class's number.
    """
    names = [unicodedata.normalize("NFC", str(classes[label])) for label in labels]
    names = ["".join(filter(str.isprintable, " ".join(name.split()))) for name in names]
    fonts = [font_with(name) if name else "" for name in names]
    shown = zip(names, fonts, labels, strict=True)
    return [(f"class {label}", None) if font == "" else (name, font) for name, font, label in shown]


@cache
def font_with(name):
    """The file of a font with the letters of a name and digits; None for Pillow's own, "" where there is none."""
    for path in (None, *system_fonts()):
        with contextlib.suppress(OSError):  # it is not there, or has bitmaps of one size
            font = load_font(path, 16)
            shapes = [font.getmask(letter) for letter in "\uffff0123456789." + name if letter != " "]
            missing, *shapes = [(shape.size, bytes(shape)) for shape in shapes]  # \uffff is no letter in any font
            if missing not in shapes:
                return path and font.path
    warnings.warn(f"no font of this system has the letters of {name}; pictures show the class's number", stacklevel=2)
    return ""


@cache
def system_fonts():
    """The files of the system's fonts, plain ones first."""
    with contextlib.suppress(ImportError):
        from matplotlib.font_manager import findSystemFonts

        fancy = "bold italic oblique light thin black serif mono condensed lastresort".split()
        key = lambda path: (sum(word in Path(path).name.lower() for word in fancy), path)  # noqa: E731
        return *FONTS, *sorted(findSystemFonts(), key=key)
    return FONTS


@cache
def load_font(path, size):
    """Pillow's font of a file, or its own, in letters of so many pixels. Raises OSError."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def draw_names(draw, size, names, labels, boxes, letters):
    """Names in letters that contrast with their ground, the first ones first; none over another or over an object."""
    width, height = size
    boxes = np.array([clipped(box, size) for box in boxes]).reshape(-1, 4)
    taken = np.zeros((0, 4))
    for i, ((name, path), label, (x0, y0, x1, y1)) in enumerate(zip(names, labels, boxes.tolist(), strict=True)):
        font = load_font(path, letters)
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


def draw_rows(columns, height=512):
    """Pictures in aligned rows of one height, with names that can be read.

    columns: a list of columns, each a list with (image, instances, classes) for every row, of images of one size: what
    `draw_instances` takes, the masks as a tensor. An image more than four times as wide as high becomes less high.
    Returns (3, H', W') uint8.
    """
    rows = [[] for _ in columns[0]]
    for column in columns:
        for row, (image, instances, classes) in zip(rows, column, strict=True):
            old = image.shape[1:]
            scale = min(height / old[0], 3 * height / old[1])
            new = [max(1, round(scale * n)) for n in old]
            kind = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
            image = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize(new[::-1], kind)
            y, x = (((torch.arange(n) + 0.5) * before / n).long() for n, before in zip(new, old, strict=True))
            boxes = instances["boxes"].cpu() * torch.tensor([new[1] / old[1], new[0] / old[0]] * 2)
            resized = instances | {"boxes": boxes, "masks": instances["masks"].cpu()[:, y][:, :, x]}
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            row.append(pad(draw_instances(image, resized, classes, 20), (0, 4, 0, height + 4 - new[0]), value=255))
    return torch.cat([torch.cat(row, 2) for row in rows], 1)


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
    names = lettering([entry["name"] for entry in classes], order.tolist())
    axes.set_yticks(range(len(order)), [name for name, _ in names], fontsize=8, parse_math=False)
    for tick, (_, path) in zip(axes.get_yticklabels(), names, strict=True):
        if path:
            tick.set(font=Path(path), fontsize=8)
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
