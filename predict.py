"""Detects objects in images: writes overlays as PNG and all detections to detections.json, in COCO's result format."""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

from checkpoint import load_model
from cli import choose_device, run_program
from coco import coco_results
from data import eval_transform
from images import DataError, read_image
from model import postprocess

# Colours that differ from each other and from most of what photographs show; instances take them in turn.
COLOURS = ["#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4"]
EXTENSIONS = set(Image.registered_extensions())


def draw_instances(image, instances, classes):
    """Masks, boxes and names over an image.

    image (3, H, W) uint8; instances {labels (n,), boxes (n, 4) xyxy in its pixels, masks (n, H, W) bool, and for
    detections scores (n,)}; classes: names by label. Small images are enlarged so that the names can be read.
    Returns (3, H', W') uint8.
    """
    factor = max(1, 320 // max(image.shape[1:]))
    image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if len(instances["labels"]) == 0:
        return image
    masks = instances["masks"].repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    height, width = image.shape[1:]
    boxes = (instances["boxes"] * factor).clamp(min=0).minimum(torch.tensor([width, height] * 2) - 1)
    names = [classes[label] for label in instances["labels"].tolist()]
    if "scores" in instances:
        names = [f"{name} {score:.2f}" for name, score in zip(names, instances["scores"].tolist(), strict=True)]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colours)
    return draw_bounding_boxes(image, boxes, labels=names, colors=colours, width=max(1, max(height, width) // 400))


def save_png(image, path):
    """Write a (3, H, W) uint8 image as PNG."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


@torch.inference_mode()
def predict(model, image, device, score_threshold=0.0):
    """Detections of one image: (3, H, W) uint8 RGB -> {scores, labels, boxes, masks}, on the CPU, see `postprocess`."""
    resized = eval_transform(*model.config.test_size)(image).to(device)
    [detections] = postprocess(model([resized]), [resized.shape[1:]], [image.shape[1:]])
    keep = detections["scores"] >= score_threshold
    return {name: value[keep].cpu() for name, value in detections.items()}


def find_images(paths):
    """The image files named, and those in the folders named, sorted. Raises DataError for a path that is not there."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS)
            if not inside:
                raise DataError(f"{path}: no image in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such image or folder")
    return list(dict.fromkeys(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="checkpoint of train.py or convert.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the overlays and detections.json")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        help="leave out detections below this score, 0 to 1 (default: 0.3)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default: auto)")
    args = parser.parse_args()

    device = choose_device(args.device)
    images = find_images(args.images)
    model, checkpoint = load_model(args.checkpoint, device)
    classes = checkpoint["classes"]
    category_ids = checkpoint.get("category_ids", range(1, len(classes) + 1))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    results, failures, names = [], [], set()
    for image_id, path in enumerate(tqdm(images, desc="predict", disable=None), start=1):
        try:
            image = read_image(path)
        except DataError as error:
            failures.append(path)
            print(f"predict.py: {error}", file=sys.stderr)
            continue
        detections = predict(model, image, device, args.score_threshold)
        name = path.stem
        while name in names:  # images of the same name in several folders or formats
            name = f"{path.stem}_{image_id}"
        names.add(name)
        save_png(draw_instances(image, detections, classes), output / f"{name}.png")
        for result in coco_results(detections, image_id, category_ids):
            category = classes[list(category_ids).index(result["category_id"])]
            results.append(result | {"file_name": str(path), "category": category})
    (output / "detections.json").write_text(json.dumps(results) + "\n")
    print(f"{len(images) - len(failures)} images, {len(results)} detections: {output}")
    if failures:
        raise DataError(f"{len(failures)} images could not be read, the first is {failures[0]}; the others are done")


if __name__ == "__main__":
    run_program(main)
