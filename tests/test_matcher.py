"""The Hungarian matcher: costs against plain numpy, pairs against brute force."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision
import toys

from config import PRESETS
from matcher import HungarianMatcher, class_cost, mask_costs, pairwise_giou, sample_masks, sample_points, stack_layers

CONFIG = replace(PRESETS["tiny"], num_classes=3, loss_points=200, class_weight=4.0)


def problem(Q, counts, seed=0):
    """Random predictions of one layer as a list of one `Stack`, and random targets; float64."""
    outputs = toys.outputs(len(counts), queries=Q, classes=3, size=16, seed=seed)
    targets = toys.targets(*counts, size=16, dtype=torch.float64, seed=seed)
    return stack_layers({"": outputs}), [target | {"labels": target["labels"] % 3} for target in targets]


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
    np.testing.assert_allclose(class_cost(logits[None, None], labels[None])[0, 0, 0], expected, rtol=1e-12)


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
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # pixel centres at 0.25 and 0.75
    points = 2 * torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.0, 0.25], [1.5, 0.5]]]) - 1
    assert sample_points(maps, points).tolist() == [[1.0, 2.0, 3.0, 2.5, 0.5, 0.0]]


def test_sample_masks_equals_sample_points():
    torch.manual_seed(0)
    masks, points = torch.rand(3, 7, 5) > 0.5, torch.rand(3, 200, 2).double() * 2.8 - 1.4  # some outside
    points[0, :4] = torch.tensor([[-1, -1], [1, 1], [-1, 1], [0, 0]])
    for some in (points, points[:1]):
        expected = sample_points(masks.double(), some.expand(3, -1, -1))
        torch.testing.assert_close(sample_masks(masks, some), expected, rtol=0, atol=1e-12)
    assert sample_masks(masks[:0], points[:1]).shape == (0, 200)


def test_cost_is_the_weighted_sum_of_five_terms(monkeypatch):
    [stack], targets = problem(6, [4])
    points = torch.rand(1, 200, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: points)
    matcher, target = HungarianMatcher(CONFIG), targets[0]
    logits, boxes = stack.logits[0], stack.boxes[0]
    maps = torch.einsum("qc,chw->qhw", stack.embeddings[0, 0], stack.pixel_features[0])
    predicted, wanted = (
        sample_points(x, (2 * points - 1).expand(len(x), -1, -1))[None] for x in (maps, target["masks"].double())
    )
    bce, dice = mask_costs(predicted, wanted)
    l1 = (boxes[0, :, None] - target["boxes"]).abs().sum(-1)
    expected = 4 * class_cost(logits[None], target["labels"][None])[0] + 5 * l1
    expected = expected - 2 * pairwise_giou(boxes, target["boxes"])
    without = stack._replace(embeddings=None, pixel_features=None)
    torch.testing.assert_close(matcher.costs([without], targets), [expected[None]])
    torch.testing.assert_close(matcher.costs([stack], targets), [(expected + 5 * bce + 5 * dice)[None]])
    matcher.cost_mask, matcher.cost_dice = 1, 2
    torch.testing.assert_close(matcher.costs([stack], targets), [(expected + bce + 2 * dice)[None]])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("masks", [True, False])
def test_pairs_equal_brute_force(seed, masks):
    stacks, targets = problem(5, [3, 1], seed)
    if not masks:
        stacks = [stacks[0]._replace(embeddings=None, pixel_features=None)]
    matcher = HungarianMatcher(CONFIG)
    torch.manual_seed(seed)  # for the same points below
    [((image, query, index),)] = [pairs.unbind(1) for pairs in matcher(stacks, targets)]
    torch.manual_seed(seed)
    [[costs]] = matcher.costs(stacks, targets)
    assert image.tolist() == [0, 0, 0, 1]
    for b, first, n in ((0, 0, 3), (1, 3, 1)):
        cost = costs[b, :, :n].numpy()
        best = min(permutations(range(5), n), key=lambda queries: cost[list(queries), range(n)].sum())
        found = dict(zip((index[image == b] - first).tolist(), query[image == b].tolist(), strict=True))
        assert found == dict(enumerate(best))


def test_more_instances_than_queries():
    stacks, targets = problem(4, [7, 2])
    [[image, query, index]] = HungarianMatcher(CONFIG)(stacks, targets)[0].unbind(1)
    assert image.tolist() == [0] * 4 + [1] * 2 and query[:4].tolist() == [0, 1, 2, 3]
    assert len(set(index.tolist())) == 6 and set(index[4:].tolist()) == {7, 8}


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 3, 0], [2, 0]])
def test_images_without_instances(counts):
    [pairs] = HungarianMatcher(CONFIG)(*problem(6, counts))
    assert pairs.shape == (3, 1, sum(counts)) and pairs.dtype == torch.int64
    assert pairs[0, 0].bincount(minlength=len(counts)).tolist() == counts


def test_outputs_in_float32_and_targets_in_float64():
    outputs = {name: value.float() for name, value in toys.outputs(1)["interm_outputs"].items()}
    [pairs] = HungarianMatcher(CONFIG)(stack_layers({"": outputs}), problem(1, [3])[1])
    assert pairs.shape == (3, 1, 3)


@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [0, 0]])
def test_layers_are_matched_in_stacks_as_each_alone(counts, monkeypatch):
    """Of five sets two share queries and pixel features; the others differ in one of them, or have no masks."""
    outputs, targets = toys.outputs(2, classes=3, size=16), problem(1, counts)[1]
    sets = {"": outputs, "_interm": outputs["interm_outputs"], "_di_0": outputs["di_outputs"][0]}
    sets |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
    stacks = stack_layers(sets)
    assert [stack.suffixes for stack in stacks] == [[""], ["_interm"], ["_di_0"], ["_0", "_1"]]
    points = torch.rand(1, 200, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: points)
    matcher = HungarianMatcher(CONFIG)
    for stack, costs, pairs in zip(stacks, matcher.costs(stacks, targets), matcher(stacks, targets), strict=True):
        for number, suffix in enumerate(stack.suffixes):
            alone = stack_layers({suffix: sets[suffix]})
            torch.testing.assert_close(costs[number], matcher.costs(alone, targets)[0][0])
            assert torch.equal(pairs[:, number], matcher(alone, targets)[0][:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_finite_count_as_very_large(value):
    [stack], targets = problem(6, [3])
    stack.embeddings[:, :, [0, 2, 4]] = value  # 1, 3 and 5 are left
    [pairs] = HungarianMatcher(CONFIG)([stack], targets)
    assert pairs[1, 0].tolist() == [1, 3, 5] and sorted(pairs[2, 0].tolist()) == [0, 1, 2]
    stack.embeddings[:] = value
    assert HungarianMatcher(CONFIG)([stack], targets)[0].shape == (3, 1, 3)


def test_matching_has_no_gradient():
    [stack], targets = problem(6, [3])
    stack.logits.requires_grad_(), stack.embeddings.requires_grad_()
    HungarianMatcher(CONFIG)([stack], targets)  # .numpy() would fail on a tensor with a gradient
