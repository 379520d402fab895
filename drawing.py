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
from scipy.ndimage import binary_erosion
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2.functional import pad, pil_to_tensor, resize, to_pil_image

from files import write_whole
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


def draw_instances(image, instances, classes, letters=1 / 65):
    """Instances over an image: masks as a light fill with a contour, boxes, names on a ground of the class's colour.

    image (3, H, W) uint8; instances {labels (n,), boxes (n, 4) xyxy in its pixels, masks (n, H, W) bool or n of COCO's
    RLE, and for detections scores (n,), best first}; classes: names by label; letters: their size, as a part of the
    longer side, at least 11 pixels. Small images are enlarged so that names can be read; a name for which there is no
    room left is not drawn, its colour tells the class. Returns (3, H', W') uint8, the same whole multiple of H and W.
    """
    factor = -(-512 // max(image.shape[1:]))
    canvas = to_pil_image(image.cpu().repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    line = max(1, round(max(canvas.size) / 500))
    labels = instances["labels"].tolist()
    # The best is drawn last, on top of the others.
    for label, mask in reversed(list(zip(labels, instances["masks"], strict=True))):
        mask = mask_utils.decode(mask).view(bool) if isinstance(mask, dict) else mask.cpu().numpy()
        paste_mask(canvas, mask, factor, line, class_colour(label))
    draw = ImageDraw.Draw(canvas)
    boxes = clip_boxes_to_image(instances["boxes"].cpu() * factor, [n - 1 for n in canvas.size[::-1]]).round().int()
    for label, box in reversed(list(zip(labels, boxes.tolist(), strict=True))):
        draw.rectangle(box, outline=class_colour(label), width=max(1, line // 2))
    names = [lettering(classes[label], label) for label in labels]
    if "scores" in instances:
        scores = instances["scores"].tolist()
        names = [(f"{name} {score:.2f}", font) for (name, font), score in zip(names, scores, strict=True)]
    draw_names(canvas, names, labels, boxes.numpy(), max(11, round(max(canvas.size) * letters)))
    return pil_to_tensor(canvas)


def paste_mask(canvas, mask, factor, line, colour):
    """Fill a mask (H, W) bool, `factor` times enlarged, lightly, and draw a contour of at most `line` pixels in it."""
    rows, columns = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
    if not rows:
        return
    x0, y0 = columns[0], rows[0]
    mask = mask[y0 : rows[-1] + 1, x0 : columns[-1] + 1].repeat(factor, 0).repeat(factor, 1)
    line = max(1, min(line, min(mask.shape) // 12))  # of a small object something else remains to be seen
    opacity = np.where(binary_erosion(mask, iterations=line), np.uint8(FILL), mask * np.uint8(255))
    canvas.paste(colour, (x0 * factor, y0 * factor), Image.fromarray(opacity))


@cache
def lettering(name, label):
    """What is written for a class, and the file of a font that has its letters and digits (None: Pillow's own).

    It is the name in one line; where that is empty, or no font of the system has all its letters, the class's number.
    """
    name = unicodedata.normalize("NFC", str(name))
    name = "".join(filter(str.isprintable, " ".join(name.split())))
    for path in (None, *system_fonts()) if name else ():
        with contextlib.suppress(OSError):  # it is not there, or has bitmaps of one size
            font = load_font(path, 16)
            shapes = [font.getmask(letter) for letter in "\uffff0123456789." + name if letter != " "]
            missing, *shapes = [(shape.size, bytes(shape)) for shape in shapes]  # \uffff is no letter in any font
            if missing not in shapes:
                return name, path and font.path
    if name:
        warnings.warn(f"no font of this system has the letters of {name}; pictures show its number", stacklevel=2)
    return f"class {label}", None


@cache
def system_fonts():
    """The files of the system's fonts, plain ones first."""
    with contextlib.suppress(ImportError):
        from matplotlib.font_manager import findSystemFonts

        fancy = "bold italic oblique light thin black serif mono condensed lastresort".split()
        key = lambda path: (sum(word in Path(path).name.lower() for word in fancy), path)
        return *FONTS, *sorted(findSystemFonts(), key=key)
    return FONTS


@cache
def load_font(path, size):
    """Pillow's font of a file, or its own, in letters of so many pixels. Raises OSError."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def draw_names(canvas, names, labels, boxes, letters):
    """Names in letters that contrast with their ground, the first ones first; none over another or over an object."""
    draw, taken = ImageDraw.Draw(canvas), np.zeros((0, 4))
    for i, ((name, path), label, (x0, y0, x1, y1)) in enumerate(zip(names, labels, boxes.tolist(), strict=True)):
        font = load_font(path, letters)
        left, top, right, bottom = draw.textbbox((0, 0), name, font=font)
        w, h = right + left, bottom + top  # the same margin on all sides
        # Above the box, inside it, below it, at its right end above, inside and below.
        for x, y in ((x0, y0 - h), (x0, y0), (x0, y1), (x1 - w, y0 - h), (x1 - w, y0), (x1 - w, y1)):
            x, y = max(0, min(x, canvas.width - w)), max(0, min(y, canvas.height - h))
            place = (x, y, x + w, y + h)
            if (covered(place, taken) > 0).any() or (covered(place, np.delete(boxes, i, 0)) > 0.5).any():
                continue
            taken = np.vstack([taken, place])
            bright = np.dot(class_colour(label), (0.299, 0.587, 0.114)) > 140
            draw.rectangle((x, y, x + w - 1, y + h - 1), fill=class_colour(label))
            draw.text((x, y), name, fill="black" if bright else "white", font=font)
            break


def covered(place, boxes):
    """The share (n,) of each of the boxes (n, 4) xyxy that one box xyxy covers."""
    low, high = np.maximum(boxes[:, :2], place[:2]), np.minimum(boxes[:, 2:], place[2:])
    return (high - low).clip(0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).clip(1).prod(1)


def side_by_side(pictures, titles):
    """Pictures (3, H, W) uint8 of one size beside each other, a title above each. Returns (3, H', W') uint8."""
    columns, (_, height, width) = [], pictures[0].shape
    letters, gap = max(11, round(max(height, width) / 40)), max(4, width // 100)
    for picture, title in zip(pictures, titles, strict=True):
        strip = Image.new("RGB", (width, 2 * letters), "white")
        ImageDraw.Draw(strip).text((width / 2, letters), title, "black", load_font(None, letters), anchor="mm")
        columns.append(pad(torch.cat([pil_to_tensor(strip), picture], 1), [0, 0, gap, 0], fill=255))
    return torch.cat(columns, 2)[..., :-gap]


def draw_rows(columns):
    """Pictures in aligned rows of 512 pixels, with names that can be read.

    columns: a list of columns, each a list with (image, instances, classes) for every row, of images of one size: what
    `draw_instances` takes. An image more than three times as wide as high becomes less high.
    Returns (3, H', W') uint8.
    """
    drawn, height = [], 512
    for column in columns:
        old = column[0][0].shape[1:]
        scale = min(height / old[0], 3 * height / old[1])
        new = [max(1, round(scale * n)) for n in old]
        pictures = [resize(draw_instances(*row, 20 / max(new)), new) for row in column]
        drawn.append(torch.cat([pad(x, [0, 0, 4, height + 4 - new[0]], fill=255) for x in pictures], 1))
    return torch.cat(drawn, 2)


def save_png(image, path):
    """Write a (3, H, W) uint8 image as PNG, with a mark by which `is_drawing` knows it."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    to_pil_image(image).save(path, format="PNG", compress_level=3, pnginfo=mark)


def is_drawing(path):
    """Whether a file is a picture that `save_png` or `save_figure` wrote."""
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
    axes.set(xlabel="decoder layer", ymargin=0.15)


def save_layers(scores, path):
    """PNG of the bars of `draw_layers` for scores with "layers"; a line on stderr without matplotlib."""
    if axes := new_axes(path, 1.5 + 0.8 * len(scores["layers"]), 3.5):
        draw_layers(axes, *([entry[kind]["AP"] for entry in scores["layers"]] for kind in ("box", "mask")))
        axes.set_ylabel("AP (numbers: box - mask)")
        axes.legend(loc="upper left")
        save_figure(axes.figure, path, 150)


def save_classes(scores, path):
    """PNG of bars of box AP and mask AP per class, for scores with "classes"; a line on stderr without matplotlib.

    The best class is at the top; those without an instance stand at the bottom, without bars.
    """
    classes = scores["classes"]
    if not (axes := new_axes(path, 6, 1 + 0.2 * len(classes))):
        return
    box, mask = (np.array([entry[kind] for entry in classes], dtype=float) for kind in ("box", "mask"))
    order = np.argsort(np.nan_to_num(box + mask, nan=-1), kind="stable")
    axes.barh(np.arange(len(order)) + 0.2, box[order], 0.38, label="box AP", color="tab:orange")
    axes.barh(np.arange(len(order)) - 0.2, mask[order], 0.38, label="mask AP", color="tab:blue")
    names, fonts = zip(*(lettering(classes[i]["name"], i) for i in order.tolist()), strict=True)
    axes.set_yticks(range(len(order)), names, fontsize=8, parse_math=False)
    for tick, font in zip(axes.get_yticklabels(), fonts, strict=True):
        tick.set(font=font and Path(font), fontsize=8)
    axes.grid(axis="x", linewidth=0.5)
    axes.set(xlabel="AP", ylim=(-0.6, len(order) - 0.4), axisbelow=True)
    axes.figure.legend(loc="outside upper center", ncols=2)
    save_figure(axes.figure, path, min(150, 60_000 / axes.figure.get_figheight()))  # matplotlib's most are 65,535 rows


def save_figure(figure, path, dpi):
    """Write a matplotlib figure as PNG, whole, with the mark by which `is_drawing` knows it."""
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": MARK}))


def new_axes(path, width, height):
    """Axes in a matplotlib figure of that many inches, for a picture there; without matplotlib a line, and None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path}: not drawn, as matplotlib is not installed; python -m pip install matplotlib", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained").subplots()
