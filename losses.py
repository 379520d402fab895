"""The set criterion: classification, box and mask losses of every set of predictions (Sec. 3.3)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from matcher import HungarianMatcher, full_precision, pairwise_giou, sample_masks, sample_points


def uncertain_points(logits, num_points, oversampling=3, share=0.75):
    """Points where masks are least certain (PointRend): of `oversampling` times as many random points, those with the
    smallest |logit| make up this `share` of the result; the rest is uniform.

    logits (N, h, w). Returns (N, num_points, 2), (x, y) in [0, 1], dtype as logits.
    """
    N, num_uncertain = len(logits), int(share * num_points)
    points = torch.rand(N, oversampling * num_points, 2, dtype=logits.dtype, device=logits.device)
    nearest = sample_points(logits, points).abs().topk(num_uncertain, dim=1, largest=False).indices
    points = points.gather(1, nearest[..., None].expand(-1, -1, 2))
    uniform = torch.rand(N, num_points - num_uncertain, 2, dtype=logits.dtype, device=logits.device)
    return torch.cat([points, uniform], 1)


def mask_losses(logits, masks, num_points):
    """Binary cross-entropy (mean over the points) and dice loss, summed over N instances.

    logits (N, h, w) and the target masks (N, H, W) bool, sampled at the same `num_points` points per instance.
    """
    with torch.no_grad():
        points = uncertain_points(logits, num_points)
        wanted = sample_masks(masks, points)
    predicted = sample_points(logits, points)
    bce = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="none").mean(1).sum()
    p = predicted.sigmoid()
    dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
    return bce, dice.sum()


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
        weights = {
            "loss_ce": config.class_weight,
            "loss_bbox": config.box_loss_scale * config.box_weight,
            "loss_giou": config.box_loss_scale * config.giou_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        layers = ["", *(f"_{i}" for i in range(config.decoder_layers))]
        suffixes = [*layers, *(f"_dn{layer}" for layer in layers), "_interm"]
        self.weights = {name + suffix: weight for suffix in suffixes for name, weight in weights.items()}
        for layer in range(config.interaction_layers * (len(config.selections) - 1)):
            self.weights |= {f"{name}_di_{layer}": weights[name] for name in ("loss_ce", "loss_bbox", "loss_giou")}

    def losses(self, outputs, instances, pairs, num_instances):
        """The terms of one set of predictions, divided by num_instances.

        instances: labels, boxes and masks of all images in one tensor each, and starts, the first of every image.
        pairs: per image (queries, targets), int64.
        """
        logits, boxes = full_precision(outputs["pred_logits"]), full_precision(outputs["pred_boxes"])
        image = torch.cat([torch.full_like(query, b) for b, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        index = torch.cat([start + index for start, (_, index) in zip(instances["starts"], pairs, strict=True)])
        *picked, index = torch.stack([image, query, index]).to(logits.device, non_blocking=True)
        picked = tuple(picked)
        labels, wanted = instances["labels"][index], instances["boxes"][index].to(boxes)

        one_hot = torch.zeros_like(logits)
        one_hot[(*picked, labels)] = 1
        terms = {"loss_ce": sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2, reduction="sum")}
        boxes = boxes[picked]
        terms["loss_bbox"] = F.l1_loss(boxes, wanted, reduction="sum")
        terms["loss_giou"] = (1 - pairwise_giou(boxes[:, None], wanted[:, None])).sum()
        if "pred_masks" in outputs:
            masks = full_precision(outputs["pred_masks"][picked]), instances["masks"][index]
            terms["loss_mask"], terms["loss_dice"] = mask_losses(*masks, self.num_points)
        return {name: term / num_instances for name, term in terms.items()}

    def forward(self, outputs, targets, num_instances=None):
        """outputs: of the model in training mode. targets: per image labels (n,) int64, boxes (n, 4) normalised cxcywh,
        masks (n, H, W) bool, at the padded size of the batch. Half-precision outputs are taken to float32.

        Returns the unweighted terms {name: scalar}, divided by `num_instances`, a float: as a default the instances in
        these targets, averaged over the processes, at least 1.
        """
        counts = [len(t["labels"]) for t in targets]
        instances = {name: torch.cat([t[name] for t in targets]) for name in ("labels", "boxes", "masks")}
        instances["starts"] = [sum(counts[:b]) for b in range(len(counts))]
        if num_instances is None:
            num_instances = outputs["pred_boxes"].new_tensor(sum(counts))
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(num_instances)
                num_instances = num_instances / dist.get_world_size()
            num_instances = num_instances.clamp(min=1)

        sets = {"": outputs, "_interm": outputs["interm_outputs"]}
        sets |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
        sets |= {f"_di_{i}": layer for i, layer in enumerate(outputs.get("di_outputs", []))}
        terms = {}
        for suffix, predictions in sets.items():
            found = self.losses(predictions, instances, self.matcher(predictions, targets), num_instances)
            terms |= {name + suffix: term for name, term in found.items()}

        if denoised := outputs.get("dn_outputs"):
            groups = denoised["num_groups"]
            n_max = denoised["pred_logits"].shape[1] // groups
            pairs = []
            for count in counts:  # query g * n_max + i is the i-th instance in group g
                index = torch.arange(count)
                queries = torch.arange(groups)[:, None] * n_max + index
                pairs.append((queries.flatten(), index.repeat(groups)))
            sets = {"_dn": denoised} | {f"_dn_{i}": layer for i, layer in enumerate(denoised["aux_outputs"])}
            for suffix, predictions in sets.items():
                found = self.losses(predictions, instances, pairs, num_instances * groups)
                terms |= {name + suffix: term for name, term in found.items()}
        return terms
