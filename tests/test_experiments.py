"""The paper's ablations: what every switch changes and what not, that every row of its tables trains, the commands."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.imbalance.__main__ as imbalance
import train
from benchmarks import experiments
from benchmarks.experiments import ROWS, Row, commands, rows, run_folder
from data import HARD_SHAPES, SHAPES, draw_shapes, make_shapes
from di import gather_tokens
from losses import SetCriterion
from model import PRESETS, Config, InputError, build_model, check_config, load_model, save_checkpoint

SMALL = {"num_classes": 4, "encoder_layers": 1, "selections": (40, 20), "num_guiding": 8, "loss_points": 32}
SWITCHES = {
    "default": {},
    "no DI": {"di": False},
    "no BATO": {"bato": False},
    "neither": {"di": False, "bato": False},
    "T_i guides": {"guidance": "t_i"},
    "T_s1 guides": {"guidance": "t_s1"},
    "T_s2 guides": {"guidance": "t_s2"},
    "no GTG": {"gtg": False},
    "single": {"selections": (20,)},
    "triple": {"selections": (40, 30, 20)},
    "no narrowing": {"selections": (20, 20)},
    "five layers": {"decoder_layers": 5},
    "box losses": {"box_loss_scale": 0.1},
    "random positions": {"position_tokens": "random"},
    "random positions, neither": {"position_tokens": "random", "di": False, "bato": False},
    "boxes of the head": {"box_init": "head"},
    "boxes of the head, neither": {"box_init": "head", "di": False, "bato": False},
}


def small_model(switch="default"):
    """The model with a switch set; where it has a parameter in common with the default model, the value is the same."""
    torch.manual_seed(0)
    default = build_model("tiny", **SMALL)
    torch.nn.init.normal_(default.heads.box_head.layers[-1].weight, std=0.1)  # zero at first: no box would move
    model = build_model("tiny", **(SMALL | SWITCHES[switch]))
    state = {name: value for name, value in default.state_dict().items() if name in model.state_dict()}
    missing, _ = model.load_state_dict(state, strict=False)
    assert len(missing) < len(model.state_dict()) / 2
    return model


def batch(*counts):
    """Images and targets with these numbers of instances."""
    generator = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    targets = [
        {
            "labels": (4 * rand(n)).long(),
            "boxes": torch.cat([rand(n, 2) * 0.4 + 0.3, rand(n, 2) * 0.3 + 0.1], 1),
            "masks": rand(n, 64, 64) > 0.5,
        }
        for n in counts
    ]
    return rand(len(counts), 3, 64, 64), targets


def inspect(switch, training=False):
    """What the model with a switch computes on the same images, and what its parts are given.

    Returns (outputs, {"encoder": T_i, level shapes and F, "bato": its results, "decoder": arguments of the first layer,
    "attention": query, key and value of Eq. 8, "bato_inputs": ...}, model).
    """
    model, seen = small_model(switch), {}
    model.train(training)
    model.encoder.register_forward_hook(lambda _, args, out: seen.update(encoder=out))
    model.candidates.register_forward_hook(lambda _, args, out: seen.update(candidates=out[0]))
    model.decoder.layers[0].register_forward_hook(lambda _, args, out: seen.update(decoder=args))
    if model.bato:
        model.bato.register_forward_hook(lambda _, args, out: seen.update(bato=out, bato_inputs=args))
        model.bato.cross_attn.register_forward_hook(lambda _, args, out: seen.update(attention=args))
    images, targets = batch(2, 3)
    torch.manual_seed(2)
    with torch.no_grad():
        outputs = model(images, targets) if training else model(images, all_layers=True)
    return outputs, seen, model


def parameters(switch):
    return {name for name, _ in build_model("tiny", **(SMALL | SWITCHES[switch])).named_parameters()}


def test_which_parameters_exist():
    default = parameters("default")
    interaction, bato = ({n for n in default if n.startswith(start)} for start in ("interactions.0.", "bato."))
    assert interaction and bato
    second = {name.replace("interactions.0.", "interactions.1.") for name in interaction}
    further = {n.replace("layers.2.", f"layers.{i}.") for n in default if "decoder.layers.2." in n for i in (3, 4)}
    position = {"position_tokens.weight"}
    expected = {
        "no DI": default - interaction,
        "no BATO": default - bato,
        "neither": default - interaction - bato,
        "T_i guides": default - interaction,
        "T_s1 guides": default - interaction,
        "T_s2 guides": default,
        "no GTG": default,
        "single": default - interaction,
        "triple": default | second,
        "no narrowing": default,
        "five layers": default | further,
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
        terms = criterion(outputs, targets)
        assert terms.keys() == {name for name in criterion.weights if counts[0] or "_dn" not in name}
        sum(criterion.weights[name] * term for name, term in terms.items()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("switch", SWITCHES)
def test_selections_and_number_of_layers(switch):
    outputs, _, model = inspect(switch)
    config = model.config
    found = {name: indices.shape[1] for name, indices in outputs["selection"].items()}
    sizes = {
        "single": [20],
        "triple": [40, 30, 20],
        "no narrowing": [20, 20],
        **dict.fromkeys(["no DI", "neither", "T_i guides", "T_s1 guides"], [20]),
        **dict.fromkeys(["random positions, neither", "boxes of the head, neither"], [20]),
    }.get(switch, [40, 20])
    guiding = {"guiding": 8} if config.bato else {}
    assert found == dict(zip(("first", "second", "third"), sizes, strict=False)) | guiding
    for name, available in zip(("first", "second", "third")[: len(sizes)], [85, *sizes], strict=False):
        indices = outputs["selection"][name]  # of 8 x 8 + 4 x 4 + 2 x 2 + 1 tokens
        assert indices.max() < available and all(len(set(row)) == len(row) for row in indices.tolist())
    interactions = [size for size in sizes[:-1] for _ in range(2)]
    assert [layer["pred_boxes"].shape[1] for layer in outputs.get("di_outputs", [])] == interactions
    assert len(outputs["aux_outputs"]) == config.decoder_layers
    assert outputs["pred_boxes"].shape == (2, 20, 4)


@pytest.mark.parametrize("switch", ["no DI", "T_i guides", "T_s1 guides", "single"])
def test_one_selection_is_the_best_of_the_first(switch):
    ours, theirs = inspect(switch)[0]["selection"]["first"], inspect("default")[0]["selection"]["first"]
    assert torch.equal(ours, theirs[:, :20])


@pytest.mark.parametrize("switch", ["no BATO", "T_s2 guides", "no GTG", "five layers", "random positions"])
def test_deimbalance_stays_as_it_is(switch):
    (ours, _, _), (theirs, _, _) = inspect(switch), inspect("default")
    for name in ("first", "second"):
        assert torch.equal(ours["selection"][name], theirs["selection"][name])
    for a, b in zip(ours["di_outputs"], theirs["di_outputs"], strict=True):
        assert torch.equal(a["pred_boxes"], b["pred_boxes"])


def test_three_selections():
    """The second of three works on what it has in the default model, and so on: tokens of the first interaction."""
    outputs, _, model = inspect("triple")
    theirs, _, _ = inspect("default")
    assert torch.equal(outputs["selection"]["first"], theirs["selection"]["first"])
    assert torch.equal(outputs["selection"]["second"][:, :20], theirs["selection"]["second"])
    assert outputs["selection"]["third"].max() < 30
    names = {name for name in SetCriterion(model.config).weights if "_di_" in name}
    assert names == {f"loss_{kind}_di_{i}" for kind in ("ce", "bbox", "giou") for i in range(4)}


def test_t_i_guides_and_enters_the_decoder():
    outputs, seen, _ = inspect("T_i guides")
    t_i = seen["encoder"][0]
    queries = gather_tokens(t_i, outputs["selection"]["first"])
    assert torch.equal(seen["bato_inputs"][0], queries) and torch.equal(seen["decoder"][0], queries)


def test_t_s1_guides_and_enters_the_decoder():
    outputs, seen, _ = inspect("T_s1 guides")
    queries = gather_tokens(seen["candidates"], outputs["selection"]["first"])
    assert torch.equal(seen["bato_inputs"][0], queries) and torch.equal(seen["decoder"][0], queries)


def test_t_s2_guides_and_enters_the_decoder():
    outputs, seen, _ = inspect("T_s2 guides")
    _, theirs, _ = inspect("default")
    assert torch.equal(seen["decoder"][0], theirs["decoder"][0])  # the queries
    assert torch.equal(seen["bato_inputs"][0], seen["decoder"][0])
    assert not torch.equal(theirs["bato_inputs"][0], theirs["decoder"][0])  # Q_bal is behind layer 1


@pytest.mark.parametrize("switch", ["T_i guides", "T_s1 guides", "T_s2 guides"])
def test_with_earlier_guidance_the_whole_decoder_sees_t_bal(switch):
    outputs, seen, model = inspect(switch)
    t_bal, pixel_features, guiding = seen["bato"]
    assert torch.equal(seen["decoder"][3], t_bal) and not torch.equal(t_bal, seen["encoder"][0])
    assert torch.equal(outputs["selection"]["guiding"], guiding)
    masks = model.heads.masks(seen["decoder"][0], pixel_features)
    assert torch.equal(outputs["aux_outputs"][0]["pred_masks"], masks)


def test_by_default_the_first_layer_sees_t_i():
    _, seen, _ = inspect("default")
    assert torch.equal(seen["decoder"][3], seen["encoder"][0])


@pytest.mark.parametrize("switch", ["T_i guides", "T_s1 guides", "T_s2 guides"])
def test_denoising_queries_do_not_guide(switch):
    """Neither in training, where they stand before the others."""
    (training, seen, _), (evaluation, _, _) = inspect(switch, training=True), inspect(switch)
    assert training["dn_outputs"]["pred_boxes"].shape[1] > 0 and seen["bato_inputs"][0].shape[1] == 20
    assert torch.equal(training["selection"]["guiding"], evaluation["selection"]["guiding"])


def test_without_guiding_token_generation_the_queries_are_key_and_value():
    outputs, seen, _ = inspect("no GTG")
    _, key, value = seen["attention"]
    best = gather_tokens(seen["bato_inputs"][0], outputs["selection"]["guiding"])
    assert torch.equal(key, best) and torch.equal(value, best)
    theirs, seen, _ = inspect("default")
    assert torch.equal(outputs["selection"]["guiding"], theirs["selection"]["guiding"])
    assert not torch.equal(seen["attention"][1], seen["attention"][2])


@pytest.mark.parametrize("switch", ["random positions", "random positions, neither"])
def test_random_position_tokens_replace_the_boxes_of_the_matching_queries_only(switch):
    ours, seen, model = inspect(switch, training=True)
    theirs, default, _ = inspect("default" if model.config.di else "neither", training=True)
    count = ours["dn_outputs"]["pred_boxes"].shape[1]
    boxes, expected = seen["decoder"][2], model.position_tokens.weight.sigmoid()
    assert torch.equal(boxes[:, count:], expected.expand(2, -1, -1))
    assert torch.equal(boxes[:, :count], default["decoder"][2][:, :count])
    assert torch.equal(seen["decoder"][0], default["decoder"][0])  # the content of the queries
    assert torch.equal(ours["aux_outputs"][0]["pred_logits"], theirs["aux_outputs"][0]["pred_logits"])
    assert torch.equal(ours["aux_outputs"][0]["pred_boxes"], expected.expand(2, -1, -1))
    assert expected.std(0).min() > 0.1  # they lie all over the image


def test_random_position_tokens_with_few_tokens():
    model = build_model("tiny", selections=(300,), position_tokens="random").eval()
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
    model.interactions[0].register_forward_hook(lambda _, args, out: given.append(args[1]))
    outputs = model(*batch(2, 3))
    assert not given[0].requires_grad and outputs["interm_outputs"]["pred_boxes"].requires_grad
    torch.testing.assert_close(given[0], outputs["interm_outputs"]["pred_boxes"].detach())
    model.eval()
    with torch.no_grad():
        first, all_layers = model(batch(2, 3)[0]), model(batch(2, 3)[0], all_layers=True)
    assert torch.equal(first["pred_boxes"], all_layers["pred_boxes"])


def test_box_loss_scale_changes_the_weights_of_the_box_losses_alone():
    ours, theirs = (SetCriterion(build_model("tiny", **SWITCHES[s]).config) for s in ("box losses", "default"))
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        factor = 0.1 if name.startswith(("loss_bbox", "loss_giou")) else 1
        assert ours.weights[name] == pytest.approx(factor * weight)
    assert vars(ours.matcher)["cost_box"] == theirs.matcher.cost_box
    assert ours.matcher.cost_giou == theirs.matcher.cost_giou


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"selections": ()}, "selections"),
        ({"selections": (300, 600)}, "selections"),
        ({"selections": (300, 0)}, "selections"),
        ({"guidance": "t_s3"}, "guidance 't_s3'.*t_s1"),
        ({"guidance": "t_s2", "di": False}, "guidance t_s2.*di"),
        ({"guidance": "t_i", "bato": False}, "guidance t_i.*bato"),
        ({"guidance": "t_s2", "selections": (300,)}, "guidance t_s2.*selections"),
        ({"gtg": False, "bato": False}, "gtg.*bato"),
        ({"position_tokens": "learned"}, "position_tokens 'learned'.*random"),
        ({"box_init": "boxes"}, "box_init 'boxes'.*bitmask"),
        ({"decoder_layers": 0}, "decoder_layers 0"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named) as error:
        Config(**settings)
    assert isinstance(error.value, InputError) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "switch, setting",
    [
        ("no DI", "selections"),
        ("no BATO", "bato"),
        ("neither", "bato"),
        ("T_i guides", "guidance"),
        ("single", "selections"),
        ("triple", "selections"),
        ("five layers", "decoder_layers"),
        ("random positions", "position_tokens"),
    ],
)
def test_a_state_dict_of_another_architecture_is_refused(switch, setting):
    default, other = (build_model("tiny", **(SMALL | SWITCHES[s])) for s in ("default", switch))
    for a, b in ((default, other), (other, default)):
        with pytest.raises(RuntimeError, match=f"of a model with other .*{setting}"):
            a.load_state_dict(b.state_dict())


@pytest.mark.parametrize("switch", list(SWITCHES)[1:])
def test_a_checkpoint_of_another_configuration_is_refused(switch, tmp_path):
    """Also where all parameters are the same, as the checkpoint holds its settings."""
    model = build_model("tiny", **(SMALL | SWITCHES[switch]))
    checkpoint = {"model": model.state_dict(), "config": asdict(model.config), "classes": list("abcd")}
    save_checkpoint(tmp_path / "checkpoint.pt", checkpoint)
    loaded, checkpoint = load_model(tmp_path / "checkpoint.pt")
    assert loaded.config == model.config
    check_config("checkpoint.pt", checkpoint, model.config)
    with pytest.raises(InputError) as error:
        check_config("checkpoint.pt", checkpoint, build_model("tiny", **SMALL).config)
    assert all(name in str(error.value) for name in SWITCHES[switch])


# The data, the pictures, the study and the commands


def test_hard_shapes_fill_little_of_their_boxes():
    share = {}
    for hard in (False, True):
        values = []
        for i in range(30):
            pixels, labels, masks = draw_shapes(np.random.default_rng([7, i]), 64, hard)
            assert pixels.shape == (64, 64, 3) and len(labels) == len(masks) >= 1
            assert masks.sum(0).max() <= 1 and masks.sum((1, 2)).min() >= 30  # visible parts
            if hard:
                assert set(labels) <= set(range(len(HARD_SHAPES)))
            for mask in masks:
                height, width = np.ptp(np.nonzero(mask), axis=1) + 1
                values.append(mask.sum() / (height * width))
        share[hard] = np.mean(values)
    assert share[True] < share[False] - 0.03


def test_hard_shapes_are_written_once(tmp_path):
    make_shapes(tmp_path, train=2, val=1, hard=True)
    path = tmp_path / "annotations" / "instances_train2017.json"
    before, content = path.stat().st_mtime_ns, json.loads(path.read_text())
    assert [c["name"] for c in content["categories"]] == list(HARD_SHAPES)
    make_shapes(tmp_path, train=2, val=1, hard=True)
    assert path.stat().st_mtime_ns == before
    make_shapes(tmp_path, train=2, val=1)  # the other set, in the same folder
    assert len(json.loads(path.read_text())["categories"]) == len(SHAPES)


def study_runs():
    """Made-up runs: seeds 0 and 1 of two rows, and seed 2 of one of them."""
    values = {("neither", 0): 10, ("neither", 1): 12, ("DI", 0): 13, ("DI", 1): 17, ("DI", 2): 30}
    layers = lambda box: [{"box": box - 4, "mask": box}, {"box": box - 1, "mask": box}, {"box": box, "mask": box + 2}]  # noqa: E731
    return [{"row": row, "seed": seed, "layers": layers(box)} for (row, seed), box in values.items()]


def test_tables_of_the_study():
    lines = imbalance.markdown(study_runs()).splitlines()
    assert "| neither | 2 | 7.0 ± 1.4 | 11.0 ± 1.4 | 10.0 ± 1.4 | 11.0 ± 1.4 | 11.0 ± 1.4 | 13.0 ± 1.4 |" in lines
    assert "| DI | -4.0 ± 0.0 | -1.0 ± 0.0 | -2.0 ± 0.0 |" in lines
    assert "| DI | 0.0 ± 0.0 | 0.0 ± 0.0 | 4.0 ± 1.4 | 4.0 ± 1.4 |" in lines  # of the seeds that both have
    assert imbalance.per_layer(study_runs(), "DI", "box") == [[9, 13, 26], [12, 16, 29], [13, 17, 30]]


def test_plot_of_the_study(tmp_path):
    pytest.importorskip("matplotlib")
    imbalance.plot(study_runs(), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 1000


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=40, val=2, hard=True)
    return root


def distinct_rows():
    """One row of Tables 3-9 for each training that they need on shapes-hard, under its folder's name."""
    found = {}
    for row in ROWS:
        if row.table not in ("table1", "table2", "fig1"):
            found.setdefault(run_folder(row, "shapes-hard", "").name, row)
    return found


@pytest.mark.parametrize("name", distinct_rows())
def test_every_row_trains(name, shapes, tmp_path, monkeypatch):
    """train.py with the printed flags, on the same kind of data: 20 steps, and the evaluation at the end."""
    [command] = commands(distinct_rows()[name], "shapes-hard", None, tmp_path)
    command[command.index("--data") + 1] = "coco"
    small = ["--data-root", shapes, "--epochs", "1", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command[1:] + small])
    train.main()
    folder = run_folder(distinct_rows()[name], "shapes-hard", tmp_path)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 20
    losses = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if "loss" in line]
    assert losses and all(torch.tensor(entry["loss"]).isfinite() for entry in losses)
    trained = {name: getattr(Config(**checkpoint["config"]), name) for name in SETTINGS}
    assert trained == {name: getattr(PRESETS["tiny"], name) for name in SETTINGS} | expected_settings(command)


SETTINGS = ("di", "bato", "guidance", "gtg", "selections", "decoder_layers", "box_loss_scale", "position_tokens")


def expected_settings(command):
    """The fields of Config that the flags of a command stand for."""
    found, words = {}, iter(command)
    for word in words:
        name = word.removeprefix("--no-").removeprefix("--").replace("-", "_")
        if word.startswith("--no-"):
            found[name] = False
        elif name in SETTINGS:
            value = next(words)
            convert = {"selections": lambda text: tuple(map(int, text.split(","))), "decoder_layers": int,
                       "box_loss_scale": float}.get(name, str)  # fmt: skip
            found[name] = convert(value)
    return found


PUBLISHED = {
    "table1": [45.7, 41.4, 46.9, 42.3, 48.4, 44.2, 49.6, 44.8, 51.7, 46.3, 51.9, 46.7]
    + [52.2, 47.2, 53.3, 47.9, 56.8, 51.0, 57.8, 51.8],
    "table2": [28.1, 25.3, 29.5, 25.7, 30.2, 27.0, 31.4, 27.9],
    "fig1": [16.6, 21.1, 21.6, 22.1],
    "table3": [27.5, 23.7, 27.9, 24.9, 24.7, 23.0, 27.1, 25.2, 21.5, 21.9, 23.8, 23.7],
    "table4": [45.6, 41.2, 46.4, 42.1, 46.2, 41.8, 46.9, 42.3],
    "table5": [46.2, 41.8, 46.6, 42.0, 46.7, 42.2, 46.9, 42.3],
    "table6": [46.5, 42.2, 46.9, 42.3],
    "table7": [46.2, 41.8, 46.9, 42.3, 46.6, 42.2],
    "table8": [46.6, 42.3, 46.8, 42.4, 46.9, 42.3],
    "table9": [45.8, 41.3, 46.9, 42.3, 46.9, 42.5],
}


def test_published_numbers():
    found = {table: [] for table in PUBLISHED}
    for row in ROWS:
        found[row.table] += row.published
    assert found == PUBLISHED and len(ROWS) == 41


def printed(capsys, monkeypatch, *arguments):
    """The output of the program with these arguments."""
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    experiments.main()
    return capsys.readouterr().out


def test_printed_commands_parse(capsys, monkeypatch):
    total = 0
    for data in ([], ["--data", "coco"], ["--data", "bdd100k", "--gpus", "8"], ["--data", "shapes-hard"]):
        text = printed(capsys, monkeypatch, *data)
        assert text.count(": published") >= (25 if "shapes-hard" in data else 30)
        for line in text.splitlines():
            if " train.py " in line:
                words = shlex.split(line)
                args = train.parse_arguments(words[words.index("train.py") + 1 :])
                assert args.output and (not data or args.data == data[1])
                total += 1
    assert total > 120


def test_tables_are_printed_with_their_numbers(capsys, monkeypatch):
    text = printed(capsys, monkeypatch, "table5", "--data", "coco", "--data-root", "/data/coco")
    assert "T_s1: published 46.6 / 42.0" in text and "table6" not in text
    assert "--data coco --data-root /data/coco --preset dimaskdino_r50" in text
    assert "--schedule 12ep --batch-size 16 --guidance t_s2" in text
    both = printed(capsys, monkeypatch, "table9")
    assert "--data coco" in both and "--data bdd100k" in both and "--schedule bdd68ep --batch-size 8" in both


def test_rows_that_are_the_same_training_share_a_folder():
    for data, count in (("coco", 21 + 8), ("shapes-hard", 18)):
        chosen = rows(["all"], data)
        trainings = {}
        for row in chosen:
            command = commands(row, data, None, "out")[0]
            trainings.setdefault(run_folder(row, data, "out"), set()).add(shlex.join(command))
        assert all(len(found) == 1 for found in trainings.values()) and len(trainings) == count


@pytest.mark.parametrize(
    "arguments, named",
    [(["table10"], "table10"), (["--run"], "--data"), (["table1", "--data", "bdd100k"], "table1")],
)
def test_bad_arguments(arguments, named, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        printed(capsys, monkeypatch, *arguments)
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_run(capsys, monkeypatch, tmp_path):
    """Runs what is not there, skips what is, resumes what has begun, and writes the numbers beside the published."""
    ran = []

    def fake(words, cwd):
        ran.append(words[1:])
        path = words[words.index("--output") + 1]
        if "train.py" in words:
            scores, path = {"box": {"AP": 40.0 + len(ran)}, "mask": {"AP": 30.0}}, f"{path}/eval.json"
        else:
            layers = [{"box": {"AP": 5.0 + i}, "mask": {"AP": 6.0}} for i in range(4)]
            scores = layers[-1] | {"layers": layers}
        with open(path, "w") as file:
            json.dump(scores, file)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(experiments.subprocess, "run", fake)
    for row in ROWS:
        run_folder(row, "coco", tmp_path).mkdir(parents=True, exist_ok=True)
    begun = run_folder(Row("table4", "", (0, 0), "--no-di"), "coco", tmp_path)
    (begun / "checkpoint.pt").touch()
    flags = ["--data", "coco", "--run", "--output", str(tmp_path)]
    printed(capsys, monkeypatch, "table4", *flags)
    assert len(ran) == 4 and [("--resume" in words) for words in ran] == [False, False, True, False]
    table = (tmp_path / "coco" / "results.md").read_text()
    assert "| neither | 45.6 / 41.2 | 41.0 / 30.0 |" in table and "| DI and BATO | 46.9 / 42.3 | 44.0 / 30.0 |" in table
    printed(capsys, monkeypatch, "table4", "table6", *flags)  # its second row is the last of Table 4
    assert len(ran) == 5 and "--no-gtg" in ran[-1]
    printed(capsys, monkeypatch, "fig1", *flags)  # trains Mask DINO, and evaluates both
    assert [words[0] for words in ran[5:]] == ["train.py", "eval.py", "eval.py"]
    table = (tmp_path / "coco" / "results.md").read_text()
    assert "published (on bdd100k)" in table and "| DI-MaskDINO, R50, layer 1 | 21.6 / 22.1 | 6.0 / 6.0 |" in table


def test_run_stops_where_a_row_fails(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(experiments.subprocess, "run", lambda words, cwd: subprocess.CompletedProcess(words, 3))
    with pytest.raises(SystemExit, match="table5, T_i: ended with status 3"):
        printed(capsys, monkeypatch, "table5", "--data", "coco", "--run", "--output", str(tmp_path))
