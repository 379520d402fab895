"""Feature extractors: torchvision's ResNets, Swins and MobileNetV2, giving maps C2...C5 at strides 4 to 32."""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlock,
    shifted_window_attention,
)
from torchvision.ops import FrozenBatchNorm2d

from config import InputError
from precision import recompute

# Swin transformers: embedding channels, blocks of the third stage, window side, stochastic depth. "_384" are those with
# the larger window, pretrained on images of 384 pixels.
SWINS = {
    "swin_t": (96, 6, 7, 0.2),
    "swin_s": (96, 18, 7, 0.3),
    "swin_b": (128, 18, 7, 0.3),
    "swin_b_384": (128, 18, 12, 0.3),
    "swin_l": (192, 18, 7, 0.3),
    "swin_l_384": (192, 18, 12, 0.3),
}


def build_backbone(name, frozen_batch_norm=True, grad_checkpoint=False):
    """Returns a randomly initialised backbone: a ResNet of torchvision.models, "mobilenet_v2" or a name in `SWINS`.

    frozen_batch_norm: see `ResNet`. grad_checkpoint: store less in training, see `recompute`. Raises InputError for
    other names.
    """
    names = [*torchvision.models.list_models(include=["resne*", "wide_resne*"]), "mobilenet_v2", *SWINS]
    if name not in names:
        raise InputError(f"backbone {name!r}: choose {', '.join(names)}")
    if name == "mobilenet_v2":
        backbone = MobileNet(frozen_batch_norm)
    else:
        backbone = Swin(*SWINS[name]) if name in SWINS else ResNet(name, frozen_batch_norm)
    backbone.grad_checkpoint = grad_checkpoint
    return backbone


class Backbone(nn.Module):
    """What the backbones share: `body` is torchvision's model without its classifier; parameters keep their names."""

    grad_checkpoint = False

    def run(self, stages, x):
        """Returns [C2, C3, C4, C5], what each of the four stages, sequences of blocks, makes of the map before it."""
        maps = []
        for stage in stages:
            for block in stage:
                x = recompute(block, x) if self.grad_checkpoint else block(x)
            maps.append(x)
        return maps


def group_norm(channels):
    """Normalisation that trains from scratch at any batch size, for models without pretrained weights."""
    return nn.GroupNorm(math.gcd(32, channels), channels)  # 32 groups but for some of MobileNetV2's layers


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm that the convolution before it applies, a `NormedConv`."""

    def forward(self, x):
        return x


class NormedConv(nn.Conv2d):
    """A convolution and the frozen batch norm behind it, as one: weight times the norm's gain, the shift as bias."""

    def forward(self, x):
        [norm] = self.norm
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = self.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def build_body(name, frozen_batch_norm):
    """Returns torchvision's randomly initialised model of that name; frozen_batch_norm: see `ResNet`.

    Every convolution applies the frozen batch norm behind it: two equivalent ways; this one passes over the activations
    once instead of three times, and stores none in float32 under autocast. All names stay as they are.
    """
    body = torchvision.models.get_model(name, weights=None, norm_layer=FoldedNorm if frozen_batch_norm else group_norm)
    for module in body.modules():
        for conv, norm in pairwise(module.children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FoldedNorm):
                conv.__class__, conv.norm = NormedConv, [norm]  # in a list, so that its entries keep their names
    return body


class ResNet(Backbone):
    """A torchvision ResNet.

    name                a constructor in torchvision.models, e.g. "resnet50"
    frozen_batch_norm   True: batch norm with fixed statistics and gains (pretrained weights); False: GroupNorm
    """

    def __init__(self, name, frozen_batch_norm=True):
        super().__init__()
        self.body = build_body(name, frozen_batch_norm)
        # With GroupNorm a CPU's step is a tenth shorter in the plain layout at 64 pixels, and as long at other sizes.
        self.memory_format = torch.channels_last if frozen_batch_norm else torch.contiguous_format
        self.body.to(memory_format=self.memory_format)
        self.channels = [stage[0].conv1.in_channels for stage in self.stages[1:]]
        self.channels.append(self.body.fc.in_features)  # of C2, C3, C4, C5
        del self.body.fc

    @property
    def stages(self):
        """The four stages, each a sequence of blocks."""
        return self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4

    def forward(self, images):
        """images (B, 3, H, W), normalised, H, W multiples of 32. Returns [C2, C3, C4, C5], (B, channels, H/s, W/s)."""
        body, x = self.body, images.contiguous(memory_format=self.memory_format)
        return self.run(self.stages, body.maxpool(body.relu(body.bn1(body.conv1(x)))))


class MobileNet(Backbone):
    """torchvision's MobileNetV2, also without the 1x1 convolution before its classifier. Argument: as for `ResNet`."""

    channels = [24, 32, 96, 320]  # of C2, C3, C4, C5

    def __init__(self, frozen_batch_norm=True):
        super().__init__()
        self.body = build_body("mobilenet_v2", frozen_batch_norm).to(memory_format=torch.channels_last)
        del self.body.classifier, self.body.features[18]

    def forward(self, images):
        """As `ResNet.forward`; the stem is part of the first stage."""
        features, x = self.body.features, images.contiguous(memory_format=torch.channels_last)
        return self.run((features[:4], features[4:7], features[7:14], features[14:]), x)


class WindowAttention(ShiftedWindowAttention):
    """torchvision's window attention, shifted also along a side that one window covers, as in the original Swin."""

    def define_relative_position_index(self):
        with torch.device("cpu"):  # not "meta": no checkpoint holds its values
            super().define_relative_position_index()
        self.register_buffer("relative_position_index", self.relative_position_index, persistent=False)

    def forward(self, x):
        """x (B, H, W, C), any H and W. Returns the same shape."""
        H, W = x.shape[1:3]
        window = self.window_size
        # The shift that torchvision leaves out. Where it does, all windows are alike along that side, so that the mask
        # between the two parts of a shifted window can travel with the position bias.
        dropped = [s if size <= w else 0 for s, size, w in zip(self.shift_size, (H, W), window, strict=True)]
        if not any(dropped):
            return super().forward(x)
        x = F.pad(x, (0, 0, 0, max(window[1] - W, 0), 0, max(window[0] - H, 0)))
        x = x.roll((-dropped[0], -dropped[1]), (1, 2))
        part = [torch.arange(w, device=x.device) >= w - s for w, s in zip(window, dropped, strict=True)]
        part = (2 * part[0][:, None] + part[1]).flatten()  # (window area,)
        bias = self.get_relative_position_bias()
        bias = torch.where(part[:, None] == part, bias, bias - 100)
        x = shifted_window_attention(
            x, self.qkv.weight, self.proj.weight, bias, window, self.num_heads, self.shift_size,
            qkv_bias=self.qkv.bias, proj_bias=self.proj.bias,
        )  # fmt: skip
        return x.roll(dropped, (1, 2))[:, :H, :W]


class Swin(Backbone):
    """A torchvision Swin transformer, with a norm on every stage's output map.

    embed_dim, third_depth, window, stochastic_depth are the numbers of `SWINS`; the other stages have two blocks, and
    every head 32 channels.
    """

    def __init__(self, embed_dim, third_depth, window, stochastic_depth):
        super().__init__()
        self.channels = [embed_dim * 2**stage for stage in range(4)]  # of C2, C3, C4, C5
        self.body = SwinTransformer(
            patch_size=[4, 4], embed_dim=embed_dim, depths=[2, 2, third_depth, 2], window_size=[window, window],
            num_heads=[channels // 32 for channels in self.channels], stochastic_depth_prob=stochastic_depth,
            block=partial(SwinTransformerBlock, attn_layer=WindowAttention),
        )  # fmt: skip
        del self.body.norm, self.body.head
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    @property
    def stages(self):
        """The four stages, each a sequence of blocks."""
        return self.body.features[1::2]

    def forward(self, images):
        """images (B, 3, H, W), normalised, any H, W. Returns [C2, C3, C4, C5], (B, channels, H/s, W/s), rounded up."""
        H, W = images.shape[-2:]
        # Before the blocks of every stage comes the embedding of patches or their merging.
        stages = [(first, *stage) for first, stage in zip(self.body.features[::2], self.stages, strict=True)]
        maps = self.run(stages, F.pad(images, (0, -W % 4, 0, -H % 4)))  # (B, H/s, W/s, C)
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]
