"""A small model, and targets and predictions for it: what most tests start from."""

from dataclasses import asdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # no public name of it
from torchvision.models._api import register_model  # no public name of it
from torchvision.models.resnet import BasicBlock, ResNet

from config import PRESETS
from model import build_model

CLASSES = tuple(f"kind {i}" for i in range(PRESETS["tiny"].num_classes))
NARROW = "resnet_narrow"  # the name of NarrowResNet among torchvision's models, once this module is imported
# As `tiny`, but with few queries, and no more layers than there are kinds of.
SMALL = {
    "backbone": NARROW,
    "encoder_layers": 1,
    "selections": (40, 20),
    "num_guiding": 8,
    "decoder_layers": 2,
    "denoising_queries": 12,
    "loss_points": 64,
}


class NarrowResNet(ResNet):
    """Four blocks of 64 channels: a checkpoint of `tiny` with it has 10 MB, where resnet18 makes 140 MB of it."""

    def __init__(self, norm_layer):
        super().__init__(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        self.fc = torch.nn.Linear(64, 1)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, 64, blocks, stride, dilate)


@register_model(NARROW)
def resnet_narrow(weights, norm_layer):
    return NarrowResNet(norm_layer)


def model(**settings):
    """A small model of ten classes with these fields of `Config`, the same at every call.

    Its box heads move boxes and its attention looks beside the cells' centres, which at first they do not: no two
    queries have the same box, no two assignments of queries to instances the same cost, and no sample lies where
    bilinear interpolation has a kink, so that no rounding of a processor or compiler chooses between two results.
    """
    torch.manual_seed(0)
    found = build_model("tiny", **(SMALL | settings))
    for name, parameter in found.named_parameters():
        if name.endswith(("box_head.layers.2.weight", "sampling_offsets.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    return found


def targets(*counts, size=64, dtype=torch.float32, seed=0):
    """Targets of one image for each of these numbers of instances: labels, boxes and masks (n, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in counts:
        centres, sides, masks = (torch.rand(n, *shape, generator=generator) for shape in ((2,), (2,), (size, size)))
        boxes = torch.cat([0.3 + 0.4 * centres, 0.1 + 0.3 * sides], 1).to(dtype)
        labels = torch.randint(PRESETS["tiny"].num_classes, (n,), generator=generator)
        found.append({"labels": labels, "boxes": boxes, "masks": masks > 0.5})
    return found


def predictions(queries, pixel_features, classes, generator):
    """One set of predictions in float64; `pixel_features`: (B, C, h, w), of which the masks are made."""

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    shape = pixel_features.shape[0], queries
    return {
        "pred_logits": 4 * rand(*shape, classes) - 2,
        "pred_boxes": torch.cat([rand(*shape, 2), 0.05 + 0.5 * rand(*shape, 2)], -1),
        "mask_embeddings": 4 * rand(*shape, pixel_features.shape[1]) - 2,
        "pixel_features": pixel_features,
    }


def outputs(batch=2, *, queries=5, selected=8, denoising=0, groups=1, classes=10, size=64, seed=0):
    """Made-up outputs of a model with one interaction layer and two decoder layers, in float64.

    queries, selected, denoising: how many there are of the second and of the first selection, and of the denoising
    part, in so many groups. size: of the images, in pixels. As in the model, the decoder's input and its first layer
    share the pixel features of the first selection, and the last layer has those that BATO refines.
    """
    generator = torch.Generator().manual_seed(seed)
    first, refined = (
        torch.randn(batch, 8, size // 4, size // 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    maps = (first, first, refined)  # of the decoder's input, the first and the last layer

    def layers(queries):
        *others, last = (predictions(queries, features, classes, generator) for features in maps)
        return last | {"aux_outputs": others}

    found = layers(queries) | {"interm_outputs": predictions(selected, first, classes, generator)}
    interaction = predictions(selected, first, classes, generator)
    found["di_outputs"] = [{name: interaction[name] for name in ("pred_logits", "pred_boxes")}]
    if denoising:
        found["dn_outputs"] = layers(denoising) | {"num_groups": groups}
    return found


def save(path, model, classes=CLASSES):
    """Write a checkpoint of this model, whose classes have these names; returns its path."""
    content = {"model": model.state_dict(), "config": asdict(model.config), "classes": list(classes)}
    torch.save(content, path)
    return path


def save_untrained(path, classes=CLASSES, **settings):
    """Write a checkpoint of an untrained `tiny` for images of 64 pixels; returns its path."""
    torch.manual_seed(0)
    return save(path, build_model("tiny", num_classes=len(classes), test_size=(64, 64), **settings), classes)


class Float32Finder(TorchDispatchMode):
    """Records the operations that return a float32 tensor, and the most numbers that one of these has."""

    def __init__(self):
        super().__init__()
        self.found, self.numel = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.found.add(str(func))
                self.numel = max(self.numel, tensor.numel())
        return out
