"""Times the loading of training images, without any training: python -m benchmarks.data_loading --data-root DIR."""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from experiments.study import commit, machine
from formats.coco import coco_paths, read_annotations
from formats.images import DataError

AUGMENTATION = 1024, (0.1, 2.0)  # the published one
COCO_ANNOTATIONS_PER_IMAGE = 860_001 / 118_287  # of train2017


def measure_process(dataset, count):
    """Print the images per second of this process alone."""
    for index in range(min(10, len(dataset))):  # files into the cache, first calls of the libraries
        dataset[index]
    begin, instances = time.perf_counter(), 0
    for number in range(count):
        _, [target] = data.collate([dataset[number % len(dataset)]])
        instances += len(target["labels"])
    rate = count / (time.perf_counter() - begin)
    print(f"\nIn one process: {rate:.1f} images/s; {instances / count:.1f} instances per image")


def measure_loader(dataset, count, workers, batch_size):
    """Print the images per second that a DataLoader's processes deliver."""
    indices = [i % len(dataset) for i in range(count + batch_size * workers * 2)]
    batches = DataLoader(
        dataset, batch_size, sampler=indices, num_workers=workers, collate_fn=data.collate, drop_last=True
    )
    for number, _ in enumerate(batches):
        if number == 2 * workers:  # those were prefetched while the processes started
            begin, first = time.perf_counter(), number
    rate = (number - first) * batch_size / (time.perf_counter() - begin)
    print(f"\nA DataLoader with {workers} process(es), batches of {batch_size}: {rate:.1f} images/s")


def measure_large_image():
    """Print the time and the peak memory of a loader process for a photograph of many polygons, all in the crop."""
    height, width, instances = 4000, 5000, 700
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    with tempfile.TemporaryDirectory() as folder:
        noise = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
        noise.resize((width, height)).save(Path(folder) / "large.jpg")
        annotations = []
        for number in range(instances):
            radius = rng.uniform(20, 400)
            points = rng.uniform(radius, (width - radius, height - radius)) + circle * radius
            box = [*points.min(0), *np.ptp(points, axis=0)]
            annotations.append({"id": number + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": box})
            annotations[-1] |= {"area": 3.14 * radius**2, "segmentation": [points.ravel().tolist()]}
        image = {"id": 1, "file_name": "large.jpg", "height": height, "width": width}
        content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]}
        path = Path(folder) / "large.json"
        path.write_text(json.dumps(content))
        dataset = data.CocoInstances(path, folder, training=True, augmentation=(AUGMENTATION[0], (1.0, 1.0)))
        begin = time.perf_counter()
        for _, [target] in DataLoader(dataset, sampler=[0] * 4, num_workers=1, collate_fn=data.collate):
            loaded = len(target["labels"])
        seconds = (time.perf_counter() - begin) / 4
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # of all child processes so far
    print(f"\nAn image of {height} x {width}, {loaded} instances: {seconds:.1f} s; its loader process {peak:.2f} GB")


def write_annotations(folder, count):
    """A COCO annotation file of `count` images like train2017 in numbers and bytes, and their (empty) image files."""
    rng = random.Random(0)
    images, path = folder / "images", folder / "instances.json"
    images.mkdir()
    annotations = round(count * COCO_ANNOTATIONS_PER_IMAGE)
    with open(path, "w") as file:
        categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
        file.write(f'{{"categories": {json.dumps(categories)}, "images": [')
        for i in range(count):
            entry = {"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640, "license": 3}
            entry["coco_url"] = f"http://images.cocodataset.org/train2017/{i:012d}.jpg"
            file.write((", " if i else "") + json.dumps(entry))
            (images / entry["file_name"]).touch()
        file.write('], "annotations": [')
        for i in range(annotations):
            points = rng.choices(range(64_000), k=2 * rng.randint(5, 40))
            polygon = [round(value / (134 if axis % 2 else 100), 2) for axis, value in enumerate(points)]
            x, y = min(polygon[::2]), min(polygon[1::2])
            entry = {
                "segmentation": [polygon],
                "area": round(rng.random() * 1e4, 4),
                "iscrowd": 0,
                "image_id": rng.randrange(count),
                "bbox": [x, y, round(max(polygon[::2]) - x, 2), round(max(polygon[1::2]) - y, 2)],
                "category_id": rng.randint(1, 80),
                "id": i,
            }
            file.write((", " if i else "") + json.dumps(entry))
        file.write("]}")
    return path, images


def measure_check(count):
    """Print time and memory of reading and checking a whole annotation file of `count` images."""
    with tempfile.TemporaryDirectory() as folder:
        path, images = write_annotations(Path(folder), count)
        before = memory()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        dataset = read_annotations(path, images)
        checked, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        held, peak = memory() - before, memory("VmHWM") - before
        print(
            f"\nAnnotation file of {len(dataset['images']):,} images, {len(dataset['annotations']):,} annotations,"
            f" {path.stat().st_size / 1e6:.0f} MB: read and checked in {checked:.1f} s"
            f" ({cpu:.1f} s of processor); memory: {held:.1f} GB, while reading {peak:.1f} GB"
        )


def memory(kind="VmRSS"):
    """This process's memory in GB, now or, with "VmHWM", at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data-root", metavar="DIR", help="folder in COCO's layout; its training images are loaded")
    add("--images", type=int, default=300, help="how many images to load (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes of the DataLoader (default: %(default)s)")
    add("--batch-size", type=int, default=2, help="images per batch (default: %(default)s)")
    large = "also measure the memory of a process that loads a generated image of 4000 x 5000 with 700 instances"
    add("--large-image", action="store_true", help=large)
    check = "also time the check of a generated annotation file of so many images; COCO has 118287"
    add("--annotation-check", type=int, metavar="IMAGES", help=check)
    args = parser.parse_args()
    if not (args.data_root or args.large_image or args.annotation_check):
        parser.error("give --data-root, --large-image or --annotation-check")
    torch.set_num_threads(1)  # as in the processes of a DataLoader
    torch.manual_seed(0)
    try:
        print(f"{machine()}, one core, commit {commit()}")
        if args.large_image:
            measure_large_image()
        if args.data_root:
            dataset = data.CocoInstances(*coco_paths(args.data_root, "train"), training=True, augmentation=AUGMENTATION)
            measure_process(dataset, args.images)
            measure_loader(dataset, args.images, args.workers, args.batch_size)
        if args.annotation_check:
            measure_check(args.annotation_check)
    except DataError as error:
        sys.exit(f"benchmarks.data_loading: {error}")


if __name__ == "__main__":
    main()
