"""BATO: which queries guide, Eq. 5 to 8 by hand, gradients."""

import pytest
import torch
import torch.nn.functional as F
import toys

from di import Queries
from encoder import Features


@pytest.fixture
def guided():
    """BATO's model with 8 guiding queries, its inputs, and their `Queries` with gradients."""
    model = toys.model(num_guiding=8)
    queries = Queries(torch.randn(2, 20, 64, requires_grad=True), torch.rand(2, 20, 4, requires_grad=True))
    features = Features(torch.randn(2, 22, 64), [(1, 1), (1, 1), (2, 2), (4, 4)], torch.randn(2, 64, 8, 8))
    return model, queries, features


def test_bato_guides_by_the_best_queries(guided):
    model, queries, features = guided
    q_bal, boxes = queries
    (t_bal, shapes, refined), guiding = model.bato(queries, features, model.heads, model.decoder.query_pos)
    assert t_bal.shape == features.tokens.shape and refined.shape == features.pixel_features.shape
    assert shapes == features.level_shapes
    assert (refined >= 0).all() and (refined > 0).any()
    scores = model.heads.class_head(q_bal).amax(-1)  # of the queries themselves, without the norm
    assert torch.equal(guiding, scores.argsort(dim=1, descending=True)[:, :8])
    # Only the guiding queries matter, and their boxes pass no gradient.
    (t_bal.sum() + refined.sum()).backward()
    reached = q_bal.grad.abs().sum(-1) > 0
    assert torch.equal(reached, torch.zeros_like(reached).scatter(1, guiding, True))
    assert boxes.grad is None


def test_bato_with_fewer_queries_than_it_wants(guided):
    model, queries, features = guided
    few = Queries(*(x[:, :3] for x in queries))
    (t_bal, _, _), guiding = model.bato(few, features, model.heads, model.decoder.query_pos)
    assert t_bal.shape == features.tokens.shape and guiding.sort().values.tolist() == [[0, 1, 2]] * 2


def test_bato_follows_equations_5_to_8(guided):
    model, queries, features = guided
    (q_bal, boxes), (t_i, shapes, _), bato, heads = queries, features, model.bato, model.heads
    with torch.no_grad():
        (t_bal, _, _), guiding = bato(queries, features, heads, model.decoder.query_pos)
        attention = bato.cross_attn
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        for b in range(2):
            best = q_bal[b, guiding[b]]
            t_g_mask, t_g_box = heads.mask_head(best), model.decoder.query_pos(boxes[b, guiding[b]])
            position = torch.cat([model_sine_position(h, w, 64) for h, w in shapes])
            sources = t_i[b] + position, t_g_mask + t_g_box, t_g_mask  # the boxes are part of the key only
            q, k, v = (
                F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                for x, weight, bias in zip(sources, weights, biases, strict=True)
            )
            mixed = ((q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5).softmax(-1) @ v
            attended = attention.out_proj(mixed.transpose(0, 1).flatten(1))
            torch.testing.assert_close(t_bal[b], bato.ffn(bato.norm(t_i[b] + attended)), rtol=1e-4, atol=1e-5)


def model_sine_position(height, width, dim):
    """2-D sine position in loops, (height * width, dim)."""
    rows = []
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            channels = []
            for value, last in ((y, height), (x, width)):
                for i in range(0, dim // 2, 2):
                    angle = torch.tensor(value / (last + 1e-6) * 2 * torch.pi / 10000 ** (i / (dim // 2)))
                    channels += [angle.sin(), angle.cos()]
            rows.append(torch.stack(channels))
    return torch.stack(rows)
