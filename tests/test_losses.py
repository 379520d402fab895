"""The set criterion against formulas written a second time in numpy, and the points that the mask losses sample."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from config import PRESETS
from losses import SetCriterion, mask_losses, uncertain_points
from matcher import sample_points
from model import build_model

CONFIG = replace(
    PRESETS["tiny"], num_classes=3, loss_points=40, decoder_layers=2, interaction_layers=1, class_weight=4.0
)
Q, SIZE = 5, 16


def predictions(generator, B, queries=Q, masks=True):
    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    found = {
        "pred_logits": 4 * rand(B, queries, 3) - 2,
        "pred_boxes": torch.cat([rand(B, queries, 2), 0.05 + 0.5 * rand(B, queries, 2)], -1),
    }
    if masks:
        found["pred_masks"] = 8 * rand(B, queries, SIZE // 4, SIZE // 4) - 4
    return found


def batch(counts, groups=0, seed=0):
    """Made-up outputs of a DI-MaskDINO with two decoder layers and one interaction layer, and targets; float64."""
    generator = torch.Generator().manual_seed(seed)
    B, n_max = len(counts), max(counts)
    outputs = predictions(generator, B)
    outputs["aux_outputs"] = [predictions(generator, B) for _ in range(2)]
    outputs["interm_outputs"] = predictions(generator, B, 8)
    outputs["di_outputs"] = [predictions(generator, B, 8, masks=False)]
    if groups:
        sets = [predictions(generator, B, groups * n_max) for _ in range(3)]
        outputs["dn_outputs"] = sets[-1] | {"aux_outputs": sets[:-1], "num_groups": groups}
    targets = []
    for n in counts:
        boxes = torch.rand(n, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1
        masks = torch.rand(n, SIZE, SIZE, generator=generator) > 0.5
        targets.append({"labels": torch.randint(3, (n,), generator=generator), "boxes": boxes, "masks": masks})
    return outputs, targets


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def giou(a, b):
    corners = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b)]
    lower, upper = np.maximum(*corners)[:2], np.minimum(*corners)[2:]
    inter = np.clip(upper - lower, 0, None).prod()
    union = a[2] * a[3] + b[2] * b[3] - inter
    hull = (np.maximum(*corners)[2:] - np.minimum(*corners)[:2]).prod()
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def class_and_box_losses(layer, targets, pairs, divisor):
    """loss_ce, loss_bbox and loss_giou in numpy; pairs: per image [(query, target), ...]."""
    ce = l1 = overlap = 0.0
    for b, image_pairs in enumerate(pairs):
        logits, boxes = layer["pred_logits"][b].numpy(), layer["pred_boxes"][b].numpy()
        positive = np.zeros_like(logits)
        for query, n in image_pairs:
            positive[query, targets[b]["labels"][n]] = 1
            wanted = targets[b]["boxes"][n].numpy()
            l1 += np.abs(boxes[query] - wanted).sum()
            overlap += 1 - giou(boxes[query], wanted)
        p = sigmoid(logits)
        ce += np.where(positive, 0.25 * (1 - p) ** 2 * -np.log(p), 0.75 * p**2 * -np.log(1 - p)).sum()
    return {"loss_ce": ce / divisor, "loss_bbox": l1 / divisor, "loss_giou": overlap / divisor}


def best_pairs(layer, target, b):
    """Pairs of one image at the least class and box cost, over all permutations."""
    p = sigmoid(layer["pred_logits"][b].numpy())[:, target["labels"].numpy()]
    cost = 4 * (0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8))
    for q, box in enumerate(layer["pred_boxes"][b].numpy()):
        for n, wanted in enumerate(target["boxes"].numpy()):
            cost[q, n] += 5 * np.abs(box - wanted).sum() - 2 * giou(box, wanted)
    n = cost.shape[1]
    best = min(permutations(range(len(cost)), n), key=lambda queries: cost[list(queries), range(n)].sum())
    return list(zip(best, range(n), strict=True))


def test_class_and_box_terms_of_every_set():
    outputs, targets = batch([3, 1], groups=2)
    criterion = SetCriterion(CONFIG)
    criterion.matcher.cost_mask = criterion.matcher.cost_dice = 0
    terms = criterion(outputs, targets)
    assert set(terms) == set(criterion.weights)
    sets = {"": outputs, "_interm": outputs["interm_outputs"], "_di_0": outputs["di_outputs"][0]}
    sets |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
    expected = {}
    for suffix, layer in sets.items():
        pairs = [best_pairs(layer, target, b) for b, target in enumerate(targets)]
        values = class_and_box_losses(layer, targets, pairs, 4)
        expected |= {name + suffix: value for name, value in values.items()}
    pairs = [[(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)], [(0, 0), (3, 0)]]  # by index; n_max = 3
    denoised = outputs["dn_outputs"]
    sets = {"_dn": denoised} | {f"_dn_{i}": layer for i, layer in enumerate(denoised["aux_outputs"])}
    for suffix, layer in sets.items():
        values = class_and_box_losses(layer, targets, pairs, 4 * 2)  # instances x groups
        expected |= {name + suffix: value for name, value in values.items()}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name
    assert set(terms) - set(expected) == {name for name in terms if "mask" in name or "dice" in name}
    assert all(term.shape == () and term >= 0 for term in terms.values())


def bilinear(image, x, y):
    """Value of an image (H, W) at (x, y) in [0, 1], pixel centres at half pixels, zero outside."""
    H, W = image.shape
    x, y = x * W - 0.5, y * H - 0.5
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    value = 0.0
    for j in (y0, y0 + 1):
        for i in (x0, x0 + 1):
            if 0 <= i < W and 0 <= j < H:
                value += image[j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
    return value


def test_mask_losses_equal_a_loop():
    torch.manual_seed(0)
    logits, masks, P = torch.randn(3, 4, 6).double(), torch.rand(3, 16, 24) > 0.5, 40
    torch.manual_seed(1)
    bce, dice = mask_losses(logits, masks, P)
    torch.manual_seed(1)
    candidates = torch.rand(3, 3 * P, 2, dtype=torch.float64).numpy()
    uniform = torch.rand(3, P // 4, 2, dtype=torch.float64).numpy()
    expected_bce = expected_dice = 0.0
    for n in range(3):
        logit, mask = logits[n].numpy(), masks[n].double().numpy()
        ranked = sorted(candidates[n], key=lambda point: abs(bilinear(logit, *point)))
        points = [*ranked[: 3 * P // 4], *uniform[n]]
        p = sigmoid(np.array([bilinear(logit, *point) for point in points]))
        t = np.array([bilinear(mask, *point) for point in points])
        expected_bce += (-t * np.log(p) - (1 - t) * np.log(1 - p)).mean()
        expected_dice += 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    assert bce.item() == pytest.approx(expected_bce, rel=1e-9)
    assert dice.item() == pytest.approx(expected_dice, rel=1e-9)


def test_mask_terms_are_those_of_the_matched_pairs(monkeypatch):
    outputs, targets = batch([3, 1], groups=2)
    calls = []

    def record(logits, masks, num_points):
        calls.append((logits, masks, num_points))
        return logits.new_tensor(6.0), logits.new_tensor(2.0)

    monkeypatch.setattr("losses.mask_losses", record)
    criterion = SetCriterion(CONFIG)
    criterion.matcher.cost_mask = criterion.matcher.cost_dice = 0
    terms = criterion(outputs, targets)
    for name, term in terms.items():
        if "mask" in name or "dice" in name:
            divisor = 8 if "_dn" in name else 4
            assert term.item() == (6 if "mask" in name else 2) / divisor
    assert len(calls) == 4 + 3  # the interaction layers have no masks
    logits, masks, num_points = calls[0]
    assert num_points == CONFIG.loss_points
    pairs = [sorted(best_pairs(outputs, target, b)) for b, target in enumerate(targets)]
    assert torch.equal(logits, torch.stack([outputs["pred_masks"][b, q] for b in range(2) for q, _ in pairs[b]]))
    assert torch.equal(masks, torch.stack([targets[b]["masks"][n] for b in range(2) for _, n in pairs[b]]))


def test_uncertain_points():
    torch.manual_seed(0)
    logits = torch.linspace(-5, 5, 64).repeat(2, 64, 1).double()  # 0 in the middle of x
    points = uncertain_points(logits, 1000)
    assert points.shape == (2, 1000, 2) and points.dtype == torch.float64
    assert ((points >= 0) & (points <= 1)).all()
    values = sample_points(logits, points).abs()
    # 750 of 3000 uniform points: those in the middle quarter of x, |logit| < 1.25 (5 % for chance).
    assert values[:, :750].max() < 1.25 * 1.1
    assert (values[:, :750] < 1.25 * 0.9).float().mean() > 0.8
    # The other 250 are uniform.
    assert 0.4 < points[:, 750:, 0].mean() < 0.6 and (values[:, 750:] > 1.5).float().mean() > 0.5
    assert abs(points[..., 1].mean() - 0.5) < 0.05


def test_the_most_uncertain_points_are_picked():
    torch.manual_seed(0)
    logits = torch.randn(3, 8, 8).double()
    torch.manual_seed(1)
    points = uncertain_points(logits, 40)
    torch.manual_seed(1)
    candidates = torch.rand(3, 120, 2, dtype=torch.float64)
    values = sample_points(logits, candidates).abs()
    for n in range(3):
        wanted = candidates[n, values[n].argsort()[:30]]
        assert {tuple(p) for p in points[n, :30].tolist()} == {tuple(p) for p in wanted.tolist()}
        assert not {tuple(p) for p in points[n, 30:].tolist()} & {tuple(p) for p in candidates[n].tolist()}


def test_perfect_predictions_cost_little_and_bad_ones_much():
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[:, 8:24, 8:24] = True
    good = torch.where(masks[:, ::4, ::4], 20.0, -20.0)
    for sign, low, high in ((1, 0, 3), (-1, 10, 50)):
        bce, dice = mask_losses(sign * good, masks, 500)
        assert low < bce < high
        assert (dice < 1) if sign > 0 else (dice > 1)


@pytest.mark.parametrize("counts", [[0], [0, 0]])
def test_without_instances_only_the_class_terms_remain(counts):
    outputs, targets = batch(counts)
    tensors = [outputs[name].requires_grad_() for name in ("pred_logits", "pred_boxes", "pred_masks")]
    criterion = SetCriterion(CONFIG)
    terms = criterion(outputs, targets)
    for name, term in terms.items():
        assert term.isfinite() and (term > 0 if "loss_ce" in name else term == 0), name
    p = sigmoid(outputs["pred_logits"].detach().numpy())
    assert terms["loss_ce"].item() == pytest.approx((0.75 * p**2 * -np.log(1 - p)).sum(), rel=1e-9)  # divided by 1
    sum(criterion.weights[name] * term for name, term in terms.items()).backward()
    assert tensors[0].grad.abs().sum() > 0
    assert tensors[1].grad.abs().sum() == tensors[2].grad.abs().sum() == 0


def test_an_image_without_instances_beside_one_with():
    outputs, targets = batch([0, 2], groups=3)
    terms = SetCriterion(CONFIG)(outputs, targets)
    assert all(term.isfinite() and term > 0 for term in terms.values())


def test_more_instances_than_queries():
    outputs, targets = batch([Q + 4])
    terms = SetCriterion(CONFIG)(outputs, targets)
    assert all(term.isfinite() and term > 0 for term in terms.values())


def test_weights():
    criterion = SetCriterion(CONFIG)
    for name, weight in criterion.weights.items():
        kind = name.split("_")[1]
        assert weight == {"ce": 4, "bbox": 5, "giou": 2, "mask": 5, "dice": 5}[kind], name


@pytest.mark.parametrize("di", [True, False], ids=["DI-MaskDINO", "Mask DINO"])
def test_weights_name_exactly_the_terms(di):
    torch.manual_seed(0)
    model = build_model("tiny", di=di, bato=di, num_classes=3, loss_points=40).train()
    _, targets = batch([2, 1])
    for target in targets:
        target["masks"] = target["masks"].repeat_interleave(4, 1).repeat_interleave(4, 2)
    outputs = model(torch.rand(2, 3, 64, 64), targets)
    criterion = SetCriterion(model.config)
    assert set(criterion(outputs, targets)) == set(criterion.weights)
    assert any("_di_" in name for name in criterion.weights) == di
    del outputs["dn_outputs"]
    assert set(criterion(outputs, targets)) == {name for name in criterion.weights if "_dn" not in name}
