"""The whole model at a small size: modes, outputs, gradients, dtypes; heads, decoder and BATO; and the detections."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from config import PRESETS
from losses import SetCriterion
from model import PIXEL_MEAN, PIXEL_STD, build_model, postprocess

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
    expected = PREDICTIONS | {"selection", "aux_outputs", "interm_outputs", "dn_outputs"}
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
    assert set(training) == set(evaluation)
    layers = ([outputs, *outputs["aux_outputs"]] for outputs in (training, evaluation))
    for ours, theirs in zip(*layers, strict=True):
        for name in PREDICTIONS:
            torch.testing.assert_close(ours[name], theirs[name])


def test_one_decoder_layer(variant):
    model = small_model(**variant, decoder_layers=1)
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
    names = {name.split(".")[0] for name, _ in small_model(di=False, bato=False).named_parameters()}
    assert not names & {"interactions", "bato", "position_tokens"}


def test_initial_boxes_are_the_reference_boxes():
    """The box head starts at zero, so an untrained model leaves the boxes around the selected masks as they are."""
    model = small_model().train()
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 64))
    for layer in outputs["aux_outputs"][1:] + [outputs]:
        torch.testing.assert_close(layer["pred_boxes"], outputs["aux_outputs"][0]["pred_boxes"])


def test_masks_are_dot_products_with_the_pixel_features():
    heads = small_model().heads
    x, features = torch.randn(2, 5, 64), torch.randn(2, 64, 4, 6)
    masks = heads.masks(x, features)
    embeddings = heads.mask_head(heads.norm(x))
    for b in range(2):
        for q in range(5):
            expected = (embeddings[b, q][:, None, None] * features[b]).sum(0)
            torch.testing.assert_close(masks[b, q], expected, rtol=1e-4, atol=1e-4)


def test_boxes_look_forward_twice():
    heads = small_model().heads
    x, features = torch.randn(1, 5, 64), torch.randn(1, 64, 4, 4)
    boxes = torch.rand(1, 5, 4, requires_grad=True)
    heads.predict_layer(x, boxes, features)["pred_boxes"].sum().backward()
    assert (boxes.grad != 0).all()


def test_decoder_layer_hides_what_the_mask_hides():
    decoder, shapes = small_model().decoder, [(1, 1), (1, 1), (2, 2), (4, 4)]
    x, boxes, tokens = torch.randn(1, 6, 64), torch.rand(1, 6, 4), torch.randn(1, 22, 64)
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[3:, :3] = True  # the last three do not see the first three
    with torch.no_grad():
        together = decoder(0, x, boxes, tokens, shapes, hidden)
        alone = decoder(0, x[:, 3:], boxes[:, 3:], tokens, shapes, None)
        open_to_all = decoder(0, x, boxes, tokens, shapes, None)
    torch.testing.assert_close(together[:, 3:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[:, :3], open_to_all[:, :3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[:, 3:], open_to_all[:, 3:], atol=1e-3)


@pytest.fixture
def guided():
    """BATO with its inputs and what it returns."""
    model = small_model()
    shapes = [(1, 1), (1, 1), (2, 2), (4, 4)]
    q_bal = torch.randn(2, 20, 64, requires_grad=True)
    boxes = torch.rand(2, 20, 4, requires_grad=True)
    t_i, pixel_features = torch.randn(2, 22, 64), torch.randn(2, 64, 8, 8)
    return model, shapes, q_bal, boxes, t_i, pixel_features


def test_bato_guides_by_the_best_queries(guided):
    model, shapes, q_bal, boxes, t_i, pixel_features = guided
    t_bal, refined, guiding = model.bato(q_bal, boxes, t_i, shapes, pixel_features, model.heads, model.decoder)
    assert t_bal.shape == t_i.shape and refined.shape == pixel_features.shape
    assert (refined >= 0).all() and (refined > 0).any()
    scores = model.heads.class_head(q_bal).amax(-1)  # of the queries themselves, without the norm
    assert torch.equal(guiding, scores.argsort(dim=1, descending=True)[:, :8])
    # Only the guiding queries matter, and their boxes pass no gradient.
    (t_bal.sum() + refined.sum()).backward()
    reached = q_bal.grad.abs().sum(-1) > 0
    assert torch.equal(reached, torch.zeros_like(reached).scatter(1, guiding, True))
    assert boxes.grad is None


def test_bato_with_fewer_queries_than_it_wants(guided):
    model, shapes, q_bal, boxes, t_i, pixel_features = guided
    arguments = q_bal[:, :3], boxes[:, :3], t_i, shapes, pixel_features, model.heads, model.decoder
    t_bal, _, guiding = model.bato(*arguments)
    assert t_bal.shape == t_i.shape and guiding.sort().values.tolist() == [[0, 1, 2]] * 2


def test_bato_follows_equations_5_to_8(guided):
    model, shapes, q_bal, boxes, t_i, pixel_features = guided
    bato, heads = model.bato, model.heads
    with torch.no_grad():
        t_bal, _, guiding = bato(q_bal, boxes, t_i, shapes, pixel_features, heads, model.decoder)
        attention = bato.cross_attn
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        for b in range(2):
            best = q_bal[b, guiding[b]]
            t_g_mask, t_g_box = heads.mask_head(best), model.decoder.query_pos(boxes[b, guiding[b]])
            position = torch.cat([model_sine_position(h, w, 64) for h, w in shapes])
            sources = t_i[b] + position, t_g_mask + t_g_box, t_g_mask  # the boxes are part of the key only
            q, k, v = (
                F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                for x, weight, bias in zip(sources, weights, biases, strict=True)
            )
            mixed = ((q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5).softmax(-1) @ v
            attended = attention.out_proj(mixed.transpose(0, 1).flatten(1))
            torch.testing.assert_close(t_bal[b], bato.ffn(bato.norm(t_i[b] + attended)), rtol=1e-4, atol=1e-5)


def model_sine_position(height, width, dim):
    """2-D sine position in loops, (height * width, dim)."""
    rows = []
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            channels = []
            for value, last in ((y, height), (x, width)):
                for i in range(0, dim // 2, 2):
                    angle = torch.tensor(value / (last + 1e-6) * 2 * torch.pi / 10000 ** (i / (dim // 2)))
                    channels += [angle.sin(), angle.cos()]
            rows.append(torch.stack(channels))
    return torch.stack(rows)


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
