"""experiments.tables: the published numbers, the commands, that every row trains, and the tables of results."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from programs import NARROW

import train
from cli import config_from
from config import PRESETS, Config
from experiments import tables
from experiments.tables import ROWS, commands, rows, run_folder
from losses import SetCriterion
from model import DIMaskDINO
from shapes import make_shapes

PUBLISHED = {  # box AP, mask AP of every row on COCO and on BDD100K
    ("table1", "coco"): [45.7, 41.4, 46.9, 42.3, 48.4, 44.2, 49.6, 44.8, 51.7, 46.3, 51.9, 46.7]
    + [52.2, 47.2, 53.3, 47.9, 56.8, 51.0, 57.8, 51.8],
    ("table2", "bdd100k"): [28.1, 25.3, 29.5, 25.7, 30.2, 27.0, 31.4, 27.9],
    ("fig1", "bdd100k"): [16.6, 21.1, 21.6, 22.1],
    ("table3", "bdd100k"): [27.5, 23.7, 27.9, 24.9, 24.7, 23.0, 27.1, 25.2, 21.5, 21.9, 23.8, 23.7],
    ("table4", "coco"): [45.6, 41.2, 46.4, 42.1, 46.2, 41.8, 46.9, 42.3],
    ("table4", "bdd100k"): [27.8, 24.4, 28.8, 25.2, 28.3, 24.9, 29.5, 25.7],
    ("table5", "coco"): [46.2, 41.8, 46.6, 42.0, 46.7, 42.2, 46.9, 42.3],
    ("table5", "bdd100k"): [28.3, 24.9, 28.5, 24.9, 28.9, 25.6, 29.5, 25.7],
    ("table6", "coco"): [46.5, 42.2, 46.9, 42.3],
    ("table6", "bdd100k"): [28.6, 25.4, 29.5, 25.7],
    ("table7", "coco"): [46.2, 41.8, 46.9, 42.3, 46.6, 42.2],
    ("table7", "bdd100k"): [28.3, 24.9, 29.5, 25.7, 29.3, 25.5],
    ("table8", "coco"): [46.6, 42.3, 46.8, 42.4, 46.9, 42.3],
    ("table8", "bdd100k"): [29.1, 25.5, 29.3, 25.3, 29.5, 25.7],
    ("table9", "coco"): [45.8, 41.3, 46.9, 42.3, 46.9, 42.5],
    ("table9", "bdd100k"): [28.7, 25.3, 29.5, 25.7, 28.9, 25.6],
}
# Changes in percent, worked out by hand from the numbers above.
DROPS = ["(-10.2 % / -3.0 %)", "(-2.9 % / +1.2 %)", "(-21.8 % / -7.6 %)", "(-14.7 % / -4.8 %)"]


def printed(capsys, monkeypatch, *arguments):
    """The output of the program with these arguments."""
    monkeypatch.setattr(sys, "argv", ["tables", *arguments])
    tables.main()
    return capsys.readouterr().out


def test_published_numbers():
    found = {}
    for row in ROWS:
        for data in ("coco", "bdd100k"):
            if numbers := tables.published(row, data):
                found.setdefault((row.table, data), []).extend(numbers)
    assert found == PUBLISHED and len(ROWS) == 41


def test_every_data_set_is_printed_with_its_own_numbers(capsys, monkeypatch):
    for data in ("coco", "bdd100k", "shapes-hard"):
        text = printed(capsys, monkeypatch, "--data", data)
        numbers = [numbers for (_, of), numbers in PUBLISHED.items() if of == data]
        pairs = [f"published {a} / {b}" for some in numbers for a, b in zip(some[::2], some[1::2], strict=True)]
        assert [line.split(": ")[1].split(";")[0].split(" (")[0] for line in text.splitlines()
                if ": published" in line and "on other data" not in line] == pairs  # fmt: skip


def test_drops_of_table_3(capsys, monkeypatch):
    text = printed(capsys, monkeypatch, "table3", "--data", "bdd100k")
    assert [line[line.index("(") :] for line in text.splitlines() if "published" in line and "(" in line] == DROPS


def test_printed_commands_parse(capsys, monkeypatch):
    """All of them, 80 or more without arguments; that of Table 1's Swin-L has the published batch and rate."""
    for flags, least in (([], 80), (["--data", "bdd100k", "--gpus", "8"], 30)):
        lines = [line for line in printed(capsys, monkeypatch, *flags).splitlines() if " --" in line]
        assert len(lines) >= least
        for line in lines:
            words = shlex.split(line)
            if "train.py" in words:
                args = train.parse_arguments(words[words.index("train.py") + 1 :])
                assert args.output
                if "table1" not in flags and "swin_l-" in args.output and args.data == "coco":
                    assert (args.batch_size, args.lr) == (4, 1e-4)
            else:
                assert words[0] == "python" and ("eval.py" in words or "-m" in words)


def test_processes_divide_the_batch(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch, "table1", "--data", "coco", "--gpus", "8").splitlines()
    found = [(shlex.split(line)[2], "swin" in line) for line in lines if "torchrun" in line]
    assert found == 6 * [("8", False)] + 4 * [("4", True)]
    assert "--nproc_per_node 2 " in printed(capsys, monkeypatch, "table9", "--data", "shapes-hard", "--gpus", "6")


def test_rows_that_are_the_same_training_share_a_folder():
    for data, count in (("coco", 10 + 6 + 11), ("bdd100k", 4 + 6 + 11), ("shapes-hard", 16)):
        trainings = {}
        for row in rows(["all"], data):
            command = commands(row, data, None, "out")[0]
            trainings.setdefault(run_folder(row, data, "out"), set()).add(shlex.join(command))
        assert all(len(found) == 1 for found in trainings.values())
        assert len(trainings) == count, data
    of = {(row.table, row.name): run_folder(row, "coco", "") for row in ROWS}
    assert of["table5", "T_i"] == of["table7", "single"] == of["table4", "BATO"]


def test_tables_are_printed_with_their_notes(capsys, monkeypatch):
    text = printed(capsys, monkeypatch, "table5", "--data", "coco", "--data-root", "/data/coco")
    assert "T_s1: published 46.6 / 42.0" in text and "table6" not in text and "DI is disabled" in text
    assert "--data coco --data-root /data/coco --preset dimaskdino_r50" in text
    assert "--schedule 12ep --batch-size 16 --guidance t_s2" in text
    both = printed(capsys, monkeypatch, "table9")
    assert "--data coco" in both and "--data bdd100k" in both and "--schedule bdd68ep --batch-size 8" in both
    assert "python -m benchmarks.inference --preset dimaskdino_swin_l" in printed(capsys, monkeypatch, "table2")


# Training


def distinct_rows():
    """One row for each training that the tables need on shapes-hard, under its folder's name."""
    found = {}
    for row in rows(["all"], "shapes-hard"):
        found.setdefault(run_folder(row, "shapes-hard", "").name, row)
    return found


def flags_of(row, output):
    """The flags of train.py of a row on shapes-hard."""
    [command, *_] = commands(row, "shapes-hard", None, output)
    return [str(word) for word in command[command.index("train.py") + 1 :]]


@pytest.mark.parametrize("name", distinct_rows())
def test_every_row_takes_four_steps(name):
    """The model of the printed flags learns a batch: the loss is finite in four steps, and smaller in the last."""
    config = config_from(train.parse_arguments(flags_of(distinct_rows()[name], "out")))
    config = replace(config, backbone=NARROW, encoder_layers=1, denoising_queries=4)  # quicker
    torch.manual_seed(0)
    model = DIMaskDINO(config).train()
    criterion = SetCriterion(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    boxes = torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.6, 0.7, 0.3, 0.2]])
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 6:32, 6:32] = masks[1, 38:51, 29:48] = True
    targets = [{"labels": torch.tensor([1, 3]), "boxes": boxes, "masks": masks}]
    losses = []
    for _ in range(4):
        terms = criterion(model(torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64), targets), targets)
        losses.append(criterion.total(terms))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=8, val=2, hard=True)
    return root


SETTINGS = ("di", "bato", "guidance", "gtg", "selections", "decoder_layers", "box_loss_scale", "position_tokens")
FOUR_WAYS = {
    "tiny": {},
    "tiny-no-di-no-bato-box-loss-scale-0.1": {"di": False, "bato": False, "selections": (30,), "box_loss_scale": 0.1},
    "tiny-guidance-t_s2": {"guidance": "t_s2"},
    "tiny-selections-60,45,30": {"selections": (60, 45, 30)},
}


@pytest.mark.parametrize("name", FOUR_WAYS)
def test_train_py_with_the_printed_flags(name, shapes, tmp_path, monkeypatch):
    """On the same kind of data: four steps, the evaluation at the end, and the settings that the flags stand for."""
    row = distinct_rows()[name]
    small = ["--data-root", str(shapes), "--epochs", "1", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    flags = [*flags_of(row, tmp_path), *small, "--backbone", NARROW, "--encoder-layers", "1"]
    flags[flags.index("--data") + 1] = "coco"  # so that make_shapes does not draw 2,000 images
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    folder = run_folder(row, "shapes-hard", tmp_path)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 4
    losses = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if "loss" in line]
    assert losses and all(torch.tensor(entry["loss"]).isfinite() for entry in losses)
    trained = {setting: getattr(Config(**checkpoint["config"]), setting) for setting in SETTINGS}
    assert trained == {setting: getattr(PRESETS["tiny"], setting) for setting in SETTINGS} | FOUR_WAYS[name]
    assert json.loads((folder / "eval.json").read_text())["mask"].keys() >= {"AP", *tables.SIZES}


# Running the rows


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["table10"], "table10"),
        (["--run"], "--data"),
        (["table1", "--data", "bdd100k"], "table1"),
        (["--data-root", "/data"], "--data-root needs --data"),
        (["--gpus", "0"], "--gpus 0: at least 1"),
    ],
)
def test_bad_arguments(arguments, named, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        printed(capsys, monkeypatch, *arguments)
    assert named in capsys.readouterr().err.splitlines()[-1]


def made_up(box, mask):
    return {
        "box": {"AP": box, "APs": box - 20, "APm": box, "APl": None},
        "mask": {"AP": mask, "APs": 1.0, "APm": 2.0, "APl": 3.0},
    }


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The commands that were run, in the place of which the files with made-up numbers are written to tmp_path."""
    found = []

    def fake(words, cwd):
        found.append(words[1:])
        path = words[words.index("--output") + 1]
        scores = made_up(40.0 + len(found), 30.0)
        if "train.py" in words:
            path = f"{path}/eval.json"
        else:
            layers = [made_up(5.0 + i, 6.0) for i in range(7)]
            scores = layers[-1] | {"layers": layers}
        with open(path, "w") as file:
            json.dump(scores, file)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(tables.subprocess, "run", fake)
    for data in ("coco", "bdd100k"):
        for row in rows(["all"], data):
            run_folder(row, data, tmp_path).mkdir(parents=True, exist_ok=True)
    return found


def test_run(capsys, monkeypatch, tmp_path, ran):
    """Runs what is not there, skips what is, resumes what has begun, and writes the numbers beside the published."""
    [begun] = [row for row in ROWS if (row.table, row.name) == ("table4", "BATO")]
    (run_folder(begun, "coco", tmp_path) / "checkpoint.pt").touch()
    flags = ["--data", "coco", "--run", "--output", str(tmp_path)]
    printed(capsys, monkeypatch, "table4", *flags)
    assert len(ran) == 4 and [("--resume" in words) for words in ran] == [False, False, True, False]
    table = (tmp_path / "coco" / "results.md").read_text()
    assert "| row | published on coco | reproduced | small | medium | large |" in table
    assert "| neither | 45.6 / 41.2 | 41.0 / 30.0 | 21.0 / 1.0 | 41.0 / 2.0 | - / 3.0 |" in table
    assert "| DI and BATO | 46.9 / 42.3 | 44.0 / 30.0 |" in table
    printed(capsys, monkeypatch, "table5", "table6", "table7", *flags)  # some of their rows are Table 4's
    assert len(ran) == 8 and [words[-4] for words in ran[4:6]] == ["--guidance", "--guidance"]
    assert "| T_i | 46.2 / 41.8 | 43.0 / 30.0 |" in (tmp_path / "coco" / "results.md").read_text()
    printed(capsys, monkeypatch, "table9", *flags, "--gpus", "2")  # by the Python that runs, as torchrun may be nowhere
    assert ran[-1][:4] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def test_run_of_the_figure_and_of_table_3(capsys, monkeypatch, tmp_path, ran):
    flags = ["--data", "bdd100k", "--run", "--output", str(tmp_path)]
    printed(capsys, monkeypatch, "fig1", "table3", *flags)  # trains both, and evaluates every layer of both
    assert [words[0] for words in ran[:4]] == ["train.py", "eval.py", "train.py", "eval.py"]
    table = (tmp_path / "bdd100k" / "results.md").read_text()
    assert "| DI-MaskDINO, R50, layer 0, the decoder's input | 21.6 / 22.1 | 5.0 / 6.0 |" in table
    assert "| DI-MaskDINO, R50, layer 1 | - | 6.0 / 6.0 |" in table
    assert "| DI-MaskDINO, R50, last layer | - | 11.0 / 6.0 |" in table
    assert "| DI, standard | 27.9 / 24.9 | 46.0 / 30.0 |" in table
    assert "| DI, random position tokens | 23.8 / 23.7 (-14.7 % / -4.8 %) | 50.0 / 30.0 (+8.7 % / +0.0 %) |" in table


@pytest.mark.parametrize("status", [0, 3])  # 0: a signal has ended it early
def test_run_stops_where_a_row_fails(status, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tables.subprocess, "run", lambda words, cwd: subprocess.CompletedProcess(words, status))
    with pytest.raises(SystemExit, match=f"table5, T_i: stopped before its end .status {status}"):
        printed(capsys, monkeypatch, "table5", "--data", "coco", "--run", "--output", str(tmp_path))
