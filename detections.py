"""From outputs to detections: scores, labels, boxes and masks in the pixels of an image."""

import math

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

from attention import full_precision
from config import InputError
from data import eval_transform

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
    resized = [eval_transform(*model.config.test_size)(image).to(device) for image in images]
    last = model.config.decoder_layers
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        outputs = model(resized, all_layers=any(layer not in (None, last) for layer in layers))
    predictions = [*outputs.get("aux_outputs", [None] * last), outputs]
    found = []
    for layer in layers:
        layer = predictions[last if layer is None else layer]
        if labels is not None:
            layer = layer | {"pred_logits": layer["pred_logits"][..., labels]}
        sizes = [image.shape[1:] for image in resized], output_sizes
        detections = postprocess(layer, *sizes, topk, score_threshold, encode)
        found.append([{k: v.cpu() if torch.is_tensor(v) else v for k, v in one.items()} for one in detections])
    return found


def postprocess(outputs, image_sizes, output_sizes, topk=100, score_threshold=0.0, encode=None):
    """Detections of the last layer, at most `topk` per image, best first.

    image_sizes      (H, W) of every image before padding, as the model saw it
    output_sizes     (H, W) that boxes and masks are wanted in
    score_threshold  0 to 1; detections with a lower score are left out
    encode           what to keep of the masks, for large images, where a hundred fill a gigabyte: a function of a few
                     masks (n, H, W) bool that returns a list of n, e.g. `coco.encode_masks`

    Returns per image {scores (k,), labels (k,) int64, boxes (k, 4) xyxy in output pixels, not clipped, masks (k, H, W)
    bool or, with `encode`, a list}. A score is the class score times the mean mask probability inside the mask.
    Raises InputError where a prediction is NaN or infinite.
    """
    finite = outputs["pred_logits"].isfinite().all()
    scores = full_precision(outputs["pred_logits"]).sigmoid().flatten(1)  # (B, Q * classes)
    scores, picked = scores.topk(min(topk, scores.shape[1]), dim=1)
    num_classes = outputs["pred_logits"].shape[-1]
    padded_height, padded_width = (4 * n for n in outputs["pred_masks"].shape[-2:])
    detections = []
    for b, (size, output_size) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        likely = ~(scores[b] < score_threshold)  # the mask's factor is at most 1; NaN stays, to be found below
        class_scores, picks = scores[b, likely], picked[b, likely]
        query, labels = picks // num_classes, picks % num_classes
        boxes = box_convert(outputs["pred_boxes"][b, query], "cxcywh", "xyxy")
        boxes = boxes * boxes.new_tensor((padded_width * output_size[1] / size[1],
                                          padded_height * output_size[0] / size[0]) * 2)  # fmt: skip
        final, masks = class_scores.clone(), []
        for some, inside, quality in full_masks(outputs["pred_masks"][b], query, size, output_size):
            final[some] *= quality
            inside = inside[final[some] >= score_threshold]
            masks += encode(inside) if encode else [inside]
        if not (finite and final.isfinite().all() and boxes.isfinite().all()):
            raise InputError("the model predicts NaN or infinity; its weights are damaged or its precision is too low")
        kept = final >= score_threshold
        final, order = final[kept].sort(descending=True, stable=True)
        if encode:
            masks = [masks[i] for i in order.tolist()]
        else:
            masks = torch.cat(masks or [kept.new_zeros(0, *output_size)])[order]
        labels, boxes = labels[kept][order], boxes[kept][order]
        detections.append({"scores": final, "labels": labels, "boxes": boxes, "masks": masks})
    return detections


def full_masks(logits, query, size, output_size):
    """Masks at full size, a few at a time: yields (their places in `query`, masks (n, H, W) bool, quality (n,)).

    logits (Q, H/4, W/4) of one image, query (k,) indices; size and output_size: (H, W) before padding and wanted. The
    quality is the mean probability inside the mask, 0 where it is empty.
    """
    padded = [4 * n for n in logits.shape[-2:]]
    pixels = max(math.prod(padded), math.prod(output_size))
    # Two or more at a time where there are two: the sum over one alone is of another order, and its last bits differ.
    count = max(1, min(len(query) // 2, math.ceil(len(query) * pixels / MASK_PIXELS)))
    for some in torch.arange(len(query), device=query.device).tensor_split(count) if len(query) else ():
        masks = full_precision(logits[query[some]][:, None])  # (n, 1, H/4, W/4)
        masks = F.interpolate(masks, padded, mode="bilinear", align_corners=False)
        masks = masks[..., : size[0], : size[1]]
        masks = F.interpolate(masks, output_size, mode="bilinear", align_corners=False)[:, 0]
        inside = masks > 0
        total = masks.sigmoid_().mul_(inside).sum((1, 2))
        # The area, exactly: no row has more ones than float32 can count. A sum of `inside` would copy it as int64.
        area = masks.copy_(inside).sum(2).to(torch.int64).sum(1)
        yield some, inside, total / (area.to(masks) + 1e-6)
