"""From outputs to detections: scores, labels, boxes and masks in the pixels of an image."""

import math

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

from config import InputError
from data import eval_transform
from decoder import masks
from di import gather_tokens
from precision import full_precision

MASK_PIXELS = 2**24  # of masks that `postprocess` holds as floats at a time: 64 MB


@torch.inference_mode()
def detect(model, images, output_sizes=None, layers=(None,), topk=100, score_threshold=0.0, encode=None, autocast=None,
           labels=None):  # fmt: skip
    """Detections of images: they are resized as the model's config says, and go through the model as one batch.

    images        list of (3, H, W) RGB tensors, uint8 or float in [0, 1], on any device
    output_sizes  (H, W) per image that boxes and masks are wanted in; None: the images' own
    layers        numbers of decoder layers whose predictions are wanted: 0 is the decoder's input, None the last layer
    autocast      dtype of torch.autocast; None for none
    labels        the model's labels that count, a list; a detection's label is then an index of it; None: all

    topk, score_threshold, encode: see `postprocess`. Returns for every layer a list with the detections of every image,
    on the CPU. Raises InputError where a prediction is NaN or infinite.
    """
    device = model.encoder.level_embed.device
    output_sizes = output_sizes or [tuple(image.shape[1:]) for image in images]
    resized = [eval_transform(image, *model.config.test_size).to(device) for image in images]
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        outputs = model(resized)
    predictions, sizes = [*outputs["aux_outputs"], outputs], [image.shape[1:] for image in resized]
    found = []
    for number in layers:
        layer = predictions[-1 if number is None else number]
        if labels is not None:
            layer = layer | {"pred_logits": layer["pred_logits"][..., labels]}
        detections = postprocess(layer, sizes, output_sizes, topk, score_threshold, encode)
        found.append([{k: v.cpu() if torch.is_tensor(v) else v for k, v in one.items()} for one in detections])
    return found


def postprocess(outputs, image_sizes, output_sizes, topk=100, score_threshold=0.0, encode=None):
    """Detections of a set of predictions, at most `topk` per image, best first.

    outputs          pred_logits, pred_boxes, mask_embeddings and pixel_features, as `DIMaskDINO.forward` returns them
    image_sizes      (H, W) of every image before padding, as the model saw it
    output_sizes     (H, W) that boxes and masks are wanted in
    score_threshold  0 to 1; detections with a lower score are left out
    encode           what to keep of the masks, for large images, where a hundred fill a gigabyte: a function of a few
                     masks (n, H, W) bool that returns a list of n, e.g. `coco.encode_masks`

    Returns per image {scores (k,), labels (k,) int64, boxes (k, 4) xyxy in output pixels, not clipped, masks (k, H, W)
    bool or, with `encode`, a list}. A score is the class score times the mean mask probability inside the mask.
    Raises InputError where a prediction is NaN or infinite.
    """
    scores, labels, query, boxes = best_queries(outputs, topk)
    padded = [4 * n for n in outputs["pixel_features"].shape[-2:]]
    detections = []
    for b, (size, output_size) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        likely = ~(scores[b] < score_threshold)  # the mask's factor is at most 1; NaN stays, to be found below
        height, width = (n * wanted / seen for n, wanted, seen in zip(padded, output_size, size, strict=True))
        box = boxes[b, likely] * boxes.new_tensor((width, height) * 2)
        embeddings, pixel_features = outputs["mask_embeddings"][b, query[b, likely]], outputs["pixel_features"][b]
        score, inside = scores[b, likely], []
        for some, found, quality in full_masks(embeddings, pixel_features, size, output_size):
            score[some] *= quality
            found = found[score[some] >= score_threshold]
            inside += encode(found) if encode else [found]
        if not (outputs["pred_logits"][b].isfinite().all() and score.isfinite().all() and box.isfinite().all()):
            raise InputError("the model predicts NaN or infinity; its weights are damaged or its precision is too low")
        kept = score >= score_threshold
        score, order = score[kept].sort(descending=True, stable=True)
        empty = kept.new_zeros(0, *output_size)
        inside = [inside[i] for i in order.tolist()] if encode else torch.cat([*inside, empty])[order]
        found = {"scores": score, "labels": labels[b, likely][kept][order], "boxes": box[kept][order], "masks": inside}
        detections.append(found)
    return detections


def best_queries(outputs, topk):
    """The `topk` best pairs of query and class of every image, best first, k in all.

    Returns class scores (B, k), labels and queries (B, k) int64, and boxes (B, k, 4) xyxy relative to the padded image.
    """
    logits = full_precision(outputs["pred_logits"])
    num_classes = logits.shape[2]
    scores, picked = logits.sigmoid().flatten(1).topk(min(topk, logits.shape[1] * num_classes), dim=1)
    query, labels = picked // num_classes, picked % num_classes
    boxes = box_convert(gather_tokens(outputs["pred_boxes"], query), "cxcywh", "xyxy")
    return scores, labels, query, boxes


def full_masks(embeddings, pixel_features, size, output_size):
    """Masks at full size, a few at a time: yields (their places among the k, masks (n, H, W) bool, quality (n,)).

    embeddings (k, C) and pixel_features (C, H/4, W/4): of one image; size and output_size: (H, W) before padding and
    wanted. The quality is the mean probability inside the mask, 0 where it is empty.
    """
    padded, k = [4 * n for n in pixel_features.shape[-2:]], len(embeddings)
    pixels = max(math.prod(padded), math.prod(output_size))
    # Two or more at a time where there are two: the sum over one alone is of another order, and its last bits differ.
    count = max(1, min(k // 2, math.ceil(k * pixels / MASK_PIXELS)))
    for some in torch.arange(k, device=embeddings.device).tensor_split(count) if k else ():
        factors = {"mask_embeddings": embeddings[None, some], "pixel_features": pixel_features[None]}
        found = full_precision(masks(factors)).transpose(0, 1)  # (n, 1, H/4, W/4)
        found = F.interpolate(found, padded, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
        found = F.interpolate(found, output_size, mode="bilinear", align_corners=False)[:, 0]
        inside = found > 0
        total = found.sigmoid_().mul_(inside).sum((1, 2))
        # The area, exactly: no row has more ones than float32 can count. A sum of `inside` would copy it as int64.
        area = found.copy_(inside).sum(2).to(torch.int64).sum(1)
        yield some, inside, total / (area.to(found) + 1e-6)
