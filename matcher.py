"""Hungarian matcher: pairs every target instance with one query, at the least total cost (DETR, Sec. 3.1)."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from attention import full_precision


def sample_points(maps, points):
    """Bilinear samples of maps (N, H, W), zero outside, at points (N, P, 2), (x, y) in [-1, 1] -> (N, P)."""
    return F.grid_sample(maps[:, None], points[:, None], align_corners=False).flatten(1)


def sample_masks(masks, points):
    """`sample_points` of bool masks, a list of (n, H, W), N in all, or at points (1, P, 2), with no float copy."""
    weights, pixels, counts = [], [], [len(m) for m in masks]
    for x, size in zip(points.unbind(2), reversed(masks[0].shape), strict=False):  # columns, rows
        x = ((x + 1) / 2 * size - 0.5)[:, None]  # in pixels, a pixel's centre on its index
        near = torch.cat([x.floor(), x.floor() + 1], 1)  # (N, 2, P)
        weights.append((1 - (x - near).abs()) * ((near >= 0) & (near < size)))
        pixels.append(near.clamp(0, size - 1).long())
    pixels = (pixels[0][:, None] + pixels[1][:, :, None] * masks[0].shape[2]).flatten(1)  # of (N, rows, columns, P)
    pixels = pixels.expand(sum(counts), -1).split(counts)
    values = torch.cat([m.flatten(1).gather(1, pixel) for m, pixel in zip(masks, pixels, strict=True)])
    return ((values.unflatten(1, (2, 2, -1)) * weights[0][:, None]).sum(2) * weights[1]).sum(1)


def sample_predictions(sets, points):
    """Mask logits of sets of predictions at points (1, P, 2): yields (B, Q, P) of each, at least in float32.

    Where the sets have the factors of their masks the pixel features are sampled, once for all sets that share them.
    """

    def sample(maps):  # image by image: grid_sample with the maps as channels would read places far apart
        return torch.stack([sample_points(full_precision(x), points.expand(len(x), -1, -1)) for x in maps])

    pixels = {id(s["pixels"]): s["pixels"] for s in sets if "pixels" in s}
    pixels = {key: sample(maps) for key, maps in pixels.items()}  # (B, C, P)
    for s in sets:
        if "pixels" in s:
            yield full_precision(s["mask_embeddings"]) @ pixels[id(s["pixels"])]
        else:
            yield sample(s["pred_masks"])


def area(sides):
    """Width times height of (..., 2). (The backward pass of `prod` would read values back from a GPU.)"""
    return sides[..., 0] * sides[..., 1]


def pairwise_giou(a, b):
    """Generalised IoU of all pairs of cxcywh boxes (..., N, 4) and (..., M, 4) -> (..., N, M).

    1e-6 is added to the union and to the enclosing area where they divide.
    """
    a, b = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (a[..., :, None, :], b[..., None, :, :]))
    area_a, area_b = (area(x[..., 2:] - x[..., :2]) for x in (a, b))
    intersection = area((torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0))
    union = area_a + area_b - intersection
    enclosing = area(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    return intersection / (union + 1e-6) - (enclosing - union) / (enclosing + 1e-6)


def class_cost(logits, labels, alpha=0.25, gamma=2):
    """Focal cost of giving each query (B, Q, classes) each label (B, n) -> (B, Q, n)."""
    p = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)).sigmoid()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return alpha * (1 - p) ** gamma * -(p + 1e-8).log() - negative


def mask_costs(logits, masks):
    """Binary cross-entropy, averaged over the points, and dice cost of all pairs.

    logits: iterable of (B, Q', P), Q in all; masks (B, n, P) in [0, 1], both at the same points. Returns two (B, Q, n).
    """
    parts, n, P = [], *masks.shape[1:]
    for x in logits:
        p = x.sigmoid()
        sums = F.softplus(x).sum(2, keepdim=True), p.sum(2, keepdim=True)
        parts.append(torch.cat([*sums, x.bmm(masks.mT), p.bmm(masks.mT)], 2))
    softplus, area, inside, overlap = torch.cat(parts, 1).split([1, 1, n, n], 2)
    return (softplus - inside) / P, 1 - (2 * overlap + 1) / (area + masks.sum(2)[:, None] + 1)


class HungarianMatcher(nn.Module):
    """Finds for every target the query that predicts it best; its cost terms have the weights of the losses."""

    def __init__(self, config):
        super().__init__()
        self.cost_class, self.cost_box, self.cost_giou = config.class_weight, config.box_weight, config.giou_weight
        self.cost_mask, self.cost_dice = config.mask_weight, config.dice_weight
        self.num_points = config.loss_points

    @torch.no_grad()
    def cost(self, outputs, targets):
        """Costs (B, Q, n) of all pairs, n the largest number of targets of an image; arguments as in `forward`. Several
        sets follow one another along Q. What stands behind an image's own targets has no meaning.
        """
        sets = [outputs] if isinstance(outputs, dict) else outputs
        logits, boxes = (
            full_precision(torch.cat([s[name] for s in sets], 1)) for name in ("pred_logits", "pred_boxes")
        )
        labels, wanted = (pad_sequence([t[name] for t in targets], batch_first=True) for name in ("labels", "boxes"))
        cost = self.cost_class * class_cost(logits, labels) + self.cost_box * torch.cdist(boxes, wanted.to(boxes), p=1)
        cost = cost - self.cost_giou * pairwise_giou(boxes, wanted.to(boxes))
        masked = [s for s in sets if "pred_masks" in s]
        if masked and labels.shape[1]:
            points = 2 * torch.rand(1, self.num_points, 2, dtype=cost.dtype, device=cost.device) - 1
            sampled = sample_masks([t["masks"] for t in targets], points).split([len(t["labels"]) for t in targets])
            sampled = pad_sequence(sampled, batch_first=True)
            bce, dice = mask_costs(sample_predictions(masked, points), sampled)
            cost[:, -bce.shape[1] :] += self.cost_mask * bce + self.cost_dice * dice
        return cost

    @torch.no_grad()
    def forward(self, outputs, targets):
        """outputs: pred_logits (B, Q, classes), pred_boxes (B, Q, 4) cxcywh, and pred_masks (B, Q, h, w) logits, which
        may be absent; or a list of such sets, those without masks first. targets: per image labels (n,) int64, boxes
        (n, 4) normalised cxcywh, masks (n, H, W) bool. All masks are compared at the same random points.

        Returns per (set and) image (queries, targets), two int64 tensors (min(Q, n),) on the CPU, sorted by query. All
        costs go to the host in one transfer; those that are not finite count as very large.
        """
        sets = [outputs] if isinstance(outputs, dict) else outputs
        sizes = [s["pred_logits"].shape[1] for s in sets]
        costs = self.cost(sets, targets).nan_to_num(1e30, 1e30, 1e30).cpu().split(sizes, 1)
        found = [linear_sum_assignment(c[b, :, : len(t["labels"])]) for c in costs for b, t in enumerate(targets)]
        return [tuple(torch.from_numpy(index) for index in pair) for pair in found]
