"""DI-MaskDINO (Fig. 2 of the paper) and Mask DINO: the model."""

from dataclasses import replace
from functools import partial
from itertools import chain
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import in_full_precision
from backbone import build_backbone
from bato import BATO
from config import PRESETS
from decoder import Decoder, PredictionHeads
from denoising import Denoising
from di import DeImbalance, Queries
from encoder import Encoder

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
PREDICTIONS = ("pred_logits", "pred_boxes", "pred_masks")  # of every layer and selection


def build_model(preset="dimaskdino_r50", **overrides):
    """A randomly initialised model of a preset; overrides are fields of `Config`, e.g. num_classes=8.

    Raises ValueError for an unknown preset, TypeError for an unknown field.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    return DIMaskDINO(replace(PRESETS[preset], **overrides))


class DIMaskDINO(nn.Module):
    """The whole model; with `di` and `bato` off in its config it is Mask DINO."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.frozen_batch_norm)
        self.encoder = Encoder(config, self.backbone.channels)
        self.heads = PredictionHeads(config)
        self.di = DeImbalance(config)
        self.denoising = Denoising(config)
        self.decoder = Decoder(config)
        self.bato = BATO(config) if config.bato else None
        if config.grad_checkpoint:
            for layer in chain(*self.backbone.stages, self.encoder.layers, self.decoder.layers):
                layer.forward = MethodType(recomputed, layer)  # which copy.deepcopy and torch.compile understand

    def forward(self, images, targets=None, all_layers=False):
        """Fig. 2, from images to predictions.

        images      list of (3, H, W) float RGB tensors in [0, 1], or one batch (B, 3, H, W); else ValueError
        targets     in training, for the denoising queries: per image {"labels": (n,) int64, "boxes": (n, 4) normalised
                    cxcywh relative to the padded batch}
        all_layers  in evaluation mode, compute the predictions of every layer as in training

        Returns pred_logits (B, Q, classes), pred_boxes (B, Q, 4) normalised cxcywh relative to the padded batch,
        pred_masks (B, Q, H/4, W/4) logits, all of the last layer; selection: {first, second, guiding} int64 (B, k),
        each among the tokens before it (with three selections also third).
        In training or with `all_layers` also aux_outputs: the same predictions on the decoder's input and after each
        layer but the last; interm_outputs: those of the first selection; di_outputs: class and box after each
        interaction layer; and with targets dn_outputs: the predictions on the denoising queries, with aux_outputs.
        In training every pred_masks has its factors beside it: mask_embeddings (B, Q, C) and pixels (B, C, H/4, W/4).
        """
        every, last = self.training or all_layers, self.config.decoder_layers - 1
        heads, decoder = self.heads, self.decoder

        features = self.encoder(self.backbone(self.batch(images)))  # Sec. 3.2.1: T_i and F
        queries, stages, outputs = self.di(features, heads, every)  # Sec. 3.2.2, Eq. 1-3: T_s2 and its boxes
        queries, num_dn, groups, attn_mask = self.denoising(queries, targets)  # in training, these come first

        layers = [heads(*queries, features.pixels)] if every else []  # predictions on the decoder's input
        for number in range(last + 1):
            if number == 1 and self.bato:  # Sec. 3.2.3, Eq. 5-8: T_i becomes T_bal, F becomes F'
                stages["q_bal"] = Queries(queries.content[:, num_dn:], queries.boxes[:, num_dn:])
                guides = stages[self.config.guidance]
                features, outputs["selection"]["guiding"] = self.bato(guides, features, heads, decoder.query_pos)
            previous = queries.boxes
            queries = decoder(number, queries, features, heads, attn_mask)  # 0: Eq. 4, Q_bal; then Eq. 9, Q_ref
            if every or number == last:
                layers.append(heads.predict_layer(queries.content, previous, features.pixels))  # Eq. 10, 11

        # By `split`, whose gradient is one tensor; that of two slices would be two as large, and their sum.
        sizes = [num_dn, queries.content.shape[1] - num_dn]
        parts = [{k: [x, x] if k == "pixels" else x.split(sizes, 1) for k, x in layer.items()} for layer in layers]
        denoised, matching = ([{k: x[i] for k, x in part.items()} for part in parts] for i in (0, 1))
        outputs |= matching[-1]
        if every:
            outputs["aux_outputs"] = matching[:-1]
        if num_dn:
            outputs["dn_outputs"] = denoised[-1] | {"aux_outputs": denoised[:-1], "num_groups": groups}
        return outputs

    def use_published_precision(self):
        """Let the encoder with the pixel features, DI's interaction and the decoder layers compute in float32 under
        autocast, as in the published training (mixed precision in float16).
        """
        for module in (self.encoder, self.decoder, *self.di.interactions):
            module.forward = partial(in_full_precision, module.forward)

    def batch(self, images):
        """List of (3, H, W) RGB images in [0, 1], or a batch of them -> normalised (B, 3, H, W), zero-padded at the
        bottom and right to multiples of 32.
        """
        check_images(images)
        like = self.encoder.level_embed  # for its dtype and device, where the constants are made: no copy to wait for
        mean, std = (torch.stack([like.new_full((1, 1), x) for x in values]) for values in (PIXEL_MEAN, PIXEL_STD))
        if torch.is_tensor(images):
            return F.pad((images.to(like) - mean) / std, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))
        images = [(image.to(like) - mean) / std for image in images]
        H, W = (32 * -(-max(image.shape[d] for image in images) // 32) for d in (1, 2))
        return torch.stack([F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1])) for image in images])


def recomputed(layer, *args):
    """The layer's forward pass, whose inner activations are computed once more in the backward pass, and not stored."""
    return checkpoint(type(layer).forward, layer, *args, use_reentrant=False)


def check_images(images):
    """Raise ValueError, with what is expected, for what `DIMaskDINO.forward` does not take as images.

    The values are looked at on the CPU only: on a GPU that would make the program wait for it. In a model that is being
    traced nothing is looked at, as sizes may be symbols.
    """
    expected = "give a list of (3, H, W) float RGB tensors in [0, 1], or one batch (B, 3, H, W)"
    batch = isinstance(images, torch.Tensor)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if batch and images.dim() != 4 or not batch and not isinstance(images, list | tuple):
        found = f"a tensor of shape {tuple(images.shape)}" if batch else f"a {type(images).__name__}"
        raise ValueError(f"images: {found}; {expected}")
    if len(images) == 0:
        raise ValueError(f"images: none; {expected}")
    for i, image in enumerate([images] if batch else images):
        name = "images" if batch else f"images[{i}]"
        if not isinstance(image, torch.Tensor):
            raise ValueError(f"{name}: a {type(image).__name__}; {expected}")
        if image.dim() != 3 + batch or image.shape[-3] != 3 or image.numel() == 0:
            raise ValueError(f"{name}: a tensor of shape {tuple(image.shape)}; {expected}")
        if not image.is_floating_point():
            raise ValueError(f"{name}: a tensor of {image.dtype}; {expected} (bytes: divide by 255)")
        if image.device.type == "cpu":
            low, high = (x.item() for x in image.aminmax())
            if low < -0.5 or high > 1.5:  # resizing may overshoot a little
                raise ValueError(f"{name}: values from {low:.3g} to {high:.3g}; {expected} (bytes: divide by 255)")
