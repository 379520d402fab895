"""De-Imbalance: the selection operator, candidate boxes, boxes from masks, and the interaction between tokens."""

from dataclasses import replace

import pytest
import torch

from config import PRESETS
from di import CandidateTokens, Queries, TokenInteraction, boxes_from_masks, candidate_boxes, gather_tokens, select
from encoder import cell_centres

CONFIG = PRESETS["tiny"]
F64 = torch.zeros(1, dtype=torch.float64)


def test_select_orders_by_the_best_class():
    tokens = torch.arange(4.0).view(1, 4, 1)
    logits = torch.tensor([[[0.0, 1.0], [5.0, -9.0], [2.0, 2.0], [-1.0, 3.0]]])  # best: 1, 5, 2, 3
    selected, indices = select(tokens, logits, 3)
    assert indices.dtype == torch.int64 and indices.tolist() == [[1, 3, 2]]
    assert selected.flatten().tolist() == [1.0, 3.0, 2.0]


def test_select_takes_the_earlier_of_equal_ones():
    logits = torch.tensor([1.0, 7.0, 1.0, 7.0, 1.0] * 200).view(1, 1000, 1)
    _, indices = select(torch.zeros(1, 1000, 2), logits, 500)
    sevens = [i for i in range(1000) if i % 5 in (1, 3)]
    ones = [i for i in range(1000) if i % 5 in (0, 2, 4)]
    assert indices[0].tolist() == (sevens + ones)[:500]


@pytest.mark.parametrize("k", [7, 8, 1000])
def test_select_takes_all_tokens_where_there_are_fewer_than_k(k):
    logits = torch.randn(2, 7, 3)
    selected, indices = select(torch.randn(2, 7, 4), logits, k)
    assert selected.shape == (2, 7, 4)
    assert [sorted(row) for row in indices.tolist()] == [list(range(7))] * 2


def test_select_sends_gradients_to_exactly_the_selected_tokens():
    tokens = torch.randn(2, 20, 4, requires_grad=True)
    logits = torch.randn(2, 20, 3, requires_grad=True)
    weight = torch.randn(2, 5, 4)
    selected, indices = select(tokens, logits, 5)
    (selected * weight).sum().backward()
    expected = torch.zeros(2, 20, 4)
    for b in range(2):
        expected[b, indices[b]] = weight[b]
    assert torch.equal(tokens.grad, expected)
    assert logits.grad is None


def test_select_treats_the_images_of_a_batch_on_their_own():
    tokens, logits = torch.randn(3, 20, 4), torch.randn(3, 20, 3)
    selected, indices = select(tokens, logits, 6)
    for b in range(3):
        alone, alone_indices = select(tokens[b : b + 1], logits[b : b + 1], 6)
        assert torch.equal(selected[b : b + 1], alone) and torch.equal(indices[b : b + 1], alone_indices)


def test_gather_tokens():
    x = torch.randn(2, 5, 3)
    gathered = gather_tokens(x, torch.tensor([[4, 0], [1, 1]]))
    assert torch.equal(gathered, torch.stack([x[0, [4, 0]], x[1, [1, 1]]]))


def loop_box(mask):
    """Brute force for one mask (H, W): (cx, cy, w, h) in units of W and H."""
    H, W = mask.shape
    pixels = [(x, y) for y in range(H) for x in range(W) if mask[y][x]]
    if not pixels:
        return [1.0, 1.0, 0.0, 0.0]
    xs, ys = zip(*pixels, strict=True)
    x0, y0, x1, y1 = min(xs), min(ys), max(xs), max(ys)
    return [(x0 + x1) / 2 / W, (y0 + y1) / 2 / H, (x1 - x0) / W, (y1 - y0) / H]


def test_boxes_from_masks_equal_a_loop():
    torch.manual_seed(0)
    logits = torch.randn(2, 30, 6, 9, dtype=torch.float64) - 1.5  # few positive pixels
    logits[0, 0] = -1  # empty
    logits[0, 1] = 0  # not positive: empty
    logits[0, 2] = 1  # full
    for i, (y, x) in enumerate([(0, 0), (5, 8), (0, 8), (3, 4)]):  # one pixel
        logits[1, i] = -1
        logits[1, i, y, x] = 1e-9
    boxes = boxes_from_masks(logits)
    expected = torch.tensor([[loop_box(mask) for mask in masks] for masks in logits > 0], dtype=torch.float64)
    assert boxes.dtype == torch.float64
    torch.testing.assert_close(boxes, expected, rtol=1e-12, atol=0)
    assert boxes[0, 0].tolist() == boxes[0, 1].tolist() == [1, 1, 0, 0]
    assert boxes[1, 1].tolist() == [8 / 9, 5 / 6, 0, 0]


def test_boxes_from_masks_with_bitmask_are_one_pixel_larger():
    torch.manual_seed(0)
    logits = torch.randn(1, 20, 6, 9, dtype=torch.float64) - 1.5
    logits[0, 0] = -1
    x, y, w, h = boxes_from_masks(logits).unbind(-1)
    expected = torch.stack([x + 0.5 / 9, y + 0.5 / 6, w + 1 / 9, h + 1 / 6], -1)
    expected[0, 0] = 0  # empty
    torch.testing.assert_close(boxes_from_masks(logits, "bitmask"), expected, rtol=1e-12, atol=1e-15)


def test_boxes_from_masks_have_no_gradient():
    assert not boxes_from_masks(torch.randn(1, 2, 4, 4, requires_grad=True)).requires_grad


def test_candidate_boxes():
    shapes = [(1, 2), (2, 3), (4, 6), (8, 12)]
    logits, valid = candidate_boxes(shapes, F64)
    assert logits.dtype == torch.float64 and logits.shape == (2 + 6 + 24 + 96, 4) and valid.shape == (128, 1)
    row = 0
    for level, (H, W) in enumerate(shapes):
        for y in range(H):
            for x in range(W):
                # The coarsest level has the smallest boxes, as released.
                box = torch.tensor([(x + 0.5) / W, (y + 0.5) / H, 0.05 * 2**level, 0.05 * 2**level]).double()
                torch.testing.assert_close(logits[row].sigmoid(), box, rtol=1e-7, atol=1e-7)
                row += 1
    assert valid.all()


def test_candidate_boxes_are_valid_between_1_and_99_percent():
    (height, width) = shape = (3, 64)
    logits, valid = candidate_boxes([shape], F64)
    x = cell_centres([shape], F64)[:, 0]
    outside = (x <= 0.01) | (x >= 0.99)  # the first and the last column: centre 0.5 / 64
    assert outside.sum() == 2 * height and width * 0.01 < 1
    assert torch.equal(valid[:, 0], ~outside)
    assert logits[outside].isposinf().all() and logits[~outside].isfinite().all()


def test_candidates_are_zeroed_where_invalid():
    torch.manual_seed(0)
    candidates, shapes = CandidateTokens(CONFIG), [(1, 1), (1, 64)]
    t_i = torch.randn(2, 65, CONFIG.hidden_dim)
    tokens, proposals = candidates(t_i, shapes)
    invalid = proposals.isinf().any(-1)
    assert invalid.sum() == 2
    zero = candidates.norm(candidates.linear(torch.zeros(CONFIG.hidden_dim)))
    torch.testing.assert_close(tokens[:, invalid], zero.expand(2, 2, -1))
    torch.testing.assert_close(tokens[:, ~invalid], candidates.norm(candidates.linear(t_i[:, ~invalid])))


@pytest.fixture
def interaction():
    torch.manual_seed(0)
    module = TokenInteraction(replace(CONFIG, interaction_layers=2))
    torch.nn.init.normal_(module.box_head.layers[-1].weight, std=0.1)  # zero at first: no box would move
    return module.double()


def test_interaction_keeps_each_new_box_but_passes_it_on_detached(interaction):
    x = torch.randn(1, 6, CONFIG.hidden_dim, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(1, 6, 4, dtype=torch.float64).clamp(0.1, 0.9).requires_grad_()
    states = interaction(Queries(x, boxes))
    assert len(states) == 2
    for tokens, refined in states:
        assert tokens.shape == x.shape and refined.shape == boxes.shape and refined.requires_grad
        assert ((refined > 0) & (refined < 1)).all()
    # The second layer's box reaches x, through the tokens, but neither the first layer's box nor the input box.
    first_box, second_box = states[0][1], states[1][1]
    gradients = torch.autograd.grad(second_box.sum(), [x, first_box, boxes], allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None and gradients[2] is None


def test_interaction_does_not_depend_on_the_order_of_the_tokens(interaction):
    x, boxes = torch.randn(1, 6, CONFIG.hidden_dim, dtype=torch.float64), torch.rand(1, 6, 4, dtype=torch.float64)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    orders = interaction(Queries(x, boxes)), interaction(Queries(x[:, order], boxes[:, order]))
    for (a, box_a), (b, box_b) in zip(*orders, strict=True):
        torch.testing.assert_close(a[:, order], b)
        torch.testing.assert_close(box_a[:, order], box_b)
