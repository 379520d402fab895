"""Outputs to detections, against a loop, whatever the size and dtype; and images to detections."""

import pytest
import torch
import torch.nn.functional as F
from toys import Float32Finder

import detections
from detections import postprocess


def made_up_outputs(B=2, Q=6, classes=3, h=8, w=12, seed=0):
    """Predictions whose mask logits are their pixel features: each query's embedding is 1 in a channel of its own."""
    torch.manual_seed(seed)
    return {
        "pred_logits": torch.randn(B, Q, classes),
        "pred_boxes": torch.rand(B, Q, 4),
        "mask_embeddings": torch.eye(Q).repeat(B, 1, 1),
        "pixel_features": 4 * torch.randn(B, Q, h, w),
    }


def test_postprocess_against_a_loop():
    outputs, image_sizes, output_sizes = made_up_outputs(), [(30, 41), (32, 48)], [(60, 82), (17, 23)]
    found = postprocess(outputs, image_sizes, output_sizes, topk=7)
    full = F.interpolate(outputs["pixel_features"], (32, 48), mode="bilinear", align_corners=False)
    for b, ((H, W), (out_h, out_w)) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        scores = outputs["pred_logits"][b].sigmoid()
        triples = sorted(((scores[q, c].item(), q, c) for q in range(6) for c in range(3)), reverse=True)[:7]
        expected = []
        for score, q, c in triples:
            mask = full[b, q, :H, :W]
            mask = F.interpolate(mask[None, None], (out_h, out_w), mode="bilinear", align_corners=False)[0, 0]
            inside = mask > 0
            quality = mask.sigmoid()[inside].sum() / (inside.sum() + 1e-6)
            cx, cy, w, h = outputs["pred_boxes"][b, q].tolist()
            sx, sy = 48 * out_w / W, 32 * out_h / H
            box = [(cx - w / 2) * sx, (cy - h / 2) * sy, (cx + w / 2) * sx, (cy + h / 2) * sy]
            expected.append((score * quality.item(), c, box, inside))
        expected.sort(key=lambda detection: -detection[0])
        scores, labels, boxes, masks = zip(*expected, strict=True)
        torch.testing.assert_close(found[b]["scores"], torch.tensor(scores))
        assert found[b]["labels"].dtype == torch.int64 and found[b]["labels"].tolist() == list(labels)
        torch.testing.assert_close(found[b]["boxes"], torch.tensor(boxes))
        assert found[b]["masks"].dtype == torch.bool and torch.equal(found[b]["masks"], torch.stack(masks))


def test_postprocess_sorts_by_the_final_score_and_takes_all_of_few():
    outputs = made_up_outputs()
    for found in postprocess(outputs, [(32, 48)] * 2, [(10, 20)] * 2):  # 18 candidates, fewer than 100
        assert {name: len(value) for name, value in found.items()} == dict.fromkeys(found, 18)
        assert (found["scores"].diff() <= 0).all() and found["masks"].shape == (18, 10, 20)
        assert set(found) == {"scores", "labels", "boxes", "masks"}


def test_postprocess_does_not_clip_boxes_and_scores_empty_masks_zero():
    outputs = made_up_outputs(B=1, Q=2, classes=1)
    outputs["pred_boxes"] = torch.tensor([[[0.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 0.5]]])
    outputs["pixel_features"][0, 0] = 20
    outputs["pixel_features"][0, 1] = -20
    outputs["pred_logits"] = torch.tensor([[[0.0], [3.0]]])
    (found,) = postprocess(outputs, [(32, 48)], [(64, 96)])
    assert found["boxes"].tolist() == [[-48, 0, 48, 64], [72, 48, 120, 80]]
    assert found["scores"][0] == pytest.approx(0.5) and found["scores"][1] == 0
    assert found["masks"][0].all() and not found["masks"][1].any()


def all_at_once(outputs, image_sizes, output_sizes, topk):
    """What `postprocess` finds, with all masks of an image at full size at a time."""
    scores, picked = outputs["pred_logits"].sigmoid().flatten(1).topk(topk, dim=1)
    classes, padded = outputs["pred_logits"].shape[-1], [4 * n for n in outputs["pixel_features"].shape[-2:]]
    found = []
    for b, ((height, width), size) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        masks = outputs["pixel_features"][b, picked[b] // classes][:, None]
        masks = F.interpolate(masks, padded, mode="bilinear", align_corners=False)[..., :height, :width]
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)[:, 0]
        inside = masks > 0
        quality = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)).to(masks) + 1e-6)
        final, order = (scores[b] * quality).sort(descending=True, stable=True)
        found.append((final, picked[b, order] % classes, inside[order]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [1, 2, 3, 30])
def test_postprocess_gives_the_same_bits_a_few_masks_at_a_time(monkeypatch, queries, dtype):
    """And with a threshold the same without what is below it."""
    outputs = {name: x.to(dtype) for name, x in made_up_outputs(Q=queries, classes=5, h=20, w=24).items()}
    sizes, topk = ([(80, 90), (70, 96)], [(240, 270), (35, 48)]), min(20, 5 * queries)
    expected = all_at_once(outputs, *sizes, topk)
    for pixels in (2**24, 3 * 240 * 270, 1):
        monkeypatch.setattr(detections, "MASK_PIXELS", pixels)
        for threshold in (0.0, 0.45, 1.0):
            found = postprocess(outputs, *sizes, topk, threshold)
            coded = postprocess(outputs, *sizes, topk, threshold, encode=list)
            for one, masks, (scores, labels, inside) in zip(found, coded, expected, strict=True):
                above = scores >= threshold
                assert torch.equal(one["scores"], scores[above])
                assert torch.equal(one["labels"], labels[above])
                assert torch.equal(one["masks"], inside[above])
                assert len(masks["masks"]) == above.sum() and all(map(torch.equal, masks["masks"], inside[above]))


def test_postprocess_of_a_large_image_holds_few_masks_at_a_time():
    """100 masks of 1600 x 2400 pixels would fill 1.5 GB as floats, and 0.4 GB as booleans."""
    outputs = made_up_outputs(B=1, Q=100, classes=1)
    with Float32Finder() as largest:
        postprocess(outputs, [(32, 48)], [(1600, 2400)], encode=lambda masks: list(masks[:, ::100, ::100].clone()))
    assert largest.numel <= detections.MASK_PIXELS + 1600 * 2400


def test_postprocess_in_half_precision_counts_every_pixel():
    """float16 cannot hold areas above 65,504, and bfloat16 has 8 bits for a score."""
    outputs = made_up_outputs(B=1, Q=4, classes=1)
    outputs["pixel_features"] = (outputs["pixel_features"].abs() + 10).half()
    (found,) = postprocess(outputs | {"pred_logits": outputs["pred_logits"].bfloat16()}, [(32, 48)], [(320, 480)])
    expected = outputs["pred_logits"].bfloat16().float().sigmoid().flatten().sort(descending=True).values
    assert found["scores"].dtype == torch.float32
    torch.testing.assert_close(found["scores"], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes", "mask_embeddings"])
def test_postprocess_refuses_what_is_no_number(name):
    outputs = made_up_outputs()
    outputs[name][1, 2] = float("nan")
    for threshold in (0.0, 0.99):
        if name == "pred_logits" or threshold == 0:
            with pytest.raises(ValueError, match="NaN or infinity"):
                postprocess(outputs, [(32, 48)] * 2, [(32, 48)] * 2, score_threshold=threshold)


def test_postprocess_computes_in_the_dtype_of_its_input():
    outputs = {name: value.double() for name, value in made_up_outputs().items()}
    with Float32Finder() as finder:
        postprocess(outputs, [(32, 48)] * 2, [(30, 40)] * 2)
    assert not finder.found


def test_postprocess_wants_both_sizes_of_every_image():
    with pytest.raises(ValueError):
        postprocess(made_up_outputs(), [(32, 48)] * 2, [(32, 48)])
