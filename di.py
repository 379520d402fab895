"""De-Imbalance (Sec. 3.2.2): the selections, the tokens that the first one scores, and the interaction between tokens.

The residual fusion, Eq. 4, is the first decoder layer (`decoder.DecoderLayer`): in the released model it is its
cross-attention from the selected tokens T_s2 to the initial tokens T_i.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn

from attention import MLP, FeedForward, inverse_sigmoid, sine_box
from encoder import cell_centres
from precision import full_precision, in_full_precision, published


class Queries(NamedTuple):
    """What DI makes, and the decoder refines layer by layer."""

    content: torch.Tensor  # (B, Q, C)
    boxes: torch.Tensor  # (B, Q, 4) reference boxes, cxcywh in [0, 1] relative to the padded batch


def refine(boxes, x, box_head):
    """Boxes (B, Q, 4), cxcywh in [0, 1], moved in logits by what the box head makes of the queries x (B, Q, C)."""
    return (in_full_precision(box_head, x) + inverse_sigmoid(boxes)).sigmoid()


def gather_tokens(x, indices):
    """x (B, S, C), indices (B, k) int64 -> (B, k, C)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def select(tokens, class_logits, k):
    """S(T, k) of Eq. 1 and 3: the k tokens with the highest class score, best first; of equal ones, the earlier first.

    tokens (B, S, C), class_logits (B, S, number of classes). k larger than S selects all S.
    Returns the selected tokens (B, min(k, S), C) and their indices, int64 (B, min(k, S)).
    """
    scores = class_logits.amax(-1)
    if torch.compiler.is_exporting():  # ONNX has no stable sort, its TopK takes the earlier of equal ones; .pt2 any
        # Not min(k, S): of it torch.export makes a symbol, and so of every size that follows.
        indices = scores.topk(k if scores.shape[1] >= k else scores.shape[1], dim=1).indices
    else:
        indices = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return gather_tokens(tokens, indices), indices


def candidate_boxes(level_shapes, like):
    """One candidate box per token, as logits of cxcywh (S, 4), +inf where invalid, and which are valid (S, 1) bool.

    A box lies on the centre of its cell; its side is 0.05 * 2^l with l = 0 at the coarsest level: the coarse levels get
    the small boxes, as in the released model. Valid: all four numbers within (0.01, 0.99).
    """
    centres = cell_centres(level_shapes, like)
    sides = torch.cat([centres.new_full((h * w, 2), 0.05 * 2**level) for level, (h, w) in enumerate(level_shapes)])
    boxes = torch.cat([centres, sides], -1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    return torch.logit(boxes).masked_fill(~valid, torch.inf), valid


class CandidateTokens(nn.Module):
    """The tokens that the first selection scores: LayerNorm(Linear(T_i)), with T_i zero where the box is invalid."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, t_i, level_shapes):
        """t_i (B, S, C), levels coarse to fine. Returns tokens (B, S, C) and candidate box logits (S, 4)."""
        proposals, valid = candidate_boxes(level_shapes, self.linear.weight)
        return self.norm(self.linear(t_i * valid)), proposals


def boxes_from_masks(mask_logits, box_init="mask"):
    """Boxes around the pixels with a positive logit; no gradient.

    mask_logits (B, Q, H, W). Returns cxcywh (B, Q, 4) in units of W and H, of half-precision masks in float32. With
    box_init "mask" a box reaches from the first to the last pixel's index, and an empty mask gives (1, 1, 0, 0); with
    "bitmask" it reaches to the last index + 1, and an empty mask gives (0, 0, 0, 0).
    """
    logits, dtype = mask_logits.detach(), full_precision(mask_logits[:0]).dtype
    wider, extremes = int(box_init == "bitmask"), []
    for line in (logits.amax(-2) > 0, logits.amax(-1) > 0):  # (B, Q, W) columns, (B, Q, H) rows
        size, there = line.shape[-1], line.any(-1)
        empty = 0 if wider else size  # where the box of an empty mask lies
        first = torch.where(there, line.int().argmax(-1), empty)  # the first of equal ones
        last = torch.where(there, size - 1 - line.flip(-1).int().argmax(-1) + wider, empty)
        extremes.append(torch.stack([first + last, 2 * (last - first)], -1).to(dtype) / (2 * size))
    return torch.stack(extremes, -1).flatten(-2)  # [[cx, cy], [w, h]] -> (cx, cy, w, h)


class InteractionLayer(nn.Module):
    """Self-attention between the selected tokens, then the feed-forward network; post-norm."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(config.hidden_dim, config.num_heads, batch_first=True)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.ffn = FeedForward(config.hidden_dim, config.feedforward_dim)

    def forward(self, x, query_pos):
        """x, query_pos (B, k1, C). Returns (B, k1, C)."""
        q = k = x + query_pos
        return self.ffn(self.norm(x + self.self_attn(q, k, x, need_weights=False)[0]))


class TokenInteraction(nn.Module):
    """T_s1^sa = MHSA(T_s1), Eq. 2: tokens that stand for the same object see each other and refine their boxes."""

    float32 = False

    def __init__(self, config):
        super().__init__()
        C = config.hidden_dim
        layer = InteractionLayer(config)
        self.layers = nn.ModuleList(deepcopy(layer) for _ in range(config.interaction_layers))  # as released
        self.query_pos = MLP(2 * C, C, C, 2)
        self.box_head = MLP(C, C, 4, 3)  # shared by the layers
        self.norm = nn.LayerNorm(C)
        nn.init.zeros_(self.box_head.layers[-1].weight)
        nn.init.zeros_(self.box_head.layers[-1].bias)

    @published
    def forward(self, queries):
        """The selected tokens as `Queries` (B, k1, ...). Returns them after every layer, a list."""
        states, (x, boxes) = [], queries
        for layer in self.layers:
            boxes = boxes.detach()
            x = layer(x, self.query_pos(sine_box(boxes, x.shape[-1])))
            boxes = refine(boxes, x, self.box_head)
            states.append(Queries(x, boxes))
        return states

    def select(self, queries, heads, k):
        """T_s2 = S(T_s1^sa, k2), Eq. 3. Returns the best k of the last layer's `Queries`, and their indices."""
        t_s1_sa, boxes = queries
        t_s2, indices = select(t_s1_sa, in_full_precision(heads.class_head, self.norm(t_s1_sa)), k)
        return Queries(t_s2, inverse_sigmoid(gather_tokens(boxes, indices)).sigmoid()), indices

    def predict(self, queries, heads):
        """Returns one layer's pred_logits and pred_boxes, for its loss; the box head is applied once more."""
        x = self.norm(queries.content)
        boxes = refine(queries.boxes, x, self.box_head)
        return {"pred_logits": heads.class_head(heads.norm(x)), "pred_boxes": boxes}


class DeImbalance(nn.Module):
    """Residual double-selection: T_i -> T_s1 (Eq. 1) -> T_s1^sa (Eq. 2) -> T_s2 (Eq. 3), with predictions of each."""

    def __init__(self, config):
        super().__init__()
        self.sizes, self.box_init = config.selections, config.box_init
        self.candidates = CandidateTokens(config)
        self.interactions = nn.ModuleList(TokenInteraction(config) for _ in self.sizes[1:])
        self.position_tokens = nn.Embedding(self.sizes[-1], 4) if config.position_tokens == "random" else None

    def forward(self, features, heads):
        """features: `Features` with T_i; heads: the model's own.

        Returns T_s2 as `Queries`, the decoder's input; {"t_s1", "t_s2": `Queries`}, which may guide BATO (Table 5); and
        a dictionary with interm_outputs, di_outputs and selections of the model's outputs.
        """
        queries, predictions, indices = self.first_selection(features, heads)  # Eq. 1: T_s1
        stages, di_outputs, selections = {"t_s1": queries}, [], [indices]
        for interaction, k in zip(self.interactions, self.sizes[1:], strict=True):
            states = interaction(queries)  # Eq. 2: T_s1^sa
            di_outputs += [interaction.predict(state, heads) for state in states]
            queries, indices = interaction.select(states[-1], heads, k)  # Eq. 3: T_s2
            selections.append(indices)
        stages["t_s2"] = queries
        if self.position_tokens:  # Table 3: learned boxes, random at first, in the place of the selected tokens'
            boxes = self.position_tokens.weight[: queries.boxes.shape[1]].sigmoid().expand_as(queries.boxes)
            queries = queries._replace(boxes=boxes)
        return queries, stages, {"interm_outputs": predictions, "di_outputs": di_outputs, "selections": selections}

    def first_selection(self, features, heads):
        """T_s1 = S(T_i, k1), Eq. 1. Returns it as `Queries` without gradient, its predictions, and their indices."""
        tokens, proposals = self.candidates(features.tokens, features.level_shapes)
        t_s1, indices = select(tokens, in_full_precision(heads.class_head, tokens), self.sizes[0])  # Eq. 1
        boxes = (in_full_precision(heads.box_head, t_s1) + proposals[indices]).sigmoid()
        predictions = heads(t_s1, boxes, features.pixel_features)
        if self.box_init != "head":
            with torch.no_grad():  # so that nobody stores the masks
                boxes = boxes_from_masks(heads.masks(predictions), self.box_init).to(boxes)
        return Queries(t_s1.detach(), inverse_sigmoid(boxes.detach()).sigmoid()), predictions, indices
