"""The set criterion against formulas written a second time in numpy, and the points that the mask losses sample."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
from config import PRESETS
from losses import SetCriterion, mask_losses
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
    P, index = 40, [2, 0, 1, 2]
    logits, masks = torch.randn(4, 4, 6).double(), torch.rand(3, 16, 24) > 0.5
    targets = [{"masks": masks[:2]}, {"masks": masks[2:]}]
    torch.manual_seed(1)
    found = mask_losses([logits[:1], logits[1:]], targets, torch.tensor(index), P)
    torch.manual_seed(1)
    candidates = torch.rand(3, 3 * P, 2, dtype=torch.float64).numpy()  # of each instance
    uniform = torch.rand(3, P // 4, 2, dtype=torch.float64).numpy()
    expected = []
    for logit, n in zip(logits.numpy(), index, strict=True):
        ranked = sorted(candidates[n], key=lambda point: abs(bilinear(logit, *point)))
        points = [*ranked[: 3 * P // 4], *uniform[n]]
        p = sigmoid(np.array([bilinear(logit, *point) for point in points]))
        t = np.array([bilinear(masks[n].numpy(), *point) for point in points])
        bce = (-t * np.log(p) - (1 - t) * np.log(1 - p)).mean()
        expected.append((bce, 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)))
    np.testing.assert_allclose(found.T, expected, rtol=1e-9)


def test_mask_terms_are_those_of_the_matched_pairs(monkeypatch):
    outputs, targets = batch([3, 1], groups=2)
    calls = []

    def record(logits, targets, index, num_points):
        calls.append((logits, targets, index, num_points))
        return torch.tensor([[6.0], [2.0]]).double().expand(-1, len(index))

    monkeypatch.setattr("losses.mask_losses", record)
    criterion = SetCriterion(CONFIG)
    criterion.matcher.cost_mask = criterion.matcher.cost_dice = 0
    terms = criterion(outputs, targets)
    for name, term in terms.items():  # 4 pairs in each set, 8 in those of denoising queries
        if "mask" in name or "dice" in name:
            assert term.item() == pytest.approx(6 if "mask" in name else 2)
    ((logits, given, index, num_points),) = calls
    assert given is targets and num_points == CONFIG.loss_points
    (logits,) = logits
    assert len(logits) == 4 * 4 + 8 * 3  # the interaction layers have no masks
    pairs = [sorted(best_pairs(outputs, target, b)) for b, target in enumerate(targets)]
    assert torch.equal(logits[:4], torch.stack([outputs["pred_masks"][b, q] for b in range(2) for q, _ in pairs[b]]))
    assert index[:4].tolist() == [n + (0, 3)[b] for b in range(2) for _, n in pairs[b]]
    assert index[-8:].tolist() == [0, 1, 2, 0, 1, 2, 3, 3]  # query g * 3 + i is the i-th instance in group g
    queries = outputs["dn_outputs"]["aux_outputs"][-1]["pred_masks"]
    assert torch.equal(logits[-8:], torch.cat([queries[0], queries[1, [0, 3]]]))


@pytest.fixture
def points_of(monkeypatch):
    """Function that returns the points (N, num_points, 2) at which masks of these logits (N, h, w) are compared."""
    calls = []

    def record(maps, points):
        calls.append(points)
        return sample_points(maps, points)

    def points_of(logits, num_points):
        targets = [{"masks": torch.zeros(1, 8, 8, dtype=torch.bool)}]
        mask_losses([logits], targets, torch.zeros(len(logits), dtype=torch.int64), num_points)
        return (calls[-1] + 1) / 2

    monkeypatch.setattr(losses, "sample_points", record)
    return points_of


def test_uncertain_points(points_of):
    torch.manual_seed(0)
    logits = torch.linspace(-5, 5, 64).repeat(2, 64, 1).double()  # 0 in the middle of x
    points = points_of(logits, 1000)
    assert points.shape == (2, 1000, 2) and points.dtype == torch.float64
    assert ((points >= 0) & (points <= 1)).all()
    values = sample_points(logits, 2 * points - 1).abs()
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
    values = sample_points(logits, (2 * candidates - 1).expand(3, -1, -1)).abs()
    for n in range(3):
        wanted = candidates[values[n].argsort()[:30]]
        torch.testing.assert_close(points[n, :30].sort(0).values, wanted.sort(0).values)
        torch.testing.assert_close(points[n, 30:], uniform)


def test_perfect_predictions_cost_little_and_bad_ones_much():
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[:, 8:24, 8:24] = True
    good = torch.where(masks[:, ::4, ::4], 20.0, -20.0)
    for sign, low, high in ((1, 0, 3), (-1, 10, 50)):
        bce, dice = mask_losses([sign * good], [{"masks": masks}], torch.arange(2), 500).sum(1)
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


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0]])
def test_masks_from_their_factors_give_the_same_terms_and_gradients(counts):
    """Of a model whose layers have two kinds of pixel features, F and F'; and not one gradient of all masks."""
    torch.manual_seed(0)
    model = build_model("tiny", num_classes=3, loss_points=40, decoder_layers=2).double().train()
    _, targets = batch(counts)
    targets = [t | {"masks": t["masks"].repeat_interleave(4, 1).repeat_interleave(4, 2)} for t in targets]
    outputs = model([torch.rand(3, 64, 64).double() for _ in counts], targets)
    layers = [outputs, outputs["interm_outputs"], *outputs["aux_outputs"]]
    if "dn_outputs" in outputs:
        layers += [outputs["dn_outputs"], *outputs["dn_outputs"]["aux_outputs"]]
    assert len({id(layer["pixels"]) for layer in layers}) == 2
    criterion, results = SetCriterion(model.config), []
    for names in ((), ("pixels", "mask_embeddings")):
        for layer in layers[:2]:  # where some have no factors, those of the others are not taken either
            for name in names:
                del layer[name]
        dense = [layer["pred_masks"] for layer in layers]
        torch.manual_seed(1)
        terms = criterion(outputs, targets)
        total = sum(criterion.weights[name] * term for name, term in terms.items())
        grads = torch.autograd.grad(total, [*model.parameters(), *dense], retain_graph=True, allow_unused=True)
        assert all((grad is None) == (not names) for grad in grads[-len(dense) :])
        results.append((terms, grads[: -len(dense)]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


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
    assert found[0] == found[1]


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
@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes", "pred_masks"])
def test_predictions_that_are_not_finite_give_terms_that_are_not_finite(name, value):
    outputs, targets = batch([3, 1], groups=2)
    outputs[name] = torch.full_like(outputs[name], value)
    terms = SetCriterion(CONFIG)(outputs, targets)
    term = {"pred_logits": "loss_ce", "pred_boxes": "loss_bbox", "pred_masks": "loss_mask"}[name]
    assert not terms[term].isfinite()
    assert terms[term + "_0"].isfinite()


class Calls(TorchDispatchMode):
    """Counts operator calls, and what waits on a GPU but does not raise on the device "meta": copies from the host, and
    `prod`, whose backward pass reads a value.
    """

    def __init__(self):
        super().__init__()
        self.count, self.copies = 0, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        result = operator(*args, **(kwargs or {}))
        sources, results = ([x for x in tree_leaves(y) if torch.is_tensor(x)] for y in ((args, kwargs), result))
        copied = any(x.device.type == "cpu" for x in sources) or "prod" in str(operator)
        if copied and any(x.device.type == "meta" for x in results):
            self.copies.append(f"{operator} {[tuple(x.shape) for x in sources]}")
        return result


class Constants(TorchFunctionMode):
    """Lists tensors on the device "meta" that are made of Python's numbers, so copied from the host."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        makers = (torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.Tensor.new_tensor)
        if function in makers and result.device.type == "meta":
            self.copies.append(f"{function.__name__} {args}")
        return result


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("counts", [[7, 7], [60, 60], [3, 0]])
def test_operator_calls_and_waiting_of_the_host(counts, factors, monkeypatch):
    """At full size on the meta device, where reading any value raises, be it `.item()` or a boolean index."""
    config = PRESETS["dimaskdino_r50"]
    groups = 100 // max(counts)
    layers = config.decoder_layers + 1

    def meta(*shape):
        return torch.empty(len(counts), *shape, device="meta", requires_grad=True)

    pixels = [meta(256, 200, 272) for _ in "FG"]  # F, and F' of BATO

    def predictions(queries, number=None):
        found = {"pred_logits": meta(queries, 80), "pred_boxes": meta(queries, 4)}
        if number is not None:
            found["pred_masks"] = meta(queries, 200, 272)
            if factors:
                found |= {"mask_embeddings": meta(queries, 256), "pixels": pixels[number > 0]}
        return found

    *aux, outputs = (predictions(300, number) for number in range(layers))
    outputs |= {"aux_outputs": aux, "interm_outputs": predictions(600, 0)}
    outputs["di_outputs"] = [predictions(600) for _ in range(config.interaction_layers)]
    *aux, denoised = (predictions(groups * max(counts), number) for number in range(layers))
    outputs["dn_outputs"] = denoised | {"aux_outputs": aux, "num_groups": groups}
    targets = []
    for n in counts:
        shapes = {"labels": ([n], torch.int64), "boxes": ([n, 4], torch.float32), "masks": ([n, 800, 1088], torch.bool)}
        targets.append({key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in shapes.items()})
    transfers = []

    def cpu(tensor):
        transfers.append(tuple(tensor.shape))
        return torch.zeros(tensor.shape)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    with Calls() as calls, Constants(calls.copies):
        terms = SetCriterion(config)(outputs, targets)
        torch.autograd.backward(list(terms.values()), [torch.ones((), device="meta")] * len(terms))
    assert transfers == [(2, 7 * 300 + 3 * 600, max(counts))]  # the costs of all matchings
    assert len(calls.copies) == 1, calls.copies  # the pairs
    assert calls.count <= 1500
