"""Decoder layers and prediction heads: masks, boxes that look forward twice, gradients, the attention mask."""

import pytest
import torch
import toys

from decoder import masks
from di import Queries
from encoder import Features


def test_masks_are_dot_products_with_the_pixel_features():
    heads = toys.model().double().heads
    x, features = torch.randn(2, 5, 64).double(), torch.randn(2, 64, 4, 6).double()
    found = masks(heads(x, torch.rand(2, 5, 4).double(), features))
    embeddings = heads.mask_head(heads.norm(x))
    for b in range(2):
        for q in range(5):
            expected = (embeddings[b, q][:, None, None] * features[b]).sum(0)
            torch.testing.assert_close(found[b, q], expected)


def test_boxes_look_forward_twice():
    heads = toys.model().heads
    x, features = torch.randn(1, 5, 64), torch.randn(1, 64, 4, 4)
    boxes = torch.rand(1, 5, 4, requires_grad=True)
    heads.predict_layer(x, boxes, features)["pred_boxes"].sum().backward()
    assert (boxes.grad != 0).all()


@pytest.fixture
def layers():
    """A decoder with its heads, `Features` and `Queries`."""
    model, shapes = toys.model(decoder_layers=3).double(), [(1, 1), (1, 1), (2, 2), (4, 4)]
    features = Features(torch.randn(1, 22, 64).double(), shapes, torch.randn(1, 64, 8, 8).double())
    return model.decoder, model.heads, features, Queries(torch.randn(1, 6, 64).double(), torch.rand(1, 6, 4).double())


def test_decoder_layer_hides_what_the_mask_hides(layers):
    decoder, heads, features, queries = layers
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[3:, :3] = True  # the last three do not see the first three
    with torch.no_grad():
        together = decoder.layer(queries, features, heads, 0, hidden)
        alone = decoder.layer(Queries(*(x[:, 3:] for x in queries)), features, heads, 0)
        open_to_all = decoder.layer(queries, features, heads, 0)
    for some, others, all_open in zip(together, alone, open_to_all, strict=True):
        torch.testing.assert_close(some[:, 3:], others)
        torch.testing.assert_close(some[:, :3], all_open[:, :3])
    assert not torch.allclose(together.content[:, 3:], open_to_all.content[:, 3:], atol=1e-3)


def test_only_the_first_layer_passes_the_gradient_of_its_reference_boxes(layers):
    decoder, heads, features, (content, boxes) = layers
    for number in range(3):
        reference = boxes.clone().requires_grad_()
        refined = decoder.layer(Queries(content, reference), features, heads, number)
        sum(x.sum() for x in refined).backward()
        assert (reference.grad is not None) == (number == 0)


def test_refined_boxes_are_corrections_in_logits(layers):
    decoder, heads, features, queries = layers
    with torch.no_grad():
        content, boxes = decoder.layer(queries, features, heads, 1)
        expected = torch.logit(queries.boxes) + heads.box_head(content)
    torch.testing.assert_close(torch.logit(boxes), expected)
