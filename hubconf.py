"""Models and predictors for other programs, by PyTorch's convention: torch.hub.load(CLONE, NAME, source="local")."""

import importlib.machinery
import os
import pathlib
import sys

_HERE = pathlib.Path(__file__).resolve().parent
_ALIAS = "dimaskdino_clone."  # before the names under which modules that had to make room stay in sys.modules

dependencies = ["torch", "torchvision", "numpy", "pycocotools", "scipy", "PIL", "tqdm"]


def _import(*names):
    """Modules of this folder. The calling program may have its own `data` or `model`: what `import` finds under these
    names stays the same, and so do the modules of this folder when it is loaded again."""
    roots = {path.stem for path in _HERE.glob("*.py")} - {"hubconf", "setup"} | {"formats"}
    path = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != _HERE]
    named = lambda: [name for name in sys.modules if name.split(".")[0] in roots]  # noqa: E731
    theirs = {name: sys.modules.pop(name) for name in named() if not _is_ours(sys.modules[name])}
    shared = {name.split(".")[0] for name in theirs}
    shared |= {name for name in roots if _is_module(importlib.machinery.PathFinder.find_spec(name, path))}
    sys.modules.update({name.removeprefix(_ALIAS): sys.modules[name] for name in sys.modules if _ALIAS in name})
    sys.path.insert(0, str(_HERE))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(_HERE))
        for name in named():
            if name.split(".")[0] in shared:
                sys.modules[_ALIAS + name] = sys.modules.pop(name)
        sys.modules.update(theirs)


def _is_ours(module):
    return _HERE in pathlib.Path(getattr(module, "__file__", None) or "/").resolve().parents


def _is_module(spec):
    return spec is not None and spec.origin is not None  # a mere folder has none


_checkpoint, _cli, _config, _coco, _images, _model, _predict = _import(
    "checkpoint", "cli", "config", "formats.coco", "formats.images", "model", "predict"
)


def dimaskdino_r50(checkpoint=None, classes=None, **overrides):
    """DI-MaskDINO with ResNet-50, as a torch.nn.Module in evaluation mode; see its `forward` for what it takes.

    checkpoint  file of train.py or convert.py; None: random weights, the backbone's too
    classes     without a checkpoint: the names of the classes, instead of COCO's number of them
    overrides   fields of `Config` in config.py; with a checkpoint, those that leave the parameters as they are

    The names are `model.classes`, None where there are none. Raises ValueError for what does not fit.
    """
    return _build("dimaskdino_r50", checkpoint, classes, overrides)


def maskdino_r50(checkpoint=None, classes=None, **overrides):
    """Mask DINO with ResNet-50; the arguments are those of `dimaskdino_r50`."""
    return _build("maskdino_r50", checkpoint, classes, overrides)


def dimaskdino_swin_l(checkpoint=None, classes=None, **overrides):
    """DI-MaskDINO with Swin-L; the arguments are those of `dimaskdino_r50`."""
    return _build("dimaskdino_swin_l", checkpoint, classes, overrides)


def maskdino_swin_l(checkpoint=None, classes=None, **overrides):
    """Mask DINO with Swin-L; the arguments are those of `dimaskdino_r50`."""
    return _build("maskdino_swin_l", checkpoint, classes, overrides)


def tiny(checkpoint=None, classes=None, **overrides):
    """The small DI-MaskDINO that train.py trains by default; the arguments are those of `dimaskdino_r50`."""
    return _build("tiny", checkpoint, classes, overrides)


def predictor(checkpoint, device="auto", score_threshold=0.3, max_detections=100):
    """A function of an image that returns its detections, as predict.py finds them.

    checkpoint       file of train.py or convert.py
    device           "cpu", "cuda", or "auto": a GPU if there is one
    score_threshold  detections with a lower score are left out
    max_detections   at most so many

    The image: a path; a PIL image; a uint8 array (H, W, 3) RGB; a tensor (3, H, W) RGB, uint8 or float in [0, 1].
    The detections: {scores (k,), labels (k,) int64, boxes (k, 4) xyxy in pixels of the image, masks (k, H, W) bool},
    best first, on the CPU; `predictor.classes[label]` is the name of a class. Files and PIL images are turned upright
    first. Raises ValueError for a checkpoint or an image that it cannot take.
    """
    return _Predictor(checkpoint, device, score_threshold, max_detections)


def _build(preset, checkpoint, classes, overrides):
    if checkpoint is None:
        if classes is not None:
            overrides = {"num_classes": len(classes)} | overrides
        model = _model.build_model(preset, **overrides).eval()
        if classes is not None and len(classes) != model.config.num_classes:
            raise ValueError(f"{len(classes)} classes, but num_classes={model.config.num_classes}; give one of them")
        model.classes = None if classes is None else list(classes)
        return model
    if classes is not None:
        raise ValueError("classes: the checkpoint has its own; leave them out")
    model, content = _checkpoint.load_model(checkpoint, overrides=overrides)
    for name in ("backbone", "di", "bato"):
        found, expected = getattr(model.config, name), getattr(_config.PRESETS[preset], name)
        if found != expected and name not in overrides:
            raise ValueError(f"{checkpoint}: is no {preset}, its {name} is {found}, not {expected}; load another entry")
    model.classes = list(content["classes"])
    return model


class _Predictor:
    """What `predictor` returns."""

    def __init__(self, checkpoint, device, score_threshold, max_detections):
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold {score_threshold}: must be between 0 and 1")
        if max_detections < 1:
            raise ValueError(f"max_detections {max_detections}: must be 1 or more")
        self.device = _cli.choose_device(str(device))
        self.model, content = _checkpoint.load_model(checkpoint, self.device)
        self.classes = list(content["classes"])
        self.limits = score_threshold, max_detections

    def __call__(self, image):
        return _predict.predict(self.model, _pixels(image), self.device, *self.limits)


def _pixels(image):
    """An image as `predictor` takes it -> (3, H, W) uint8 RGB."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    found = f"a {type(image).__name__}"
    if isinstance(image, str | os.PathLike):
        return _images.read_image(image)
    if isinstance(image, Image.Image):
        if not image.mode.startswith(("I", "F")):  # more than 8 bits: PIL would clip them
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
        found = f"a PIL image of mode {image.mode}"
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        found = f"an array of {image.dtype}, shape {image.shape}"
    if isinstance(image, torch.Tensor):
        found = f"a tensor of {image.dtype}, shape {tuple(image.shape)}"
        if image.dim() == 3 and image.shape[0] == 3 and image.numel():
            if image.dtype == torch.uint8:
                return image.cpu()
            if image.is_floating_point():
                low, high = (x.item() for x in image.aminmax())
                if 0 <= low and high <= 1:
                    return (image.detach().cpu().float() * 255).round().to(torch.uint8)
                found += f", values from {low:.3g} to {high:.3g}"
    raise ValueError(
        f"image: {found}; expected a path, a PIL image with 8 bits a channel, a uint8 array (H, W, 3) RGB, or a tensor "
        "(3, H, W) RGB, uint8 or float in [0, 1]"
    )
