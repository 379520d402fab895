"""Multi-scale deformable attention (Deformable DETR, Sec. 4.1), feed-forward networks, positions of cells and boxes."""

import math

import torch
from torch import nn

from ops import ms_deform_attn


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections: C channels, M heads, L levels, P points per head."""

    def __init__(self, dim, num_heads, num_levels, num_points):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self):
        """Head m looks in the m-th compass direction, point p at p + 1 cells; all samples weigh the same."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # (M, 2)
        offsets = directions[:, None, None] * torch.arange(1, self.num_points + 1)[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(self, query, reference, tokens, level_shapes):
        """query (B, Q, C), its position included; reference (B or 1, Q, 2) points or (B, Q, 4) cxcywh boxes, in [0, 1];
        tokens (B, S, C); level_shapes [(H, W), ...]. Returns (B, Q, C).

        Offsets are in cells of each level around a point, and in units of size / (2 P) around a box.
        """
        B, Q, _ = query.shape
        shape = (B, Q, self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(tokens).view(B, tokens.shape[1], self.num_heads, -1)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        reference = reference[:, :, None, None, None]  # (B, Q, 1, 1, 1, 2 or 4)
        if reference.shape[-1] == 2:
            # Of the levels, (L, 2); made on the device, so that no copy is waited for.
            sizes = torch.stack([torch.stack([reference.new_full((), n) for n in (w, h)]) for h, w in level_shapes])
            locations = reference + offsets / sizes[:, None]
        else:
            locations = reference[..., :2] + offsets * reference[..., 2:] * (0.5 / self.num_points)
        # Under autocast `value` is in half precision, `locations` and with them the weights in the reference's float32.
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1, dtype=locations.dtype).view(shape)
        return self.output_proj(ms_deform_attn(value, level_shapes, locations, weights))


class FeedForward(nn.Module):
    """The second half of every transformer layer here: LayerNorm(x + W2 ReLU(W1 x)), (..., dim) -> (..., dim)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim, hidden_dim, out_dim, num_layers):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def xavier_matrices_(module):
    """Xavier-uniform values for every matrix below `module`, as transformer layers start; the rest stays as it is."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if isinstance(child, MSDeformAttn):
            child.reset_parameters()


def sine_embedding(values, dim):
    """values (...) in [0, 1] -> (..., dim): sin (even channels) and cos (odd) of 2 pi * value, dim / 2 frequencies."""
    frequencies = 10000 ** (torch.arange(0, dim, 2, device=values.device, dtype=values.dtype) / dim)
    angles = values[..., None] * (2 * math.pi) / frequencies  # (..., dim / 2)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def sine_position(height, width, dim, like):
    """2-D sine position of every cell of a map, row-major: half the channels for y, half for x.

    Cells count from 1 and the last one is 1. Returns (height * width, dim), dtype and device as the tensor `like`.
    """
    y, x = (torch.arange(1, n + 1, device=like.device, dtype=like.dtype) for n in (height, width))
    y, x = y / (y[-1] + 1e-6), x / (x[-1] + 1e-6)
    y, x = sine_embedding(y, dim // 2), sine_embedding(x, dim // 2)
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1).flatten(0, 1)


def sine_box(boxes, dim):
    """boxes (..., 4) cxcywh in [0, 1] -> (..., 2 * dim): sine embeddings of cy, cx, w, h in turn, dim / 2 each."""
    x, y, w, h = boxes.unbind(-1)
    return sine_embedding(torch.stack([y, x, w, h], -1), dim // 2).flatten(-2)


def inverse_sigmoid(x):
    """Logit of x, any shape; x and 1 - x are kept at 1e-5 or above, so the logits lie within about +-11.5."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))
