"""Feature extractors: torchvision's ResNets, giving the maps C2...C5 at strides 4, 8, 16 and 32."""

import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


def group_norm(channels):
    """Normalisation that trains from scratch at any batch size, for models without pretrained weights."""
    return nn.GroupNorm(32, channels)


class ResNet(nn.Module):
    """A torchvision ResNet without its classifier; parameters keep torchvision's names below `body`.

    name                a constructor in torchvision.models, e.g. "resnet50"
    frozen_batch_norm   True: batch norm with fixed statistics and gains (pretrained weights); False: GroupNorm
    """

    def __init__(self, name, frozen_batch_norm=True):
        super().__init__()
        norm_layer = FrozenBatchNorm2d if frozen_batch_norm else group_norm
        self.body = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
        self.channels = [stage[0].conv1.in_channels for stage in (self.body.layer2, self.body.layer3, self.body.layer4)]
        self.channels.append(self.body.fc.in_features)  # of C2, C3, C4, C5
        del self.body.fc

    def forward(self, images):
        """images (B, 3, H, W), normalised, H and W multiples of 32. Returns [C2, C3, C4, C5], (B, channels, H/s, W/s)."""
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        maps = []
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            maps.append(x)
        return maps
