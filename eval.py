"""Evaluates a checkpoint: COCO's box and mask AP, also per class and of every decoder layer, and results as a file."""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import cli
import distributed
from checkpoint import load_model
from config import InputError
from data import loader
from detections import detect
from drawing import is_drawing, save_classes, save_layers
from files import explaining, write_whole
from formats.coco import check_sizes, coco_results, encode_masks, match_classes
from formats.images import DataError


def average_precision(coco, results, image_ids, max_detections=100):
    """COCO's numbers of results (`coco_results`) in percent, None where there is no instance of the kind.

    max_detections: how many results count per image and class, the best ones.

    Returns {"box": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}, "mask":
    the same, "classes": [{"name", "box": AP, "mask": AP}, ...] ordered by category id}. AR100 is AR at max_detections:
    with 300 it is named AR300, with 5 the three are AR1 and AR5. Equal to COCOeval.summarize(), which knows only 100.
    """
    limits = [limit for limit in (1, 10) if limit < max_detections] + [max_detections]
    scores, classes = {}, [{"name": coco.cats[category_id]["name"]} for category_id in sorted(coco.cats)]
    for name, kind, key in (("box", "bbox", "bbox"), ("mask", "segm", "segmentation")):
        # loadRes takes a mask's area from the box where there is one, and the box from the mask where there is none.
        alone = [{k: result[k] for k in ("image_id", "category_id", "score", key)} for result in results]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(coco, coco.loadRes(alone) if alone else COCO(), kind)
            evaluation.params.imgIds = image_ids
            evaluation.params.maxDets = limits
            evaluation.evaluate()
            evaluation.accumulate()
        # (IoU .5, .55, ..., recall, class, area, limit) and (IoU, class, area, limit); areas: all, small, medium, large
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
        best, most = precision[..., -1], recall[..., -1]
        scores[name] = {"AP": mean(best[..., 0]), "AP50": mean(best[0, ..., 0]), "AP75": mean(best[5, ..., 0])}
        scores[name] |= {f"AP{size}": mean(best[..., area]) for area, size in enumerate("sml", start=1)}
        scores[name] |= {f"AR{limit}": mean(recall[:, :, 0, i]) for i, limit in enumerate(limits)}
        scores[name] |= {f"AR{size}": mean(most[..., area]) for area, size in enumerate("sml", start=1)}
        for k, entry in enumerate(classes):
            entry[name] = mean(best[:, :, k, 0])
    return scores | {"classes": classes}


def mean(values):
    """Mean of a part of COCOeval's arrays in percent; they hold -1 where there is no instance. None if all are."""
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def find_results(model, dataset, workers=0, per_layer=False, batch_size=4, max_detections=100, autocast=None,
                 labels=None, stopping=lambda: False):  # fmt: skip
    """COCO results of a model on a data set made with training=False: for the last layer or every one a list, by image.

    max_detections: the best so many detections of an image count. autocast: dtype of torch.autocast, None for none.
    labels: the model's label of each of the data set's classes (`match_classes`), where they are not the same.
    stopping: called before each batch; where it returns True in any process, all leave off and return None.

    Of several processes the first has all results, the others have none. Leaves the model in evaluation mode. Raises
    InputError for NaN in the predictions.
    """
    model.eval()
    # Padding changes what the model sees, so that only images of one size share a batch: each is as if it were alone.
    same_size = {}
    for index, image_id in enumerate(dataset.image_ids):
        entry = dataset.coco.imgs[image_id]
        same_size.setdefault((entry["height"], entry["width"]), []).append(index)
    batches = [some[i : i + batch_size] for some in same_size.values() for i in range(0, len(some), batch_size)]
    rank = distributed.process_rank()
    share = batches[rank :: distributed.process_count()]
    layers = range(model.config.decoder_layers + 1) if per_layer else [None]
    found = [{} for _ in layers]  # of each layer {image id: its results}

    def work():
        with cli.Progress("evaluate", sum(map(len, share))) as progress:
            for images, targets in loader(dataset, share, workers):
                if stopping():
                    break
                sizes = [target["original_size"] for target in targets]
                detections = detect(model, images, sizes, layers, max_detections, 0.0, encode_masks, autocast, labels)
                for of_layer, batch in zip(found, detections, strict=True):
                    for image_id, some in zip((target["image_id"] for target in targets), batch, strict=True):
                        of_layer[image_id] = coco_results(some, image_id, dataset.category_ids)
                progress.step(len(images))

    distributed.together(work)
    if any(distributed.gather(stopping())):
        return None
    for layer, some in enumerate(found):  # one at a time, as every process holds all of it for a moment
        parts = distributed.gather(some)
        found[layer] = {} if rank else {image_id: of_image for part in parts for image_id, of_image in part.items()}
    return [[r for image_id in dataset.image_ids for r in some.get(image_id, ())] for some in found]


def score(dataset, results, max_detections=100, per_class=False):
    """Numbers of what `find_results` returned: `average_precision` of the last layer, "classes" on request.

    Of several layers also "layers": [{"layer": 0, "box": {...}, "mask": {...}}, ...], from the decoder's input, 0, on.
    """
    layers = [average_precision(dataset.coco, found, dataset.image_ids, max_detections) for found in results]
    scores = layers[-1] if per_class else {kind: layers[-1][kind] for kind in ("box", "mask")}
    if len(layers) > 1:
        scores["layers"] = [{"layer": i, "box": s["box"], "mask": s["mask"]} for i, s in enumerate(layers)]
    return scores


def percent(value):
    """A metric for printing."""
    return "    -" if value is None else f"{value:5.1f}"


def print_scores(scores):
    """Print the metrics and, where they are there, AP per class, and box AP, mask AP and their difference per layer."""
    print("       " + "  ".join(f"{metric:>5}" for metric in scores["box"]))
    for kind in ("box", "mask"):
        print(f"{kind:5}  " + "  ".join(percent(value) for value in scores[kind].values()))
    if "classes" in scores:
        width = max(5, *(len(entry["name"]) for entry in scores["classes"]))
        print(f"\n{'class':{width}}  box AP  mask AP")
        for entry in scores["classes"]:
            print(f"{entry['name']:{width}}   {percent(entry['box'])}    {percent(entry['mask'])}")
    if "layers" in scores:
        print("\nlayer      box AP  mask AP  box - mask")
        for entry in scores["layers"]:
            box, mask = entry["box"]["AP"], entry["mask"]["AP"]
            gap = percent(None if None in (box, mask) else box - mask)
            print(f"{entry['layer'] or '0 (input)':<9}   {percent(box)}    {percent(mask)}       {gap}")


def new_file(path, beginning):
    """Path of a JSON file to write, in a folder that exists then; nothing is written yet.

    beginning: of the files of its kind. Raises InputError where it cannot be written or would replace another file.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise InputError(f"{path}: is to be a JSON file; give a name that ends in .json")
    with explaining(OSError, f"{path}: cannot be written", "choose another name"):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        there = path.open("rb").read(len(beginning)) if path.exists() else b""
    if there not in (b"", beginning):
        raise InputError(f"{path}: exists and is another kind of file; choose another name")
    return path


def write_results(results, coco, path, masks_path):
    """Write COCO results: boxes and masks to `path`, masks alone to `masks_path`; a result a line.

    coco: the data set's; where its images and categories have a file_id, that is the annotation file's own id.
    COCO's tools take the area of a mask from the box where a result has both, and the box from the mask where it has
    only that: the first file gives the AP and AR of both, but APs, APm and APl of masks need the second.
    """
    own = lambda table, number: table[number].get("file_id", number)
    for file, without in ((path, None), (masks_path, "bbox")):
        lines = []
        for result in results:
            ids = {"image_id": own(coco.imgs, result["image_id"]), "category_id": own(coco.cats, result["category_id"])}
            lines.append(json.dumps({key: value for key, value in (result | ids).items() if key != without}))
        write_whole(file, "[\n" + ",\n".join(lines) + "\n]\n")


def parse_arguments():
    """The flags as a namespace, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="A checkpoint of train.py or convert.py.")
    add("--per-layer", action="store_true", help="Evaluate the decoder's input and every decoder layer.")
    add("--per-class", action="store_true", help="Show box AP and mask AP of every class as well.")
    best = "Count at most so many detections of an image, the best ones (default: 100, as published)."
    add("--max-detections", type=cli.positive, default=100, metavar="N", help=best)
    numbers = "Write the numbers to this file too and, with --per-layer and --per-class, bar charts beside it."
    add("--output", metavar="FILE.json", help=numbers)
    results = "Write the detections too, as COCO results: boxes and masks here, masks alone to FILE.segm.json."
    add("--results", metavar="FILE.json", help=results)
    add("--batch-size", type=cli.positive, default=4, help="Images at a time, of one size (default: 4).")
    add("--split", choices=["val", "test"], default="val", help="With --data coco and --data-root (default: val).")
    cli.add_model_arguments(parser)
    cli.add_data_arguments(parser)
    args = parser.parse_args()
    others = args.val_json or args.val_images
    if args.split == "test" and (args.data not in (None, "coco") or not args.data_root or others):
        raise InputError("--split test: is for --data coco with --data-root; for other files, --val-json names them")
    if (args.train_json or args.train_images) and not (args.val_json or args.val_images or args.data_root):
        raise InputError("--train-json, --train-images: eval.py takes the files of --val-json and --val-images")
    return args


def main():
    args = parse_arguments()
    device, rank, *_ = distributed.join_processes(cli.choose_device(args.device))
    output, charts, results, model, autocast, dataset, labels = distributed.together(lambda: prepare(args, device))
    found = find_results(
        model, dataset, args.workers, args.per_layer, args.batch_size, args.max_detections, autocast, labels
    )
    if rank > 0:
        return
    errors = []  # of what cannot be written: the first is said last, when all else is kept and shown

    def attempt(write, *arguments):
        try:
            write(*arguments)
        except OSError as error:
            errors.append(error)

    if results:
        attempt(write_results, found[-1], dataset.coco, *results)
    if dataset.coco.anns:
        scores = score(dataset, found, args.max_detections, args.per_class)
        if output:
            attempt(write_whole, output, json.dumps(scores, indent=1) + "\n")
        for save, path in charts.items():
            attempt(save, scores, path)
        print_scores(scores)
    else:
        print("the data has no annotations: there is nothing to compare the detections with, so no AP")
    if errors:
        raise errors[0]
    if results:
        print(f"results of {len(dataset)} images: {results[0]}; without boxes: {results[1]}")


def prepare(args, device):
    """All that there is before the first image: --output, its charts as {function: path}, both files of --results,
    model, autocast's dtype, data set, and the model's labels of its classes.
    """
    output = args.output and new_file(args.output, b'{\n "box"')
    kinds = (args.per_layer, save_layers, ".png"), (args.per_class, save_classes, ".classes.png")
    charts = {save: output.with_suffix(suffix) for asked, save, suffix in kinds if asked and output}
    for path in charts.values():
        if path.exists() and not is_drawing(path):
            raise InputError(f"{path}: would be overwritten by a chart, but is not one; choose another --output")
    names = [args.results, Path(args.results).with_suffix(".segm.json")] if args.results else []
    results = [new_file(name, b'[\n{"image_id"') for name in names]
    if output and output.resolve() in [path.resolve() for path in results]:
        raise InputError(f"--output and --results: both write {output}; give two names")
    model, checkpoint = load_model(args.checkpoint, device)
    autocast = cli.prepare_model(model, args, device)
    dataset = cli.open_split(args, args.split, model.config.test_size, need_annotations=False)
    try:
        labels = match_classes(checkpoint["classes"], dataset.classes)
    except DataError as error:
        raise InputError(f"{args.checkpoint}: {error}") from None
    check_sizes(dataset.coco.dataset, dataset.image_dir)
    if not dataset.coco.anns and not results:
        raise InputError("the data has no annotations to compare with; --results FILE.json writes the detections")
    return output, charts, results, model, autocast, dataset, labels


if __name__ == "__main__":
    cli.run_program(main)
