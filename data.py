"""The data set of images with instances, training augmentation, collate, and the sampler of training batches."""

import contextlib
import io
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from coco import read_annotations
from images import DataError, read_image


class CocoInstances(Dataset):
    """An instance segmentation data set.

    annotation_file, image_dir: paths, as `read` takes them. All annotations are checked here; DataError says what is
    wrong with them.
    transform: `train_transform(...)` or `eval_transform(...)`.
    training: keep only the images with at least one usable instance (not a crowd); otherwise all.
    read: `read_annotations` for a file in COCO format, `read_bdd100k` for BDD100K's bitmasks.

    classes       names of the classes, ordered by category id
    category_ids  category_ids[label] is the category id in the file
    image_ids     image_ids[i] is the image id of item i
    coco          pycocotools.coco.COCO of all annotations, crowds included, for the evaluation
    """

    def __init__(self, annotation_file, image_dir, transform, training, read=read_annotations):
        dataset = read(annotation_file, image_dir)
        self.image_dir = Path(image_dir)
        self.transform = transform
        categories = sorted(dataset["categories"], key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self.coco = COCO()
        self.coco.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        self.instances = {image["id"]: [] for image in dataset["images"]}  # image id -> usable annotations
        for annotation in dataset["annotations"]:
            if not annotation["iscrowd"]:
                self.instances[annotation["image_id"]].append(annotation)
        self.image_ids = [i for i, instances in self.instances.items() if instances or not training]
        if not self.image_ids:
            raise DataError(f"{annotation_file}: no image has an instance to train on (only crowds); give another file")

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        """Image (3, H, W) float32 RGB in [0, 1] and its target; crowds and instances without a pixel are left out.

        image_id int; labels (n,) int64; boxes (n, 4) float32, absolute xyxy of the transformed image, tight around the
        masks' pixel edges; masks (n, H, W) bool; original_size (H, W) of the image as annotated.
        """
        image_id = self.image_ids[index]
        entry = self.coco.imgs[image_id]
        height, width = entry["height"], entry["width"]
        image = read_image(self.image_dir / entry["file_name"], (height, width))
        instances = self.instances[image_id]
        target = {
            "image_id": image_id,
            "labels": torch.tensor([self.labels[a["category_id"]] for a in instances], dtype=torch.int64),
            "masks": tv_tensors.Mask(decode_masks([a["segmentation"] for a in instances], height, width)),
            "original_size": (height, width),
        }
        return self.transform(tv_tensors.Image(image), target)


def decode_masks(segmentations, height, width):
    """Masks (n, height, width) bool of COCO segmentations: lists of polygons, uncompressed or compressed RLE."""
    if not segmentations:
        return torch.zeros(0, height, width, dtype=torch.bool)
    rles = []
    for segmentation in segmentations:
        if isinstance(segmentation, list):
            segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            segmentation = mask_utils.frPyObjects(segmentation, height, width)
        rles.append(segmentation)
    return torch.from_numpy(mask_utils.decode(rles)).permute(2, 0, 1).contiguous().view(torch.bool)


# ----------------------------------------------------------------------------------------------------------------------
# Transforms: (image, target) -> (image, target), image and masks uint8 and bool until the end


def train_transform(size, scale_range=(0.1, 2.0)):
    """Training augmentation: horizontal flip with probability 1/2, large-scale jitter, size x size out.

    Input: (3, H, W) uint8 image and a target with labels (n,) and masks (n, H, W), a tv_tensors.Mask. Output: float32
    image in [0, 1], target with the instances that are still visible, boxes added. See `LargeScaleJitter`.
    """
    return v2.Compose([v2.RandomHorizontalFlip(0.5), LargeScaleJitter(size, scale_range), finish])


def eval_transform(shorter=800, longer=1333):
    """Test-time transform: the shorter side resized to `shorter`, or less where the longer one would exceed `longer`.

    Input and output as for `train_transform`; also takes an image alone.
    """
    return v2.Compose([ResizeShorter(shorter, longer), finish])


class LargeScaleJitter(v2.Transform):
    """Scale the image to fit size x size times a random factor, crop size x size at random, pad with grey (128/255).

    The padding is at the bottom and right. The window to crop is chosen in the unscaled image, in whole pixels, and
    only it is resized: the same distribution but for the rounding, at a fraction of the work.
    """

    def __init__(self, size, scale_range):
        super().__init__()
        self.size, self.scale_range = size, scale_range

    def make_params(self, flat_inputs):
        image_size = v2.query_size(flat_inputs)
        scale = self.size / max(image_size) * torch.empty(1).uniform_(*self.scale_range).item()
        start, window, out = [], [], []  # (y, x) each: first pixel and pixels of the window, pixels it becomes
        for pixels in image_size:
            scaled = max(1, round(pixels * scale))
            window.append(pixels if scaled <= self.size else min(pixels, max(1, round(self.size / scale))))
            out.append(min(scaled, self.size))
            start.append(torch.randint(pixels - window[-1] + 1, ()).item())
        return {"start": start, "window": window, "out": out}

    def transform(self, inpt, params):
        (top, left), (height, width) = params["start"], params["window"]
        out = resize(F.crop(inpt, top, left, height, width), params["out"])
        bottom, right = (self.size - pixels for pixels in params["out"])
        return F.pad(out, [0, 0, right, bottom], fill=0 if isinstance(inpt, tv_tensors.Mask) else 128)


class ResizeShorter(v2.Transform):
    """Resize so that the shorter side has `shorter` pixels, but the longer one at most `longer`; the ratio is kept."""

    def __init__(self, shorter, longer):
        super().__init__()
        self.shorter, self.longer = shorter, longer

    def make_params(self, flat_inputs):
        image_size = v2.query_size(flat_inputs)
        scale = min(self.shorter / min(image_size), self.longer / max(image_size))
        return {"size": [max(1, round(pixels * scale)) for pixels in image_size]}

    def transform(self, inpt, params):
        return resize(inpt, params["size"])


def resize(inpt, size):
    """Resize an image (bilinear, antialiased) or masks (nearest) to (height, width), pixel centre on pixel centre.

    torchvision's own nearest mode for masks takes the upper left corner: up to half a pixel off the image.
    """
    if not isinstance(inpt, tv_tensors.Mask):
        return F.resize(inpt, size, antialias=True)
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64) for new, old in zip(size, inpt.shape[1:], strict=True)
    )
    # NumPy's take needs a fifth of the time of torch's indexing on the CPU, most of the time of loading otherwise.
    masks = inpt.as_subclass(torch.Tensor).numpy().take(columns, 2).take(rows, 1)
    return tv_tensors.Mask(torch.from_numpy(masks))


def finish(image, target=None):
    """Last step: the image to float32 in [0, 1], boxes from masks, instances without a pixel dropped."""
    image = F.to_dtype(image, torch.float32, scale=True)
    if target is None:
        return image
    masks = target["masks"].as_subclass(torch.Tensor)
    boxes = mask_boxes(masks)
    keep = boxes[:, 2] > 0
    return image, target | {"labels": target["labels"][keep], "boxes": boxes[keep], "masks": masks[keep]}


def mask_boxes(masks):
    """Tight xyxy boxes (n, 4) float32 of masks (n, H, W) bool: pixel edges, so x1 = last column + 1; empty: zeros."""
    sides = []
    pixels = masks.view(torch.uint8)  # amax of bytes is twenty times as fast as any()
    for occupied in (pixels.amax(1), pixels.amax(2)):  # (n, W), (n, H)
        position = torch.arange(1, occupied.shape[1] + 1)
        end = (occupied * position).amax(1)
        start = occupied.shape[1] - (occupied * position.flip(0)).amax(1)
        sides.append((torch.minimum(start, end), end))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def collate(batch):
    """Batch of (image, target) -> (list of (3, H, W) images, list of targets as the model and the losses take them).

    The padded size is the largest height and width of the batch, rounded up to multiples of 32; the model pads the
    images itself. Targets: image_id; labels (n,) int64; boxes (n, 4) float32 cxcywh in [0, 1] relative to the padded
    size; masks (n, padded H, padded W) bool; size (H, W) of the transformed image; original_size (H, W) of the file's.
    """
    images = [image.as_subclass(torch.Tensor) for image, _ in batch]
    padded_height, padded_width = (math.ceil(max(image.shape[axis] for image in images) / 32) * 32 for axis in (1, 2))
    targets = []
    for image, (_, target) in zip(images, batch, strict=True):
        height, width = image.shape[1:]
        boxes = F.convert_bounding_box_format(target["boxes"], old_format="xyxy", new_format="cxcywh")
        padding = (0, padded_width - width, 0, padded_height - height)
        targets.append(
            {
                "image_id": target["image_id"],
                "labels": target["labels"],
                "boxes": boxes / torch.tensor([padded_width, padded_height] * 2),
                "masks": torch.nn.functional.pad(target["masks"], padding) if any(padding) else target["masks"],
                "size": (height, width),
                "original_size": target["original_size"],
            }
        )
    return images, targets


def to_device(batch, device):
    """(images, targets) of `collate` on the device; what is no tensor stays as it is."""
    images, targets = batch
    move = lambda value: value.to(device, non_blocking=True) if torch.is_tensor(value) else value  # noqa: E731
    return [move(image) for image in images], [{k: move(v) for k, v in target.items()} for target in targets]


# ----------------------------------------------------------------------------------------------------------------------
# Training batches: randomness follows from the seed and the position in training, so that a resumed run repeats nothing


def seed_of(*numbers):
    """A 32-bit seed from integers, as different for neighbouring ones as for distant ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainSampler(Sampler):
    """Endless batches of (image, seed of its augmentation) for one process.

    The epochs' permutations, one behind the other, are cut into batches of `batch_size`, of which process `rank` of
    `world` takes its share; so a batch is of the same images whatever the number of processes. `start`: images seen.
    """

    def __init__(self, num_images, batch_size, seed, start=0, rank=0, world=1):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self):
        orders = {}  # epoch -> permutation
        for first in range(self.start, sys.maxsize, self.batch_size):
            batch = []
            for position in range(first + self.rank, first + self.batch_size, self.world):
                epoch, place = divmod(position, self.num_images)
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(seed_of(self.seed, 0, epoch))
                    orders = {epoch: torch.randperm(self.num_images, generator=generator).tolist()}
                batch.append((orders[epoch][place], seed_of(self.seed, 1, position)))
            yield batch


class SeededDataset(Dataset):
    """A data set whose items are asked for by (index, seed of the augmentation), in whichever loader process."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]


def train_batches(dataset, batch_size, seed, start, rank, world, workers, pin_memory):
    """Endless batches of `collate` for one of the `world` processes, as `TrainSampler` puts them together."""
    sampler = TrainSampler(len(dataset), batch_size, seed, start, rank, world)
    yield from DataLoader(
        SeededDataset(dataset), batch_sampler=sampler, collate_fn=collate, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=quiet_worker,
    )  # fmt: skip


def quiet_worker(_):
    """Loader processes leave signals to the main process, which writes a checkpoint, and end when it tells them.

    Not by a signal, at which the main process would take them for broken.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
