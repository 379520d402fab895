"""torch.compile: no graph breaks, once for all sizes, the same predictions, and --compile in the programs."""

import copy
import json
import sys
from functools import partialmethod

import pytest
import torch
import torch.fx.experimental._config as shapes_of
import toys
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor
from toys import NARROW

import backbone
import cli
import eval as evaluation
import predict
from config import InputError
from detections import postprocess

CPU = torch.device("cpu")
MASK_DINO = {"di": False, "bato": False, "decoder_layers": 1}


@pytest.fixture(autouse=True)
def settings():
    """What `compile_layers` sets is put back, and what was compiled is forgotten."""
    before = dynamo.specialize_float, shapes_of.use_duck_shape
    yield
    dynamo.specialize_float, shapes_of.use_duck_shape = before
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch):
    """Instead of a compiler, one that runs what is traced as it is, with the number of its graphs as `frame_count`."""
    counter = CompileCounter()
    monkeypatch.setattr(cli, "require_compiler", lambda *args: None)  # traced graphs need none
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter))
    return counter


def has_compiler():
    try:
        cli.require_compiler("--compile", CPU)
    except InputError:
        return False
    return True


def small_model(**settings):
    return toys.model(**{"hidden_dim": 32, "interaction_layers": 1, "frozen_batch_norm": True} | settings).eval()


def test_the_whole_model_has_no_graph_breaks():
    model = small_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    images, targets = torch.rand(2, 3, 64, 96), toys.targets(3, 5)
    with torch.no_grad():
        # To rounding: attention that is not traced may take a path of its own, as it does in torch 2.10.
        torch.testing.assert_close(compiled(images)["mask_embeddings"], model(images)["mask_embeddings"])
    model.train()
    outputs = compiled(list(images), targets)
    assert outputs["dn_outputs"]["num_groups"] == 12 // 5 and len(outputs["aux_outputs"]) == model.config.decoder_layers


def test_layers_are_compiled_once_for_all_sizes_and_numbers_of_instances(counter):
    model = small_model().train()
    compiled = copy.deepcopy(model)
    cli.compile_layers(compiled, CPU)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    batches, traced = [(2, 96, 96, (3, 5)), (3, 96, 224, (4, 1, 0)), (2, 160, 96, (1, 1))], []
    for number, (batch, height, width, counts) in enumerate(batches):
        images, targets, gradients = torch.rand(batch, 3, height, width), toys.targets(*counts), []
        for one in (model, compiled):
            torch.manual_seed(number)
            outputs = one(images, targets)
            sum(outputs[name].square().mean() for name in ("pred_logits", "pred_boxes", "mask_embeddings")).backward()
            gradients.append([p.grad for p in one.parameters() if p.grad is not None])
            one.zero_grad()
        torch.testing.assert_close(*gradients)
        traced.append(counter.frame_count)
    assert traced == traced[:1] * 3 and traced[0] > 0


def test_gradient_checkpointing_can_be_compiled(counter):
    model = small_model(**MASK_DINO, grad_checkpoint=True).train()
    compiled, images, gradients = copy.deepcopy(model), torch.rand(2, 3, 96, 96), []
    cli.compile_layers(compiled, CPU)
    for one in (model, compiled):
        one(images)["mask_embeddings"].square().mean().backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
    assert counter.frame_count


def test_a_swin_backbone_is_left_as_it_is(counter, monkeypatch):
    monkeypatch.setitem(backbone.SWINS, "swin_small", (32, 2, 7, 0.0))
    model = small_model(backbone="swin_small", **MASK_DINO)
    compiled = copy.deepcopy(model)
    cli.compile_layers(compiled, CPU)
    for height, width in [(96, 96), (160, 224)]:
        images = torch.rand(2, 3, height, width)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(images)["mask_embeddings"], model(images)["mask_embeddings"])
    assert counter.frame_count


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_model_makes_the_same_detections():
    model = small_model(**MASK_DINO)  # half the kernels, each of which the C++ compiler needs seconds for
    compiled = copy.deepcopy(model)
    cli.compile_layers(compiled, CPU)
    for batch, height, width in [(2, 96, 96), (3, 96, 160)]:
        sizes = [(height, width)] * batch
        with torch.inference_mode():
            images = torch.rand(batch, 3, height, width)
            ours, theirs = (postprocess(one(images), sizes, sizes, topk=10) for one in (compiled, model))
        for found, expected in zip(ours, theirs, strict=True):
            assert torch.equal(found["labels"], expected["labels"])
            assert (found["masks"] == expected["masks"]).float().mean() > 0.9999
            for name in ("scores", "boxes"):
                torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_without_a_compiler_it_says_so():
    absent = inductor.patch({"cpp.cxx": ("/no/compiler",)})
    with absent, pytest.raises(InputError, match="--compile: needs a C.. compiler"):
        cli.compile_layers(small_model(), CPU)


def test_programs_compile(counter, run, shapes, tmp_path, monkeypatch):
    flags = "--batch-size 2 --workers 0 --device cpu --no-eval --max-iterations 2".split()
    flags += f"--encoder-layers 1 --decoder-layers 1 --no-di --no-bato --backbone {NARROW}".split()
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        run("--output", tmp_path / name, *flags, *more)
    plain, compiled = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("plain", "compiled"))
    torch.testing.assert_close(plain["model"], compiled["model"], atol=1e-5, rtol=1e-4)
    trained = counter.frame_count
    assert trained

    checkpoint = ["--device", "cpu", "--checkpoint", tmp_path / "plain" / "checkpoint.pt"]
    images = shapes / "images" / "val2017"
    commands = {
        evaluation: [*checkpoint, "--data-root", shapes, "--workers", 0, "--results", "DIR/r.json"],
        predict: [*checkpoint, "--score-threshold", 0, "--output", "DIR", images],
    }
    for module, arguments in commands.items():
        for folder, more in (("eager", []), ("compiled", ["--compile"])):
            given = [str(x).replace("DIR", str(tmp_path / folder)) for x in (*more, *arguments)]
            monkeypatch.setattr(sys, "argv", [module.__name__, *given])
            before = counter.frame_count
            module.main()
            assert (counter.frame_count > before) == bool(more)
    for file in ("r.json", "detections.json"):
        ours, theirs = (json.loads((tmp_path / folder / file).read_text()) for folder in ("compiled", "eager"))
        assert len(ours) == len(theirs) > 0
        assert [x["score"] for x in ours] == pytest.approx([x["score"] for x in theirs], abs=1e-4)
