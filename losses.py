"""The set criterion: classification, box and mask losses of every set of predictions (appendix B.2)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from matcher import HungarianMatcher, pairwise_giou, sample_masks, sample_points, stack_layers
from precision import full_precision

TERMS = ("loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice")


def draw_points(targets, num_points, like):
    """The points of the mask losses, drawn once for each of N instances: all predictions of it choose from the same.

    Returns points (N, K, 2) in [-1, 1], 3 * num_points to choose from and then a quarter of num_points, in dtype and
    device of `like`; and the targets' masks (n, H, W) bool at these points, (N, K).
    """
    counts, sizes = [len(t["masks"]) for t in targets], (3 * num_points, num_points - int(0.75 * num_points))
    points = torch.cat([torch.rand(sum(counts), n, 2, dtype=like.dtype, device=like.device) for n in sizes], 1) * 2 - 1
    parts = zip(targets, points.split(counts), strict=True)
    return points, torch.cat([sample_masks(target["masks"], some) for target, some in parts])


def smallest(x, k):
    """Returns indices (N, k), in any order, of the k smallest values in every row of x (N, P), k < P."""
    if x.device.type != "cpu":
        return x.topk(k, dim=1, largest=False, sorted=False).indices
    # Two equivalent ways; numpy's is four times as fast on a CPU. Some rows at a time: its indices are of all values.
    parts = np.array_split(x.numpy(), max(1, x.numel() // 2**18))
    return torch.from_numpy(np.concatenate([part.argpartition(k, axis=1)[:, :k] for part in parts]))


def mask_losses(maps, index, points, wanted, num_points):
    """Binary cross-entropy (mean over the points) and dice loss of R predicted masks at num_points points each: 75 %
    those of the smallest |logit| among three times as many random ones (PointRend), the rest uniform.

    maps (R, h, w) logits; index (R,) int64, the instance of each; points, wanted: of `draw_points`. Returns two (R,).
    """
    k, first = int(0.75 * num_points), points[:, : 3 * num_points]
    parts = zip(maps.detach().split(128), index.split(128), strict=True)  # a few at a time: each has 0.3 MB of points
    uncertain = torch.cat([smallest(sample_points(some, first[i]).abs_(), k) for some, i in parts])
    uniform = torch.arange(3 * num_points, points.shape[1], device=index.device).expand(len(maps), -1)
    chosen = index[:, None], torch.cat([uncertain, uniform], 1)
    predicted, wanted = sample_points(maps, points[chosen]), wanted[chosen]
    bce = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="none").mean(1)
    p = predicted.sigmoid()
    return bce, 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)


def denoising_pairs(counts, groups, num_layers):
    """Pairs as of the matcher, (3, num_layers, groups * sum(counts)), for images with so many instances each: denoising
    query g * max(counts) + i is the i-th instance of its image in group g.
    """
    first = [sum(counts[:image]) for image in range(len(counts))]
    places = [(image, g, i) for image, n in enumerate(counts) for g in range(groups) for i in range(n)]
    pairs = torch.tensor([(image, g * max(counts) + i, first[image] + i) for image, g, i in places])
    return pairs.T[:, None].expand(-1, num_layers, -1)


class SetCriterion(nn.Module):
    """Matches every set of predictions to the targets and computes its losses.

    A term is one of TERMS + a suffix: none (last layer), `_0` (decoder's input), `_1`... (decoder layers), `_interm`
    (first selection), `_di_0`... (interaction layers, class and box only), and `_dn`, `_dn_0`... for the denoising
    queries. weights: that of each kind of term, {"loss_ce": 4.0, ...}, whatever the suffix.
    """

    def __init__(self, config):
        super().__init__()
        self.matcher = HungarianMatcher(config)
        self.num_points = config.loss_points
        boxes = [config.box_loss_scale * weight for weight in (config.box_weight, config.giou_weight)]
        weights = config.class_weight, *boxes, config.mask_weight, config.dice_weight
        self.weights = dict(zip(TERMS, weights, strict=True))

    def total(self, terms):
        """Returns the weighted sum of terms {name: scalar}."""
        return sum(weight * x for kind, weight in self.weights.items() for n, x in terms.items() if n.startswith(kind))

    def forward(self, outputs, targets, num_instances=None):
        """outputs: of the model, in any precision. targets: per image labels (n,) int64, boxes (n, 4) normalised
        cxcywh, masks (n, H, W) bool at the padded size of the batch. num_instances: by default those of these targets.

        Returns the unweighted terms {name: scalar}, at least in float32, divided by num_instances.
        """
        counts = [len(t["labels"]) for t in targets]
        num_instances = num_instances or max(1.0, sum(counts))
        sets = {f"_di_{i}": layer for i, layer in enumerate(outputs["di_outputs"])}
        sets |= {"_interm": outputs["interm_outputs"], "": outputs}
        stacks = stack_layers(sets | {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])})
        pairs, divisors = self.matcher(stacks, targets), [num_instances] * len(stacks)
        if denoised := outputs.get("dn_outputs"):
            sets = {"_dn": denoised} | {f"_dn_{i}": layer for i, layer in enumerate(denoised["aux_outputs"])}
            more, groups = stack_layers(sets), denoised["num_groups"]
            pairs += [denoising_pairs(counts, groups, len(stack.suffixes)) for stack in more]
            stacks, divisors = stacks + more, divisors + [num_instances * groups] * len(more)
        labels, boxes = (torch.cat([t[name] for t in targets]) for name in ("labels", "boxes"))
        points = draw_points(targets, self.num_points, stacks[0].boxes)
        # The host has just waited for the costs: this copy waits no more.
        table, terms = torch.cat([pair.flatten() for pair in pairs]).to(labels.device, non_blocking=True), {}
        parts = table.split([pair.numel() for pair in pairs])
        for stack, pair, part, divisor in zip(stacks, pairs, parts, divisors, strict=True):
            counts = pair[0, 0].bincount(minlength=len(targets)).tolist()
            sums = self.stack_losses(stack, part.view(pair.shape), counts, labels, boxes.to(stack.boxes), points)
            for name, layers in zip(TERMS, sums, strict=False):
                terms.update(zip((name + suffix for suffix in stack.suffixes), layers / divisor, strict=True))
        return terms

    def stack_losses(self, stack, pairs, counts, labels, boxes, points):
        """Returns the sums over pairs or queries of each kind of term, five or, without masks, three (L,)."""
        image, query, target = pairs  # (L, P) each
        layer = torch.arange(len(image), device=image.device)[:, None]
        one_hot = torch.zeros_like(stack.logits)
        one_hot[layer, image, query, labels[target]] = 1
        predicted, wanted = stack.boxes[layer, image, query], boxes[target]  # (L, P, 4)
        sums = [
            sigmoid_focal_loss(stack.logits, one_hot, alpha=0.25, gamma=2).sum((1, 2, 3)),
            (predicted - wanted).abs().sum((1, 2)),
            (1 - pairwise_giou(predicted[:, :, None], wanted[:, :, None])).sum((1, 2, 3)),
        ]
        if stack.embeddings is not None:
            embeddings = stack.embeddings[layer, image, query].to(stack.pixel_features.dtype)  # (L, P, C)
            parts, masks = (embeddings.split(counts, 1), target.split(counts, 1), stack.pixel_features), []
            for some, index, pixel_features in zip(*parts, strict=True):
                maps = full_precision(torch.einsum("lpc,chw->lphw", some, pixel_features)).flatten(0, 1)  # Eq. 11
                losses = torch.stack(mask_losses(maps, index.flatten(), *points, self.num_points))
                masks.append(losses.unflatten(1, index.shape).sum(2))
            sums += sum(masks)
        return sums
