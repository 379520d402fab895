"""Does box AP lag mask AP at the first decoder layer, and do DI and BATO help? Table 4 and the tolerance test of
Table 3 on shapes-hard, with seeds: python -m experiments.imbalance.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

from cli import positive, run_program
from drawing import draw_layers
from experiments.study import ROOT, earlier_runs, mean_sd, paired, run_all, write_results
from experiments.tables import ROWS, settings
from shapes import make_shapes

FOLDER = Path(__file__).resolve().parent
RECIPE = ["--data", "shapes-hard", "--preset", "tiny", "--batch-size", "8", "--epochs", "5", "--lr", "0.001"]
MODULES = {row.name: settings(row, "shapes-hard")[2] for row in ROWS if row.table == "table4"}
# Constraint -> {row without it: row with it}; those without are rows of Table 4, as preset tiny has three layers too.
TOLERANCE, FLAGS = {}, dict(MODULES)
for row in ROWS:
    if row.table == "table3" and not row.name.endswith("standard"):
        system, constraint = row.name.replace("Mask DINO", "neither").split(", ")
        TOLERANCE.setdefault(constraint, {})[system] = f"{system}, {constraint}"
        FLAGS[f"{system}, {constraint}"] = settings(row, "shapes-hard")[2]


def run_folder(output, name, seed):
    """Where a run of a row goes."""
    return output / f"{name.replace(', ', '-').replace(' / ', '-').replace(' ', '-')}-{seed}"


def command(output, name, seed):
    """The command line of a run, without the Python in front; its eval.json, written at the end, has every layer."""
    training = ["train.py", *RECIPE, *FLAGS[name], "--seed", str(seed), "--eval-every", "1000", "--per-layer"]
    return [*training, "--resume", "--workers", "0", "--device", "cpu", "--output", str(run_folder(output, name, seed))]


def collect(output, seeds):
    """The finished runs: [{"row", "seed", "commit", "seconds" of training, "layers": [{"box": AP, "mask": AP}]}]."""
    runs = []
    for name in FLAGS:
        for seed in range(seeds):
            folder = run_folder(output, name, seed)
            if (folder / "eval.json").exists():
                layers = json.loads((folder / "eval.json").read_text())["layers"]
                layers = [{kind: round(layer[kind]["AP"], 2) for kind in ("box", "mask")} for layer in layers]
                log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                seconds = round([entry["seconds"] for entry in log if "loss" in entry][-1])
                made = ", ".join((folder / "commit.txt").read_text().split())
                runs.append({"row": name, "seed": seed, "commit": made, "seconds": seconds, "layers": layers})
    return runs


def per_layer(runs, name, kind, seeds=None):
    """Per layer the values of one row, a list in the order of the seeds; kind "box", "mask", or "gap" for box - mask.

    seeds: those to take, all by default.
    """
    chosen = [run for run in runs if run["row"] == name and (seeds is None or run["seed"] in seeds)]
    chosen = [run["layers"] for run in sorted(chosen, key=lambda run: run["seed"])]
    value = lambda layer: layer["box"] - layer["mask"] if kind == "gap" else layer[kind]
    return [[value(layer) for layer in layers] for layers in zip(*chosen, strict=True)]


def common_seeds(runs, *names):
    """The seeds that all these rows have."""
    return set.intersection(*({run["seed"] for run in runs if run["row"] == name} for name in names))


def module_tables(runs):
    """Lines of three tables of Table 4's rows: AP at layers 0, 1 and the last; all gaps; paired differences."""
    last = len(runs[0]["layers"]) - 1
    names = [name for name in MODULES if common_seeds(runs, name)]
    values = {(name, kind): per_layer(runs, name, kind) for name in names for kind in ("box", "mask", "gap")}
    lines = ["| row | seeds | input box | input mask | layer 1 box | layer 1 mask | final box | final mask |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        cells = [mean_sd(values[name, kind][layer]) for layer in (0, 1, last) for kind in ("box", "mask")]
        lines.append(f"| {' | '.join([name, str(len(values[name, 'box'][0])), *cells])} |")
    lines += ["", f"| box AP - mask AP | input | {' | '.join(f'layer {i}' for i in range(1, last + 1))} |"]
    lines.append("| --- " * (last + 2) + "|")
    lines += [f"| {' | '.join([name, *map(mean_sd, values[name, 'gap'])])} |" for name in names]
    lines += ["", "| minus neither, same seeds | seeds | gap at input | gap at layer 1 | final box | final mask |",
              "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        seeds = common_seeds(runs, name, "neither")
        if name != "neither" and seeds:
            both = [(kind, layer) for kind, layer in (("gap", 0), ("gap", 1), ("box", last), ("mask", last))]
            cells = [paired(*(per_layer(runs, n, k, seeds)[layer] for n in (name, "neither"))) for k, layer in both]
            lines.append(f"| {' | '.join([name, str(len(seeds)), *cells])} |")
    return lines


def tolerance_table(runs):
    """Lines of a table as the paper's Table 3: final AP with a constraint, and what it changes against without it.

    The last line of a constraint is how much less DI loses than "neither", of the seeds that all four rows have.
    """
    lines = ["| constraint | row | seeds | final box | final mask | change of box | change of mask |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for constraint, pairs in TOLERANCE.items():
        for system, constrained in pairs.items():
            if seeds := common_seeds(runs, system, constrained):
                final, changes = [], []
                for kind in ("box", "mask"):
                    now, before = (per_layer(runs, name, kind, seeds)[-1] for name in (constrained, system))
                    final.append(mean_sd(now))
                    relative = f", {100 * (mean(now) / mean(before) - 1):+.0f} %" if mean(before) else ""
                    changes.append(paired(now, before) + relative)
                lines.append(f"| {' | '.join([constraint, system, str(len(seeds)), *final, *changes])} |")
        if seeds := common_seeds(runs, *pairs, *pairs.values()):
            cells = []
            for kind in ("box", "mask"):
                neither, di = (changes_of(runs, *rows, kind, seeds) for rows in pairs.items())
                cells.append(paired(di, neither))
            lines.append(f"| {constraint} | DI minus neither | {len(seeds)} | | | {' | '.join(cells)} |")
    return lines


def changes_of(runs, system, constrained, kind, seeds):
    """What a constraint changes in a row's final AP, seed by seed."""
    now, before = (per_layer(runs, name, kind, seeds)[-1] for name in (constrained, system))
    return [a - b for a, b in zip(now, before, strict=True)]


def markdown(runs):
    """All tables, mean ± standard deviation over the seeds; in brackets the 95 % interval of paired differences."""
    tolerance = tolerance_table(runs)
    return "\n".join([*module_tables(runs), *(["", *tolerance] if len(tolerance) > 2 else [])])


def plot(runs, path):
    """PNG of box and mask AP per layer, a panel for each row of Table 4, error bars of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = figure.subplots(1, len(MODULES), sharey=True)
    for axes, name in zip(panels, MODULES, strict=True):
        box, mask = (per_layer(runs, name, kind) for kind in ("box", "mask"))
        if box:
            spread = lambda kind: [stdev(v) if len(v) > 1 else 0 for v in kind]
            draw_layers(axes, *([mean(v) for v in kind] for kind in (box, mask)), spread(box), spread(mask))
        axes.set_title({"neither": "neither (Mask DINO)", "DI and BATO": "DI and BATO (DI-MaskDINO)"}.get(name, name))
    panels[0].set_ylabel("AP (numbers: box - mask)")
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description="Trains the four rows of Table 4, and the rows of Table 3 with a constraint, on shapes-hard with "
        "several seeds, evaluates every decoder layer, prints tables of them in Markdown, and writes results.json and, "
        "with matplotlib, plot.png. Runs that are in results.json already are kept, unfinished ones go on."
    )
    add = parser.add_argument
    add("--seeds", type=positive, default=5, help="runs per row (default: 5)")
    jobs = "runs at a time, a core each (default: the number of cores)"
    add("--jobs", type=positive, default=os.cpu_count(), help=jobs)
    launcher = "words before each run's command, e.g. 'srun -n 1' (default: none)"
    add("--launcher", default="", metavar="COMMAND", help=launcher)
    add("--output", default="runs/imbalance", metavar="DIR", help="folder of the runs (default: runs/imbalance)")
    add("--results", default=FOLDER, metavar="DIR", help="folder of the results (default: this one)")
    args = parser.parse_args()
    output, results, recipe = ROOT / args.output, Path(args.results), shlex.join(RECIPE)
    runs = [run for run in earlier_runs(results / "results.json", recipe=recipe) if run["row"] in FLAGS]
    print(f"kept: {len(runs)} runs of results.json")
    known = {(run["row"], run["seed"]) for run in runs}
    # Seed by seed, so that what is there early compares all rows.
    work = [(name, seed) for seed in range(args.seeds) for name in FLAGS if (name, seed) not in known]
    if work:
        make_shapes(ROOT / "runs" / "shapes-hard", hard=True)  # before runs that start together do it
        run_all([(run_folder(output, *one), "eval.json", command(output, *one)) for one in work], args.jobs,
                shlex.split(args.launcher))  # fmt: skip

    runs += collect(output, args.seeds)
    order = lambda run: (run["seed"], list(FLAGS).index(run["row"]))
    runs = write_results(results / "results.json", runs, order, recipe=recipe)
    print(markdown(runs))
    try:
        plot(runs, results / "plot.png")
    except ImportError:
        print("plot.png: not drawn, as matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    sys.argv[0] = "experiments.imbalance"
    run_program(main)
