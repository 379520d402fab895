"""The Hungarian matcher: costs against plain numpy, pairs against brute force."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision

from config import PRESETS
from matcher import HungarianMatcher, class_cost, mask_costs, pairwise_giou, sample_masks, sample_points

CONFIG = replace(PRESETS["tiny"], num_classes=3, loss_points=200, class_weight=4.0)


def problem(Q, counts, seed=0, size=16):
    """Random predictions on a 4x4 grid of stride 4 and random targets, float64."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    B = len(counts)
    outputs = {
        "pred_logits": 4 * rand(B, Q, 3) - 2,
        "pred_boxes": torch.cat([rand(B, Q, 2), 0.05 + 0.5 * rand(B, Q, 2)], -1),
        "pred_masks": 8 * rand(B, Q, size // 4, size // 4) - 4,
    }
    targets = [
        {
            "labels": (3 * rand(n)).long(),
            "boxes": torch.cat([rand(n, 2), 0.05 + 0.5 * rand(n, 2)], -1),
            "masks": rand(n, size, size) > 0.5,
        }
        for n in counts
    ]
    return outputs, targets


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_giou(a, b):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    inter = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def test_giou():
    torch.manual_seed(0)
    a, b = torch.rand(7, 4).double(), torch.rand(5, 4).double()
    b[0] = a[0]
    b[1, 2:] = 0  # a point
    found = pairwise_giou(a, b)
    expected = torch.tensor([[numpy_giou(x, y) for y in b.tolist()] for x in a.tolist()]).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    corners = (torchvision.ops.box_convert(x, "cxcywh", "xyxy") for x in (a, b))
    torch.testing.assert_close(found, torchvision.ops.generalized_box_iou(*corners), rtol=0, atol=1e-3)
    assert found[0, 0] == pytest.approx(1, abs=1e-3)
    pairs = pairwise_giou(a[:5, None], b[:, None])[:, 0, 0]
    torch.testing.assert_close(pairs, found[:5].diagonal())


def test_class_cost():
    logits, labels = torch.tensor([[2.0, -1.0, 0.5]]).double(), torch.tensor([1, 1, 2])
    p = sigmoid(np.array([-1.0, -1.0, 0.5]))
    expected = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8)
    np.testing.assert_allclose(class_cost(logits[None], labels[None])[0][0], expected, rtol=1e-12)


def test_mask_costs():
    torch.manual_seed(0)
    logits, masks = torch.randn(1, 4, 50).double(), torch.rand(1, 3, 50).double()
    bce, dice = mask_costs([logits[:, :1], logits[:, 1:]], masks)
    assert bce.shape == dice.shape == (1, 4, 3)
    for q in range(4):
        p = sigmoid(logits[0, q].numpy())
        for n in range(3):
            t = masks[0, n].numpy()
            assert bce[0, q, n] == pytest.approx((-t * np.log(p) - (1 - t) * np.log(1 - p)).mean(), rel=1e-12)
            assert dice[0, q, n] == pytest.approx(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1), rel=1e-12)


def test_sample_points_are_bilinear_and_zero_outside():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # pixel centres at 0.25 and 0.75
    points = 2 * torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.0, 0.25], [1.5, 0.5]]]) - 1
    assert sample_points(maps, points).tolist() == [[1.0, 2.0, 3.0, 2.5, 0.5, 0.0]]


def test_sample_masks_equals_sample_points():
    torch.manual_seed(0)
    masks, points = torch.rand(3, 7, 5) > 0.5, torch.rand(3, 200, 2).double() * 2.8 - 1.4  # some outside
    points[0, :4] = torch.tensor([[-1, -1], [1, 1], [-1, 1], [0, 0]])
    for some in (points, points[:1]):
        found, expected = sample_masks([masks[:1], masks[1:1], masks[1:]], some), masks.double()
        expected = sample_points(expected, some.expand(3, -1, -1))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_cost_is_the_weighted_sum_of_five_terms(monkeypatch):
    outputs, targets = problem(6, [4])
    points = torch.rand(1, 200, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: points)
    matcher, target = HungarianMatcher(CONFIG), targets[0]
    logits, boxes, masks = (value[0] for value in outputs.values())
    unmasked = {name: outputs[name] for name in ("pred_logits", "pred_boxes")}
    samples = (sample_points(x, 2 * points.expand(len(x), -1, -1) - 1) for x in (masks, target["masks"].double()))
    predicted, wanted = (x[None] for x in samples)
    bce, dice = (cost[0] for cost in mask_costs([predicted], wanted))
    l1 = (boxes[:, None] - target["boxes"]).abs().sum(-1)
    expected = (
        4 * class_cost(logits[None], target["labels"][None])[0] + 5 * l1 - 2 * pairwise_giou(boxes, target["boxes"])
    )
    torch.testing.assert_close(matcher.cost(unmasked, targets)[0], expected)
    torch.testing.assert_close(matcher.cost(outputs, targets)[0], expected + 5 * bce + 5 * dice)
    matcher.cost_mask, matcher.cost_dice = 1, 2
    torch.testing.assert_close(matcher.cost(outputs, targets)[0], expected + bce + 2 * dice)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("masks", [True, False])
def test_pairs_equal_brute_force(seed, masks):
    outputs, targets = problem(5, [3, 1], seed)
    if not masks:
        del outputs["pred_masks"]
    matcher = HungarianMatcher(CONFIG)
    torch.manual_seed(seed)  # for the same points below
    found = matcher(outputs, targets)
    torch.manual_seed(seed)
    costs = matcher.cost(outputs, targets).numpy()
    for b, (query, index) in enumerate(found):
        n = len(targets[b]["labels"])
        cost = costs[b, :, :n]
        best = min(permutations(range(5), n), key=lambda queries: cost[list(queries), range(n)].sum())
        assert dict(zip(index.tolist(), query.tolist(), strict=True)) == dict(enumerate(best))


def test_pairs_are_sorted_by_query():
    outputs, targets = problem(30, [9, 4])
    for query, index in HungarianMatcher(CONFIG)(outputs, targets):
        assert query.dtype == index.dtype == torch.int64
        assert query.tolist() == sorted(set(query.tolist()))


def test_more_instances_than_queries():
    outputs, targets = problem(4, [7, 2])
    (query, index), (other, _) = HungarianMatcher(CONFIG)(outputs, targets)
    assert query.tolist() == [0, 1, 2, 3] and len(set(index.tolist())) == 4
    assert len(other) == 2


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 3, 0], [2, 0]])
def test_images_without_instances(counts):
    outputs, targets = problem(6, counts)
    pairs = HungarianMatcher(CONFIG)(outputs, targets)
    assert [len(query) for query, _ in pairs] == [len(index) for _, index in pairs] == counts
    assert all(x.dtype == torch.int64 for pair in pairs for x in pair)


def test_mixed_dtypes():
    outputs, targets = problem(6, [3])
    outputs = {name: value.float() for name, value in outputs.items()}
    assert len(HungarianMatcher(CONFIG)(outputs, targets)[0][0]) == 3


@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [0, 0]])
def test_several_sets_are_matched_as_each_alone(counts, monkeypatch):
    sets, matcher = [problem(Q, counts, seed=Q)[0] for Q in (9, 5, 7)], HungarianMatcher(CONFIG)
    del sets[0]["pred_masks"]
    targets, points = problem(1, counts)[1], torch.rand(1, 200, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: points)
    alone = [pair for outputs in sets for pair in matcher(outputs, targets)]
    for found, expected in zip(matcher(sets, targets), alone, strict=True):
        assert [x.tolist() for x in found] == [x.tolist() for x in expected]
    costs = torch.cat([matcher.cost(outputs, targets) for outputs in sets], 1)
    torch.testing.assert_close(matcher.cost(sets, targets), costs)


def test_masks_from_their_factors_cost_the_same(monkeypatch):
    """Of three sets, two of which share the pixel features; and a fourth that has its masks alone."""
    sets, targets, points = [], problem(1, [3, 1])[1], torch.rand(1, 200, 2, dtype=torch.float64)
    some, other = torch.randn(2, 2, 8, 4, 4, dtype=torch.float64)
    for Q, pixels in ((9, some), (5, other), (7, some)):
        embeddings = torch.randn(2, Q, 8, dtype=torch.float64)
        masks = torch.einsum("bqc,bchw->bqhw", embeddings, pixels)
        factors = {"mask_embeddings": embeddings, "pixels": pixels}
        sets.append(problem(Q, [3, 1], seed=Q)[0] | {"pred_masks": masks} | factors)
    sets.append(problem(6, [3, 1])[0])
    without = [{name: x for name, x in s.items() if "pred" in name} for s in sets]
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: points)
    matcher = HungarianMatcher(CONFIG)
    torch.testing.assert_close(matcher.cost(sets, targets), matcher.cost(without, targets), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_finite_count_as_very_large(value):
    outputs, targets = problem(6, [3])
    outputs["pred_masks"][:, [0, 2, 4]] = value  # 1, 3 and 5 are left
    ((query, index),) = HungarianMatcher(CONFIG)(outputs, targets)
    assert query.tolist() == [1, 3, 5] and sorted(index.tolist()) == [0, 1, 2]
    outputs["pred_masks"][:] = value
    assert len(HungarianMatcher(CONFIG)(outputs, targets)[0][0]) == 3


def test_matching_has_no_gradient():
    outputs, targets = problem(6, [3])
    outputs = {name: value.requires_grad_() for name, value in outputs.items()}
    HungarianMatcher(CONFIG)(outputs, targets)  # .numpy() would fail on a tensor with a gradient
