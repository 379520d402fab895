"""experiments.plot on made logs: what the lines show, and one clear line for what cannot be drawn."""

import json
import sys

import pytest
from PIL import Image

from cli import run_program
from experiments import plot


def scores(box, mask):
    return {"box": {"AP": box, "AP50": 90.0}, "mask": {"AP": mask, "AP50": 80.0}}


def write_log(folder, offset=0.0, layers=4, epochs=3):
    """A run of `epochs` evaluations and ten training entries before each; layers = 0: evaluated without --per-layer."""
    lines = []
    for epoch in range(epochs):
        for step in range(1, 11):
            iteration = epoch * 200 + step * 20
            terms = {"loss_ce": 1.0, "loss_bbox": 0.5, "loss_giou": 0.25, "loss_mask": 0.4, "loss_dice": 0.8}
            terms |= {f"{name}_0": 2 * value for name, value in terms.items()} | {"loss_ce_di_1": 4.0}
            terms = {name: value * 100 / (100 + iteration) for name, value in terms.items()}
            entry = {"epoch": epoch, "iteration": iteration, "seconds": 1.0, "lr": 1e-4, "images_per_second": 9.0}
            lines.append(entry | {"loss": 4000 / (100 + iteration) + offset} | terms)
        entry = {"epoch": epoch + 1, "iteration": epoch * 200 + 200, "seconds": 1.0}
        entry |= scores(10.0 * epoch + offset, 11.0 * epoch + offset)
        if layers:
            per_layer = [scores(10.0 * epoch - (layers - i), 11.0 * epoch) for i in range(layers)]
            entry["layers"] = [{"layer": i} | layer for i, layer in enumerate(per_layer)]
        lines.append(entry)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def panels(figure):
    return {panel.get_title(): panel for panel in figure.axes}


def test_lines_show_what_the_log_says(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {"a": write_log(tmp_path / "a"), "b": write_log(tmp_path / "b", 5, layers=6)}
    figure = plot.draw({name: plot.read_log(run) for name, run in runs.items()})
    drawn = panels(figure)
    a, b = drawn["Total loss"].lines
    assert points(a)[0] == (20, 4000 / 120) and points(b)[-1] == (600, 4000 / 700 + 5) and len(points(a)) == 30
    assert a.get_color() != b.get_color()
    for kind, terms in {"Class": (1 + 2 + 4), "Box": 3 * (0.5 + 0.25), "Mask": 3 * (0.4 + 0.8)}.items():
        assert points(drawn[f"{kind} loss"].lines[0])[0] == (20, pytest.approx(terms * 100 / 120))
    box, mask, *others = drawn["Average precision"].lines
    assert points(box) == [(1, 0), (2, 10), (3, 20)] and points(mask) == [(1, 0), (2, 11), (3, 22)]
    assert len(others) == 2 and points(others[0]) == [(1, 5), (2, 15), (3, 25)]
    gaps = drawn["Box AP - mask AP per layer: a"].lines
    assert [points(line) for line in gaps[:4]] == [[(1, i - 4), (2, i - 5), (3, i - 6)] for i in range(4)]
    assert drawn["Box AP - mask AP per layer: b"].get_ylim()[0] < -8 and len(drawn) == 7
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_runs_without_layers_without_evaluation_and_without_ap(tmp_path):
    pytest.importorskip("matplotlib")
    plain, bare = write_log(tmp_path / "plain", layers=0), write_log(tmp_path / "bare", epochs=1)
    lines = (bare / "log.jsonl").read_text().splitlines()
    (bare / "log.jsonl").write_text("\n".join(lines[:5]) + "\n")  # stopped before the first evaluation
    none = write_log(tmp_path / "none")
    (none / "log.jsonl").write_text((none / "log.jsonl").read_text().replace('"AP": 10.0', '"AP": null'))
    drawn = panels(plot.draw({run.name: plot.read_log(run) for run in (plain, bare, none)}))
    assert len(drawn) == 6 and "Box AP - mask AP per layer: none" in drawn
    assert [len(line.get_xdata()) for line in drawn["Total loss"].lines] == [30, 5, 30]


def test_program_writes_a_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    runs = [str(write_log(tmp_path / name)) for name in ("a", "b")]
    monkeypatch.setattr(sys, "argv", ["experiments.plot", *runs, "--output", str(tmp_path / "out.png")])
    plot.main()
    assert "out.png" in capsys.readouterr().out
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_unfinished_last_line_is_left_out(tmp_path):
    path = write_log(tmp_path) / "log.jsonl"
    whole = plot.read_log(tmp_path)
    path.write_text(path.read_text() + '{"epoch": 3, "iter')
    assert plot.read_log(tmp_path) == whole


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("", "has no entry yet"),
        ('{"epoch": 0, "iteration": 20, "loss": 1}\nnothing\n', "line 2 is no entry"),
        ("[]\n", "line 1 is no entry"),
    ],
)
def test_damaged_logs_are_named(tmp_path, monkeypatch, content, message):
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    monkeypatch.setattr(sys, "argv", ["experiments.plot", str(tmp_path), "--output", str(tmp_path / "out.png")])
    with pytest.raises(SystemExit, match=rf"log\.jsonl: {message}") as end:
        run_program(plot.main)
    assert "\n" not in end.value.code and not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("output", ["out.doc", "nowhere/out.png"])
def test_picture_that_cannot_be_written(tmp_path, monkeypatch, output):
    pytest.importorskip("matplotlib")
    write_log(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments.plot", str(tmp_path), "--output", str(tmp_path / output)])
    with pytest.raises(SystemExit, match=f"experiments.plot: error: .*{output}: cannot be written") as end:
        run_program(plot.main)
    assert "\n" not in end.value.code


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    monkeypatch.setattr(sys, "argv", ["experiments.plot", str(write_log(tmp_path))])
    with pytest.raises(SystemExit, match="pip install matplotlib") as end:
        run_program(plot.main)
    assert "\n" not in end.value.code
