"""Models and predictors for other programs, by PyTorch's convention: torch.hub.load(CLONE, NAME, source="local")."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import types
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as transforms

dependencies = ["torch", "torchvision", "numpy", "pycocotools", "scipy", "PIL", "tqdm"]
_HERE = pathlib.Path(__file__).resolve().parent


# The modules of this folder are private to it: the calling program, or another clone, may have a `data` or a `model`.
# What `import` finds under these names stays as it was. In sys.modules ours begin with a mark of the folder, so that
# loading it again gives the same ones, and what looks for a class or a function by its module finds it.
_MARK = f"dimaskdino_{zlib.crc32(bytes(_HERE)):x}_"
_NAMES = {"formats", *(path.stem for path in _HERE.glob("*.py"))}


def _take_out():
    """Remove all modules of such names from sys.modules, and return them by name."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in _NAMES}


_theirs = _take_out()
sys.modules.update({name.removeprefix(_MARK): x for name, x in sys.modules.items() if name.startswith(_MARK)})
sys.path.insert(0, str(_HERE))
try:
    import checkpoint as _checkpoint
    import config as _config
    import decoder as _decoder
    import detections as _detections
    import formats.images as _images
    import model as _model
    import precision as _precision
finally:
    sys.path.remove(str(_HERE))
    _ours = _take_out()
    sys.modules.update(_theirs)
    for _name, _module in _ours.items():
        sys.modules[_MARK + _name], _module.__name__ = _module, _MARK + _name
        for _value in vars(_module).values():
            if isinstance(_value, type | types.FunctionType) and _value.__module__ == _name:
                _value.__module__ = _MARK + _name


def _entry(preset):
    """The function of that name, which returns a model."""
    config = _config.PRESETS[preset]

    def build(checkpoint=None, classes=None, **overrides):
        if classes is not None:
            if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
                raise ValueError(f"classes {classes!r}: expected a list of names")
            if checkpoint is not None:
                raise ValueError("classes: the checkpoint has its own; leave them out")
            if (number := overrides.setdefault("num_classes", len(classes))) != len(classes):
                raise ValueError(f"{len(classes)} classes, but num_classes={number}; give one of them")
        if checkpoint is None:
            model = _model.build_model(preset, **overrides).eval()
        else:
            model, content = _checkpoint.load_model(checkpoint, overrides=overrides)
            classes = content["classes"]
        for name in sorted({"backbone", "di", "bato"} - overrides.keys()):
            if (found := getattr(model.config, name)) != (expected := getattr(config, name)):
                raise ValueError(f"{checkpoint}: is no {preset}, its {name} is {found}, not {expected}; load another")
        model.classes, model.masks = classes and list(map(str, classes)), _decoder.masks
        return model

    build.__doc__ = f"""{"DI-MaskDINO" if config.di else "Mask DINO"}, as a torch.nn.Module in evaluation mode.

    checkpoint  file of train.py or convert.py; None: random weights, the backbone's too
    classes     without a checkpoint: the list of the classes' names, instead of the preset's number of them
    overrides   fields of `Config` in config.py; with a checkpoint, those that leave the parameters as they are

    `model.masks(outputs)` are the mask logits (B, Q, H/4, W/4) of what it returns; the names are `model.classes`, None
    where there are none. Raises ValueError for what does not fit.
    """
    return build


globals().update({preset: _entry(preset) for preset in _config.PRESETS})


class predictor:  # by torch.hub's convention a name of its own, like the models'
    """A function of an image that returns its detections, as predict.py finds them.

    checkpoint: file of train.py or convert.py; device: "cpu", "cuda", or "auto", a GPU if there is one. Detections with
    a score below score_threshold are left out, and all but the best max_detections.

    The image: a path; a PIL image; a uint8 array (H, W, 3) RGB; a tensor (3, H, W) RGB, uint8 or float in [0, 1].
    The detections: {scores (k,), labels (k,) int64, boxes (k, 4) xyxy in pixels of the image, masks (k, H, W) bool},
    best first, on the CPU; `predictor.classes[label]` is the name of a class. Files and PIL images are turned upright
    first. Raises ValueError for what it cannot take. It can be pickled, with its weights, for processes that have this
    folder.
    """

    def __init__(self, checkpoint, device="auto", score_threshold=0.3, max_detections=100):
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold {score_threshold}: must be between 0 and 1")
        if max_detections < 1:
            raise ValueError(f"max_detections {max_detections}: must be 1 or more")
        if isinstance(checkpoint, dict):  # of __reduce__
            model, content = _model.DIMaskDINO(_config.Config(**checkpoint["config"])).float().eval(), checkpoint
            model.load_state_dict(content["model"])
        else:
            model, content = _checkpoint.load_model(checkpoint)
        self.settings = device, score_threshold, max_detections
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.classes = model.to(device), list(map(str, content["classes"]))
        on_gpu = torch.device(device).type == "cuda"  # where the programs switch TF32 off, too
        self.exactly = _precision.without_tf32 if on_gpu else contextlib.nullcontext

    def __call__(self, image):
        image, (_, threshold, most) = _pixels(image), self.settings
        with self.exactly():
            [[found]] = _detections.detect(self.model, [image], topk=most, score_threshold=threshold)
        return found

    def __reduce__(self):
        weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
        content = {"model": weights, "config": dataclasses.asdict(self.model.config), "classes": self.classes}
        load = functools.partial(torch.hub.load, str(_HERE), "predictor", source="local")
        return load, (content, *self.settings)


def _pixels(image):
    """An image as `predictor` takes it -> (3, H, W) uint8 RGB. Raises ValueError."""
    if isinstance(image, str | os.PathLike):
        return _images.read_image(image)
    found = type(image).__name__
    if isinstance(image, np.ndarray | torch.Tensor):
        found += f" of {image.dtype}, shape {tuple(image.shape)}"
    if isinstance(image, Image.Image):
        found += f" of mode {image.mode}"
        if image.mode[0] not in "IF":  # of more than 8 bits: PIL would clip them
            image = transforms.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        image = torch.from_numpy(image.copy()).permute(2, 0, 1)
    if isinstance(image, torch.Tensor) and image.dim() == 3 and image.shape[0] == 3 and image.numel():
        if image.is_floating_point():
            low, high = (x.item() for x in image.aminmax())
            found += f", values from {low:.3g} to {high:.3g}"
            if 0 <= low and high <= 1:
                image = (image.detach().float() * 255).round().to(torch.uint8)
        if image.dtype == torch.uint8:
            return image.cpu()
    raise ValueError(
        f"image: {found}; expected a path, a PIL image with 8 bits a channel, a uint8 array (H, W, 3) RGB, or a tensor "
        "(3, H, W) RGB, uint8 or float in [0, 1]"
    )
