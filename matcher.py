"""Hungarian matcher: pairs every target instance with one query, at the least total cost (DETR, Sec. 3.1)."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert


def full_precision(x):
    """The tensor, in float32 if it is of a half-precision dtype, as predictions under autocast are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sample_points(maps, points):
    """Bilinear samples of maps (N, H, W) at points (N, P, 2), (x, y) in [0, 1] -> (N, P); outside counts as zero."""
    return F.grid_sample(maps[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def sample_masks(masks, points):
    """`sample_points` of bool masks (N, H, W), in the dtype of the points, without a float copy of whole masks."""
    H, W = masks.shape[1:]
    flat = masks.flatten(1)
    corner = points * points.new_tensor([W, H]) - 0.5  # in pixels, a pixel's centre on its index
    first = corner.floor()
    above = corner - first
    first = first.long()
    total = torch.zeros_like(points[..., 0])
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = first[..., 0] + dx, first[..., 1] + dy
        weight = (above[..., 0] if dx else 1 - above[..., 0]) * (above[..., 1] if dy else 1 - above[..., 1])
        inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
        value = flat.gather(1, y.clamp(0, H - 1) * W + x.clamp(0, W - 1))
        total += weight * (value & inside)
    return total


def pairwise_giou(a, b):
    """Generalised IoU of all pairs of cxcywh boxes (..., N, 4) and (..., M, 4) -> (..., N, M).

    1e-6 is added to the union and to the enclosing area where they divide.
    """
    a, b = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (a, b))
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    a, b = a[..., :, None, :], b[..., None, :, :]
    intersection = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area_a[..., :, None] + area_b[..., None, :] - intersection
    enclosing = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return intersection / (union + 1e-6) - (enclosing - union) / (enclosing + 1e-6)


def class_cost(logits, labels, alpha=0.25, gamma=2):
    """Focal cost of giving each query (B, Q, classes) each label (B, n) -> (B, Q, n)."""
    p = logits.sigmoid().gather(2, labels[:, None].expand(-1, logits.shape[1], -1))
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative


def mask_costs(logits, masks):
    """Binary cross-entropy, averaged over the points, and dice cost of all pairs.

    logits (B, Q, P) and target masks (B, n, P) in [0, 1], sampled at the same points. Returns two (B, Q, n).
    """
    bce = (F.softplus(-logits) @ masks.mT + F.softplus(logits) @ (1 - masks).mT) / logits.shape[-1]
    p = logits.sigmoid()
    dice = 1 - (2 * p @ masks.mT + 1) / (p.sum(-1)[..., :, None] + masks.sum(-1)[..., None, :] + 1)
    return bce, dice


class HungarianMatcher(nn.Module):
    """Finds for every target the query that predicts it best; its cost terms have the weights of the losses."""

    def __init__(self, config):
        super().__init__()
        self.cost_class, self.cost_box, self.cost_giou = config.class_weight, config.box_weight, config.giou_weight
        self.cost_mask, self.cost_dice = config.mask_weight, config.dice_weight
        self.num_points = config.loss_points

    def cost(self, outputs, targets):
        """Costs (B, Q, n) of all pairs, n the largest number of targets of an image; arguments as in `forward`.

        What stands behind an image's own targets has no meaning.
        """
        logits, boxes = full_precision(outputs["pred_logits"]), full_precision(outputs["pred_boxes"])
        labels, wanted = (pad_sequence([t[name] for t in targets], batch_first=True) for name in ("labels", "boxes"))
        wanted = wanted.to(boxes)
        cost = self.cost_class * class_cost(logits, labels)
        cost = cost + self.cost_box * torch.cdist(boxes, wanted, p=1)
        cost = cost - self.cost_giou * pairwise_giou(boxes, wanted)
        if "pred_masks" in outputs and labels.shape[1]:
            masks = full_precision(outputs["pred_masks"])
            counts = [len(t["labels"]) for t in targets]
            points = torch.rand(len(masks), self.num_points, 2, dtype=masks.dtype, device=masks.device)
            predicted = F.grid_sample(masks, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]  # (B, Q, P)
            image = torch.repeat_interleave(torch.tensor(counts)).to(points.device, non_blocking=True)
            sampled = sample_masks(torch.cat([t["masks"] for t in targets]), points[image])
            bce, dice = mask_costs(predicted, pad_sequence(sampled.split(counts), batch_first=True))
            cost = cost + self.cost_mask * bce + self.cost_dice * dice
        return cost

    @torch.no_grad()
    def forward(self, outputs, targets):
        """outputs: pred_logits (B, Q, classes), pred_boxes (B, Q, 4) cxcywh, and pred_masks (B, Q, h, w) logits, which
        may be absent. targets: per image labels (n,) int64, boxes (n, 4) normalised cxcywh, masks (n, H, W) bool.

        Returns per image (queries, targets), two int64 tensors (min(Q, n),) on the CPU, sorted by query. The costs of
        all images go to the host in one transfer.
        """
        costs = self.cost(outputs, targets).cpu().numpy()
        found = [linear_sum_assignment(c[:, : len(t["labels"])]) for c, t in zip(costs, targets, strict=True)]
        return [tuple(torch.from_numpy(index) for index in pair) for pair in found]
