"""Transformer decoder and prediction heads (Sec. 3.2.4). Its first layer is the residual fusion of Eq. 4."""

import math

import torch
from torch import nn

from attention import MLP, FeedForward, MSDeformAttn, sine_box, xavier_matrices_
from di import Queries, refine
from precision import published, recompute


def masks(predictions):
    """Eq. 11: mask_embeddings (B, Q, C) and pixel_features (B, C, H/4, W/4) -> logits (B, Q, H/4, W/4)."""
    pixel_features = predictions["pixel_features"]
    return torch.einsum("bqc,bchw->bqhw", predictions["mask_embeddings"].to(pixel_features.dtype), pixel_features)


class PredictionHeads(nn.Module):
    """Class, box and mask heads (Eq. 10, 11), one set for every layer and for both selections."""

    masks = staticmethod(masks)  # for DI, whose file this one imports

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

    def forward(self, x, boxes, pixel_features):
        """x (B, Q, C), boxes (B, Q, 4), pixel_features (B, C, H/4, W/4). Returns a set of predictions: Eq. 10,
        pred_logits (B, Q, classes) and pred_boxes, and the two factors of Eq. 11, mask_embeddings (B, Q, C) and
        pixel_features, which `masks` multiplies where somebody reads them.
        """
        x = self.norm(x)
        factors = {"mask_embeddings": self.mask_head(x), "pixel_features": pixel_features}
        return {"pred_logits": self.class_head(x), "pred_boxes": boxes, **factors}

    def predict_layer(self, x, boxes, pixel_features):
        """Returns the predictions of a decoder layer from its output x and the boxes of the layer before it, with their
        gradient ("look forward twice", DINO). The norm comes once for the box, twice for class and mask, as released.
        """
        x = self.norm(x)
        return self(x, refine(boxes, x, self.box_head), pixel_features)


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

    float32 = False

    def __init__(self, config):
        super().__init__()
        C = config.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.position_mlp = MLP(2 * C, C, C, 2)
        self.grad_checkpoint = config.grad_checkpoint
        xavier_matrices_(self)

    def query_pos(self, boxes):
        """Returns the position tokens (B, Q, C) of boxes (B, Q, 4)."""
        return self.position_mlp(sine_box(boxes, self.position_mlp.layers[-1].out_features))

    @published
    def layer(self, queries, features, heads, number, attn_mask=None):
        """One layer, self.layers[number]. Returns `Queries` (B, Q, ...) with its output and its refined boxes.

        The first, number 0, is Eq. 4 and gives Q_bal, the others Eq. 9; their reference boxes have no gradient, those
        of the first, which come from DI, have theirs. attn_mask (Q, Q) bool, True where hidden, or None. (The losses
        and eval.py number predictions: 0 is that on the decoder's input, 1 that of this first layer.)
        """
        content, boxes = queries
        boxes = boxes if number == 0 else boxes.detach()
        args = content, self.query_pos(boxes), boxes, features.tokens, features.level_shapes, attn_mask
        layer = self.layers[number]
        content = recompute(layer, *args) if self.grad_checkpoint else layer(*args)
        return Queries(content, refine(boxes, content, heads.box_head))
