"""The model against what the released implementation computes from the same weights, in float64 on the CPU.

The reduced copy in tests/golden is always compared, the full set beside the repository where there is one. The model
runs once for both.
"""

import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recipe
import torch
from reduce import project

import losses
import ops
from config import PRESETS
from convert import convert_state_dict, released_names
from decoder import masks
from detections import postprocess
from di import candidate_boxes
from losses import SetCriterion
from matcher import HungarianMatcher
from model import build_model

REDUCED = Path(__file__).resolve().parent / "golden"
FULL = Path(__file__).resolve().parents[2] / "shared" / "golden"
HEIGHT, WIDTH = 256, 320
PADDED_SIZES = [[470, 500], [450, 489]]
DRAWS = 20  # of the points of the mask losses


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """All cores that the workers of pytest-xdist leave to each, as the tensors are large; two threads on one core wait
    for each other for longer than they compute.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    with threads(max(1, os.cpu_count() // workers)):
        yield


@pytest.fixture(params=["reduced", "full"])
def load(request):
    """Function that loads a golden file by name, {name: array}, from the reduced copy or the full set."""
    folder = {"reduced": REDUCED, "full": FULL}[request.param]

    def load(name):
        if not folder.is_dir():
            pytest.skip("the full golden data is not here")
        with np.load(folder / f"{name}.npz") as file:
            golden = dict(file)
        if "loss_names" in golden:
            golden |= {f"loss/{n}": x for n, x in zip(golden["loss_names"], golden["loss_values"], strict=True)}
        return golden

    return load


def assert_close(ours, golden, name, rtol=1e-6):
    """Every number within rtol of its own size; numbers a thousand times smaller than the largest may be off by rtol of
    that thousandth. A reduced golden array is compared with the same projection of ours.
    """
    ours = np.asarray(ours.detach(), np.float64)
    if ours.ndim == golden.ndim + 1:
        ours = project(ours)
    assert ours.shape == golden.shape, name
    np.testing.assert_allclose(ours, golden, rtol=rtol, atol=1e-3 * rtol * abs(golden).max(), err_msg=name)


def released_model(preset, salt=0):
    """The preset with the recipe's weights, float64."""
    weights = recipe.weights(REDUCED / f"keys_{preset}.json.gz", salt)
    with torch.device("meta"):  # no random values that are replaced at once
        model = build_model(preset, noise_scale=0.0)
    model.load_state_dict(convert_state_dict(weights), assign=True)
    return model


def recipe_images(sizes, first_seed=0):
    images = (recipe.image(h, w, first_seed + b) for b, (h, w) in enumerate(sizes))
    return [torch.from_numpy(image).permute(2, 0, 1).double() / 255 for image in images]


def recipe_targets(height, width, counts, first_seed=0):
    arrays = (recipe.targets(height, width, n, seed=first_seed + b) for b, n in enumerate(counts))
    return [dict(zip(("labels", "boxes", "masks"), map(torch.from_numpy, target), strict=True)) for target in arrays]


@pytest.fixture(scope="module", params=["dimaskdino_r50", "maskdino_r50"])
def system(request):
    """One system with all it computes on the recipe's images: in evaluation mode, and forward, losses and backward."""
    model = released_model(request.param)
    counts = [3, 5] if model.config.di else [3]
    images = recipe_images([(HEIGHT, WIDTH)] * len(counts))
    model.eval()
    with torch.no_grad():
        inference = model(images)
    sizes = [(HEIGHT, WIDTH)] * len(counts)
    detections = postprocess(inference, sizes, sizes)

    model.train()
    targets = recipe_targets(HEIGHT, WIDTH, counts)
    outputs = model(images, targets)
    # Mask costs are 0 in this matching, and `test_mask_losses` samples the masks: few points do here.
    criterion = SetCriterion(replace(model.config, loss_points=4))
    criterion.matcher.cost_mask = criterion.matcher.cost_dice = 0
    sets = {"": outputs, "_interm": outputs["interm_outputs"]}
    sets |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
    pairs = {suffix: (layer, criterion.matcher({"": layer}, targets)[""]) for suffix, layer in sets.items()}
    terms = criterion(outputs, targets)
    total = criterion.total({n: term for n, term in terms.items() if "mask" not in n and "dice" not in n})
    total.backward()
    return SimpleNamespace(
        name=request.param,
        model=model,
        images=images,
        inference=inference,
        detections=detections,
        targets=targets,
        outputs=outputs,
        pairs=pairs,
        criterion=criterion,
        terms={name: term.detach() for name, term in terms.items()},
        total=total.detach(),
    )


def our_loss(name):
    """Our name of a released loss term: loss/oldm_loss_ce_0 -> loss_ce_di_0."""
    name = name.removeprefix("loss/")
    if name.startswith("oldm_"):
        term, layer = name.removeprefix("oldm_").rsplit("_", 1)
        return f"{term}_di_{layer}"
    return name


def test_inputs(system, load):
    golden = load(system.name)
    for b, (image, target) in enumerate(zip(system.images, system.targets, strict=True)):
        if "images" in golden:
            np.testing.assert_array_equal((image * 255).permute(1, 2, 0), golden["images"][b])
        np.testing.assert_array_equal(target["labels"], golden[f"tgt{b}_labels"])
        np.testing.assert_array_equal(target["masks"].sum((1, 2)), golden[f"tgt{b}_mask_area"])
        assert_close(target["boxes"], golden[f"tgt{b}_boxes"], f"boxes of image {b}")


def selections(outputs):
    """{golden name: indices} of the selections and, with BATO, of the guiding queries."""
    found = dict(zip(("first_selection", "second_selection"), outputs["selections"], strict=False))
    return found if outputs["guiding"] is None else found | {"guiding_tokens": outputs["guiding"]}


def test_selections(system, load):
    golden, found = load(system.name), selections(system.inference)
    assert set(found) == {"first_selection", "second_selection", "guiding_tokens"} & set(golden)
    for name, indices in found.items():
        assert indices.dtype == torch.int64
        np.testing.assert_array_equal(indices, golden[name], err_msg=name)


def assert_same_detections(detections, golden):
    for b, found in enumerate(detections):
        np.testing.assert_array_equal(found["labels"], golden[f"det{b}_labels"])
        np.testing.assert_array_equal(found["masks"].sum((1, 2)), golden[f"det{b}_mask_area"])
        for name in ("scores", "boxes"):
            assert_close(found[name], golden[f"det{b}_{name}"], f"det{b}_{name}")


def test_detections(system, load):
    assert_same_detections(system.detections, load(system.name))


def test_detections_in_plain_pytorch(system, monkeypatch):
    """Without the compiled deformable attention."""
    monkeypatch.setitem(ops.WITHOUT_OP, "cpu", "is switched off")
    with torch.no_grad():
        outputs = system.model.eval()(system.images)
    system.model.train()
    for name, indices in selections(outputs).items():
        assert torch.equal(indices, selections(system.inference)[name])
    sizes = [(HEIGHT, WIDTH)] * len(system.images)
    with np.load(REDUCED / f"{system.name}.npz") as golden:
        assert_same_detections(postprocess(outputs, sizes, sizes), golden)


def assert_same_predictions(predictions, golden, prefix):
    assert_close(predictions["pred_logits"], golden[f"{prefix}logits"], f"{prefix}logits")
    assert_close(predictions["pred_boxes"], golden[f"{prefix}boxes"], f"{prefix}boxes")
    assert ("mask_embeddings" in predictions) == (f"{prefix}masks_mean" in golden)
    if "mask_embeddings" in predictions:
        logits = masks(predictions).flatten(2)
        assert_close(logits.mean(2), golden[f"{prefix}masks_mean"], f"{prefix}masks_mean")
        assert_close(logits.std(2), golden[f"{prefix}masks_std"], f"{prefix}masks_std")


def test_every_layer(system, load):
    golden, outputs = load(system.name), system.outputs
    denoised = outputs["dn_outputs"]
    sets = {f"layer{i}_": layer for i, layer in enumerate([*outputs["aux_outputs"], outputs])}
    sets |= {f"dn{i}_": layer for i, layer in enumerate([*denoised["aux_outputs"], denoised])}
    sets |= {f"interaction{i}_": layer for i, layer in enumerate(outputs["di_outputs"])}
    sets["encoder_"] = outputs["interm_outputs"]
    assert {f"{prefix}logits" for prefix in sets} == {name for name in golden if name.endswith("_logits")}
    for prefix, predictions in sets.items():
        assert_same_predictions(predictions, golden, prefix)
    first = masks(outputs)[:, :8]
    assert_close(first, golden["final_masks_first_queries"], "final_masks_first_queries")
    assert denoised["num_groups"] == golden["dn_groups"]
    assert denoised["pred_logits"].shape[1] == golden["dn_pad"]


def test_class_and_box_losses(system, load):
    golden = {our_loss(name): x for name, x in load(system.name).items() if name.startswith("loss/")}
    assert set(golden) == set(system.terms)
    for name, value in golden.items():
        if "mask" not in name and "dice" not in name:
            # loss_bbox_dn_0 is about 0, as the denoising queries start at the ground truth: 1e-9 is for it.
            assert system.terms[name].item() == pytest.approx(float(value), rel=1e-6, abs=1e-9), name


@pytest.fixture(scope="module")
def mask_loss_draws(system):
    """Own draws of every mask and dice term: {name: (array of draws, number of golden draws in one golden value)}."""
    outputs, targets = system.outputs, system.targets
    count = sum(len(t["labels"]) for t in targets)
    sets = dict(system.pairs)
    # Without noise all denoising groups are the same: one is enough, and the golden value is the mean over all of them.
    groups = outputs["dn_outputs"]["num_groups"]
    n_max = outputs["dn_outputs"]["pred_logits"].shape[1] // groups
    one_group = losses.denoising_pairs([len(t["labels"]) for t in targets], 1)
    denoised = [outputs["dn_outputs"], *outputs["dn_outputs"]["aux_outputs"]]
    for suffix, layer in zip(["_dn", *(f"_dn_{i}" for i in range(len(denoised) - 1))], denoised, strict=True):
        by_group = masks(layer).detach().unflatten(1, (groups, n_max))
        torch.testing.assert_close(by_group, by_group[:, :1].expand_as(by_group), rtol=1e-9, atol=1e-9)
        sets[suffix] = layer, one_group
    draws, rand = {}, torch.rand
    with torch.random.fork_rng(devices=[]), torch.no_grad(), threads(1), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        # The points are those of float64; what is found there is computed in float32, quicker and far below the spread.
        patch.setattr(torch, "rand", lambda *size, dtype, device: rand(*size, dtype=torch.float64).to(device, dtype))
        num_points = system.model.config.loss_points
        for suffix, (layer, pairs) in sets.items():
            maps = torch.cat([m[query] for m, (query, _) in zip(masks(layer), pairs, strict=True)]).float()
            wanted = torch.cat([t["masks"][index] for t, (_, index) in zip(targets, pairs, strict=True)])
            found = []
            for _ in range(DRAWS):
                points = losses.draw_points([{"masks": wanted}], num_points, maps)
                terms = losses.mask_losses(maps[:, None], torch.arange(len(maps)), *points, num_points)
                found.append([term.sum() for term in terms])
            for name, values in zip(("loss_mask", "loss_dice"), zip(*found, strict=True), strict=True):
                draws[name + suffix] = np.array(values) / count, groups if "dn" in suffix else 1
    return draws


def test_mask_losses(system, mask_loss_draws, load):
    golden = {n: float(x) for n, x in load(system.name).items() if n.startswith(("loss/loss_mask", "loss/loss_dice"))}
    assert {f"loss/{name}" for name in mask_loss_draws} == set(golden)
    deviations = []
    for name, (values, repeats) in mask_loss_draws.items():
        spread = values.std(ddof=1) * (1 / repeats + 1 / DRAWS) ** 0.5
        assert 0 < spread < 0.02 * values.mean(), name
        deviations.append((golden[f"loss/{name}"] - values.mean()) / spread)
    # Each is about a standard normal value if both implementations draw from the same distribution.
    assert np.abs(deviations).max() < 4.5
    assert np.square(deviations).mean() < 2.5


def test_gradients(system, load):
    golden = load(system.name)
    assert system.total.item() == pytest.approx(float(golden["total_box_class_loss"]), rel=1e-6)
    gradients = {name: p.grad for name, p in system.model.named_parameters()}
    ours, _ = released_names(system.model.config)
    reached = {ours[str(name)]: norm for name, norm in zip(golden["grad_names"], golden["grad_norms"], strict=True)}
    for name, norm in reached.items():
        assert gradients[name].norm().item() == pytest.approx(float(norm), rel=1e-5), name
    for name in gradients.keys() - reached.keys():  # the released total does not reach these
        assert gradients[name] is None or gradients[name].abs().max() == 0, name


@pytest.fixture(scope="module")
def padded_model():
    """The model of both padded cases, their images, and T_i and F (they take most of the time)."""
    model = released_model("dimaskdino_r50", salt=3).eval()
    images = recipe_images(PADDED_SIZES, 5)
    with torch.no_grad():
        return model, images, model.encoder(model.backbone(model.batch(images)))


@pytest.fixture(scope="module", params=["padded", "padded_empty_masks"])
def padded(request, padded_model):
    """Two images of unequal size in one batch, evaluated with all layers; the boxes of many tokens are invalid."""
    model, images, features = padded_model
    with np.load(REDUCED / f"{request.param}.npz") as golden:
        assert golden["sizes"].tolist() == PADDED_SIZES
        shift = float(golden["mask_shift"])
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.backbone, "forward", lambda images: None)
        # `mask_shift` is added to the bias of the convolution that F comes out of.
        patch.setattr(
            model.encoder, "forward", lambda maps: features._replace(pixel_features=features.pixel_features + shift)
        )
        bias = model.heads.mask_head.layers[2].bias
        patch.setattr(bias, "data", bias.data - shift)
        return SimpleNamespace(name=request.param, outputs=model(images))


def test_padded_selections(padded, load):
    golden, (first, second) = load(padded.name), padded.outputs["selections"]
    shapes = [(8, 8), (15, 16), (30, 32), (60, 64)]  # C6...C3 of the padded 480 x 512
    valid = candidate_boxes(shapes, torch.zeros(1, dtype=torch.float64))[1][:, 0].numpy()
    for ours, theirs in zip(first.numpy(), golden["first_selection"], strict=True):
        # The invalid ones score the same, so their order is free. Here all of them are selected.
        assert (~valid[theirs]).sum() == (~valid).sum() == 244
        np.testing.assert_array_equal(valid[ours], valid[theirs])
        np.testing.assert_array_equal(ours[valid[ours]], theirs[valid[theirs]])
        assert set(ours) == set(theirs)
    np.testing.assert_array_equal(second, golden["second_selection"])
    np.testing.assert_array_equal(padded.outputs["guiding"], golden["guiding_tokens"])


def test_padded_predictions(padded, load):
    golden, outputs = load(padded.name), padded.outputs
    assert outputs["pixel_features"].shape[-2:] == (120, 128)
    assert_same_predictions(outputs, golden, "")
    assert_close(outputs["interm_outputs"]["pred_boxes"], golden["encoder_boxes"], "encoder_boxes")
    empty = ~(masks(outputs["interm_outputs"]) > 0).flatten(2).any(2)
    assert padded.name == "padded" or empty.sum() == 293


@pytest.mark.parametrize("padded", ["padded"], indirect=True)
def test_padded_detections(padded, load):
    golden = load(padded.name)
    assert_same_detections(postprocess(padded.outputs, PADDED_SIZES, golden["output_sizes"].tolist()), golden)


@pytest.mark.parametrize("padded", ["padded"], indirect=True)
def test_padded_matching(padded, load, monkeypatch):
    golden = load(padded.name)
    points = np.random.RandomState(golden["match_points_seed"]).rand(1, 12544, 2)
    shared = lambda *size, dtype, device: torch.from_numpy(points).to(device, dtype).expand(*size)
    monkeypatch.setattr(torch, "rand", shared)
    targets = recipe_targets(480, 512, golden["match_targets"].tolist(), 5)
    matcher = HungarianMatcher(PRESETS["dimaskdino_r50"])
    costs, pairs = matcher.costs({"": padded.outputs}, targets), matcher({"": padded.outputs}, targets)[""]
    for b, (query, index) in enumerate(pairs):
        expected = sorted(zip(golden[f"match{b}_query"], golden[f"match{b}_target"], strict=True))
        assert list(zip(query, index, strict=True)) == expected
        assert_close(costs[b, :, : len(targets[b]["labels"])], golden[f"match{b}_cost"], f"match{b}_cost")
