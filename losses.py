"""The set criterion: classification, box and mask losses of every set of predictions (appendix B.2)."""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from attention import full_precision
from matcher import HungarianMatcher, pairwise_giou, sample_masks, sample_points

TERMS = ("loss_ce", "loss_bbox", "loss_giou", "loss_mask", "loss_dice")


def smallest(x, k):
    """Indices (N, k) int32, in any order, of the k smallest values in every row of x (N, P), k < P."""
    if x.device.type != "cpu":
        return x.topk(k, dim=1, largest=False, sorted=False).indices.int()
    # numpy is four times as fast as torch, with few rows at a time: its indices are int64, and of all values.
    parts = np.array_split(x.numpy(), max(1, x.numel() // 2**18))
    return torch.from_numpy(np.concatenate([part.argpartition(k, axis=1)[:, :k].astype(np.int32) for part in parts]))


def most_uncertain(maps, points, index, k):
    """Of every mask of logits (n, h, w) the k points of smallest |logit|: indices (n, k) int32.

    points (instances, P, 2), of which those of row index[i] are the i-th mask's.
    """
    # A few at a time: each has 0.5 MB of points.
    parts = zip(maps.detach().split(192), index.split(192), strict=True)
    return torch.cat([smallest(sample_points(few, points.index_select(0, some)).abs_(), k) for few, some in parts])


def mask_losses(logits, targets, index, num_points):
    """Binary cross-entropy (mean over the points) and dice loss of N predictions: (2, N).

    logits: list of (n, h, w), N in all; index (N,) int64, the instance of each among those of all targets. Of its
    `num_points` points, 75 % are those of the smallest |logit| among three times as many random ones (PointRend), the
    rest is uniform. The random points are drawn once for each instance: all predictions of it choose from the same.
    """
    masks, num_random, num_uncertain = [t["masks"] for t in targets], 3 * num_points, int(0.75 * num_points)
    count, like = sum(map(len, masks)), {"dtype": logits[0].dtype, "device": index.device}
    draws = [2 * torch.rand(count, n, 2, **like) - 1 for n in (num_random, num_points - num_uncertain)]
    points = torch.cat(draws, 1)  # (instances, K, 2)
    sampled, points, K = sample_masks(masks, points), points.flatten(0, 1), points.shape[1]
    uniform = torch.arange(num_random, K, device=index.device, dtype=torch.int32)
    predicted, wanted = [], []
    for maps, part in zip(logits, index.split([len(maps) for maps in logits]), strict=True):
        chosen = torch.cat([most_uncertain(maps, draws[0], part, num_uncertain), uniform.expand(len(maps), -1)], 1)
        chosen.add_(part[:, None], alpha=K)  # int32: a table of more rows would take 17 GB
        predicted.append(sample_points(maps, F.embedding(chosen, points)))
        wanted.append(F.embedding(chosen, sampled.view(-1, 1))[..., 0])
    predicted, wanted = torch.cat(predicted), torch.cat(wanted)
    bce = F.softplus(predicted, threshold=50).addcmul_(predicted, wanted, value=-1).mean(1)
    p = predicted.sigmoid()
    dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
    return torch.stack([bce, dice])


def same_pixels(sets):
    """Of every set the number of the first one whose masks are products with the same pixel features, (S,) int64.

    Where a set with masks does not have their factors, every set stands alone.
    """
    known = all("pixels" in s for s in sets if "pred_masks" in s)
    pixels = [id(s["pixels"] if known and "pixels" in s else s) for s in sets]
    return torch.tensor([pixels.index(one) for one in pixels])


def join_pairs(sets, pairs, counts):
    """The N pairs of all sets and images in one table, by `same_pixels` and image; all on the CPU.

    sets: S predictions; pairs: (queries, targets) per set and image, int64; counts: instances of each of the B images.
    Returns rows (5, N) int64: a pair's set, its image, its query in the set and among those of all sets, its instance
    among those of all images; and lengths (S, B) int64, how many pairs follow one another.
    """
    number = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(query) for query, _ in pairs]))
    number, image = number // len(counts), number % len(counts)
    place = same_pixels(sets)[number] * len(counts) + image
    sizes = [s["pred_logits"].shape[1] for s in sets]
    first_query, first_instance = (F.pad(torch.tensor(x).cumsum(0), (1, 0)) for x in (sizes, counts))
    query, index = (torch.cat(x) for x in zip(*pairs, strict=True))
    rows = torch.stack([number, image, query, query + first_query[number], index + first_instance[image]])
    return rows[:, place.argsort(stable=True)], place.bincount(minlength=len(pairs)).view(len(sets), -1)


def masks_of(sets, lengths, image, query, joined):
    """Mask logits of the queries of N pairs, a list of (n, h, w).

    sets: S predictions; lengths (S, B) and image, query, joined (N,) int64: of `join_pairs`, counted in these sets.
    Where the sets have the factors of their masks, those of the pairs are multiplied once more: the gradient of
    pred_masks would be as large as all masks, and mostly zero.
    """
    if not all("pixels" in s for s in sets):
        sizes = lengths.sum(1).tolist()
        picked = zip(sets, image.split(sizes), query.split(sizes), strict=True)
        return [torch.cat([full_precision(s["pred_masks"][b, q]) for s, b, q in picked])]
    dtype, first = sets[0]["pred_masks"].dtype, same_pixels(sets).unique()
    embeddings = torch.cat([s["mask_embeddings"] for s in sets], 1)[image, joined].to(dtype)
    pixels = [x.to(dtype) for i in first for x in sets[i]["pixels"]]
    parts = zip(embeddings.split(lengths[first].flatten().tolist()), pixels, strict=True)
    return [full_precision(torch.einsum("nc,chw->nhw", *part)) for part in parts]


class SetCriterion(nn.Module):
    """Matches every set of predictions to the targets and computes its losses.

    weights: the weight of every term that can occur, by name; terms are `loss_` + {ce, bbox, giou, mask, dice} + a
    suffix: none (last layer), `_0` (decoder's input), `_1`... (decoder layers), `_interm` (first selection), `_di_0`...
    (interaction layers, class and box only), and `_dn`, `_dn_0`... for the denoising queries.
    """

    def __init__(self, config):
        super().__init__()
        self.matcher = HungarianMatcher(config)
        self.num_points = config.loss_points
        boxes = [config.box_loss_scale * weight for weight in (config.box_weight, config.giou_weight)]
        weights = dict(zip(TERMS, (config.class_weight, *boxes, config.mask_weight, config.dice_weight), strict=True))
        layers = ["", *(f"_{i}" for i in range(config.decoder_layers))]
        suffixes = [*layers, *(f"_dn{layer}" for layer in layers), "_interm"]
        self.weights = {name + suffix: weight for suffix in suffixes for name, weight in weights.items()}
        for layer in range(config.interaction_layers * (len(config.selections) - 1)):
            self.weights |= {f"{name}_di_{layer}": weights[name] for name in TERMS[:3]}

    def losses(self, sets, targets, pairs, divisors):
        """The terms of all sets {suffix: predictions}, those without masks first, each divided by its set's divisor.

        pairs: (queries, targets) per set and image, int64, on the CPU.
        """
        counts, sizes = [len(t["labels"]) for t in targets], [s["pred_logits"].shape[1] for s in sets.values()]
        joined = (torch.cat([s[name] for s in sets.values()], 1) for name in ("pred_logits", "pred_boxes"))
        logits, boxes = map(full_precision, joined)
        labels, wanted = (torch.cat([t[name] for t in targets]) for name in ("labels", "boxes"))

        rows, lengths = join_pairs(list(sets.values()), pairs, counts)
        # The host has just waited for the costs: this copy waits no more.
        number, image, query, joined, index = rows.to(boxes.device, non_blocking=True)

        one_hot = torch.zeros_like(logits)
        one_hot[image, joined, labels[index]] = 1
        class_losses = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2).sum((0, 2))  # of each query
        boxes, wanted = boxes[image, joined], wanted[index].to(boxes)
        l1, giou = (boxes - wanted).abs().sum(1), pairwise_giou(boxes[:, None], wanted[:, None])[:, 0, 0]

        masked = [s for s in sets.values() if "pred_masks" in s]
        plain = len(sets) - len(masked)
        lengths, first = lengths[plain:], lengths[:plain].sum().item()
        masks = masks_of(masked, lengths, image[first:], query[first:], joined[first:] - sum(sizes[:plain]))
        bce, dice = F.pad(mask_losses(masks, targets, index[first:], self.num_points), (first, 0))

        class_sums = torch.stack([x.sum() for x in class_losses.split(sizes)])
        of_set = (number[:, None] == torch.arange(len(sets), device=number.device))[..., None]  # (pairs, sets, 1)
        sums = torch.stack([l1, 1 - giou, bce, dice], 1)[:, None].where(of_set, 0).sum(0)
        sums = torch.cat([class_sums[:, None], sums], 1) / divisors[:, None].to(class_sums)  # (sets, 5)
        rows = zip(sets, sums, [TERMS if "pred_masks" in s else TERMS[:3] for s in sets.values()], strict=True)
        return {name + suffix: x for suffix, row, names in rows for name, x in zip(names, row, strict=False)}

    def forward(self, outputs, targets, num_instances=None):
        """outputs: of the model in training mode. targets: per image labels (n,) int64, boxes (n, 4) normalised cxcywh,
        masks (n, H, W) bool, at the padded size of the batch. Half-precision outputs are taken to float32.

        Returns the unweighted terms {name: scalar}, divided by `num_instances`, a float: as a default the instances in
        these targets, averaged over the processes, at least 1. The host waits once, for the costs of all matchings.
        """
        counts = [len(t["labels"]) for t in targets]
        if num_instances is None:
            num_instances = torch.full((), sum(counts), dtype=torch.float64, device=outputs["pred_boxes"].device)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(num_instances)
                num_instances = num_instances / dist.get_world_size()
            num_instances = num_instances.clamp(min=1)

        sets = {f"_di_{i}": layer for i, layer in enumerate(outputs.get("di_outputs", []))}
        sets |= {"": outputs, "_interm": outputs["interm_outputs"]}
        sets |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
        pairs, matched = self.matcher(list(sets.values()), targets), len(sets)
        if denoised := outputs.get("dn_outputs"):
            layers = {"_dn": denoised} | {f"_dn_{i}": layer for i, layer in enumerate(denoised["aux_outputs"])}
            queries = torch.arange(denoised["pred_logits"].shape[1]).view(denoised["num_groups"], -1)  # (groups, n_max)
            pairs += [(queries[:, :n].flatten(), torch.arange(n).repeat(len(queries))) for n in counts] * len(layers)
            sets |= layers
        divisors = torch.ones(len(sets), dtype=torch.float64, device=outputs["pred_boxes"].device) * num_instances
        divisors[matched:] *= denoised["num_groups"] if denoised else 1
        return self.losses(sets, targets, pairs, divisors)
