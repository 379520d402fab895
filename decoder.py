"""Transformer decoder and prediction heads (Sec. 3.2.4). Its first layer is the residual fusion of Eq. 4."""

import math

import torch
from torch import nn

from attention import (
    MLP,
    FeedForward,
    MSDeformAttn,
    in_full_precision,
    inverse_sigmoid,
    sine_box,
    xavier_matrices_,
)
from di import Queries


def mask_logits(embeddings, pixels):
    """Dot products of mask embeddings (B, Q, C) and pixel features (B, C, h, w) -> (B, Q, h, w), Eq. 11."""
    return torch.einsum("bqc,bchw->bqhw", embeddings, pixels)


class PredictionHeads(nn.Module):
    """Class, box and mask heads (Eq. 10, 11), one set for every layer and for both selections."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_dim
        self.norm = nn.LayerNorm(C)
        self.class_head = nn.Linear(C, config.num_classes)
        self.box_head = MLP(C, C, 4, 3)
        self.mask_head = MLP(C, C, C, 3)
        nn.init.zeros_(self.box_head.layers[-1].weight)
        nn.init.zeros_(self.box_head.layers[-1].bias)
        if config.class_prior is not None:
            nn.init.constant_(self.class_head.bias, math.log(config.class_prior / (1 - config.class_prior)))

    def scores(self, x):
        """Class logits (B, S, classes) of tokens x (B, S, C) that decide a selection, never in half precision."""
        return in_full_precision(self.class_head, x)

    def masks(self, x, pixel_features):
        """Mask logits (B, Q, H/4, W/4): dot products of the normed queries' embeddings and the pixel features."""
        return mask_logits(self.mask_head(self.norm(x)), pixel_features)

    def forward(self, x, boxes, pixel_features):
        """x (B, Q, C), boxes (B, Q, 4) -> {pred_logits (B, Q, classes), pred_boxes, pred_masks (B, Q, H/4, W/4)}.

        In training also the factors of pred_masks, mask_embeddings (B, Q, C) and pixels (B, C, H/4, W/4): of them the
        criterion makes the masks of the matched queries, so that the others need no gradient.
        """
        normed = self.norm(x)
        embeddings = self.mask_head(normed)
        predictions = {
            "pred_logits": self.class_head(normed),
            "pred_boxes": boxes,
            "pred_masks": mask_logits(embeddings, pixel_features),
        }
        return predictions | ({"mask_embeddings": embeddings, "pixels": pixel_features} if self.training else {})

    def refine(self, x, boxes):
        """Reference boxes (B, Q, 4) of the next layer: of a layer's output x (B, Q, C) and its own reference boxes."""
        return (in_full_precision(self.box_head, x) + inverse_sigmoid(boxes)).sigmoid()

    def predict_layer(self, x, boxes, pixel_features):
        """Predictions of a decoder layer: x its output, boxes those that the layer before it gave, with their gradient
        ("look forward twice", DINO). The queries pass the norm once for the box, twice for class and mask, as released.
        """
        x = self.norm(x)
        return self(x, self.refine(x, boxes), pixel_features)


class DecoderLayer(nn.Module):
    """Self-attention between queries, deformable cross-attention to the tokens, feed-forward network; post-norm."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_dim
        self.self_attn = nn.MultiheadAttention(C, config.num_heads, batch_first=True)
        self.self_norm = nn.LayerNorm(C)
        self.cross_attn = MSDeformAttn(C, config.num_heads, config.num_levels, config.num_points)
        self.cross_norm = nn.LayerNorm(C)
        self.ffn = FeedForward(C, config.feedforward_dim)

    def forward(self, x, query_pos, boxes, tokens, level_shapes, attn_mask):
        """x, query_pos (B, Q, C); boxes (B, Q, 4); tokens (B, S, C); attn_mask (Q, Q) bool, True if hidden, or None."""
        q = k = x + query_pos
        x = self.self_norm(x + self.self_attn(q, k, x, attn_mask=attn_mask, need_weights=False)[0])
        x = self.cross_norm(x + self.cross_attn(x + query_pos, boxes, tokens, level_shapes))
        return self.ffn(x)


class Decoder(nn.Module):
    """The decoder layers and the position MLP that they share."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.position_mlp = MLP(2 * C, C, C, 2)
        xavier_matrices_(self)

    def query_pos(self, boxes):
        """Position tokens (B, Q, C) of boxes (B, Q, 4)."""
        return self.position_mlp(sine_box(boxes, self.position_mlp.layers[-1].out_features))

    def forward(self, number, queries, features, heads, attn_mask=None):
        """One layer by its number, from 0: `Queries` (B, Q, ...) -> `Queries` with its output and its refined boxes.

        Layer 0 is Eq. 4 and gives Q_bal, the others Eq. 9; their reference boxes have no gradient, those of layer 0,
        which come from DI, have theirs. attn_mask (Q, Q) bool, True where hidden, or None.
        """
        content, boxes = queries
        boxes = boxes if number == 0 else boxes.detach()
        layer = self.layers[number]
        content = layer(content, self.query_pos(boxes), boxes, features.tokens, features.level_shapes, attn_mask)
        return Queries(content, heads.refine(content, boxes))
