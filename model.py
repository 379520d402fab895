"""DI-MaskDINO (Fig. 2 of the paper) and Mask DINO: the model."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from backbone import build_backbone
from bato import BATO
from config import PRESETS
from decoder import Decoder, PredictionHeads
from denoising import Denoising
from di import DeImbalance, Queries
from encoder import Encoder

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def build_model(preset="dimaskdino_r50", **overrides):
    """Returns a randomly initialised model of a preset; overrides are fields of `Config`, e.g. num_classes=8.

    Raises ValueError for an unknown preset or values that cannot be used, TypeError for an unknown field.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    return DIMaskDINO(replace(PRESETS[preset], **overrides))


class DIMaskDINO(nn.Module):
    """The whole model; with `di` and `bato` off in its config it is Mask DINO."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.frozen_batch_norm, config.grad_checkpoint)
        self.encoder = Encoder(config, self.backbone.channels)
        self.heads = PredictionHeads(config)
        self.di = DeImbalance(config)
        self.denoising = Denoising(config)
        self.decoder = Decoder(config)
        self.bato = BATO(config) if config.bato else None

    def forward(self, images, targets=None):
        """Fig. 2, from images to predictions.

        images   list of (3, H, W) float RGB tensors in [0, 1], or one batch (B, 3, H, W); else ValueError
        targets  in training, for the denoising queries: per image {"labels": (n,) int64, "boxes": (n, 4) normalised
                 cxcywh relative to the padded batch}

        Returns a set of predictions of the last layer: pred_logits (B, Q, classes), pred_boxes (B, Q, 4) normalised
        cxcywh relative to the padded batch, mask_embeddings (B, Q, C) and pixel_features (B, C, H/4, W/4), of which
        `decoder.masks` makes mask logits. Beside it aux_outputs, a list of such sets: of the decoder's input and each
        layer but the last; interm_outputs: that of the first selection; di_outputs, a list: class and box after each
        interaction layer; selections, a list of int64 (B, k), each among the tokens before it; guiding, int64 (B, k),
        None without BATO; in training, where there are denoising queries, dn_outputs: the set of these, with its
        aux_outputs and num_groups.
        """
        heads, decoder = self.heads, self.decoder
        features = self.encoder(self.backbone(self.batch(images)))  # Sec. 3.2.1: T_i and F
        queries, stages, outputs = self.di(features, heads)  # Sec. 3.2.2, Eq. 1-3: T_s2; stages: T_s1 and T_s2
        queries, num_dn, groups, attn_mask = self.denoising(queries, targets)  # in training, these come first

        guiding, layers = None, [heads(*queries, features.pixel_features)]  # predictions on the decoder's input
        for number in range(self.config.decoder_layers):
            if number == 1 and self.bato:  # Sec. 3.2.3, Eq. 5-8: T_i becomes T_bal, F becomes F'
                stages["q_bal"] = Queries(queries.content[:, num_dn:], queries.boxes[:, num_dn:])
                features, guiding = self.bato(stages[self.config.guidance], features, heads, decoder.query_pos)
            previous = queries.boxes
            queries = decoder.layer(queries, features, heads, number, attn_mask)  # 0: Eq. 4, Q_bal; then Eq. 9, Q_ref
            layers.append(heads.predict_layer(queries.content, previous, features.pixel_features))  # Eq. 10, 11

        *before, last = [of_queries(layer, slice(num_dn, None)) for layer in layers]
        outputs.update(last, aux_outputs=before, guiding=guiding)
        if num_dn:
            *before, last = [of_queries(layer, slice(num_dn)) for layer in layers]
            outputs["dn_outputs"] = dict(last, aux_outputs=before, num_groups=groups)
        return outputs

    def use_published_precision(self):
        """Under autocast, encoder, interaction and decoder layers compute in float32, as in the published training."""
        for module in (self.encoder, self.decoder, *self.di.interactions):
            module.float32 = True

    def batch(self, images):
        """Returns the images normalised, as one batch, zero-padded at the bottom and right to multiples of 32."""
        check_images(images)
        like = self.encoder.level_embed  # for its dtype and device, where the constants are made: no copy to wait for
        mean, std = (torch.stack([like.new_full((1, 1), x) for x in values]) for values in (PIXEL_MEAN, PIXEL_STD))
        if torch.is_tensor(images):
            return F.pad((images.to(like) - mean) / std, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))
        images = [(image.to(like) - mean) / std for image in images]
        H, W = (32 * -(-max(image.shape[d] for image in images) // 32) for d in (1, 2))
        return torch.stack([F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1])) for image in images])


def of_queries(predictions, queries):
    """Returns a set of predictions for a slice of its queries."""
    return {name: x if name == "pixel_features" else x[:, queries] for name, x in predictions.items()}


def check_images(images):
    """Raise ValueError, with what is expected, for what `DIMaskDINO.forward` does not take as images."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # sizes may be symbols
        return
    several = isinstance(images, list | tuple)
    faults = {f"images[{i}]": fault(x, 3) for i, x in enumerate(images)} if several else {"images": fault(images, 4)}
    expected = "give a list of (3, H, W) float RGB tensors in [0, 1], or one batch (B, 3, H, W) (bytes: divide by 255)"
    for name, found in (faults or {"images": "none"}).items():
        if found:
            raise ValueError(f"{name}: {found}; {expected}")


def fault(image, dims):
    """Returns what is wrong with an image, of 3 dimensions, or with a batch, of 4; or None."""
    if not torch.is_tensor(image):
        return f"a {type(image).__name__}"
    if image.dim() != dims or image.shape[-3] != 3 or image.numel() == 0 or not image.is_floating_point():
        return f"a tensor of {image.dtype}, shape {tuple(image.shape)}"
    if image.device.type == "cpu":  # to look at values on a GPU would make the program wait for it
        low, high = image.aminmax()
        if not (low >= -0.5 and high <= 1.5):  # NaN is neither; resizing may overshoot a little
            return f"values from {low:.3g} to {high:.3g}"
