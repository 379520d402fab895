"""The set criterion against formulas written a second time in numpy, and the points that the mask losses sample."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import toys
from test_matcher import numpy_giou as giou
from test_matcher import sigmoid

import losses
from config import PRESETS
from losses import SetCriterion, denoising_pairs, draw_points, mask_losses
from matcher import sample_points

CONFIG = replace(
    PRESETS["tiny"], num_classes=3, loss_points=40, decoder_layers=2, interaction_layers=1, class_weight=4.0
)
Q = 5


def batch(counts, groups=0):
    """Made-up outputs of a DI-MaskDINO with two decoder layers and one interaction layer, and targets; float64."""
    found = toys.outputs(len(counts), queries=Q, denoising=groups * max(counts), groups=groups, classes=3, size=16)
    targets = toys.targets(*counts, size=16, dtype=torch.float64)
    return found, [target | {"labels": target["labels"] % 3} for target in targets]


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


def losses_of(maps, masks, index, num_points):
    """(2, R): `mask_losses` of logits maps (R, h, w) at points drawn for the instances of masks (N, H, W)."""
    points = draw_points([{"masks": masks[:2]}, {"masks": masks[2:]}], num_points, maps)
    return torch.stack(mask_losses(maps[:, None], torch.tensor(index), *points, num_points))


def test_mask_losses_equal_a_loop():
    torch.manual_seed(0)
    P, index = 40, [2, 0, 1, 2]
    maps, masks = torch.randn(4, 4, 6).double(), torch.rand(3, 16, 24) > 0.5
    torch.manual_seed(1)
    found = losses_of(maps, masks, index, P)
    torch.manual_seed(1)
    candidates = torch.rand(3, 3 * P, 2, dtype=torch.float64).numpy()  # of each instance
    uniform = torch.rand(3, P // 4, 2, dtype=torch.float64).numpy()
    expected = []
    for logit, n in zip(maps.numpy(), index, strict=True):
        ranked = sorted(candidates[n], key=lambda point: abs(bilinear(logit, *point)))
        points = [*ranked[: 3 * P // 4], *uniform[n]]
        p = sigmoid(np.array([bilinear(logit, *point) for point in points]))
        t = np.array([bilinear(masks[n].numpy(), *point) for point in points])
        bce = (-t * np.log(p) - (1 - t) * np.log(1 - p)).mean()
        expected.append((bce, 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)))
    np.testing.assert_allclose(found.T, expected, rtol=1e-9)


def test_mask_terms_are_those_of_the_matched_pairs():
    """Perfect masks on the queries that class and box match, and on the denoising ones, cost nothing; others do."""
    counts, groups = [3, 1], 2
    outputs, targets = batch(counts, groups)
    wide = [target | {"masks": torch.zeros_like(target["masks"])} for target in targets]
    for target in wide:
        for n, mask in enumerate(target["masks"]):  # each instance is a column of cells of its own
            mask[:, 4 * n : 4 * n + 4] = True
    columns = torch.eye(4, dtype=torch.float64)  # a channel for each column
    features = torch.cat([200 * columns, torch.full((1, 4), -100.0).double()])[None, :, None].expand(2, -1, 4, -1)

    def perfect(layer, pairs):
        embeddings = torch.zeros(2, layer["pred_logits"].shape[1], 5, dtype=torch.float64)
        embeddings[..., 4] = 1  # nothing but background
        for b, some in enumerate(pairs):
            for query, n in some:
                embeddings[b, query, n] = 1
        layer |= {"mask_embeddings": embeddings, "pixel_features": features}

    for layer in (outputs, outputs["interm_outputs"], *outputs["aux_outputs"]):
        perfect(layer, [best_pairs(layer, target, b) for b, target in enumerate(wide)])
    for layer in (outputs["dn_outputs"], *outputs["dn_outputs"]["aux_outputs"]):
        perfect(layer, [[(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)], [(0, 0), (3, 0)]])
    criterion = SetCriterion(replace(CONFIG, loss_points=1000))
    criterion.matcher.cost_mask = criterion.matcher.cost_dice = 0
    good = criterion(outputs, wide)
    outputs["mask_embeddings"] = outputs["mask_embeddings"].flip(1)
    bad = criterion(outputs, wide)
    for name, term in good.items():
        if "dice" in name:
            assert term < 0.3, name  # on the points between two cells they differ
    assert bad["loss_dice"] > 0.5 and bad["loss_mask"] > 5 * good["loss_mask"]


def test_denoising_pairs_follow_the_groups():
    pairs = [(query.tolist(), target.tolist()) for query, target in denoising_pairs([3, 1], 2)]
    # Query g * 3 + i is the i-th instance in group g.
    assert pairs == [([0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]), ([0, 3], [0, 0])]


@pytest.fixture
def points_of(monkeypatch):
    """Function that returns the points (N, num_points, 2) at which masks of these logits (N, h, w) are compared."""
    calls = []

    def record(maps, points):
        calls.append(points)
        return sample_points(maps, points)

    def points_of(logits, num_points):
        losses_of(logits, torch.zeros(1, 8, 8, dtype=torch.bool), [0] * len(logits), num_points)
        return (calls[-1] + 1) / 2

    monkeypatch.setattr(losses, "sample_points", record)
    return points_of


def test_uncertain_points(points_of):
    torch.manual_seed(0)
    logits = torch.linspace(-5, 5, 64).repeat(2, 64, 1).double()  # 0 in the middle of x
    points = points_of(logits, 1000)
    assert points.shape == (2, 1000, 2) and points.dtype == torch.float64
    assert ((points >= 0) & (points <= 1)).all()
    values = sample_points(logits[:, None], 2 * points - 1).squeeze(1).abs()
    # 750 of 3000 uniform points: those in the middle quarter of x, |logit| < 1.25 (5 % for chance).
    assert values[:, :750].max() < 1.25 * 1.1
    assert (values[:, :750] < 1.25 * 0.9).float().mean() > 0.8
    # The other 250 are uniform.
    assert 0.4 < points[:, 750:, 0].mean() < 0.6 and (values[:, 750:] > 1.5).float().mean() > 0.5
    assert abs(points[..., 1].mean() - 0.5) < 0.05


def test_the_most_uncertain_points_are_picked(points_of):
    torch.manual_seed(0)
    logits = torch.randn(3, 8, 8).double()
    torch.manual_seed(1)
    points = points_of(logits, 40)
    torch.manual_seed(1)
    candidates, uniform = (torch.rand(n, 2, dtype=torch.float64) for n in (120, 10))
    values = sample_points(logits[:, None], (2 * candidates - 1)[None]).squeeze(1).abs()
    for n in range(3):
        wanted = candidates[values[n].argsort()[:30]]
        torch.testing.assert_close(points[n, :30].sort(0).values, wanted.sort(0).values)
        torch.testing.assert_close(points[n, 30:], uniform)


def test_perfect_predictions_cost_little_and_bad_ones_much():
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[:, 8:24, 8:24] = True
    good = torch.where(masks[:, ::4, ::4], 20.0, -20.0)
    for sign, low, high in ((1, 0, 3), (-1, 10, 50)):
        bce, dice = losses_of(sign * good, masks, [0, 1], 500).sum(1)
        assert low < bce < high
        assert (dice < 1) if sign > 0 else (dice > 1)


@pytest.mark.parametrize("counts", [[0], [0, 0]])
def test_without_instances_only_the_class_terms_remain(counts):
    outputs, targets = batch(counts)
    names = "pred_logits", "pred_boxes", "mask_embeddings", "pixel_features"
    logits, *tensors = [outputs[name].requires_grad_() for name in names]
    criterion = SetCriterion(CONFIG)
    terms = criterion(outputs, targets)
    for name, term in terms.items():
        assert term.isfinite() and (term > 0 if "loss_ce" in name else term == 0), name
    p = sigmoid(outputs["pred_logits"].detach().numpy())
    assert terms["loss_ce"].item() == pytest.approx((0.75 * p**2 * -np.log(1 - p)).sum(), rel=1e-9)  # divided by 1
    criterion.total(terms).backward()
    assert logits.grad.abs().sum() > 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)


def test_an_image_without_instances_beside_one_with():
    outputs, targets = batch([0, 2], groups=3)
    terms = SetCriterion(CONFIG)(outputs, targets)
    assert all(term.isfinite() and term > 0 for term in terms.values())


def test_more_instances_than_queries():
    outputs, targets = batch([Q + 4])
    terms = SetCriterion(CONFIG)(outputs, targets)
    assert all(term.isfinite() and term > 0 for term in terms.values())


def test_total_is_the_weighted_sum_whatever_the_suffix():
    criterion = SetCriterion(CONFIG)
    assert criterion.weights == {"loss_ce": 4, "loss_bbox": 5, "loss_giou": 2, "loss_mask": 5, "loss_dice": 5}
    assert criterion.total({"loss_ce": 1, "loss_bbox_dn_0": 10, "loss_mask_interm": 100}) == 4 + 50 + 500


@pytest.mark.parametrize("di", [True, False], ids=["DI-MaskDINO", "Mask DINO"])
def test_terms_of_a_model(di):
    model = toys.model(di=di, bato=di).train()
    targets = toys.targets(2, 1)
    outputs, criterion = model(torch.rand(2, 3, 64, 64), targets), SetCriterion(model.config)
    layers = ["", "_0", "_1"]
    masked = [*layers, "_interm", *(f"_dn{layer}" for layer in layers)]
    expected = {name + suffix for name in losses.TERMS for suffix in masked}
    expected |= {f"{name}_di_{i}" for name in losses.TERMS[:3] for i in range(2)} if di else set()
    assert set(criterion(outputs, targets)) == expected
    del outputs["dn_outputs"]
    assert set(criterion(outputs, targets)) == {name for name in expected if "_dn" not in name}


def test_half_precision_outputs_give_the_terms_in_float32():
    outputs, targets = batch([3, 1], groups=2)

    def cast(x, dtype):
        if isinstance(x, dict):
            return {name: cast(value, dtype) for name, value in x.items()}
        return [cast(y, dtype) for y in x] if isinstance(x, list) else x.to(dtype) if torch.is_tensor(x) else x

    halved = cast(outputs, torch.bfloat16)
    found = []
    for same in (halved, cast(halved, torch.float32)):
        torch.manual_seed(0)
        found.append(SetCriterion(CONFIG)(same, targets))
    assert all(term.dtype == torch.float32 for term in found[0].values())
    for name, term in found[0].items():  # of masks the product with the pixel features is in half precision
        mask = "mask" in name or "dice" in name
        assert term.item() == pytest.approx(found[1][name].item(), rel=0.02 if mask else 0), name


def test_points_depend_on_their_number_alone(monkeypatch):
    """Matching and losses draw their points as the golden data of training steps needs it."""
    outputs, targets = batch([3, 1], groups=2)
    rand, shapes = torch.rand, []

    def record(first, *shape, dtype, device):
        shapes.append(shape)
        return rand(1, *shape, dtype=dtype, device=device).expand(first, -1, -1)

    monkeypatch.setattr(torch, "rand", record)
    SetCriterion(CONFIG)(outputs, targets)
    assert set(shapes) == {(40, 2), (120, 2), (10, 2)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes", "mask_embeddings"])
def test_predictions_that_are_not_finite_give_terms_that_are_not_finite(name, value):
    outputs, targets = batch([3, 1], groups=2)
    outputs[name] = torch.full_like(outputs[name], value)
    terms = SetCriterion(CONFIG)(outputs, targets)
    term = {"pred_logits": "loss_ce", "pred_boxes": "loss_bbox", "mask_embeddings": "loss_mask"}[name]
    assert not terms[term].isfinite()
    assert terms[term + "_0"].isfinite()
