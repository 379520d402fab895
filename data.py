"""The data set of images with instances, its augmentation, and batches for training and evaluation."""

import contextlib
import io
import itertools
import math
import multiprocessing
import os
import signal
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as transforms

from config import InputError
from files import explaining
from formats.coco import read_annotations
from formats.images import DataError, read_image


class CocoInstances(Dataset):
    """An instance segmentation data set; all annotations are checked when it is made, DataError says what is wrong.

    annotation_file, image_dir: paths, as `read` takes them: `read_annotations` for a file in COCO format,
    `read_bdd100k` for BDD100K's bitmasks.
    training: items have instances, and images without a usable one (not a crowd) are left out unless `keep_empty`;
    otherwise all images, without instances.
    test_size: (shorter, longer) of `resize_shorter`, for the images of evaluation.
    augmentation: of training, (size, (lowest scale, highest)), see `draw_augmentation`; None: images as in evaluation.

    classes       names of the classes, ordered by category id
    category_ids  category_ids[label] is the category id in the file; labels, the reverse
    image_ids     image_ids[i] is the image id of item i
    instances     usable annotations of every image id
    coco          pycocotools.coco.COCO of all annotations, crowds included, for the evaluation
    """

    def __init__(
        self, annotation_file, image_dir, training, test_size=(800, 1333), augmentation=None, keep_empty=False,
        read=read_annotations,
    ):  # fmt: skip
        self.coco = COCO()
        self.coco.dataset = read(annotation_file, image_dir)
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        self.image_dir = Path(image_dir)
        self.training, self.test_size, self.augmentation = training, test_size, augmentation
        self.category_ids = sorted(self.coco.cats)
        self.classes = [self.coco.cats[category_id]["name"] for category_id in self.category_ids]
        self.labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self.instances = {i: [a for a in self.coco.imgToAnns[i] if not a["iscrowd"]] for i in self.coco.imgs}
        if training and not any(self.instances.values()):
            raise DataError(f"{annotation_file}: no image has an instance to train on (only crowds); give another file")
        self.image_ids = [i for i, some in self.instances.items() if some or keep_empty or not training]

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, key):
        """Image (3, H, W) float32 RGB in [0, 1] and its target; key: the index, or (index, seed of the augmentation).

        image_id; original_size (H, W) of the image that the annotations describe. In training also the instances that
        are visible: labels (n,) int64; boxes (n, 4) float32, xyxy in pixels; masks (n, H, W) bool.
        """
        index, generator = (key[0], torch.Generator().manual_seed(key[1])) if isinstance(key, tuple) else (key, None)
        if self.training:
            image, instances = self.ground_truth(index, self.augmentation, generator)
        else:
            image, instances = resize_shorter(self._read(index), *self.test_size), {}
        entry = self.coco.imgs[self.image_ids[index]]
        target = {"image_id": entry["id"], "original_size": (entry["height"], entry["width"])}
        return transforms.to_dtype(image, torch.float32, scale=True), target | instances

    def ground_truth(self, index, augmentation=None, generator=None):
        """Item `index` with its instances, augmented or as the evaluation sees it: to draw, and to train.

        Image (3, H, W) uint8 RGB; labels (n,) int64, boxes (n, 4) float32, xyxy in pixels, masks (n, H, W) bool.
        """
        image, annotations = self._read(index), self.instances[self.image_ids[index]]
        segmentations, stored = [annotation["segmentation"] for annotation in annotations], image.shape[1:]
        if augmentation:
            placement = draw_augmentation(stored, *augmentation, generator)
            image, boxes, masks, kept = augment(image, segmentations, *placement, augmentation[0])
        else:
            image = resize_shorter(image, *self.test_size)
            size = image.shape[1:]
            boxes, masks, kept = place_instances(segmentations, stored, False, size, (0, 0), size)
        labels = torch.tensor([self.labels[annotations[i]["category_id"]] for i in kept], dtype=torch.int64)
        return image, {"labels": labels, "boxes": boxes, "masks": masks}

    def _read(self, index):
        """Image (3, H, W) uint8, of the size that is annotated."""
        entry = self.coco.imgs[self.image_ids[index]]
        return read_image(self.image_dir / entry["file_name"], (entry["height"], entry["width"]))


def resize_shorter(image, shorter, longer):
    """The image (3, H, W) with its shorter side `shorter` long, or less where the longer one would exceed `longer`."""
    height, width = image.shape[1:]
    scale = min(shorter / min(height, width), longer / max(height, width))
    return transforms.resize(image, [max(1, int(pixels * scale + 0.5)) for pixels in (height, width)], antialias=True)


def eval_transform(image, shorter, longer):
    """The test-time transform of an image alone: (3, H, W) uint8 -> float32 in [0, 1], see `resize_shorter`."""
    return transforms.to_dtype(resize_shorter(image, shorter, longer), torch.float32, scale=True)


# --- augmentation: large-scale jitter (Ghiasi et al., arXiv 2012.07177, section 3) as the released code does it


def draw_augmentation(image_size, size, scale, generator=None):
    """Random arguments (flip, resized, offset) of `augment` for an image of (H, W) pixels.

    Flipped with probability 1/2; resized to fit size x size times a factor uniform in `scale`, a (lowest, highest)
    pair; cropped at one random place for both directions, so that crops lie on the diagonal.
    """
    flip, factor, place = torch.rand(3, dtype=torch.float64, generator=generator).tolist()
    target = size * (scale[0] + (scale[1] - scale[0]) * factor)
    ratio = min(target / pixels for pixels in image_size)
    resized = tuple(max(1, round(pixels * ratio)) for pixels in image_size)
    return flip < 0.5, resized, tuple(round(max(pixels - size, 0) * place) for pixels in resized)


def augment(image, segmentations, flip, resized, offset, size):
    """Flip, resize and crop an image with its instances; pad it with grey (128) at the bottom and right.

    image: (3, H, W) uint8. segmentations: one per instance as pycocotools takes them: a list of polygons
    [x0, y0, x1, y1, ...] in pixels, or RLE, compressed or not. flip: whether left and right change places. resized:
    (h, w) of the whole image; offset: (y, x) of the crop in it; size: of the crop, height and width. Returns the image
    (3, size, size) uint8 and `place_instances`' boxes, masks and kept.
    """
    placed = place_instances(segmentations, image.shape[1:], flip, resized, offset, (size, size))
    image = transforms.resize(image, list(resized), antialias=True)
    image = transforms.horizontal_flip(image) if flip else image
    image = image[:, offset[0] : offset[0] + size, offset[1] : offset[1] + size]
    return transforms.pad(image, [0, 0, size - image.shape[2], size - image.shape[1]], fill=128), *placed


def place_instances(segmentations, image_size, flip, resized, offset, window):
    """Boxes and masks of the instances in a window (h, w) of the flipped and resized image; arguments as for `augment`.

    boxes (n, 4) float32: xyxy in the window's pixels, the bounds of the polygons clipped to it, or of an RLE's visible
    pixels, not rounded to whole pixels; masks (n, *window) bool; kept (n,) int64: indices of the segmentations that are
    there. Those whose box has no extent are left out; those whose mask has no pixel are not.
    """
    image_size, resized, offset, window = (np.array(pair[::-1]) for pair in (image_size, resized, offset, window))
    placed = []  # (index, box, first pixel, RLE) of those that are there
    for index, segmentation in enumerate(segmentations):
        place = _place_rle if isinstance(segmentation, dict) else _place_polygons
        box, *patch = place(segmentation, image_size, flip, resized, offset, window)
        if (box[1] - box[0] > 1e-5).all():
            placed.append((index, box, *patch))
    shape = len(placed), *window[::-1].tolist()
    if get_worker_info():
        # Shared memory that is taken page by page, as pixels are set. Two equivalent ways; this one, of torch's own
        # default_collate, because a public function would copy the masks there, empty pages too: 2.1 GB and 4.8 s for
        # 700 instances of 1024 x 1024, here 0.7 GB and 1.5 s.
        storage = torch.UntypedStorage._new_shared(max(1, math.prod(shape)))
        masks = torch.empty(0, dtype=torch.bool).set_(storage, 0, shape)
    else:
        masks = torch.from_numpy(np.zeros(shape, bool))
    for mask, (*_, (left, top), rle) in zip(masks.numpy(), placed, strict=True):
        height, width = rle["size"]
        mask[top : top + height, left : left + width] = mask_utils.decode(rle)
    boxes = np.array([box for _, box, *_ in placed], dtype=np.float32).reshape(-1, 4)
    return torch.from_numpy(boxes), masks, torch.tensor([index for index, *_ in placed], dtype=torch.int64)


def _place_polygons(polygons, image_size, flip, resized, offset, window):
    """One instance's box [(x0, y0), (x1, y1)] float64, and the pixels that it touches: the first (x, y) and an RLE."""
    placed, held = [], []
    for polygon in polygons:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if flip:
            points[:, 0] = image_size[0] - points[:, 0]
        points = points * (resized / image_size) - offset
        clipped = clip_polygon(points, window)
        own = clipped[~outer_corners(clipped, points, window)]
        if len(own) > 2:
            placed.append(clipped)
            held.append(own)
    placed = placed or [np.zeros((3, 2))]  # without extent
    points = np.concatenate(held or placed)
    box = np.stack([points.min(0), points.max(0)])
    first, (width, height) = _pixels(box, window)
    # pycocotools rounds to fifths of a pixel; when that is done before the shift, the shift changes no pixel.
    shifted = [(np.floor(5 * points + 0.5) / 5 - first).ravel() for points in placed]
    return box, first, mask_utils.merge(mask_utils.frPyObjects(shifted, height, width))


def clip_polygon(points, window):
    """The part of a polygon (n, 2) float64 within 0 <= x <= window[0] and 0 <= y <= window[1], (0, 2) if there is none.

    Sutherland and Hodgman, "Reentrant polygon clipping" (1974): one side is cut after the other. The parts of a concave
    polygon remain joined by edges on the sides, which enclose nothing but may go to `outer_corners`.
    """
    for axis, bound, sign in ((0, 0, 1), (0, window[0], -1), (1, 0, 1), (1, window[1], -1)):
        depth = sign * (points[:, axis] - bound)  # of each corner inside the side
        inside = depth >= 0
        if inside.all():
            continue
        if not inside.any():
            return points[:0]
        cut = inside != np.roll(inside, -1)  # the edges that cross the side
        share = np.divide(depth, depth - np.roll(depth, -1), where=cut, out=np.zeros_like(depth))
        crossings = points + share[:, None] * (np.roll(points, -1, axis=0) - points)
        crossings[:, axis] = bound
        points = np.stack([points, crossings], axis=1)[np.stack([inside, cut], axis=1)]
    return points


def outer_corners(clipped, polygon, window):
    """Which points of `clipped` (n, 2), what `clip_polygon` has made of a polygon (m, 2), are no part of it, bool (n,).

    These are corners of the window around which the outline runs on the outside.
    """
    corners = ((clipped == 0) | (clipped == window)).all(1)
    for i in np.flatnonzero(corners):
        spokes = (polygon - clipped[i].clip(1e-6, window - 1e-6)) @ (1, 1j)  # from a little within to each vertex
        turns = np.angle(np.roll(spokes, -1) / spokes).sum() / (2 * np.pi)  # of the outline about it
        corners[i] = abs(turns) < 0.5 and not (polygon == clipped[i]).all(1).any()
    return corners


def _place_rle(rle, image_size, flip, resized, offset, window):
    """As `_place_polygons`. The box is that of the pixels in sight, as squares; the mask takes the nearest pixel."""
    ratio, window = resized / image_size, np.minimum(window, resized - offset)  # without the padding
    if isinstance(rle["counts"], list):
        rle = mask_utils.frPyObjects(rle, *rle["size"])
    mask = mask_utils.decode(rle)[:, :: -1 if flip else 1]
    low = np.floor(offset / ratio).astype(int)
    high = np.minimum(np.ceil((offset + window) / ratio), image_size).astype(int)
    in_sight = np.asfortranarray(mask[low[1] : high[1], low[0] : high[0]])
    x, y, w, h = mask_utils.toBbox(mask_utils.encode(in_sight)) + [*low, 0, 0]
    box = (np.array([(x, y), (x + w, y + h)]) * ratio - offset).clip(0, window)
    first, pixels = _pixels(box, window)
    columns, rows = (((np.arange(n) + 0.5 + first[i] + offset[i]) / ratio[i]).astype(int) for i, n in enumerate(pixels))
    return box, first, mask_utils.encode(np.asfortranarray(mask[rows[:, None], columns]))


def _pixels(box, window):
    """The first (x, y) of the window's pixels that a box touches, and their numbers in x and y."""
    first = np.minimum(np.floor(box[0]), window - 1).astype(int)
    return first, np.minimum(np.floor(box[1]).astype(int) + 1, window) - first


def collate(batch):
    """Batch of (image, target) -> (list of (3, H, W) images, list of targets as the model and the losses take them).

    The padded size is the largest height and width of the batch, rounded up to multiples of 32; the model pads the
    images itself. Targets: image_id; original_size (H, W), that of the file; in training also labels (n,) int64; boxes
    (n, 4) float32 cxcywh in [0, 1] relative to the padded size; masks (n, padded H, padded W) bool.
    """
    images = [image for image, _ in batch]
    padded_height, padded_width = (math.ceil(max(image.shape[axis] for image in images) / 32) * 32 for axis in (1, 2))
    targets = []
    for image, target in batch:
        if "boxes" in target:
            boxes, masks = box_convert(target["boxes"], "xyxy", "cxcywh"), target["masks"]
            padding = (0, padded_width - image.shape[2], 0, padded_height - image.shape[1])
            masks = F.pad(masks, padding) if any(padding) else masks
            target = target | {"boxes": boxes / torch.tensor([padded_width, padded_height] * 2), "masks": masks}
        targets.append(target)
    if get_worker_info():  # here, where an error is heard of; in the thread that sends the batch it would be lost
        for value in [*images, *(value for target in targets for value in target.values())]:
            if torch.is_tensor(value):
                value.share_memory_()
    return images, targets


def to_device(batch, device):
    """(images, targets) of `collate` on the device; what is no tensor stays as it is."""
    images, targets = batch
    move = lambda value: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
    return list(map(move, images)), [{key: move(value) for key, value in target.items()} for target in targets]


# --- training batches: randomness follows from the seed and the position, so that a resumed run repeats nothing


def seed_of(*numbers):
    """A 32-bit seed from integers, as different for neighbouring ones as for distant ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train_keys(num_images, batch_size, seed, start=0, rank=0, world=1):
    """Endless batches of (index, seed of the augmentation), the keys of a process's items, after `start` images.

    The epochs' permutations, one behind the other, are cut into batches of `batch_size` images, of which
    process `rank` of `world` takes its share; so a batch is of the same images whatever the number of processes.
    """

    @lru_cache(maxsize=1)
    def order(epoch):
        return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed_of(seed, 0, epoch))).tolist()

    for first in itertools.count(start, batch_size):
        positions = range(first + rank, first + batch_size, world)
        yield [(order(p // num_images)[p % num_images], seed_of(seed, 1, p)) for p in positions]


def train_batches(dataset, batch_size, seed, start, rank, world, workers, pin_memory):
    """Endless batches of `collate` for one of the `world` processes: the items of a CocoInstances by `train_keys`."""
    yield from loader(dataset, train_keys(len(dataset), batch_size, seed, start, rank, world), workers, pin_memory)


def loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader of batches of `collate`; batches: the keys of each one's items."""
    allow_many_files()
    if workers:
        if os.name == "posix" and len(os.fsencode(tempfile.gettempdir())) > 73:  # a socket's name has 107 bytes at most
            raise InputError(f"TMPDIR {tempfile.gettempdir()}: is too long for loader processes; shorten it")
        with explaining(OSError, "loader processes cannot start (/dev/shm)", "mount it, or use --workers 0"):
            multiprocessing.Lock()
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=start_worker,
    )  # fmt: skip


def start_worker(_):
    """Loader processes leave signals to the main process, which writes a checkpoint, and end when it tells them.

    Not by a signal, at which the main process would take them for broken.
    """
    for name in {"SIGINT", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    allow_many_files()


def allow_many_files():
    """Let batches come from other processes whatever the limit of open files (`ulimit -n`).

    Each tensor of a batch takes a file descriptor as long as it is there, some hundreds for a large batch. So the limit
    is raised as far as the system lets it; where that is not far, tensors go by names in /dev/shm, which takes none.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limits, enough = resource.getrlimit(resource.RLIMIT_NOFILE), 2**16
    now, possible = (enough if limit == resource.RLIM_INFINITY else min(limit, enough) for limit in limits)
    if now < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, limits[1]))
    if possible < enough:
        torch.multiprocessing.set_sharing_strategy("file_system")
