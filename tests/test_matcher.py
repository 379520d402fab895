"""The Hungarian matcher: costs against plain numpy, pairs against brute force."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision
import toys

from config import PRESETS
from matcher import HungarianMatcher, class_cost, mask_costs, pairwise_giou, sample_masks, sample_points

CONFIG = replace(PRESETS["tiny"], num_classes=3, loss_points=200, class_weight=4.0)


def problem(Q, counts, seed=0):
    """Random predictions of one layer, {"": predictions}, and random targets; float64."""
    outputs = toys.outputs(len(counts), queries=Q, classes=3, size=16, seed=seed)
    targets = toys.targets(*counts, size=16, dtype=torch.float64, seed=seed)
    return {"": outputs}, [target | {"labels": target["labels"] % 3} for target in targets]


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
    expected = torch.tensor([[numpy_giou(x, y) for y in b.tolist()] for x in a.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    corners = (torchvision.ops.box_convert(x, "cxcywh", "xyxy") for x in (a, b))
    torch.testing.assert_close(found, torchvision.ops.generalized_box_iou(*corners), rtol=0, atol=1e-3)
    assert found[0, 0] == pytest.approx(1, abs=1e-3)
    pairs = pairwise_giou(a[:5, None], b[:, None])[:, 0, 0]
    torch.testing.assert_close(pairs, found[:5].diagonal())


def test_class_cost():
    logits, labels = torch.tensor([[2.0, -1.0, 0.5]]).double(), torch.tensor([1, 1, 2])
    p = sigmoid(np.array([-1.0, -1.0, 0.5]))
    expected = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8)
    np.testing.assert_allclose(class_cost(logits[None], labels[None])[0, 0], expected, rtol=1e-12)


def test_mask_costs():
    torch.manual_seed(0)
    logits, masks = torch.randn(1, 4, 50).double(), torch.rand(1, 3, 50).double()
    bce, dice = mask_costs(logits, masks)
    assert bce.shape == dice.shape == (1, 4, 3)
    for q in range(4):
        p = sigmoid(logits[0, q].numpy())
        for n in range(3):
            t = masks[0, n].numpy()
            assert bce[0, q, n] == pytest.approx((-t * np.log(p) - (1 - t) * np.log(1 - p)).mean(), rel=1e-12)
            assert dice[0, q, n] == pytest.approx(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1), rel=1e-12)


def test_sample_points_are_bilinear_and_zero_outside():
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])  # pixel centres at 0.25 and 0.75
    points = 2 * torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.0, 0.25], [1.5, 0.5]]]) - 1
    assert sample_points(maps, points).tolist() == [[[1.0, 2.0, 3.0, 2.5, 0.5, 0.0]]]


def test_sample_masks_equals_sample_points():
    torch.manual_seed(0)
    masks, points = torch.rand(3, 7, 5) > 0.5, torch.rand(3, 200, 2).double() * 2.8 - 1.4  # some outside
    points[0, :4] = torch.tensor([[-1, -1], [1, 1], [-1, 1], [0, 0]])
    for some in (points, points[:1]):
        expected = sample_points(masks[:, None].double(), some)[:, 0]
        torch.testing.assert_close(sample_masks(masks, some), expected, rtol=0, atol=1e-12)
    assert sample_masks(masks[:0], points[:1]).shape == (0, 200)


def test_cost_is_the_weighted_sum_of_five_terms(monkeypatch):
    sets, targets = problem(6, [4])
    points = torch.rand(1, 200, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: points)
    matcher, target, outputs = HungarianMatcher(CONFIG), targets[0], sets[""]
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    maps = torch.einsum("bqc,bchw->bqhw", outputs["mask_embeddings"], outputs["pixel_features"])
    predicted, wanted = (sample_points(x, 2 * points - 1) for x in (maps, target["masks"][None].double()))
    bce, dice = mask_costs(predicted, wanted)
    l1 = (boxes[0, :, None] - target["boxes"]).abs().sum(-1)
    expected = 4 * class_cost(logits, target["labels"][None]) + 5 * l1
    expected = expected - 2 * pairwise_giou(boxes, target["boxes"])
    without = {name: outputs[name] for name in ("pred_logits", "pred_boxes")}
    torch.testing.assert_close(matcher.costs({"": without}, targets), expected)
    torch.testing.assert_close(matcher.costs(sets, targets), expected + 5 * bce + 5 * dice)
    matcher.cost_mask, matcher.cost_dice = 1, 2
    torch.testing.assert_close(matcher.costs(sets, targets), expected + bce + 2 * dice)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("masks", [True, False])
def test_pairs_equal_brute_force(seed, masks):
    sets, targets = problem(5, [3, 1], seed)
    if not masks:
        sets = {"": {name: sets[""][name] for name in ("pred_logits", "pred_boxes")}}
    matcher = HungarianMatcher(CONFIG)
    torch.manual_seed(seed)  # for the same points below
    pairs = matcher(sets, targets)[""]
    torch.manual_seed(seed)
    costs = matcher.costs(sets, targets).numpy()
    for cost, n, (query, target) in zip(costs, (3, 1), pairs, strict=True):
        best = min(permutations(range(5), n), key=lambda queries: cost[list(queries), range(n)].sum())
        assert dict(zip(target.tolist(), query.tolist(), strict=True)) == dict(enumerate(best))


def test_more_instances_than_queries():
    (query, target), other = HungarianMatcher(CONFIG)(*problem(4, [7, 2]))[""]
    assert query.tolist() == [0, 1, 2, 3] and len(set(target.tolist())) == 4
    assert len(other[0]) == 2 and sorted(other[1].tolist()) == [0, 1]


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 3, 0], [2, 0]])
def test_images_without_instances(counts):
    pairs = HungarianMatcher(CONFIG)(*problem(6, counts))[""]
    assert [(len(query), len(target)) for query, target in pairs] == [(n, n) for n in counts]


def test_outputs_in_float32_and_targets_in_float64():
    outputs = {name: value.float() for name, value in toys.outputs(1)["interm_outputs"].items()}
    [(query, target)] = HungarianMatcher(CONFIG)({"": outputs}, problem(1, [3])[1])[""]
    assert len(set(query.tolist())) == 3 and sorted(target.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [0, 0]])
def test_sets_are_matched_together_as_each_alone(counts, monkeypatch):
    """Of five sets two share queries and pixel features; the others differ in one of them, or have no masks."""
    outputs, targets = toys.outputs(2, classes=3, size=16), problem(1, counts)[1]
    sets = {"": outputs, "_interm": outputs["interm_outputs"], "_di_0": outputs["di_outputs"][0]}
    sets |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
    points = torch.rand(1, 200, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: points)
    matcher = HungarianMatcher(CONFIG)
    costs, pairs = matcher.costs(sets, targets), matcher(sets, targets)
    sizes = [layer["pred_logits"].shape[1] for layer in sets.values()]
    for (suffix, layer), cost in zip(sets.items(), costs.split(sizes, 1), strict=True):
        torch.testing.assert_close(cost, matcher.costs({suffix: layer}, targets))
        for found, alone in zip(pairs[suffix], matcher({suffix: layer}, targets)[suffix], strict=True):
            np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_finite_count_as_very_large(value):
    sets, targets = problem(6, [3])
    sets[""]["mask_embeddings"][:, [0, 2, 4]] = value  # 1, 3 and 5 are left
    [(query, target)] = HungarianMatcher(CONFIG)(sets, targets)[""]
    assert query.tolist() == [1, 3, 5] and sorted(target.tolist()) == [0, 1, 2]
    sets[""]["mask_embeddings"][:] = value
    [(query, _)] = HungarianMatcher(CONFIG)(sets, targets)[""]
    assert len(set(query.tolist())) == 3


def test_matching_has_no_gradient():
    sets, targets = problem(6, [3])
    sets[""]["pred_logits"].requires_grad_(), sets[""]["mask_embeddings"].requires_grad_()
    HungarianMatcher(CONFIG)(sets, targets)  # scipy would fail on a tensor with a gradient
