"""Detects objects in images: writes overlays as PNG, detections.json in COCO's result format, and images.json."""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from functools import partial
from itertools import chain, count
from pathlib import Path

from PIL import Image

import cli
from checkpoint import load_model, lock_file
from config import InputError
from detections import detect
from drawing import draw_instances, is_drawing, save_png, side_by_side
from files import explaining, write_whole
from formats.coco import coco_results, encode_masks
from formats.images import DataError, read_image, with_image

# Suffixes of what PIL decodes by itself; the formats named are those that it only recognises.
OTHERS = "BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"
EXTENSIONS = {x for x, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in OTHERS}
LINE = ",\n"  # between the entries of a list
BAD_NAME = errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ  # where a disk cannot have the name of an overlay


def find_images(paths, recursive, output):
    """The image files named and those in the folders named, sorted, each once: a list of paths.

    What folders hold besides is counted on stderr; overlays that an earlier run left in `output` are no images. Raises
    DataError where there is none, OSError for a folder that cannot be read.
    """
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such image or folder; check the path")
        others = Counter()
        inside = list(search(path, recursive, output, others, set())) if path.is_dir() else [path]
        kinds = ", ".join(f"{number} {kind}" for kind, number in others.most_common(10)) or "none"
        left_out = f"left out: {others.total()}, most of them {kinds}"
        if not inside:
            raise DataError(f"{path}: no image in this folder ({left_out})")
        if others:
            print(f"predict.py: {path}: {left_out}", file=sys.stderr)
        for image in inside:
            found.setdefault(os.path.join(os.path.realpath(image.parent), image.name), image)
    return list(found.values())


def search(folder, recursive, output, others, seen):
    """Yields the images in a folder, those of its folders last; counts what else is there in `others`.

    Linked folders are followed, but none is read twice, since a link may lead back: `seen` holds those that were.
    """
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.is_symlink(), path.name)):
        if path.is_dir():
            if not recursive:
                others["folders (--recursive reads them)"] += 1
            elif not os.access(path, os.R_OK | os.X_OK):
                others["folders that cannot be read"] += 1
            elif path.resolve() not in seen:
                yield from search(path, recursive, output, others, seen)
        elif path.name.startswith("._"):
            others["._*"] += 1
        elif path.suffix.lower() not in EXTENSIONS:
            others[path.suffix.lower() or "without suffix"] += 1
        elif not path.is_file():  # a pipe, a link to nowhere
            others["not a file"] += 1
        elif output.is_dir() and folder.samefile(output) and is_drawing(path):
            others["overlays of an earlier run"] += 1
        else:
            yield path


def overlay_names(images, longest=255):
    """A file name for the overlay of each image, all different, also without capitals, and of at most so many bytes."""
    names = {}
    for image_id, path in enumerate(images, start=1):
        for tries in count():
            stem, end = path.stem, f"_{image_id}" * tries + ".png"
            while len(os.fsencode(stem + end)) > longest:
                stem = stem[:-1]
            if (stem + end).lower() not in names:
                break
        names[(stem + end).lower()] = stem + end
    return list(names.values())


def claim_output(output, images, lists):
    """Make the folder and return the names of its overlays. Raises OSError where nothing can be written into it, and
    InputError where an overlay or one of the lists would replace a file that no earlier run wrote.
    """
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()
    names = overlay_names(images, os.pathconf(output, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255)
    earlier = False
    with contextlib.suppress(OSError, ValueError, TypeError):
        entries = json.loads((output / "images.json").read_bytes())
        earlier = isinstance(entries, list) and all("overlay" in entry for entry in entries)
    for path in [output / name for name in names] + lists:
        if path.exists() and (path in images or not (is_drawing(path) if path.suffix == ".png" else earlier)):
            raise InputError(f"{path}: would be overwritten, but is not of predict.py; choose another --output")
    return names


def append(path, entries):
    """Append to the JSON list in a file, which holds a whole list whatever happens meanwhile. Raises OSError."""
    with open(path, "r+b", buffering=0) as file:
        whole = file.seek(-len("]\n"), os.SEEK_END)
        text = (LINE * bool(entries and whole > len("[")) + LINE.join(map(json.dumps, entries)) + "]\n").encode()
        try:
            while text:
                text = text[file.write(text) :]  # as much as the disk takes, and an error if that is nothing
        except BaseException:
            file.truncate(whole)
            file.seek(whole)
            file.write(b"]\n")
            raise


def parse_arguments():
    """The flags as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="Image files, or folders of them.")
    add("--checkpoint", required=True, metavar="FILE", help="A checkpoint of train.py or convert.py.")
    add("--output", required=True, metavar="DIR", help="The folder for the overlays, detections.json and images.json.")
    add("--recursive", action="store_true", help="Take the images in folders inside of folders as well.")
    threshold = "Leave out detections below this score, 0 to 1 (default: 0.3)."
    add("--score-threshold", type=cli.fraction, default=0.3, metavar="S", help=threshold)
    limit = "Keep at most so many detections of an image (default: 100)."
    add("--max-detections", type=cli.positive, default=100, metavar="N", help=limit)
    layer = "Take decoder layer N, 0 being the decoder's input; several side by side. Name the images before this flag."
    add("--layer", type=cli.count, nargs="+", metavar="N", help=layer)
    cli.add_model_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_arguments()
    device = cli.choose_device(args.device)
    output, layers = Path(args.output), list(dict.fromkeys(args.layer or [None]))
    images = find_images(args.images, args.recursive, output)
    lists = [output / ("detections.json" if len(layers) == 1 else f"detections_{layer}.json") for layer in layers]
    lists.append(output / "images.json")
    nothing = dict.fromkeys(("width", "height", "overlay", "detections"))
    entries = [{"id": image_id, "file_name": str(path)} | nothing for image_id, path in enumerate(images, start=1)]
    # What is read has errors of its own; an OSError is of what is written.
    with explaining(OSError, f"--output {output}: cannot be written", "make room or choose another"):
        names = claim_output(output, images, lists)
        model, checkpoint = load_model(args.checkpoint, device)
        if args.layer and max(layers) > model.config.decoder_layers:
            raise InputError(f"--layer {max(layers)}: this model has layers 0 to {model.config.decoder_layers}")
        autocast = cli.prepare_model(model, args, device)
        limits = {"topk": args.max_detections, "score_threshold": args.score_threshold}
        find = partial(detect, model, layers=layers, encode=encode_masks, autocast=autocast, **limits)
        for number in (signal.SIGINT, signal.SIGTERM):  # both as Ctrl-C: what is done is kept
            signal.signal(number, signal.default_int_handler)
        _lock = lock_file(output / ".lock")
        try:
            for path in lists:
                write_whole(path, "[]\n")
            with cli.Progress("predict", len(entries)) as progress:
                for entry, name in zip(entries, names, strict=True):
                    done, results = predict(entry, find, layers, checkpoint, output / name, progress.say)
                    for path, some in zip(lists, [*results, [entry | done]], strict=True):
                        append(path, some)
                    entry |= done
                    progress.step()
        finally:
            with contextlib.suppress(OSError):  # of a full disk, where those that are done are listed
                write_whole(lists[-1], f"[{LINE.join(map(json.dumps, entries))}]\n")
            done = [entry["detections"] for entry in entries if entry["overlay"]]
            found = sum(sum(n) if isinstance(n, list) else n for n in done)
            print(f"{len(done)} of {len(entries)} images, {found} detections: {output}")
    if failed := [entry["file_name"] for entry in entries if "error" in entry]:
        raise DataError(f"{len(failed)} of {len(entries)} images could not be done, the first is {failed[0]}")


def predict(entry, find, layers, checkpoint, overlay, say):
    """Detect objects in the image of an entry of images.json, and write the overlay.

    find: a function of a list of images, as `detect`. Returns what completes the entry, and COCO's results of every
    layer: none of an image that cannot be read, or whose name is none for the disk, with an entry that says so.
    """
    path, classes = entry["file_name"], checkpoint["classes"]
    category_ids = checkpoint.get("category_ids", range(1, len(classes) + 1))
    try:
        image = read_image(path)
        with contextlib.suppress(DataError):  # of a page behind the first, which alone counts
            # The second picture that many phones put into a JPEG, then an MPO, is no page.
            pages = with_image(path, lambda x: 1 if x.format == "MPO" else getattr(x, "n_frames", 1), again=False)
            if pages > 1:
                say(f"predict.py: {path}: has {pages} pages or frames; only the first is taken", sys.stderr)
        found = [detections for [detections] in find([image])]
        pictures = [draw_instances(image, detections, classes) for detections in found]
        if len(layers) > 1:
            pictures = [side_by_side(pictures, [f"layer {layer}" if layer else "layer 0 (input)" for layer in layers])]
        write_whole(overlay, partial(save_png, pictures[0]))
    except (DataError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in BAD_NAME:
            raise
        reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        say(f"predict.py: {reason}", sys.stderr)
        return {"error": reason}, [[] for _ in layers]
    results = [coco_results(detections, entry["id"], category_ids) for detections in found]
    names = dict(zip(category_ids, map(str, classes), strict=True))
    for result in chain(*results):
        result |= {"file_name": path, "category": names[result["category_id"]]}
    counts = [len(some) for some in results]
    size = {"width": image.shape[2], "height": image.shape[1]}
    return size | {"overlay": overlay.name, "detections": counts if len(layers) > 1 else counts[0]}, results


if __name__ == "__main__":
    cli.run_program(main)
