"""Three training steps against those of the released implementation, in float64 on the CPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import recipe
import torch
from test_golden import FULL, HEIGHT, REDUCED, WIDTH, all_cores, our_loss, recipe_images, recipe_targets, released_model

from convert import released_names
from losses import SetCriterion
from train import CLIP_NORM, backward, parameter_groups

assert all_cores  # a fixture
INSTANCES = [3, 1, 6]  # of the image of each step


def uniform(*size, **options):
    """Takes the place of torch.rand: the same values for every image, instance and layer."""
    return torch.from_numpy(recipe.uniform(*(size[0] if len(size) == 1 else size))).to(**options)


@pytest.fixture(scope="module")
def training():
    """Three steps at the published rates: the terms and the gradient norm of each, and the changes of the weights."""
    model = released_model("dimaskdino_r50", salt=21).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    criterion = SetCriterion(model.config)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4, backbone_lr=1e-5))
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", uniform)
        for number, count in enumerate(INSTANCES):
            images = recipe_images([(HEIGHT, WIDTH)], 60 + number)
            targets = recipe_targets(HEIGHT, WIDTH, [count], 60 + number)
            optimizer.zero_grad()
            terms, _ = backward(model, criterion, [(images, targets)])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            steps.append({name: term.item() for name, term in terms.items()} | {"norm": norm.item()})
    changes = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return SimpleNamespace(model=model, steps=steps, changes=changes)


@pytest.fixture(params=[REDUCED, FULL], ids=["reduced", "full"])
def golden(request):
    if not request.param.is_dir():
        pytest.skip("the full golden data is not here")
    with np.load(request.param / "training_steps.npz") as file:
        return dict(file)


def test_terms_and_gradient_norms(training, golden):
    for number, step in enumerate(training.steps):
        prefix = f"step{number}/"
        expected = {name.removeprefix(prefix): float(x) for name, x in golden.items() if name.startswith(prefix)}
        expected = {our_loss(name): x for name, x in expected.items()}
        expected["loss"], expected["norm"] = expected.pop("total"), expected.pop("grad_norm")
        assert set(step) == set(expected)
        for name, value in expected.items():
            # Terms of about 0 are not compared relatively: denoising queries without noise start at the ground truth.
            assert step[name] == pytest.approx(value, rel=1e-9, abs=1e-12), prefix + name


def test_changes_of_all_parameters(training, golden):
    ours, _ = released_names(training.model.config)
    changes = {source: training.changes[ours[source]] for source in map(str, golden["names"])}
    assert {ours[source] for source in changes} == set(training.changes)
    norms = np.array([change.norm().item() for change in changes.values()])
    sums = np.array([change.sum().item() for change in changes.values()])
    roots = np.sqrt([change.numel() for change in changes.values()])
    np.testing.assert_allclose(norms, golden["delta_norms"], rtol=1e-6)
    # A sum can be about 0; the most that it can be is sqrt(n) times the norm.
    np.testing.assert_array_less(abs(sums - golden["delta_sums"]), 1e-6 * roots * golden["delta_norms"] + 1e-30)
