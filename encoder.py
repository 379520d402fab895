"""Feature tokens extractor (Sec. 3.2.1): the deformable encoder that gives T_i, and the pixel features F for masks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attention import FeedForward, MSDeformAttn, sine_position, xavier_matrices_
from precision import published, recompute


class Features(NamedTuple):
    """What DI, BATO and the decoder see of the images; made by the encoder, and made anew by BATO."""

    tokens: torch.Tensor  # T_i or T_bal (B, S, C): levels from coarse (C6) to fine (C3 or C2), each row-major
    level_shapes: list[tuple[int, int]]  # [(H, W), ...] of the levels in this order
    pixel_features: torch.Tensor  # F or F' (B, C, H/4, W/4), for masks


def tokens_to_map(tokens, level_shapes, level, size):
    """The tokens (B, S, C) of one level as a map (B, C, *size), bilinearly resized."""
    tokens = tokens.split([h * w for h, w in level_shapes], dim=1)[level].unflatten(1, level_shapes[level])
    tokens = tokens.contiguous().permute(0, 3, 1, 2)  # channels last, as `F.interpolate` wants it
    return F.interpolate(tokens, size=size, mode="bilinear", align_corners=False)


def cell_centres(level_shapes, like):
    """Centres (x, y) in [0, 1] of all cells of all levels, (S, 2), dtype and device as the tensor `like`."""
    centres = []
    for height, width in level_shapes:
        y, x = (torch.arange(n, device=like.device, dtype=like.dtype).add(0.5) / n for n in (height, width))
        y, x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(centres)


class GroupNorm(nn.GroupNorm):
    """Group norm that keeps the dtype also under autocast: what is behind it stores no float32 beside its half."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then the feed-forward network; post-norm."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_dim
        self.self_attn = MSDeformAttn(C, config.num_heads, config.num_levels, config.num_points)
        self.norm = nn.LayerNorm(C)
        self.ffn = FeedForward(C, config.encoder_feedforward_dim)

    def forward(self, tokens, position, centres, level_shapes):
        """tokens (B, S, C), position (S, C), centres (S, 2). Returns tokens (B, S, C)."""
        x = self.norm(tokens + self.self_attn(tokens + position, centres[None], tokens, level_shapes))
        return feed_forward(self.ffn, x)


def feed_forward(ffn, x):
    """Returns ffn(x) of tokens x (B, S, C); in training its wide inner activations are computed again, not stored."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # in pieces that stay in its caches: faster
        return torch.cat([recompute(ffn, piece) for piece in x.split(1024, 1)], 1)
    return recompute(ffn, x)


class Encoder(nn.Module):
    """Multi-scale deformable encoder on C3...C6, with five levels C2...C6, and the stride-4 pixel features."""

    float32 = False

    def __init__(self, config, channels):
        super().__init__()
        self.grad_checkpoint = config.grad_checkpoint
        C = config.hidden_dim
        used = channels[5 - config.num_levels :]  # C3...C5 or C2...C5
        self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(c, C, 1), nn.GroupNorm(32, C)) for c in used)
        c6 = nn.Conv2d(channels[-1], C, 3, stride=2, padding=1)
        self.input_proj.append(nn.Sequential(c6, nn.GroupNorm(32, C)))
        self.level_embed = nn.Parameter(torch.randn(len(self.input_proj), C))  # fine to coarse
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], C, 1, bias=False), nn.GroupNorm(32, C))
        self.output = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), GroupNorm(32, C), nn.ReLU(True))
        self.pixel_proj = nn.Conv2d(C, C, 1)
        xavier_matrices_(self.layers)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for conv in (self.lateral[0], self.output[0], self.pixel_proj):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.pixel_proj.bias)

    @published
    def forward(self, maps):
        """maps: [C2, C3, C4, C5]. Returns the `Features` with T_i and F."""
        c2 = maps[0]
        maps = maps[1 - len(self.input_proj) :] + maps[-1:]  # C5 twice, since C6 comes from it
        maps = [project(m) for project, m in zip(self.input_proj, maps, strict=True)]
        shapes = [tuple(m.shape[-2:]) for m in maps]
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)  # (B, S, C), fine to coarse
        like = self.level_embed  # positions are in the dtype of the parameters, also under autocast
        position = torch.cat([sine_position(*s, like.shape[1], like) + e for s, e in zip(shapes, like, strict=True)])
        centres = cell_centres(shapes, like)
        for layer in self.layers:
            args = tokens, position, centres, shapes
            tokens = recompute(layer, *args) if self.grad_checkpoint else layer(*args)

        finest = tokens_to_map(tokens, shapes, 0, c2.shape[-2:])
        pixel_features = self.pixel_proj(self.output(self.lateral(c2) + finest))

        t_i = torch.cat(tokens.split([h * w for h, w in shapes], dim=1)[::-1], 1)  # coarse to fine from here on
        return Features(t_i, shapes[::-1], pixel_features)
