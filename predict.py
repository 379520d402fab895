"""Detects objects in images: writes overlays as PNG, detections.json in COCO's result format, and images.json."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from checkpoint import load_model
from cli import (
    add_compile_argument,
    add_precision_argument,
    choose_device,
    compile_layers,
    count,
    positive,
    run_program,
    use_precision,
    write_whole,
)
from config import InputError
from data import eval_transform
from detections import postprocess
from drawing import draw_instances, is_drawing, save_png, side_by_side
from formats.coco import coco_results, encode_masks
from formats.images import DECODER_ERRORS, DataError, read_image

# Suffixes of what PIL decodes by itself; the formats named are those that it only recognises.
EXTENSIONS = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
}


def predict(model, image, device, score_threshold=0.0, max_detections=100, encode=None, autocast=None):
    """Detections of one image: (3, H, W) uint8 RGB -> {scores, labels, boxes, masks}, on the CPU, see `postprocess`."""
    [detections] = predict_layers(model, image, device, [None], score_threshold, max_detections, encode, autocast)
    return detections


@torch.inference_mode()
def predict_layers(model, image, device, layers, score_threshold=0.0, max_detections=100, encode=None, autocast=None):
    """As `predict`, a list of the detections of several decoder layers: 0 is the decoder's input, None the last."""
    resized = eval_transform(*model.config.test_size)(image).to(device)
    last = model.config.decoder_layers
    with torch.autocast(torch.device(device).type, dtype=autocast, enabled=autocast is not None):
        outputs = model([resized], all_layers=any(layer not in (None, last) for layer in layers))
    outputs = [*outputs.get("aux_outputs", [None] * last), outputs]
    sizes = [resized.shape[1:]], [tuple(image.shape[1:])]
    found = []
    for layer in layers:
        predictions = outputs[last if layer is None else layer]
        [detections] = postprocess(predictions, *sizes, max_detections, score_threshold, encode)
        found.append({k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in detections.items()})
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What goes in


def find_images(paths, recursive, output):
    """The image files named, and those in the folders named, sorted: a list of paths. Raises DataError.

    What folders hold besides is counted on stderr; overlays that an earlier run left in `output` are no images.
    """
    found = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
        elif not path.is_dir():
            raise DataError(f"{path}: no such image or folder; check the path")
        else:
            inside, others = search(path, recursive, output)
            if others:
                kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(10))
                more = f" and {len(others) - 10} more kinds" if len(others) > 10 else ""
                print(f"predict.py: {path}: left out: {kinds}{more}", file=sys.stderr)
            if not inside:
                raise DataError(f"{path}: no image in this folder{'' if recursive else '; --recursive looks deeper'}")
            found += inside
    return list({os.path.abspath(path): path for path in found}.values())


def search(folder, recursive, output):
    """The image files in a folder, sorted, and a Counter of the kinds of what else is in it. Raises DataError."""
    found, others = [], Counter()

    def refuse(error):
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check the folder's permissions")

    for root, folders, files in os.walk(folder, onerror=refuse):
        if not recursive:
            others["folders (--recursive reads them)"] += len(folders)
            folders.clear()
        folders.sort()
        for path in (Path(root, name) for name in sorted(files)):
            if path.name.startswith("._"):
                others["._*"] += 1
            elif path.suffix.lower() not in EXTENSIONS:
                others[path.suffix.lower() or "without suffix"] += 1
            elif not path.is_file():  # a pipe, a link to nowhere
                others["not a file"] += 1
            elif output.is_dir() and os.path.samefile(root, output) and is_drawing(path):
                others["overlays of an earlier run"] += 1
            else:
                found.append(path)
    return found, +others


def count_pages(path):
    """Images in the file that one looks at in turn; the second picture that many phones put into a JPEG is none."""
    try:
        with Image.open(path) as image:
            return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except DECODER_ERRORS:
        return 1


# ----------------------------------------------------------------------------------------------------------------------
# What comes out


def overlay_names(images):
    """A file name for the overlay of each image, all different, also where capitals do not count."""
    taken, names = set(), []
    for image_id, path in enumerate(images, start=1):
        name = path.stem
        while name.lower() in taken:  # longer each time
            name += f"_{image_id}"
        taken.add(name.lower())
        names.append(f"{name}.png")
    return names


def claim_output(output, images, names):
    """Make the folder `output`. Raises InputError where a file of these names is there that no earlier run wrote."""
    output.mkdir(parents=True, exist_ok=True)
    inputs = {(status.st_dev, status.st_ino) for status in map(os.stat, images)}
    earlier = is_image_list(output / "images.json")
    for path in (output / name for name in names if (output / name).exists()):
        if (path.stat().st_dev, path.stat().st_ino) in inputs:
            raise InputError(f"{path}: would be written, but is one of the images; choose another --output")
        if not (is_drawing(path) if path.suffix == ".png" else earlier):
            raise InputError(f"{path}: would be overwritten, but is not of predict.py; choose another --output")


def is_image_list(path):
    """Whether a file is an images.json of this program."""
    try:
        return all("overlay" in entry for entry in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return False


def write_entries(path, entries):
    """Write a JSON list, an entry a line. Raises OSError."""
    text = ",\n".join(map(json.dumps, entries))
    write_whole(path, lambda temporary: temporary.write_text(f"[{text}]\n"))


@contextlib.contextmanager
def growing_list(path):
    """A JSON list in a file that grows: yields the function that appends a list of entries. Raises OSError.

    It grows in path.tmp, which is renamed at the end of the block, an exception's too. Where the disk is full, the
    entries of which it takes only a part are missing.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", buffering=0) as file:
        file.write(b"[")
        whole = 1

        def append(entries):
            nonlocal whole
            data = ",\n".join(map(json.dumps, entries)).encode()
            data = b",\n" + data if entries and whole > 1 else data
            while data:
                data = data[file.write(data) :]  # as much as the disk takes, and an error if that is nothing
            whole = file.tell()

        try:
            yield append
        finally:
            file.seek(whole)
            file.truncate()
            file.write(b"]\n")
            os.replace(temporary, path)


# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments():
    """The flags as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add("--checkpoint", required=True, metavar="FILE", help="checkpoint of train.py or convert.py")
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="folder for the overlays, detections.json, and images.json, which lists every image with its id, size, "
        "overlay and number of detections",
    )
    add("--recursive", action="store_true", help="also take the images in the folders inside of folders")
    add(
        "--score-threshold",
        type=fraction,
        default=0.3,
        metavar="S",
        help="leave out detections below this score, 0 to 1 (default: 0.3)",
    )
    add("--max-detections", type=positive, default=100, metavar="N", help="at most so many per image (default: 100)")
    add(
        "--layer",
        type=count,
        nargs="+",
        metavar="N",
        help="predictions of decoder layer N instead of the last, 0 being the decoder's input; several are drawn side "
        "by side, and their detections go to detections_N.json. Name the images before this flag",
    )
    add("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default: auto)")
    add_precision_argument(parser)
    add_compile_argument(parser)
    return parser.parse_args()


def fraction(text):
    """An argparse type: a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def main():
    args = parse_arguments()
    device = choose_device(args.device)
    output, layers = Path(args.output), list(dict.fromkeys(args.layer or [None]))
    images = find_images(args.images, args.recursive, output)
    names = overlay_names(images)
    files = [f"detections_{layer}.json" for layer in layers] if len(layers) > 1 else ["detections.json"]
    entries = [new_entry(image_id, path) for image_id, path in enumerate(images, start=1)]
    for number in (signal.SIGINT, signal.SIGTERM):  # both as Ctrl-C: what is done is kept
        signal.signal(number, signal.default_int_handler)
    try:
        claim_output(output, images, [*names, "images.json", *files])
        write_entries(output / "images.json", entries)
        model, checkpoint = load_model(args.checkpoint, device)
        autocast = use_precision(model, args.precision, device)
        if args.compile:
            compile_layers(model, device)
        if args.layer and max(layers) > model.config.decoder_layers:
            raise InputError(f"--layer {max(layers)}: this model has layers 0 to {model.config.decoder_layers}")
        with contextlib.ExitStack() as stack:
            stack.callback(write_entries, output / "images.json", entries)
            appends = [stack.enter_context(growing_list(output / file)) for file in files]
            stack.callback(print_summary, entries, output)
            for entry, name in zip(tqdm(entries, desc="predict", disable=None), names, strict=True):
                detect(model, checkpoint, device, autocast, args, layers, entry, output / name, appends)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--output {output}: cannot be written ({reason}); make room or choose another") from None
    if failures := [entry for entry in entries if "error" in entry]:
        first = failures[0]["file_name"]
        raise DataError(f"{len(failures)} images could not be read, the first is {first}; the others are done")


def new_entry(image_id, path):
    """What images.json says of an image that is not done yet."""
    return {"id": image_id, "file_name": str(path), "width": None, "height": None, "overlay": None, "detections": None}


def detect(model, checkpoint, device, autocast, args, layers, entry, overlay, appends):
    """Detect objects in the image of an entry of images.json; write overlay and detections, and complete the entry."""
    path, classes = entry["file_name"], checkpoint["classes"]
    try:
        image = read_image(path)
    except DataError as error:
        entry["error"] = str(error)
        tqdm.write(f"predict.py: {error}", file=sys.stderr)
        return
    if (pages := count_pages(path)) > 1:
        tqdm.write(f"predict.py: {path}: has {pages} pages or frames; only the first is taken", file=sys.stderr)
    found = predict_layers(
        model, image, device, layers, args.score_threshold, args.max_detections, encode_masks, autocast
    )
    pictures = [draw_instances(image, detections, classes) for detections in found]
    if len(layers) > 1:
        pictures = [side_by_side(pictures, [f"layer {layer}" if layer else "layer 0 (input)" for layer in layers])]
    write_whole(overlay, lambda temporary: save_png(pictures[0], temporary))
    category_ids = checkpoint.get("category_ids", range(1, len(classes) + 1))
    for append, detections in zip(appends, found, strict=True):
        results = coco_results(detections, entry["id"], category_ids)
        labels = detections["labels"].tolist()
        append([r | {"file_name": path, "category": classes[i]} for r, i in zip(results, labels, strict=True)])
    counts = [len(detections["scores"]) for detections in found]
    entry.update(width=image.shape[2], height=image.shape[1], overlay=overlay.name)
    entry["detections"] = counts if len(layers) > 1 else counts[0]


def print_summary(entries, output):
    """Print how far the program got."""
    done = [entry["detections"] for entry in entries if entry["overlay"]]
    count = sum(sum(n) if isinstance(n, list) else n for n in done)
    print(f"{len(done)} of {len(entries)} images, {count} detections: {output}")


if __name__ == "__main__":
    run_program(main)
