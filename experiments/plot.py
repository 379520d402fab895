"""Draws losses, AP and the box-mask gap per layer of training runs: python -m experiments.plot RUN... --output FILE."""

import argparse
import json
import math
import sys
from pathlib import Path

from cli import run_program
from config import InputError
from files import explaining
from losses import KINDS


def read_log(run):
    """The entries of RUN/log.jsonl, see train.py: those of the training and those of the evaluations, two lists.

    Raises InputError for a run without a log or with a damaged one. A last line without its end is that of a run at
    work, and left out.
    """
    path = Path(run) / "log.jsonl"
    with explaining(OSError, f"{path}: cannot be read", "give the --output folder of train.py"):
        lines = path.read_text().splitlines(keepends=True)
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        foreign = f"{path}: line {number} is no entry of a training log"
        with explaining((ValueError, KeyError, TypeError), foreign, "remove it"):
            entries.append(json.loads(line))
            _ = entries[-1]["epoch"], entries[-1]["iteration"]
    training = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "box" in entry and "mask" in entry]
    if not training and not evaluations:
        raise InputError(f"{path}: has no entry yet; wait for the first")
    return training, evaluations


def loss_of_kind(entry, kind):
    """Sum of the terms of a kind over all layers, unweighted as they are in the log."""
    return sum(value for name, value in entry.items() if name.startswith(KINDS[kind]))


def average_precision(scores, kind):
    """ "box" or "mask" AP of an evaluation or of a layer's entry in it, in percent; NaN where there is none."""
    value = scores[kind]["AP"]
    return math.nan if value is None else value


def draw(logs):
    """A matplotlib Figure of {name of the run: what `read_log` returned}.

    One panel each for the total loss, for AP and for every kind of loss, all runs in it; one more for every run
    evaluated with --per-layer: box AP - mask AP of each decoder layer.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with_layers = [name for name, (_, evaluations) in logs.items() if any("layers" in entry for entry in evaluations)]
    rows = math.ceil((5 + len(with_layers)) / 2)
    figure = Figure(figsize=(12, 0.8 + 3.5 * rows), layout="constrained")
    total, precision, *panels = figure.subplots(rows, 2).ravel()
    for number, (training, evaluations) in enumerate(logs.values()):
        style = {"color": f"C{number}", "linewidth": 1.2}
        iterations, epochs = [entry["iteration"] for entry in training], [entry["epoch"] for entry in evaluations]
        total.plot(iterations, [entry["loss"] for entry in training], **style)
        for panel, kind in zip(panels, KINDS, strict=False):
            panel.plot(iterations, [loss_of_kind(entry, kind) for entry in training], **style)
        for kind, line in (("box", "-"), ("mask", "--")):
            values = [average_precision(entry, kind) for entry in evaluations]
            precision.plot(epochs, values, line, marker=".", **style)
    label_losses(total, "Total loss", "weighted sum of all terms")
    for panel, kind in zip(panels, KINDS, strict=False):
        label_losses(panel, f"{kind} loss".capitalize(), f"sum of {' and '.join(KINDS[kind])}")
    precision.set(title="Average precision", xlabel="epoch", ylabel="AP, percent")
    precision.legend([Line2D([], [], linestyle=line, color="black") for line in ("-", "--")], ["box", "mask"])

    for panel, name in zip(panels[3:], with_layers, strict=False):
        if panel is not panels[3]:
            panel.sharey(panels[3])  # before anything is drawn, so that the range is that of all
        draw_gap(panel, [entry for entry in logs[name][1] if "layers" in entry])
        panel.set(title=f"Box AP - mask AP per layer: {name}", xlabel="epoch", ylabel="difference, points of AP")
    for panel in panels[3 + len(with_layers) :]:
        panel.remove()
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        if panel.get_xlabel() == "epoch":
            panel.xaxis.get_major_locator().set_params(integer=True)
    handles = [Line2D([], [], color=f"C{number}") for number in range(len(logs))]
    figure.legend(handles, list(logs), loc="outside upper center", ncols=min(4, len(logs)))
    return figure


def label_losses(panel, title, ylabel):
    """Axes of a loss: logarithmic, with plain numbers instead of powers of ten."""
    panel.set(title=title, xlabel="iteration", ylabel=ylabel, yscale="log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "2357" else "")


def draw_gap(panel, evaluations):
    """One line per decoder layer: box AP - mask AP over the epochs, dark for the first layer and light for the last."""
    from matplotlib import colormaps

    lines = {}  # layer: (epochs, differences)
    for entry in evaluations:
        for scores in entry["layers"]:
            epochs, gaps = lines.setdefault(scores["layer"], ([], []))
            epochs.append(entry["epoch"])
            gaps.append(average_precision(scores, "box") - average_precision(scores, "mask"))
    for layer, points in sorted(lines.items()):
        colour = colormaps["viridis"](0.9 * layer / max(1, *lines))  # the last tenth is too light to be seen
        panel.plot(*points, marker=".", color=colour, label="0 (input)" if layer == 0 else str(layer))
    panel.axhline(0, color="black", linewidth=0.8)
    panel.legend(title="decoder layer", loc="upper left", bbox_to_anchor=(1, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote to, its --output")
    parser.add_argument("--output", default="plot.png", metavar="FILE", help="the picture (default: %(default)s)")
    args = parser.parse_args()
    with explaining(ImportError, "matplotlib is not installed", "python -m pip install matplotlib"):
        import matplotlib  # noqa: F401
    paths = [Path(run).resolve() for run in args.runs]
    unique = len({path.name for path in paths}) == len(paths)
    figure = draw({path.name if unique else str(path): read_log(path) for path in paths})
    with explaining((ValueError, OSError), f"{args.output}: cannot be written"):
        figure.savefig(args.output, dpi=110)
    print(f"written: {args.output}")


if __name__ == "__main__":
    sys.argv[0] = "experiments.plot"
    run_program(main)
