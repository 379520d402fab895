"""The whole model at a small size: modes, outputs, gradients, dtypes."""

import pytest
import torch
import toys
from toys import Float32Finder

from config import PRESETS
from detections import postprocess
from losses import SetCriterion
from model import PIXEL_MEAN, PIXEL_STD, build_model

SYSTEMS = {
    "DI-MaskDINO": {"di": True, "bato": True},
    "DI": {"di": True, "bato": False},
    "BATO": {"di": False, "bato": True},
    "Mask DINO": {"di": False, "bato": False},
}
PREDICTIONS = {"pred_logits", "pred_boxes", "mask_embeddings", "pixel_features"}
OUTPUTS = PREDICTIONS | {"aux_outputs", "interm_outputs", "di_outputs", "selections", "guiding"}


def small_model(**overrides):
    return toys.model(decoder_layers=3, **overrides)


@pytest.fixture(params=SYSTEMS)
def variant(request):
    """Config fields of one system, or of one of the two ablations between them."""
    return SYSTEMS[request.param]


def test_outputs_in_training(variant):
    model = small_model(**variant).train()
    outputs = model([torch.rand(3, 64, 50), torch.rand(3, 40, 64)], toys.targets(2, 3))
    assert set(outputs) == OUTPUTS | {"dn_outputs"}
    assert len(outputs["aux_outputs"]) == 3  # the decoder's input, layers 1 and 2
    first = 40 if variant["di"] else 20  # Mask DINO selects its queries at once
    sets = [(outputs, 20), (outputs["interm_outputs"], first), *((layer, 20) for layer in outputs["aux_outputs"])]
    denoised = outputs["dn_outputs"]
    assert denoised["num_groups"] == 4 and len(denoised["aux_outputs"]) == 3
    sets += [(layer, 12) for layer in [denoised, *denoised["aux_outputs"]]]
    for layer, queries in sets:
        assert PREDICTIONS <= set(layer)
        assert layer["pred_logits"].shape == (2, queries, 10)
        assert layer["pred_boxes"].shape == (2, queries, 4)
        assert layer["mask_embeddings"].shape == (2, queries, 64) and layer["pixel_features"].shape == (2, 64, 16, 16)
        assert ((layer["pred_boxes"] >= 0) & (layer["pred_boxes"] <= 1)).all()
    assert len(outputs["di_outputs"]) == (2 if variant["di"] else 0)
    for layer in outputs["di_outputs"]:
        assert set(layer) == {"pred_logits", "pred_boxes"}
        assert layer["pred_logits"].shape == (2, 40, 10) and layer["pred_boxes"].shape == (2, 40, 4)
    assert [x.shape for x in outputs["selections"]] == [(2, first)] + [(2, 20)] * variant["di"]
    assert outputs["guiding"].shape == (2, 8) if variant["bato"] else outputs["guiding"] is None
    # F serves the first selection, the decoder's input and layer 1; with BATO, F' the others.
    features = [layer["pixel_features"] for layer in (outputs["interm_outputs"], *outputs["aux_outputs"], outputs)]
    assert len(set(map(id, features[:3]))) == 1 and features[3] is features[4]
    assert (features[3] is features[0]) == (not variant["bato"])


def test_training_without_targets_equals_evaluation(variant):
    model = small_model(**variant)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        training, evaluation = model.train()(images), model.eval()(images)
    assert set(training) == set(evaluation) == OUTPUTS
    layers = ([outputs, *outputs["aux_outputs"]] for outputs in (training, evaluation))
    for ours, theirs in zip(*layers, strict=True):
        for name in PREDICTIONS:
            torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("di", [True, False])
def test_one_decoder_layer(di):
    model = toys.model(di=di, bato=False, decoder_layers=1)
    with torch.no_grad():
        assert len(model.eval()(torch.rand(1, 3, 64, 64))["aux_outputs"]) == 1


@pytest.mark.parametrize("case", ["no instances", "no denoising", "instances on one image", "too many to denoise"])
def test_every_parameter_gets_a_gradient(variant, case):
    model = small_model(**variant).train()
    batch = {
        "no instances": toys.targets(0, 0),
        "no denoising": toys.targets(2, 3),
        "instances on one image": toys.targets(0, 3),
        "too many to denoise": toys.targets(13, 1),
    }[case]
    criterion = SetCriterion(model.config)
    outputs = model(torch.rand(2, 3, 64, 64), None if case == "no denoising" else batch)
    assert ("dn_outputs" in outputs) == (case == "instances on one image")
    terms = criterion(outputs, batch)
    criterion.total(terms).backward()
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
    assert outputs["pred_logits"].shape == (2, tokens, 10)
    counts = [tokens] * len(outputs["selections"])
    if system == "DI-MaskDINO":
        counts.append(min(50, tokens))
    for indices, count in zip([*outputs["selections"], outputs["guiding"]], counts, strict=False):
        assert len(set(indices[0].tolist())) == count and indices.max() < tokens
    detections = postprocess(outputs, [size] * 2, [size] * 2)
    assert detections[0]["masks"].shape == (min(100, 10 * tokens), *size)

    batch = toys.targets(2, 0)
    for target in batch:
        target["masks"] = torch.ones(len(target["labels"]), height, width, dtype=torch.bool)
    terms = SetCriterion(model.config)(model.train()(images, batch), batch)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_double_model_has_no_float32_tensor_inside(variant):
    model = small_model(**variant).double()
    images, batch = torch.rand(2, 3, 64, 50), toys.targets(2, 3)
    for target in batch:
        target["boxes"] = target["boxes"].double()
    images = list(images.double())
    with torch.no_grad(), Float32Finder() as finder:
        model.eval()(images)
        outputs = model.train()(images, batch)
    assert finder.found <= {"aten.rand.default"}  # which of the denoising labels become random
    layers = [outputs, outputs["interm_outputs"], *outputs["aux_outputs"], outputs["dn_outputs"]]
    assert {layer[name].dtype for layer in layers for name in PREDICTIONS} == {torch.float64}


def test_published_precision():
    """Under autocast encoder, interaction and decoder are then in float32; boxes and selecting scores always are."""
    model, seen = toys.model().eval(), {}
    layers = {
        "encoder": model.encoder.layers[0].ffn.linear1,
        "decoder": model.decoder.layers[0].ffn.linear1,
        "interaction": model.di.interactions[0].layers[0].ffn.linear1,
        "bato": model.bato.ffn.linear1,
        "backbone": model.backbone.body.conv1,
        "masks": model.heads.mask_head.layers[0],
        "boxes": model.heads.box_head.layers[0],
        "classes": model.heads.class_head,
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    half, single = {torch.float16}, {torch.float32}
    for chosen in (half, single):
        if chosen is single:
            model.use_published_precision()
        seen.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            assert model(torch.rand(2, 3, 64, 64))["pred_boxes"].dtype == torch.float32
        expected = {"backbone": half, "bato": half, "masks": half, "boxes": single, "classes": half | single}
        assert seen == expected | dict.fromkeys(("encoder", "interaction", "decoder"), chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_a_half_type_keeps_it(dtype, variant):
    with torch.no_grad():
        outputs = small_model(**variant).to(dtype).eval()(torch.rand(2, 3, 64, 50, dtype=dtype))
    assert {outputs[name].dtype for name in PREDICTIONS} == {dtype}


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
    model = build_model("tiny", **toys.SMALL).train()
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 64))
    for layer in outputs["aux_outputs"][1:] + [outputs]:
        torch.testing.assert_close(layer["pred_boxes"], outputs["aux_outputs"][0]["pred_boxes"])


@pytest.mark.parametrize("images, found", [
    (torch.rand(3, 64, 64), r"images: a tensor of torch.float32, shape \(3, 64, 64\)"),
    (torch.rand(2, 4, 64, 64), r"images: a tensor of torch.float32, shape \(2, 4, 64, 64\)"),
    (torch.rand(0, 3, 64, 64), r"images: a tensor of torch.float32, shape \(0, 3, 64, 64\)"),
    ([], "images: none"),
    ("photo.jpg", "images: a str"),
    ([torch.rand(3, 9, 9), torch.rand(1, 3, 9, 9)], r"images\[1\]: a tensor of torch.float32, shape \(1, 3, 9, 9\)"),
    ([torch.rand(64, 64, 3)], r"images\[0\]: a tensor of torch.float32, shape \(64, 64, 3\)"),
    ([torch.rand(3, 0, 64)], r"images\[0\]: a tensor of torch.float32, shape \(3, 0, 64\)"),
    ([torch.zeros(3, 9, 9, dtype=torch.uint8)], r"images\[0\]: a tensor of torch.uint8.*divide by 255"),
    ([torch.linspace(0, 255, 243).view(3, 9, 9)], r"images\[0\]: values from 0 to 255.*divide by 255"),
    (torch.linspace(-2, 3, 243).view(1, 3, 9, 9), "images: values from -2 to 3"),
    ([torch.rand(3, 9, 9).numpy()], r"images\[0\]: a ndarray"),
])  # fmt: skip
def test_images_that_forward_does_not_take(images, found):
    with pytest.raises(ValueError, match=found):
        small_model().eval()(images)
