"""Denoising queries: groups, noise and its bounds, padding, and the attention mask."""

from dataclasses import replace

import pytest
import torch
import toys

from config import PRESETS
from denoising import Denoising
from di import Queries

CLASSES, WIDTH = PRESETS["tiny"].num_classes, 32


def denoise(batch, num_matching=4, num_queries=100, noise_scale=0.4):
    """The queries in front of `num_matching` others: content, boxes, attention mask, groups; and the embedding."""
    torch.manual_seed(0)
    fields = {"hidden_dim": WIDTH, "denoising_queries": num_queries, "noise_scale": noise_scale}
    denoising = Denoising(replace(PRESETS["tiny"], **fields)).double().train()
    shape = len(batch), num_matching
    matching = Queries(torch.rand(*shape, WIDTH).double(), torch.rand(*shape, 4).double())
    queries, number, groups, mask = denoising(matching, batch)
    for found, given in zip(queries, matching, strict=True):
        assert torch.equal(found[:, number:], given)
    return queries.content[:, :number], queries.boxes[:, :number], mask, groups, denoising.label_embedding


def targets(*counts):
    return toys.targets(*counts, dtype=torch.float64)


def test_without_noise_the_queries_are_the_ground_truth():
    batch = targets(3, 2)
    content, boxes, _, groups, embedding = denoise(batch, noise_scale=0.0)
    assert groups == 33 and content.shape == (2, 99, WIDTH) and boxes.shape == (2, 99, 4)
    assert content.dtype == boxes.dtype == torch.float64
    for b, target in enumerate(batch):
        n = len(target["labels"])
        for group in range(groups):  # query g * n_max + i is instance i in group g
            own = slice(3 * group, 3 * group + n)
            assert torch.equal(content[b, own], embedding(target["labels"]))
            torch.testing.assert_close(boxes[b, own], target["boxes"], rtol=1e-12, atol=0)
    padding = torch.arange(99) % 3 == 2
    assert (content[1, padding] == 0).all() and (boxes[1, padding] == 0.5).all()
    assert content.requires_grad


def test_number_of_groups():
    for counts, num_queries, groups in [((1, 0), 100, 100), ((7, 3), 100, 14), ((100,), 100, 1), ((4,), 11, 2)]:
        content, boxes, mask, found, _ = denoise(targets(*counts), 6, num_queries)
        assert found == groups
        assert content.shape[1] == boxes.shape[1] == groups * max(counts)
        assert mask.shape == (groups * max(counts) + 6,) * 2


@pytest.mark.parametrize("counts", [(0,), (0, 0), (101, 3)])
def test_none_without_instances_and_with_too_many(counts):
    content, boxes, mask, groups, _ = denoise(targets(*counts))
    assert content.shape[1] == boxes.shape[1] == groups == 0 and mask is None


def test_attention_mask():
    _, _, mask, groups, _ = denoise(targets(2, 3), num_queries=9)
    assert groups == 3 and mask.dtype == torch.bool
    for query in range(13):
        for key in range(13):
            seen = key >= 9 or (query < 9 and query // 3 == key // 3)  # matching queries, or the own group
            assert mask[query, key] == (not seen)


@pytest.mark.parametrize("noise_scale", [0.4, 1.0])
def test_noise_keeps_its_bounds_and_fills_them(noise_scale):
    torch.manual_seed(1)
    batch = targets(2)
    batch[0]["boxes"] = torch.tensor([[0.5, 0.4, 0.2, 0.3], [0.6, 0.5, 0.1, 0.2]]).double()
    _, boxes, _, groups, _ = denoise(batch, 4, 2000, noise_scale)
    assert groups == 1000
    truth = batch[0]["boxes"]
    noise = (boxes.view(groups, 2, 4) - truth) / truth[:, [2, 3, 2, 3]] / torch.tensor([0.5, 0.5, 1, 1])
    assert noise.abs().max() <= noise_scale + 1e-4  # sides near 0 are kept at 1e-5
    assert noise.amax((0, 1)).min() > 0.98 * noise_scale and noise.amin((0, 1)).max() < -0.98 * noise_scale
    assert noise.mean((0, 1)).abs().max() < 0.1 * noise_scale  # uniform: standard error 0.013 * noise_scale
    torch.testing.assert_close(noise.std((0, 1)) / noise_scale, torch.full((4,), 3**-0.5).double(), rtol=0.05, atol=0)


def test_noisy_boxes_stay_in_the_image():
    batch = targets(1)
    batch[0]["boxes"] = torch.tensor([[0.02, 0.98, 1.0, 1.0]]).double()
    _, boxes, _, _, _ = denoise(batch, 4, 1000, 1.0)
    assert ((boxes > 0) & (boxes < 1)).all() and boxes[..., 0].min() < 2e-5 and boxes[..., 1].max() > 1 - 2e-5


def test_a_fifth_of_the_labels_becomes_random():
    torch.manual_seed(1)
    batch = targets(1)
    batch[0]["labels"] = torch.tensor([2])
    content, _, _, groups, embedding = denoise(batch, 4, 10000, 0.4)
    label = (content[0, :, None] == embedding.weight).all(-1).int().argmax(-1)
    share = label.bincount(minlength=CLASSES) / groups
    wanted = torch.full((CLASSES,), 0.02).index_fill(0, torch.tensor(2), 0.82)  # a fifth is redrawn, from all classes
    assert (share - wanted).abs().max() < 0.015


def test_matching_predictions_do_not_see_the_denoising_queries():
    model = toys.model().double().train()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        alone = model(images)
        for count in (1, 4):
            outputs = model(images, targets(count))
            for ours, theirs in zip([*alone["aux_outputs"], alone], [*outputs["aux_outputs"], outputs], strict=True):
                for name in ("pred_logits", "pred_boxes", "mask_embeddings"):
                    torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9)


def test_groups_do_not_see_each_other():
    model = toys.model(denoising_queries=50, noise_scale=0.0).double().train()
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 64), targets(4))["dn_outputs"]
    groups = outputs["num_groups"]
    assert groups == 12  # 50 // 4
    for layer in [outputs, *outputs["aux_outputs"]]:
        by_group = layer["pred_logits"].unflatten(1, (groups, 4))
        torch.testing.assert_close(by_group, by_group[:, :1].expand_as(by_group), rtol=1e-9, atol=1e-9)
