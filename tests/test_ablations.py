"""The paper's ablations, Tables 3-9: what every switch changes in the model and what not."""

from dataclasses import asdict
from functools import cache

import pytest
import torch
import toys

from checkpoint import check_config, load_model, save_checkpoint
from config import InputError
from di import gather_tokens
from losses import SetCriterion

SWITCHES = {
    "default": {},
    "no DI": {"di": False},
    "no BATO": {"bato": False},
    "neither": {"di": False, "bato": False},
    "T_s1 guides": {"guidance": "t_s1"},
    "T_s2 guides": {"guidance": "t_s2"},
    "no GTG": {"gtg": False},
    "single": {"selections": (20,)},
    "triple": {"selections": (40, 30, 20)},
    "no narrowing": {"selections": (20, 20)},
    "four layers": {"decoder_layers": 4},
    "box losses": {"box_loss_scale": 0.1},
    "random positions": {"position_tokens": "random"},
    "random positions, neither": {"position_tokens": "random", "di": False, "bato": False},
    "boxes of the head": {"box_init": "head"},
    "boxes of the head, neither": {"box_init": "head", "di": False, "bato": False},
}


def small_model(switch="default"):
    """The model with a switch set; where it has a parameter in common with the default model, the value is the same."""
    default, model = toys.model(), toys.model(**SWITCHES[switch])
    state = {name: value for name, value in default.state_dict().items() if name in model.state_dict()}
    missing, _ = model.load_state_dict(state, strict=False)
    assert len(missing) < len(model.state_dict()) / 2
    return model


def batch(*counts):
    """Images and targets with these numbers of instances."""
    return torch.rand(len(counts), 3, 64, 64, generator=torch.Generator().manual_seed(1)), toys.targets(*counts)


@cache
def inspect(switch, training=False):
    """What the model with a switch computes on the same images, and what its parts are given.

    Returns (outputs, {"encoder": T_i, level shapes and F, "bato": its results, "decoder": arguments of the first layer,
    "attention": query, key and value of Eq. 8, "bato_inputs": ...}, model).
    """
    model, seen = small_model(switch), {}
    model.train(training)
    model.encoder.register_forward_hook(lambda _, args, out: seen.update(encoder=out))
    model.di.candidates.register_forward_hook(lambda _, args, out: seen.update(candidates=out[0]))
    model.decoder.layers[0].register_forward_hook(lambda _, args, out: seen.update(decoder=args))
    if model.bato:
        model.bato.register_forward_hook(lambda _, args, out: seen.update(bato=(*out[0], out[1]), bato_inputs=args[0]))
        model.bato.cross_attn.register_forward_hook(lambda _, args, out: seen.update(attention=args))
    images, targets = batch(2, 3)
    torch.manual_seed(2)
    with torch.no_grad():
        outputs = model(images, targets) if training else model(images)
    return outputs, seen, model


def parameters(switch):
    return {name for name, _ in toys.model(**SWITCHES[switch]).named_parameters()}


def test_which_parameters_exist():
    default = parameters("default")
    interaction, bato = ({n for n in default if n.startswith(start)} for start in ("di.interactions.0.", "bato."))
    assert interaction and bato
    second = {name.replace("interactions.0.", "interactions.1.") for name in interaction}
    further = {n.replace("layers.1.", f"layers.{i}.") for n in default if "decoder.layers.1." in n for i in (2, 3)}
    position = {"di.position_tokens.weight"}
    expected = {
        "no DI": default - interaction,
        "no BATO": default - bato,
        "neither": default - interaction - bato,
        "T_s1 guides": default,
        "T_s2 guides": default,
        "no GTG": default,
        "single": default - interaction,
        "triple": default | second,
        "no narrowing": default,
        "four layers": default | further,
        "box losses": default,
        "random positions": default | position,
        "random positions, neither": default - interaction - bato | position,
        "boxes of the head": default,
        "boxes of the head, neither": default - interaction - bato,
    }
    assert expected.keys() == SWITCHES.keys() - {"default"}
    for switch, names in expected.items():
        assert parameters(switch) == names, switch


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_parameter_gets_a_gradient(switch):
    for counts in ((2, 3), (0, 0)):
        model = small_model(switch).train()
        images, targets = batch(*counts)
        outputs = model(images, targets)
        criterion = SetCriterion(model.config)
        criterion.total(criterion(outputs, targets)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("switch", SWITCHES)
def test_selections_and_number_of_layers(switch):
    outputs, _, model = inspect(switch)
    config = model.config
    sizes = {
        "single": [20],
        "triple": [40, 30, 20],
        "no narrowing": [20, 20],
        **dict.fromkeys(["no DI", "neither"], [20]),
        **dict.fromkeys(["random positions, neither", "boxes of the head, neither"], [20]),
    }.get(switch, [40, 20])
    assert [indices.shape[1] for indices in outputs["selections"]] == sizes
    assert outputs["guiding"].shape[1] == 8 if config.bato else outputs["guiding"] is None
    for indices, available in zip(
        outputs["selections"], [85, *sizes], strict=False
    ):  # 8 x 8 + 4 x 4 + 2 x 2 + 1 tokens
        assert indices.max() < available and all(len(set(row)) == len(row) for row in indices.tolist())
    interactions = [size for size in sizes[:-1] for _ in range(2)]
    assert [layer["pred_boxes"].shape[1] for layer in outputs["di_outputs"]] == interactions
    assert len(outputs["aux_outputs"]) == config.decoder_layers
    assert outputs["pred_boxes"].shape == (2, 20, 4)


@pytest.mark.parametrize("switch", ["no DI", "single"])
def test_one_selection_is_the_best_of_the_first(switch):
    ours, theirs = inspect(switch)[0]["selections"][0], inspect("default")[0]["selections"][0]
    assert torch.equal(ours, theirs[:, :20])


@pytest.mark.parametrize(
    "switch", ["no BATO", "T_s1 guides", "T_s2 guides", "no GTG", "four layers", "random positions"]
)
def test_deimbalance_stays_as_it_is(switch):
    (ours, _, _), (theirs, _, _) = inspect(switch), inspect("default")
    assert all(map(torch.equal, ours["selections"], theirs["selections"]))
    for a, b in zip(ours["di_outputs"], theirs["di_outputs"], strict=True):
        assert torch.equal(a["pred_boxes"], b["pred_boxes"])


def test_three_selections():
    """The second of three works on what it has in the default model, and so on: tokens of the first interaction."""
    first, second, third = inspect("triple")[0]["selections"]
    default = inspect("default")[0]["selections"]
    assert torch.equal(first, default[0]) and torch.equal(second[:, :20], default[1])
    assert third.max() < 30


def test_the_named_stage_guides_and_nothing_else_changes():
    default, without, _ = inspect("default")
    for switch, stage in (("T_s1 guides", "t_s1"), ("T_s2 guides", "t_s2")):
        outputs, seen, _ = inspect(switch)
        assert torch.equal(seen["decoder"][0], without["decoder"][0])  # T_s2 enters the decoder, and its first layer
        assert torch.equal(seen["decoder"][3], seen["encoder"][0])  # sees T_i
        for layer in (0, 1):
            ours, theirs = outputs["aux_outputs"][layer], default["aux_outputs"][layer]
            assert torch.equal(ours["pred_boxes"], theirs["pred_boxes"])
        t_s1 = gather_tokens(seen["candidates"], outputs["selections"][0])
        expected = {"t_s1": t_s1, "t_s2": seen["decoder"][0]}[stage]
        assert torch.equal(seen["bato_inputs"].content, expected)
        assert seen["bato_inputs"].boxes.shape == (2, expected.shape[1], 4)
        assert torch.equal(outputs["guiding"], seen["bato"][3])
        assert not torch.equal(outputs["pred_boxes"], default["pred_boxes"])
    assert not torch.equal(without["bato_inputs"].content, without["decoder"][0])  # Q_bal is behind layer 1


def test_by_default_the_first_layer_sees_t_i():
    _, seen, _ = inspect("default")
    assert torch.equal(seen["decoder"][3], seen["encoder"][0])


@pytest.mark.parametrize("switch", ["T_s1 guides", "T_s2 guides", "default"])
def test_denoising_queries_do_not_guide(switch):
    """Neither in training, where they stand before the others."""
    (training, seen, _), (evaluation, _, _) = inspect(switch, training=True), inspect(switch)
    assert training["dn_outputs"]["pred_boxes"].shape[1] > 0 and seen["bato_inputs"].content.shape[1] == (
        40 if switch == "T_s1 guides" else 20
    )
    assert torch.equal(training["guiding"], evaluation["guiding"])


def test_without_guiding_token_generation_the_queries_are_key_and_value():
    outputs, seen, _ = inspect("no GTG")
    _, key, value = seen["attention"]
    best = gather_tokens(seen["bato_inputs"][0], outputs["guiding"])
    assert torch.equal(key, best) and torch.equal(value, best)
    theirs, seen, _ = inspect("default")
    assert torch.equal(outputs["guiding"], theirs["guiding"])
    assert not torch.equal(seen["attention"][1], seen["attention"][2])


@pytest.mark.parametrize("switch", ["random positions", "random positions, neither"])
def test_random_position_tokens_replace_the_boxes_of_the_matching_queries_only(switch):
    ours, seen, model = inspect(switch, training=True)
    theirs, default, _ = inspect("default" if model.config.di else "neither", training=True)
    count = ours["dn_outputs"]["pred_boxes"].shape[1]
    boxes, expected = seen["decoder"][2], model.di.position_tokens.weight.sigmoid()
    assert torch.equal(boxes[:, count:], expected.expand(2, -1, -1))
    assert torch.equal(boxes[:, :count], default["decoder"][2][:, :count])
    assert torch.equal(seen["decoder"][0], default["decoder"][0])  # the content of the queries
    assert torch.equal(ours["aux_outputs"][0]["pred_logits"], theirs["aux_outputs"][0]["pred_logits"])
    assert torch.equal(ours["aux_outputs"][0]["pred_boxes"], expected.expand(2, -1, -1))
    assert expected.std(0).min() > 0.1  # they lie all over the image


def test_random_position_tokens_with_few_tokens():
    model = toys.model(selections=(300,), position_tokens="random").eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32))["pred_boxes"].shape[1] == 22


def test_boxes_of_the_head_enter_the_decoder():
    outputs, seen, _ = inspect("boxes of the head, neither")
    expected = outputs["interm_outputs"]["pred_boxes"]
    torch.testing.assert_close(seen["decoder"][2], expected)
    theirs, default, _ = inspect("neither")
    assert torch.equal(expected, theirs["interm_outputs"]["pred_boxes"])
    assert (default["decoder"][2] - expected).abs().max() > 0.1  # around masks they are others


def test_boxes_of_the_head_enter_the_interaction_without_gradient():
    model = small_model("boxes of the head").train()
    given = []
    model.di.interactions[0].register_forward_hook(lambda _, args, out: given.append(args[0].boxes))
    outputs = model(*batch(2, 3))
    assert not given[0].requires_grad and outputs["interm_outputs"]["pred_boxes"].requires_grad
    torch.testing.assert_close(given[0], outputs["interm_outputs"]["pred_boxes"].detach())


def test_box_loss_scale_changes_the_weights_of_the_box_losses_alone():
    ours, theirs = (SetCriterion(toys.model(**SWITCHES[s]).config) for s in ("box losses", "default"))
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        factor = 0.1 if name.startswith(("loss_bbox", "loss_giou")) else 1
        assert ours.weights[name] == pytest.approx(factor * weight)
    assert vars(ours.matcher)["cost_box"] == theirs.matcher.cost_box
    assert ours.matcher.cost_giou == theirs.matcher.cost_giou


@pytest.mark.parametrize(
    "switch, setting",
    [
        ("no DI", "selections"),
        ("no BATO", "bato"),
        ("neither", "bato"),
        ("single", "selections"),
        ("triple", "selections"),
        ("four layers", "decoder_layers"),
        ("random positions", "position_tokens"),
    ],
)
def test_weights_of_another_architecture_are_refused(switch, setting, tmp_path):
    """A checkpoint whose config is not that of its weights, either way; the error names what differs."""
    default, other = (toys.model(**SWITCHES[s]) for s in ("default", switch))
    for a, b in ((default, other), (other, default)):
        content = {"model": b.state_dict(), "config": asdict(a.config), "classes": list(toys.CLASSES)}
        save_checkpoint(tmp_path / "checkpoint.pt", content)
        with pytest.raises(InputError, match=rf"checkpoint\.pt: .*{setting}"):
            load_model(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("switch", list(SWITCHES)[1:])
def test_a_checkpoint_of_another_configuration_is_refused(switch, tmp_path):
    """Also where all parameters are the same, as the checkpoint holds its settings."""
    model = toys.model(**SWITCHES[switch])
    loaded, checkpoint = load_model(toys.save(tmp_path / "checkpoint.pt", model))
    assert loaded.config == model.config
    checkpoint["settings"] = {}
    check_config("checkpoint.pt", checkpoint, model.config, {})
    with pytest.raises(InputError) as error:
        check_config("checkpoint.pt", checkpoint, toys.model().config, {})
    assert all(name in str(error.value) for name in SWITCHES[switch])
