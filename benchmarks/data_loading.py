"""Times the loading of training images, without any training: python -m benchmarks.data_loading --data-root DIR."""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors

import data

SIZE, SCALE_RANGE = 1024, (0.1, 2.0)  # the published augmentation
COCO_ANNOTATIONS_PER_IMAGE = 860_001 / 118_287  # of train2017


def machine():
    """One line: processor, versions, commit."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    processor = names[0] if names else platform.processor()
    return f"{processor}, one core; torch {torch.__version__}; commit {commit or 'unknown'}"


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


@contextmanager
def timed_parts():
    """Within it the functions of data.py add up the seconds spent in them; yields {part: seconds}."""
    seconds = {}

    def timed(function, part_of):
        @wraps(function)
        def wrapper(*arguments):
            begin = time.perf_counter()
            result = function(*arguments)
            part = part_of(*arguments)
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begin
            return result

        return wrapper

    parts = {
        "read_image": lambda *_: "decode the JPEG",
        "decode_masks": lambda *_: "decode the masks",
        "resize": lambda inpt, size: f"resize the {'masks' if isinstance(inpt, tv_tensors.Mask) else 'image'}",
        "finish": lambda *_: "to float, boxes from the masks",
        "collate": lambda *_: "collate",
    }
    originals = {name: getattr(data, name) for name in parts}
    for name, function in originals.items():
        setattr(data, name, timed(function, parts[name]))
    try:
        yield seconds
    finally:
        for name, function in originals.items():
            setattr(data, name, function)


def training_set(root):
    return data.CocoInstances(
        *data.coco_paths(root, "train"), data.train_transform(SIZE, SCALE_RANGE), training=True
    )  # fmt: skip


def measure_parts(root, count):
    """Print the time of every part of the loading of `count` images in this process."""
    with timed_parts() as seconds:
        dataset = training_set(root)
        for index in range(min(10, len(dataset))):  # files into the cache, first calls of the libraries
            dataset[index]
        torch.manual_seed(0)
        seconds.clear()
        begin, instances = time.perf_counter(), 0
        for number in range(count):
            _, [target] = data.collate([dataset[number % len(dataset)]])
            instances += len(target["labels"])
        total = time.perf_counter() - begin
    seconds["flip, crop, pad and the rest"] = total - sum(seconds.values())
    print(f"\nIn one process: {count / total:.1f} images/s; {instances / count:.1f} instances per image\n")
    print("| part | ms per image | share |\n|---|---|---|")
    for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"| {part} | {spent / count * 1e3:.2f} | {spent / total:.0%} |")
    print(f"| all | {total / count * 1e3:.2f} | |")


def measure_loader(root, count, workers, batch_size):
    """Print the images per second that a DataLoader's processes deliver."""
    dataset = training_set(root)
    indices = [i % len(dataset) for i in range(count + batch_size * workers * 2)]
    batches = DataLoader(
        dataset, batch_size, sampler=indices, num_workers=workers, collate_fn=data.collate, drop_last=True
    )
    for number, _ in enumerate(batches):
        if number == 2 * workers:  # those were prefetched while the processes started
            begin, first = time.perf_counter(), number
    rate = (number - first) * batch_size / (time.perf_counter() - begin)
    print(f"\nA DataLoader with {workers} process(es), batches of {batch_size}: {rate:.1f} images/s")


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
        begin = time.perf_counter()
        dataset = data.read_annotations(path, images)
        checked = time.perf_counter() - begin
        held, peak = memory() - before, memory("VmHWM") - before
        print(
            f"\nAnnotation file of {len(dataset['images']):,} images, {len(dataset['annotations']):,} annotations,"
            f" {path.stat().st_size / 1e6:.0f} MB: read and checked in {checked:.1f} s; memory: {held:.1f} GB, while"
            f" reading {peak:.1f} GB"
        )


def memory(kind="VmRSS"):
    """This process's memory in GB, now or, with "VmHWM", at its peak (Linux)."""
    return next(int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith(kind)) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", metavar="DIR", help="folder in COCO's layout; its training images are loaded")
    parser.add_argument("--images", type=int, default=300, help="how many images to load (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes of the DataLoader (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="images per batch (default: %(default)s)")
    parser.add_argument(
        "--annotation-check",
        type=int,
        metavar="IMAGES",
        help="also time the check of a generated annotation file of so many images; COCO has 118287",
    )
    args = parser.parse_args()
    if not args.data_root and not args.annotation_check:
        parser.error("give --data-root, --annotation-check or both")
    torch.set_num_threads(1)  # as in the processes of a DataLoader
    try:
        print(machine())
        if args.data_root:
            measure_parts(args.data_root, args.images)
            measure_loader(args.data_root, args.images, args.workers, args.batch_size)
        if args.annotation_check:
            measure_check(args.annotation_check)
    except data.DataError as error:
        sys.exit(f"benchmarks.data_loading: {error}")


if __name__ == "__main__":
    main()
