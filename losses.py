"""The set criterion: classification, box and mask losses of every set of predictions (appendix B.2)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from matcher import HungarianMatcher, join, pairwise_giou, queries_of, sample_masks, sample_points
from precision import full_precision

TERMS = ("loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice")
KINDS = {"class": TERMS[:1], "box": TERMS[1:3], "mask": TERMS[3:]}


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

    maps (R, 1, h, w) logits; index (R,), the instance of each; points, wanted: of `draw_points`. Returns two (R,).
    """
    k, first = int(0.75 * num_points), points[:, : 3 * num_points]
    uncertain = smallest(sample_points(maps.detach(), first[index]).squeeze(1).abs_(), k)
    uniform = torch.arange(3 * num_points, points.shape[1], device=index.device).expand(len(maps), -1)
    chosen = index[:, None], torch.cat([uncertain, uniform], 1)
    predicted, wanted = sample_points(maps, points[chosen]).squeeze(1), wanted[chosen]
    bce = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="none").mean(1)
    p = predicted.sigmoid()
    return bce, 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)


def denoising_pairs(counts, groups):
    """Pairs as of the matcher: denoising query g * max(counts) + i is the i-th of an image's instances in group g."""
    grids = [np.indices((groups, n)).reshape(2, -1) for n in counts]
    return [(group * max(counts) + i, i) for group, i in grids]


def join_pairs(pairs, sets, counts):
    """One table int64 (4, R) of the pairs of some sets, image by image: a pair's set, its image, its query among those
    of the sets side by side, and its instance among those of all images, which have so many each.
    """
    sizes, found = queries_of(sets), []
    for image in range(len(counts)):
        for number, suffix in enumerate(sets):
            query, instance = pairs[suffix][image]
            ones = np.ones_like(query)
            found.append((number * ones, image * ones, query + sum(sizes[:number]), instance + sum(counts[:image])))
    return torch.from_numpy(np.concatenate(found, 1))


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
        sets |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
        pairs, divisors = self.matcher(sets, targets), dict.fromkeys(sets, num_instances)
        if denoised := outputs.get("dn_outputs"):
            more = {"_dn": denoised} | {f"_dn_{i}": layer for i, layer in enumerate(denoised["aux_outputs"])}
            groups = denoised["num_groups"]
            pairs |= dict.fromkeys(more, denoising_pairs(counts, groups))
            divisors |= dict.fromkeys(more, num_instances * groups)
            sets |= more
        labels, boxes = (torch.cat([t[name] for t in targets]) for name in ("labels", "boxes"))
        boxes = boxes.to(full_precision(outputs["pred_boxes"]))
        instances = labels, boxes, *draw_points(targets, self.num_points, boxes)
        stacks = {}  # sets with the same pixel features, whose losses are computed together
        for suffix, predictions in sets.items():
            stacks.setdefault(id(predictions.get("pixel_features")), {})[suffix] = predictions
        tables = [join_pairs(pairs, stack, counts) for stack in stacks.values()]
        # The host has just waited for the costs: this copy waits no more.
        parts = torch.cat(tables, 1).to(labels.device, non_blocking=True).split([table.shape[1] for table in tables], 1)
        terms = {}
        for stack, table, part in zip(stacks.values(), tables, parts, strict=True):
            images = table[1].bincount(minlength=len(targets)).tolist()
            for kind, sums in self.stack_losses(stack, part, images, *instances).items():
                terms |= {kind + s: value / divisors[s] for s, value in zip(stack, sums.unbind(), strict=True)}
        return terms

    def stack_losses(self, stack, pairs, counts, labels, target_boxes, points, masks):
        """Returns {kind of term: sums (L,) over the queries or pairs of L sets}; those without masks have three kinds.

        stack: {suffix: predictions}. pairs: of `join_pairs`, as many of each image as counts says. labels,
        target_boxes, points, masks: of the instances of all images.
        """
        layer, image, query, instance = pairs  # (R,) each
        logits, boxes = full_precision([join(stack, "pred_logits"), join(stack, "pred_boxes")])
        one_hot = torch.zeros_like(logits)  # (B, T, classes)
        one_hot[image, query, labels[instance]] = 1
        focal = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2).sum((0, 2)).split(queries_of(stack))
        predicted, wanted = boxes[image, query], target_boxes[instance]  # (R, 4)
        values = [(predicted - wanted).abs().sum(1), 1 - pairwise_giou(predicted[:, None], wanted[:, None]).flatten()]
        pixel_features = next(iter(stack.values())).get("pixel_features")
        if pixel_features is not None:
            embeddings = join(stack, "mask_embeddings")[image, query].to(pixel_features.dtype)  # (R, C)
            parts, losses = (embeddings.split(counts), pixel_features, instance.split(counts)), []
            for of_image, pixels, indices in zip(*parts, strict=True):
                # A few at a time: each has 0.3 MB of points to choose from.
                for some, index in zip(of_image.split(192), indices.split(192), strict=True):
                    maps = full_precision(some @ pixels.flatten(1)).unflatten(1, (1, *pixels.shape[1:]))  # Eq. 11
                    losses.append(torch.stack(mask_losses(maps, index, points, masks, self.num_points)))
            values += torch.cat(losses, 1)
        values = torch.stack(values)  # (2 or 4, R)
        sums = values.new_zeros(len(values), len(stack)).index_add(1, layer, values)
        return dict(zip(TERMS, [torch.stack([some.sum() for some in focal]), *sums], strict=False))
