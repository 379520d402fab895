"""Hungarian matcher: pairs every target instance with one query, at the least total cost (DETR, Sec. 3.1)."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from precision import full_precision


def join(sets, name):
    """What all sets of predictions {suffix: predictions} have of this name, queries side by side: (B, T, ...)."""
    return torch.cat([predictions[name] for predictions in sets.values()], 1)


def queries_of(sets):
    """The number of queries of each set, T in all."""
    return [predictions["pred_logits"].shape[1] for predictions in sets.values()]


def sample_points(maps, points):
    """Bilinear samples of maps (N, C, h, w), zero outside, at points (N or 1, P, 2), (x, y) in [-1, 1] -> (N, C, P)."""
    return F.grid_sample(maps, points.unsqueeze(1).expand(len(maps), -1, -1, -1), align_corners=False).squeeze(2)


def sample_masks(masks, points):
    """Samples (n, P) of masks (n, H, W) bool at points (n or 1, P, 2); a few at a time, as they become numbers."""
    parts = zip(masks.unsqueeze(1).split(32), points.expand(len(masks), -1, -1).split(32), strict=True)
    return torch.cat([sample_points(some.to(points), where) for some, where in parts]).squeeze(1)


def pairwise_giou(a, b):
    """Generalised IoU (..., N, M) of all pairs of cxcywh boxes (..., N, 4) and (..., M, 4); 1e-6 in divisors."""
    area = lambda sides: torch.mul(*sides.unbind(-1))  # backward, `prod` would read values off a GPU
    (centre_a, size_a), (centre_b, size_b) = a.unsqueeze(-2).chunk(2, -1), b.unsqueeze(-3).chunk(2, -1)
    half_a, half_b = size_a / 2, size_b / 2
    low_a, high_a, low_b, high_b = centre_a - half_a, centre_a + half_a, centre_b - half_b, centre_b + half_b
    intersection = area((torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0))
    union = area(size_a) + area(size_b) - intersection
    enclosing = area(torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b))
    return intersection / (union + 1e-6) - (enclosing - union) / (enclosing + 1e-6)


def class_cost(logits, labels):
    """Focal cost, alpha 0.25 and gamma 2, of giving each query (B, T, classes) each label (B, n) -> (B, T, n)."""
    p = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)).sigmoid()
    return 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()


def mask_costs(logits, masks):
    """Mean cross-entropy and dice cost (B, Q, n) of all pairs of logits (B, Q, P) and masks (B, n, P) in [0, 1]."""
    p, transposed = logits.sigmoid(), masks.mT
    bce = (F.softplus(logits).sum(2, keepdim=True) - logits.bmm(transposed)) / logits.shape[2]
    return bce, 1 - (2 * p.bmm(transposed) + 1) / (p.sum(2, keepdim=True) + masks.sum(2)[:, None] + 1)


class HungarianMatcher(nn.Module):
    """Finds for every target the query that predicts it best; its cost terms have the weights of the losses."""

    def __init__(self, config):
        super().__init__()
        self.cost_class, self.cost_box, self.cost_giou = config.class_weight, config.box_weight, config.giou_weight
        self.cost_mask, self.cost_dice = config.mask_weight, config.dice_weight
        self.num_points = config.loss_points

    @torch.no_grad()
    def costs(self, sets, targets):
        """Costs (B, T, n) of all pairs, T queries of all sets side by side; no meaning past an image's own targets.

        Arguments as for `forward`.
        """
        logits, boxes = full_precision([join(sets, "pred_logits"), join(sets, "pred_boxes")])
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)  # (B, n)
        wanted = pad_sequence([t["boxes"] for t in targets], batch_first=True).to(boxes)  # (B, n, 4)
        cost = self.cost_class * class_cost(logits, labels) + self.cost_box * torch.cdist(boxes, wanted, p=1)
        cost -= self.cost_giou * pairwise_giou(boxes, wanted)
        points = 2 * torch.rand(1, self.num_points, 2, dtype=boxes.dtype, device=boxes.device) - 1  # for all masks
        masks = pad_sequence([sample_masks(t["masks"], points) for t in targets], batch_first=True)  # (B, n, P)
        sampled = {}  # pixel features, which sets share, at the points: (B, C, P)
        for predictions, part in zip(sets.values(), cost.split(queries_of(sets), 1), strict=True):
            if "mask_embeddings" in predictions:
                maps = predictions["pixel_features"]
                if id(maps) not in sampled:
                    sampled[id(maps)] = sample_points(maps.to(boxes), points)
                bce, dice = mask_costs(predictions["mask_embeddings"].to(boxes).bmm(sampled[id(maps)]), masks)
                part += self.cost_mask * bce + self.cost_dice * dice
        return cost

    def forward(self, sets, targets):
        """sets: {suffix: predictions}, without masks "pred_logits" and "pred_boxes" alone. targets: per image labels
        (n,) int64, boxes (n, 4) normalised cxcywh, masks (n, H, W) bool.

        Returns for every set and image its min(Q, n) pairs: {suffix: [(query, target), ...]}, two numpy arrays each.
        All costs go to the host in one transfer; those that are not finite count as very large.
        """
        layers = self.costs(sets, targets).nan_to_num(1e30, 1e30, 1e30).cpu().split(queries_of(sets), 1)
        counts = [len(t["labels"]) for t in targets]
        pairs = [[linear_sum_assignment(costs[b, :, :n]) for b, n in enumerate(counts)] for costs in layers]
        return dict(zip(sets, pairs, strict=True))
