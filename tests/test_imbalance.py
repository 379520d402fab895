"""experiments.imbalance and what the studies share: runs that go on, tables, intervals and the plot."""

import json
import sys
from functools import partial

import pytest
from PIL import Image

import experiments.imbalance.__main__ as imbalance
import train
from cli import run_program
from experiments import study


def study_runs():
    """Made-up runs: seeds 0 and 1 of some rows, and seed 2 of one of them."""
    boxes = {"neither": (10, 12), "DI": (13, 17, 30), "neither, random position tokens": (8, 8),
             "DI, random position tokens": (12, 17, 2)}  # fmt: skip
    layers = lambda box: [{"box": box - 4, "mask": box}, {"box": box - 1, "mask": box}, {"box": box, "mask": box + 2}]
    return [{"row": row, "seed": seed, "layers": layers(box)} for row, some in boxes.items()
            for seed, box in enumerate(some)]  # fmt: skip


def test_tables():
    lines = imbalance.markdown(study_runs()).splitlines()
    assert "| neither | 2 | 7.0 ± 1.4 | 11.0 ± 1.4 | 10.0 ± 1.4 | 11.0 ± 1.4 | 11.0 ± 1.4 | 13.0 ± 1.4 |" in lines
    assert "| DI | -4.0 ± 0.0 | -1.0 ± 0.0 | -2.0 ± 0.0 |" in lines
    # Differences 3 and 5 of the seeds that both have: 4 ± t(0.975, 1) * sqrt(2) / sqrt(2) = 4 ± 12.706.
    assert "| DI | 2 | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | +4.0 [-8.7, +16.7] | +4.0 [-8.7, +16.7] |" in lines
    assert imbalance.per_layer(study_runs(), "DI", "box") == [[9, 13, 26], [12, 16, 29], [13, 17, 30]]


def test_table_of_the_tolerance():
    lines = imbalance.markdown(study_runs()).splitlines()
    change = "-3.0 [-15.7, +9.7], -27 % | -3.0 [-15.7, +9.7], -23 %"  # of box 10, 12 to 8, 8, and mask 12, 14 to 10, 10
    assert f"| random position tokens | neither | 2 | 8.0 ± 0.0 | 10.0 ± 0.0 | {change} |" in lines
    [di] = [line for line in lines if line.startswith("| random position tokens | DI | 3 |")]
    assert "| 10.3 ± 7.6 |" in di and "-48 %" in di
    # DI changes by -1 and 0, neither by -2 and -4.
    assert "| random position tokens | DI minus neither | 2 | | | +2.5 [-16.6, +21.6] | +2.5 [-16.6, +21.6] |" in lines


def test_interval_against_a_table_of_student():
    """For 95 % and 4 degrees of freedom a table has 2.776 (2.7764); 2.7764 * 1581.1 / 5**0.5 = 1963.2."""
    assert study.paired([1000.0, 2000.0, 3000.0, 4000.0, 5000.0], [0.0] * 5) == "+3000.0 [+1036.8, +4963.2]"
    assert study.paired([3.0], [1.5]) == "+1.5" and study.mean_sd([3.0]) == "3.0"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    for runs in (study_runs(), [run for run in study_runs() if run["seed"] == 0]):  # also of a single seed
        imbalance.plot(runs, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as picture:
            assert picture.width > 1000
            colours = {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 24)}
        assert colours[255, 127, 14] > 1000 and colours[31, 119, 180] > 1000  # bars of box and mask AP


def test_committed_results_fit_the_program():
    content = json.loads((imbalance.FOLDER / "results.json").read_text())
    assert content["commit"] and {run["row"] for run in content["runs"]} <= imbalance.FLAGS.keys()
    readme = (imbalance.FOLDER / "README.md").read_text()
    assert all(line in readme for line in imbalance.markdown(content["runs"]).splitlines())


def test_all_commands_parse(tmp_path):
    folders = set()
    for name in imbalance.FLAGS:
        args = train.parse_arguments(imbalance.command(tmp_path, name, 3)[1:])
        assert args.seed == 3 and args.per_layer and args.resume
        folders.add(args.output)
    assert len(folders) == 8
    assert args.box_loss_scale is None and args.position_tokens == "random" and args.bato is False and args.di is None


SCRIPT = """import sys, pathlib
folder = pathlib.Path(sys.argv[1])
print("here")
if sys.argv[2] == "fail":
    sys.exit(3)
if sys.argv[2] != "stop":
    (folder / "eval.json").write_text("{}")
"""


def test_runs_go_on_and_failures_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments.imbalance"])
    (tmp_path / "script.py").write_text(SCRIPT)
    runs = lambda word: [(tmp_path / n, "eval.json", [tmp_path / "script.py", tmp_path / n, w])
                         for n, w in (("a", "end"), ("b", word), ("c", "end"))]  # fmt: skip
    for word, status in (("fail", 3), ("stop", 0)):  # stopped by a signal, train.py ends with status 0
        with pytest.raises(SystemExit, match=rf"imbalance: error: .*b: stopped before its end \(status {status}\)"):
            run_program(partial(study.run_all, runs(word), 2))
    study.run_all(runs("end"), 2)
    assert (tmp_path / "a" / "output.txt").read_text() == "here\n"  # once
    assert (tmp_path / "a" / "eval.json").exists() and (tmp_path / "c" / "eval.json").exists()
    assert (tmp_path / "b" / "output.txt").read_text() == "here\n" * 3
    assert len((tmp_path / "b" / "commit.txt").read_text().split()) == 1


def test_collect(tmp_path):
    folder = imbalance.run_folder(tmp_path, "DI and BATO", 1)
    folder.mkdir()
    (imbalance.run_folder(tmp_path, "DI", 0)).mkdir()  # not finished
    score = {"AP": 12.346}
    (folder / "eval.json").write_text(json.dumps({"layers": [{"layer": 0, "box": score, "mask": score}]}))
    (folder / "log.jsonl").write_text('{"seconds": 7.9, "loss": 1}\n{"seconds": 9, "box": 1}\n')
    (folder / "commit.txt").write_text("abc\ndef\n")
    layers = [{"box": 12.35, "mask": 12.35}]
    expected = {"row": "DI and BATO", "seed": 1, "commit": "abc, def", "seconds": 8, "layers": layers}
    assert imbalance.collect(tmp_path, 2) == [expected]


def test_what_results_json_has_is_not_trained_again(tmp_path, monkeypatch):
    made = [{"row": name, "seed": 0, "commit": "abc", "seconds": 8, "layers": [{"box": 1.0, "mask": 2.0}] * 4}
            for name in imbalance.FLAGS]  # fmt: skip
    path, started = tmp_path / "results.json", []
    path.write_text(json.dumps({"recipe": " ".join(imbalance.RECIPE), "runs": made}))
    monkeypatch.setattr(imbalance, "make_shapes", lambda *args, **kwargs: None)
    monkeypatch.setattr(imbalance, "run_all", lambda runs, *args: started.extend(str(folder) for folder, *_ in runs))
    monkeypatch.setattr(
        sys, "argv", ["imbalance", "--seeds", "2", "--results", str(tmp_path), "--output", str(tmp_path)]
    )
    imbalance.main()
    assert len(started) == len(imbalance.FLAGS) and all(folder.endswith("-1") for folder in started)
    assert json.loads(path.read_text())["runs"] == made


def test_earlier_runs(tmp_path):
    """Runs of another recipe, and those that do not say which commit trained them, are trained again."""
    path = tmp_path / "results.json"
    assert study.earlier_runs(path, recipe="a") == []
    path.write_text(json.dumps({"recipe": "a", "runs": [{"seed": 0, "commit": "abc"}, {"seed": 1}]}))
    assert study.earlier_runs(path, recipe="a") == [{"seed": 0, "commit": "abc"}]
    assert study.earlier_runs(path, recipe="b") == []
