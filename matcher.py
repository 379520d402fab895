"""Hungarian matcher: pairs every target instance with one query, at the least total cost (DETR, Sec. 3.1)."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from precision import full_precision


class Stack(NamedTuple):
    """The predictions of L layers that have as many queries and the same pixel features."""

    suffixes: list[str]  # of the layers' loss terms
    logits: torch.Tensor  # (L, B, Q, classes)
    boxes: torch.Tensor  # (L, B, Q, 4) cxcywh
    embeddings: torch.Tensor | None  # (L, B, Q, C); None for layers without masks
    pixel_features: torch.Tensor | None  # (B, C, h, w)


def stack_layers(sets):
    """{suffix: set of predictions} -> list of `Stack`; classes and boxes at least in float32."""
    groups = {}
    for suffix, predictions in sets.items():
        key = predictions["pred_logits"].shape[1], id(predictions.get("pixel_features"))
        groups.setdefault(key, {})[suffix] = predictions
    stacks = []
    for group in groups.values():
        join = lambda name: torch.stack([layer[name] for layer in group.values()])  # noqa: E731, B023
        pixel_features = next(iter(group.values())).get("pixel_features")
        embeddings = None if pixel_features is None else join("mask_embeddings")
        logits, boxes = full_precision([join("pred_logits"), join("pred_boxes")])
        stacks.append(Stack(list(group), logits, boxes, embeddings, pixel_features))
    return stacks


def sample_points(maps, points):
    """Bilinear samples of maps (N, h, w), zero outside, at points (N or 1, P, 2), (x, y) in [-1, 1] -> (N, P)."""
    points = points[:, None].expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps[:, None], points, align_corners=False).flatten(1)


def sample_masks(masks, points):
    """`sample_points` of masks (n, H, W) bool; a few at a time, as they become numbers."""
    parts = zip(masks.split(32), points.expand(len(masks), -1, -1).split(32), strict=True)
    return torch.cat([sample_points(some.to(points), where) for some, where in parts])


def pairwise_giou(a, b):
    """Generalised IoU (..., N, M) of all pairs of cxcywh boxes (..., N, 4) and (..., M, 4); 1e-6 in divisors."""
    area = lambda sides: sides[..., 0] * sides[..., 1]  # noqa: E731  (backward, `prod` would read values off a GPU)
    a, b = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (a[..., :, None, :], b[..., None, :, :]))
    area_a, area_b = (area(x[..., 2:] - x[..., :2]) for x in (a, b))
    intersection = area((torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0))
    union = area_a + area_b - intersection
    enclosing = area(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    return intersection / (union + 1e-6) - (enclosing - union) / (enclosing + 1e-6)


def class_cost(logits, labels, alpha=0.25, gamma=2):
    """Focal cost of giving each query (L, B, Q, classes) each label (B, n) -> (L, B, Q, n)."""
    p = logits.gather(3, labels[:, None].expand(*logits.shape[:3], -1)).sigmoid()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return alpha * (1 - p) ** gamma * -(p + 1e-8).log() - negative


def mask_costs(logits, masks):
    """Mean cross-entropy and dice cost (B, Q, n) of all pairs of logits (B, Q, P) and masks (B, n, P) in [0, 1]."""
    p = logits.sigmoid()
    bce = (F.softplus(logits).sum(2)[:, :, None] - logits @ masks.mT) / logits.shape[2]
    return bce, 1 - (2 * (p @ masks.mT) + 1) / (p.sum(2)[:, :, None] + masks.sum(2)[:, None] + 1)


class HungarianMatcher(nn.Module):
    """Finds for every target the query that predicts it best; its cost terms have the weights of the losses."""

    def __init__(self, config):
        super().__init__()
        self.cost_class, self.cost_box, self.cost_giou = config.class_weight, config.box_weight, config.giou_weight
        self.cost_mask, self.cost_dice = config.mask_weight, config.dice_weight
        self.num_points = config.loss_points

    @torch.no_grad()
    def costs(self, stacks, targets):
        """Costs (L, B, Q, n) of all pairs of each `Stack`, n the most targets of an image; behind an image's own they
        have no meaning. targets: per image labels (n,) int64, boxes (n, 4) normalised cxcywh, masks (n, H, W) bool.
        """
        like = stacks[0].boxes
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)  # (B, n)
        boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True).to(like)  # (B, n, 4)
        points = 2 * torch.rand(1, self.num_points, 2, dtype=like.dtype, device=like.device) - 1  # for all masks
        masks = pad_sequence([sample_masks(t["masks"], points) for t in targets], batch_first=True)  # (B, n, P)
        costs = []
        for stack in stacks:
            cost = self.cost_class * class_cost(stack.logits, labels) + self.cost_box * torch.cdist(
                stack.boxes, boxes, p=1
            )
            cost -= self.cost_giou * pairwise_giou(stack.boxes, boxes)
            if stack.embeddings is not None:
                pixels = torch.stack([sample_points(x.to(like), points) for x in stack.pixel_features])  # (B, C, P)
                for layer, embeddings in zip(cost, stack.embeddings, strict=True):
                    bce, dice = mask_costs(embeddings.to(like) @ pixels, masks)
                    layer += self.cost_mask * bce + self.cost_dice * dice
            costs.append(cost)
        return costs

    def forward(self, stacks, targets):
        """The pairs of every `Stack`, of each layer P = the sum of min(Q, n) over the images; arguments as of `costs`.

        Returns for every stack int64 (3, L, P) on the CPU: a pair's image, its query, and its instance among those of
        all images. All costs go to the host in one transfer; those that are not finite count as very large.
        """
        costs = self.costs(stacks, targets)
        values = torch.cat([cost.flatten() for cost in costs]).nan_to_num(1e30, 1e30, 1e30).cpu()
        counts = [len(t["labels"]) for t in targets]

        def pairs(layer):
            found = [linear_sum_assignment(layer[b, :, :n]) for b, n in enumerate(counts)]
            return np.concatenate([(0 * q + b, q, i + sum(counts[:b])) for b, (q, i) in enumerate(found)], 1)

        parts = zip(values.split([cost.numel() for cost in costs]), costs, strict=True)
        parts = (part.view(cost.shape).numpy() for part, cost in parts)
        return [torch.from_numpy(np.stack([pairs(layer) for layer in part], 1)) for part in parts]
