"""Does box AP lag mask AP at the first decoder layer, and do DI and BATO help? Table 4 on shapes-hard, with seeds:
python -m benchmarks.imbalance.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from benchmarks.experiments import ROOT, ROWS
from data import make_shapes
from drawing import draw_layers
from model import PRESETS

FOLDER = Path(__file__).resolve().parent
ABLATIONS = {row.name: row.flags.split() for row in ROWS if row.table == "table4"}
RECIPE = ["--data", "shapes-hard", "--preset", "tiny", "--batch-size", "8", "--epochs", "5", "--lr", "0.001"]


def train_and_evaluate(name, seed, output, launcher):
    """One run, from where it stopped: trains, and evaluates every decoder layer. Nothing to do for a finished one."""
    folder = output / f"{name.replace(' ', '-')}-{seed}"
    if (folder / "per_layer.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # One thread each: as many runs as cores are faster than one run on all of them.
    small = ["--workers", "0", "--device", "cpu"]
    train = ["train.py", *RECIPE, *ABLATIONS[name], "--seed", str(seed), "--eval-every", "1000", "--resume", *small]
    checkpoint = folder / "checkpoint.pt"
    evaluate = ["eval.py", "--checkpoint", checkpoint, *RECIPE[:2], "--per-layer", *small]
    commands = [*train, "--output", folder], [*evaluate, "--output", folder / "per_layer.json"]
    both = " && ".join(shlex.join(map(str, [sys.executable, *command])) for command in commands)
    print(both, flush=True)
    with open(folder / "output.txt", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, "sh", "-c", both], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)


def collect(output, seeds):
    """[{"row", "seed", "seconds" of training, "layers": [{"box": AP, "mask": AP}, ...]}, ...] of the finished runs."""
    runs = []
    for name in ABLATIONS:
        for seed in range(seeds):
            folder = output / f"{name.replace(' ', '-')}-{seed}"
            if (folder / "per_layer.json").exists():
                layers = json.loads((folder / "per_layer.json").read_text())["layers"]
                layers = [{kind: round(layer[kind]["AP"], 2) for kind in ("box", "mask")} for layer in layers]
                log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                runs.append({"row": name, "seed": seed, "seconds": round(log[-1]["seconds"]), "layers": layers})
    return runs


def per_layer(runs, name, kind):
    """Per layer the values of all seeds of one row; kind "box", "mask", or "gap" for box - mask."""
    chosen = [run["layers"] for run in runs if run["row"] == name]
    value = lambda layer: layer["box"] - layer["mask"] if kind == "gap" else layer[kind]  # noqa: E731
    return [[value(layer) for layer in layers] for layers in zip(*chosen, strict=True)]


def spread(values):
    """Mean ± standard deviation (n - 1) of some values, for printing."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def markdown(runs):
    """Three tables of mean ± standard deviation over the seeds: the layers 0, 1 and the last; all gaps; differences."""
    last = len(runs[0]["layers"]) - 1
    names = [name for name in ABLATIONS if any(run["row"] == name for run in runs)]
    values = {(name, kind): per_layer(runs, name, kind) for name in names for kind in ("box", "mask", "gap")}
    lines = ["| row | seeds | input box | input mask | layer 1 box | layer 1 mask | final box | final mask |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        cells = [spread(values[name, kind][layer]) for layer in (0, 1, last) for kind in ("box", "mask")]
        lines.append(f"| {' | '.join([name, str(len(values[name, 'box'][0])), *cells])} |")
    lines += ["", f"| box AP - mask AP | input | {' | '.join(f'layer {i}' for i in range(1, last + 1))} |"]
    lines.append("| --- " * (last + 2) + "|")
    lines += [f"| {' | '.join([name, *map(spread, values[name, 'gap'])])} |" for name in names]
    common = set.intersection(*({run["seed"] for run in runs if run["row"] == name} for name in names))
    if common and "neither" in names:
        runs = [run for run in runs if run["seed"] in common]
        values = {(name, kind): per_layer(runs, name, kind) for name in names for kind in ("box", "mask", "gap")}
        lines += ["", "| minus neither, same seed | gap at input | gap at layer 1 | final box | final mask |",
                  "| --- | --- | --- | --- | --- |"]  # fmt: skip
        for name in names[1:]:
            cells = []
            for kind, layer in (("gap", 0), ("gap", 1), ("box", last), ("mask", last)):
                pairs = zip(values[name, kind][layer], values["neither", kind][layer], strict=True)
                cells.append(spread([a - b for a, b in pairs]))
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def plot(runs, path):
    """PNG of box and mask AP per layer, a panel for each row, error bars of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = figure.subplots(1, len(ABLATIONS), sharey=True)
    for axes, name in zip(panels, ABLATIONS, strict=True):
        box, mask = (per_layer(runs, name, kind) for kind in ("box", "mask"))
        if len(box) and len(box[0]) > 1:
            draw_layers(axes, *([mean(v) for v in kind] for kind in (box, mask)),
                        *([stdev(v) for v in kind] for kind in (box, mask)))  # fmt: skip
        axes.set_title({"neither": "neither (Mask DINO)", "DI and BATO": "DI and BATO (DI-MaskDINO)"}.get(name, name))
    panels[0].set_ylabel("AP (numbers: box - mask)")
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description="Trains the four rows of Table 4 on shapes-hard with several seeds, evaluates every decoder layer, "
        "prints tables of them in Markdown, and writes results.json and, with matplotlib, plot.png. Finished runs are "
        "skipped."
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per row (default: 3)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time, a core each (default: the number of cores)"
    )
    parser.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="words before each run's command, e.g. 'srun -n 1' (default: none)",
    )
    parser.add_argument("--output", default="runs/imbalance", metavar="DIR", help="folder of the runs")
    parser.add_argument("--results", default=FOLDER, metavar="DIR", help="folder of the results (default: this one)")
    args = parser.parse_args()
    output, results = ROOT / args.output, Path(args.results)
    make_shapes(ROOT / "runs" / "shapes-hard", hard=True)  # before runs that start together do it
    with ThreadPoolExecutor(args.jobs) as pool:  # seed by seed, so that what is there early compares all rows
        work = [(name, seed, output, shlex.split(args.launcher)) for seed in range(args.seeds) for name in ABLATIONS]
        list(pool.map(train_and_evaluate, *zip(*work, strict=True)))

    runs = collect(output, args.seeds)
    config = {name: getattr(PRESETS["tiny"], name) for name in ("decoder_layers", "selections", "train_size")}
    content = {"recipe": shlex.join(RECIPE), "config": config, "runs": runs}
    (results / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(runs))
    try:
        plot(runs, results / "plot.png")
    except ImportError:
        print("plot.png: not drawn, as matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
