"""The whole model at a small size: modes, outputs, gradients, dtypes; and the detections."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from config import PRESETS
from detections import postprocess
from losses import SetCriterion
from model import PIXEL_MEAN, PIXEL_STD, build_model

SMALL = {
    "num_classes": 4,
    "hidden_dim": 64,
    "encoder_layers": 1,
    "selections": (40, 20),
    "num_guiding": 8,
    "decoder_layers": 3,
    "denoising_queries": 12,
    "loss_points": 64,
}
SYSTEMS = {
    "DI-MaskDINO": {"di": True, "bato": True},
    "DI": {"di": True, "bato": False},
    "BATO": {"di": False, "bato": True},
    "Mask DINO": {"di": False, "bato": False},
}
PREDICTIONS = {"pred_logits", "pred_boxes", "pred_masks"}
FACTORS = {"mask_embeddings", "pixels"}  # of pred_masks, in training


def small_model(**overrides):
    torch.manual_seed(0)
    return build_model("tiny", **(SMALL | overrides))


def targets(*counts, size=64):
    found = []
    for n in counts:
        boxes = torch.cat([torch.rand(n, 2) * 0.4 + 0.3, torch.rand(n, 2) * 0.3 + 0.1], 1)
        found.append({"labels": torch.randint(4, (n,)), "boxes": boxes, "masks": torch.rand(n, size, size) > 0.5})
    return found


@pytest.fixture(params=SYSTEMS)
def variant(request):
    """Config fields of one system, or of one of the two ablations between them."""
    return SYSTEMS[request.param]


def test_outputs_in_training(variant):
    model = small_model(**variant).train()
    outputs = model([torch.rand(3, 64, 50), torch.rand(3, 40, 64)], targets(2, 3))
    expected = PREDICTIONS | FACTORS | {"selection", "aux_outputs", "interm_outputs", "dn_outputs"}
    assert set(outputs) == expected | ({"di_outputs"} if variant["di"] else set())
    assert len(outputs["aux_outputs"]) == 3  # the decoder's input, layers 1 and 2
    first = 40 if variant["di"] else 20  # Mask DINO selects its queries at once
    sets = [(outputs, 20), (outputs["interm_outputs"], first), *((layer, 20) for layer in outputs["aux_outputs"])]
    denoised = outputs["dn_outputs"]
    assert denoised["num_groups"] == 4 and len(denoised["aux_outputs"]) == 3
    sets += [(layer, 12) for layer in [denoised, *denoised["aux_outputs"]]]
    for layer, queries in sets:
        assert layer["pred_logits"].shape == (2, queries, 4)
        assert layer["pred_boxes"].shape == (2, queries, 4)
        assert layer["pred_masks"].shape == (2, queries, 16, 16)
        product = torch.einsum("bqc,bchw->bqhw", layer["mask_embeddings"], layer["pixels"])
        torch.testing.assert_close(product, layer["pred_masks"], rtol=1e-4, atol=1e-4)
        assert ((layer["pred_boxes"] >= 0) & (layer["pred_boxes"] <= 1)).all()
    for layer in outputs.get("di_outputs", []):
        assert layer["pred_logits"].shape == layer["pred_boxes"].shape == (2, 40, 4) and set(layer) < PREDICTIONS
    counts = {name: indices.shape for name, indices in outputs["selection"].items()}
    wanted = {"first": (2, first)} | ({"second": (2, 20)} if variant["di"] else {})
    assert counts == wanted | ({"guiding": (2, 8)} if variant["bato"] else {})


def test_evaluation_computes_only_the_result(variant):
    model = small_model(**variant).eval()
    images, calls = torch.rand(2, 3, 64, 64), []
    model.heads.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        outputs = model(images)
        assert set(outputs) == PREDICTIONS | {"selection"} and len(calls) == 1
        every = model(images, all_layers=True)
    assert set(every) == set(outputs) | {"aux_outputs", "interm_outputs"} | ({"di_outputs"} if variant["di"] else set())
    assert len(every["aux_outputs"]) == 3
    for name in PREDICTIONS:
        assert torch.equal(outputs[name], every[name])
    for name, indices in outputs["selection"].items():
        assert torch.equal(indices, every["selection"][name])


def test_training_without_targets_equals_evaluation(variant):
    model = small_model(**variant)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        training, evaluation = model.train()(images), model.eval()(images, all_layers=True)
    assert set(training) == set(evaluation) | FACTORS
    layers = ([outputs, *outputs["aux_outputs"]] for outputs in (training, evaluation))
    for ours, theirs in zip(*layers, strict=True):
        for name in PREDICTIONS:
            torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("di", [True, False])
def test_one_decoder_layer(di):
    model = small_model(di=di, bato=False, decoder_layers=1)
    with torch.no_grad():
        assert set(model.eval()(torch.rand(1, 3, 64, 64))) == PREDICTIONS | {"selection"}
        assert len(model.train()(torch.rand(1, 3, 64, 64))["aux_outputs"]) == 1


@pytest.mark.parametrize("case", ["no instances", "no denoising", "instances on one image", "too many to denoise"])
def test_every_parameter_gets_a_gradient(variant, case):
    model = small_model(**variant).train()
    batch = {
        "no instances": targets(0, 0),
        "no denoising": targets(2, 3),
        "instances on one image": targets(0, 3),
        "too many to denoise": targets(13, 1),
    }[case]
    criterion = SetCriterion(model.config)
    outputs = model(torch.rand(2, 3, 64, 64), None if case == "no denoising" else batch)
    assert ("dn_outputs" in outputs) == (case == "instances on one image")
    terms = criterion(outputs, batch)
    sum(criterion.weights[name] * term for name, term in terms.items()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [(1, 1), (20, 90)])
@pytest.mark.parametrize("system", ["DI-MaskDINO", "Mask DINO"])
def test_images_with_fewer_tokens_than_queries(system, size):
    model = small_model(**SYSTEMS[system], selections=(600, 300), num_guiding=50)
    images = [torch.rand(3, *size)] * 2
    height, width = (32 * -(-n // 32) for n in size)
    tokens = sum(-(-height // s) * -(-width // s) for s in (8, 16, 32, 64))
    assert tokens < 300
    with torch.no_grad():
        outputs = model.eval()(images)
    assert outputs["pred_logits"].shape == (2, tokens, 4)
    for name, indices in outputs["selection"].items():
        wanted = range(min(50, tokens)) if name == "guiding" else range(tokens)
        assert len(set(indices[0].tolist())) == len(wanted) and indices.max() < tokens
    detections = postprocess(outputs, [size] * 2, [size] * 2)
    assert detections[0]["masks"].shape == (min(100, 4 * tokens), *size)

    batch = targets(2, 0)
    for target in batch:
        target["masks"] = torch.ones(len(target["labels"]), height, width, dtype=torch.bool)
    terms = SetCriterion(model.config)(model.train()(images, batch), batch)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Float32Finder(TorchDispatchMode):
    """Records the operations that return a float32 tensor."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.found.add(str(func))
        return out


def test_a_double_model_has_no_float32_tensor_inside(variant):
    model = small_model(**variant).double()
    images, batch = torch.rand(2, 3, 64, 50), targets(2, 3)
    for target in batch:
        target["boxes"] = target["boxes"].double()
    images = list(images.double())
    with torch.no_grad(), Float32Finder() as finder:
        model.eval()(images)
        outputs = model.train()(images, batch)
    assert finder.found <= {"aten.rand.default"}  # which of the denoising labels become random
    layers = [outputs, outputs["interm_outputs"], *outputs["aux_outputs"], outputs["dn_outputs"]]
    assert {layer[name].dtype for layer in layers for name in PREDICTIONS} == {torch.float64}


def test_batch_normalises_and_then_pads():
    model = small_model()
    images = [torch.rand(3, 40, 33), torch.rand(3, 64, 20)]
    batch = model.batch(images)
    assert batch.shape == (2, 3, 64, 64)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
    for image, padded in zip(images, batch, strict=True):
        height, width = image.shape[1:]
        torch.testing.assert_close(padded[:, :height, :width], (image - mean) / std)
        assert (padded[:, height:] == 0).all() and (padded[:, :, width:] == 0).all()
    stacked = torch.rand(2, 3, 32, 64)
    assert torch.equal(model.batch(stacked), model.batch(list(stacked)))


def test_presets():
    with pytest.raises(ValueError, match="unknown preset 'huge'.*tiny"):
        build_model("huge")
    with pytest.raises(TypeError, match="colour"):
        build_model("tiny", colour=3)
    assert PRESETS["dimaskdino_r50"].selections == (600, 300)
    mask_dino = PRESETS["maskdino_r50"]
    assert (mask_dino.di, mask_dino.bato, mask_dino.decoder_layers) == (False, False, 9)
    names = {name for name, _ in small_model(di=False, bato=False).named_parameters()}
    assert not [name for name in names if name.startswith(("di.interactions", "di.position_tokens", "bato"))]


def test_initial_boxes_are_the_reference_boxes():
    """The box head starts at zero, so an untrained model leaves the boxes around the selected masks as they are."""
    model = small_model().train()
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 64))
    for layer in outputs["aux_outputs"][1:] + [outputs]:
        torch.testing.assert_close(layer["pred_boxes"], outputs["aux_outputs"][0]["pred_boxes"])


def made_up_outputs(B=2, Q=6, classes=3, h=8, w=12, seed=0):
    torch.manual_seed(seed)
    return {
        "pred_logits": torch.randn(B, Q, classes),
        "pred_boxes": torch.rand(B, Q, 4),
        "pred_masks": 4 * torch.randn(B, Q, h, w),
    }


def test_postprocess_against_a_loop():
    outputs, image_sizes, output_sizes = made_up_outputs(), [(30, 41), (32, 48)], [(60, 82), (17, 23)]
    found = postprocess(outputs, image_sizes, output_sizes, topk=7)
    full = F.interpolate(outputs["pred_masks"], (32, 48), mode="bilinear", align_corners=False)
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
    for detections in postprocess(outputs, [(32, 48)] * 2, [(10, 20)] * 2):  # 18 candidates, fewer than 100
        assert {name: len(value) for name, value in detections.items()} == dict.fromkeys(detections, 18)
        assert (detections["scores"].diff() <= 0).all() and detections["masks"].shape == (18, 10, 20)
        assert set(detections) == {"scores", "labels", "boxes", "masks"}


def test_postprocess_does_not_clip_boxes_and_scores_empty_masks_zero():
    outputs = made_up_outputs(B=1, Q=2, classes=1)
    outputs["pred_boxes"] = torch.tensor([[[0.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 0.5]]])
    outputs["pred_masks"][0, 0] = 20
    outputs["pred_masks"][0, 1] = -20
    outputs["pred_logits"] = torch.tensor([[[0.0], [3.0]]])
    (found,) = postprocess(outputs, [(32, 48)], [(64, 96)])
    assert found["boxes"].tolist() == [[-48, 0, 48, 64], [72, 48, 120, 80]]
    assert found["scores"][0] == pytest.approx(0.5) and found["scores"][1] == 0
    assert found["masks"][0].all() and not found["masks"][1].any()


def all_at_once(outputs, image_sizes, output_sizes, topk):
    """What `postprocess` finds, with all masks of an image at full size at a time."""
    scores, picked = outputs["pred_logits"].sigmoid().flatten(1).topk(topk, dim=1)
    classes, padded = outputs["pred_logits"].shape[-1], [4 * n for n in outputs["pred_masks"].shape[-2:]]
    found = []
    for b, ((height, width), size) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        masks = outputs["pred_masks"][b, picked[b] // classes][:, None]
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
        monkeypatch.setattr(model_module, "MASK_PIXELS", pixels)
        for threshold in (0.0, 0.45, 1.0):
            found = postprocess(outputs, *sizes, topk, threshold)
            coded = postprocess(outputs, *sizes, topk, threshold, encode=list)
            for detections, masks, (scores, labels, inside) in zip(found, coded, expected, strict=True):
                above = scores >= threshold
                assert torch.equal(detections["scores"], scores[above])
                assert torch.equal(detections["labels"], labels[above])
                assert torch.equal(detections["masks"], inside[above])
                assert len(masks["masks"]) == above.sum() and all(map(torch.equal, masks["masks"], inside[above]))


def test_postprocess_enlarges_few_masks_at_a_time_and_none_below_the_threshold(monkeypatch):
    outputs, sizes, interpolate = made_up_outputs(B=1, Q=50), [], F.interpolate

    def record(masks, *args, **kwargs):
        sizes.append(len(masks))
        return interpolate(masks, *args, **kwargs)

    monkeypatch.setattr(model_module.F, "interpolate", record)
    monkeypatch.setattr(model_module, "MASK_PIXELS", 4 * 320 * 480)
    likely = (outputs["pred_logits"].sigmoid() >= 0.6).sum().item()
    postprocess(outputs, [(32, 48)], [(320, 480)], score_threshold=0.6)
    assert max(sizes) <= 4 and sum(sizes[::2]) == likely < 100


def test_postprocess_in_half_precision_counts_every_pixel():
    """float16 cannot hold areas above 65,504, and bfloat16 has 8 bits for a score."""
    outputs = made_up_outputs(B=1, Q=4, classes=1)
    outputs["pred_masks"] = (outputs["pred_masks"].abs() + 10).half()
    (found,) = postprocess(outputs | {"pred_logits": outputs["pred_logits"].bfloat16()}, [(32, 48)], [(320, 480)])
    expected = outputs["pred_logits"].bfloat16().float().sigmoid().flatten().sort(descending=True).values
    assert found["scores"].dtype == torch.float32
    torch.testing.assert_close(found["scores"], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", sorted(PREDICTIONS))
def test_postprocess_refuses_what_is_no_number(name):
    outputs = made_up_outputs()
    outputs[name][1, 2] = float("nan")
    for threshold in (0.0, 0.99):
        if name == "pred_logits" or threshold == 0:
            with pytest.raises(ValueError, match="NaN or infinity"):
                postprocess(outputs, [(32, 48)] * 2, [(32, 48)] * 2, score_threshold=threshold)


@pytest.mark.parametrize("images, found", [
    (torch.rand(3, 64, 64), r"images: a tensor of shape \(3, 64, 64\)"),
    (torch.rand(2, 4, 64, 64), r"images: a tensor of shape \(2, 4, 64, 64\)"),
    (torch.rand(0, 3, 64, 64), "images: none"),
    ([], "images: none"),
    ("photo.jpg", "images: a str"),
    ([torch.rand(3, 9, 9), torch.rand(1, 3, 9, 9)], r"images\[1\]: a tensor of shape \(1, 3, 9, 9\)"),
    ([torch.rand(64, 64, 3)], r"images\[0\]: a tensor of shape \(64, 64, 3\)"),
    ([torch.rand(3, 0, 64)], r"images\[0\]: a tensor of shape \(3, 0, 64\)"),
    ([torch.zeros(3, 9, 9, dtype=torch.uint8)], r"images\[0\]: a tensor of torch.uint8.*divide by 255"),
    ([torch.linspace(0, 255, 243).view(3, 9, 9)], r"images\[0\]: values from 0 to 255.*divide by 255"),
    (torch.linspace(-2, 3, 243).view(1, 3, 9, 9), "images: values from -2 to 3"),
    ([torch.rand(3, 9, 9).numpy()], r"images\[0\]: a ndarray"),
])  # fmt: skip
def test_images_that_forward_does_not_take(images, found):
    with pytest.raises(ValueError, match=found):
        small_model().eval()(images)


def test_postprocess_enlarges_only_the_selected_masks(monkeypatch):
    outputs, sizes, interpolate = made_up_outputs(Q=50), [], F.interpolate

    def record(masks, *args, **kwargs):
        sizes.append(len(masks))
        return interpolate(masks, *args, **kwargs)

    monkeypatch.setattr(model_module.F, "interpolate", record)
    postprocess(outputs, [(32, 48)] * 2, [(32, 48)] * 2, topk=5)
    assert set(sizes) == {5}


def test_postprocess_computes_in_the_dtype_of_its_input():
    outputs = {name: value.double() for name, value in made_up_outputs().items()}
    with Float32Finder() as finder:
        postprocess(outputs, [(32, 48)] * 2, [(30, 40)] * 2)
    assert not finder.found


def test_postprocess_wants_both_sizes_of_every_image():
    with pytest.raises(ValueError):
        postprocess(made_up_outputs(), [(32, 48)] * 2, [(32, 48)])
