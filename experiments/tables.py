"""The tables of the paper as commands of train.py, beside the published numbers: python -m experiments.tables table5.

docs/ablations.md says how rows are read that the paper does not spell out.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ("coco", "bdd100k", "shapes-hard")
TITLES = {
    "table1": "Table 1: the systems on COCO val2017",
    "table2": "Table 2: the systems on BDD100K, 68 epochs",
    "fig1": "Fig. 1 (c, d): the 0-th decoder layer, which is layer 0 here (published numbers are read off the figure)",
    "table3": "Table 3: constraints that widen the imbalance, 3 decoder layers, DI without BATO",
    "table4": "Table 4: the two modules",
    "table5": "Table 5: guidance of BATO",
    "table6": "Table 6: guiding token generation",
    "table7": "Table 7: number of selections",
    "table8": "Table 8: k1 and k2",
    "table9": "Table 9: decoder layers",
}
SIZES = ("APs", "APm", "APl")  # of the reproduced numbers: small, medium, large
FPS = "The paper's FPS column ({}) is measured with python -m benchmarks.inference."
NOTES = {
    "table1": "Swin-L: batch 4 on 4 GPUs at learning rate 1e-4, the paper's only one. The authors released neither a "
    "configuration nor a checkpoint of DI-MaskDINO with Swin-L: its preset is read off the paper.\n"
    + FPS.format("R50: Mask DINO 8.0, DI-MaskDINO 7.7; Swin-L: 3.4, 3.0"),
    "table2": FPS.format("on BDD100K's images"),
    "table3": "In brackets: change in percent of the row without the constraint.",
    "table5": "T_i: DI is disabled. T_s1, T_s2: DI is whole, and BATO is guided by tokens of that stage.",
}
BACKBONE_WEIGHTS = {"r50": "ResNet50_Weights.IMAGENET1K_V1", "swin_l": "swin_large_patch4_window12_384_22k.pth"}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    table          key of TITLES
    name           of the row, as in the paper
    coco, bdd100k  published (box AP, mask AP) on that data set, in percent; None: the paper has none
    flags          of train.py, as one string, beyond those of the data set
    preset         of train.py
    schedule       of train.py on COCO
    """

    table: str
    name: str
    coco: tuple[float, float] | None = None
    bdd100k: tuple[float, float] | None = None
    flags: str = ""
    preset: str = "dimaskdino_r50"
    schedule: str = "12ep"


def systems(table, name, data, mask_dino, di_maskdino, backbone="r50", schedule="12ep", flags=""):
    """The rows of Mask DINO and DI-MaskDINO with one backbone and schedule, and their numbers on one data set."""
    return [
        Row(table, f"{system}, {name}", **{data: published}, flags=flags, preset=f"{preset}_{backbone}",
            schedule=schedule)
        for system, preset, published in (
            ("Mask DINO", "maskdino", mask_dino),
            ("DI-MaskDINO", "dimaskdino", di_maskdino),
        )
    ]  # fmt: skip


SWIN = {"backbone": "swin_l", "flags": "--batch-size 4 --lr 1e-4"}
BOTH = (46.9, 42.3), (29.5, 25.7)  # the whole model, in six tables
ROWS = [
    *systems("table1", "R50, 12 epochs", "coco", (45.7, 41.4), (46.9, 42.3)),
    *systems("table1", "R50, 24 epochs", "coco", (48.4, 44.2), (49.6, 44.8), schedule="24ep"),
    *systems("table1", "R50, 50 epochs", "coco", (51.7, 46.3), (51.9, 46.7), schedule="50ep"),
    *systems("table1", "Swin-L, 12 epochs", "coco", (52.2, 47.2), (53.3, 47.9), **SWIN),
    *systems("table1", "Swin-L, 50 epochs", "coco", (56.8, 51.0), (57.8, 51.8), **SWIN, schedule="50ep"),
    *systems("table2", "R50", "bdd100k", (28.1, 25.3), (29.5, 25.7)),
    *systems("table2", "Swin-L", "bdd100k", (30.2, 27.0), (31.4, 27.9), "swin_l"),
    *systems("fig1", "R50", "bdd100k", (16.6, 21.1), (21.6, 22.1)),
    Row("table3", "Mask DINO, standard", None, (27.5, 23.7), "--no-di --no-bato --decoder-layers 3"),
    Row("table3", "DI, standard", None, (27.9, 24.9), "--no-bato --decoder-layers 3"),
    Row("table3", "Mask DINO, weight of box losses / 10", None, (24.7, 23.0),
        "--no-di --no-bato --decoder-layers 3 --box-loss-scale 0.1"),
    Row("table3", "DI, weight of box losses / 10", None, (27.1, 25.2),
        "--no-bato --decoder-layers 3 --box-loss-scale 0.1"),
    Row("table3", "Mask DINO, random position tokens", None, (21.5, 21.9),
        "--no-di --no-bato --decoder-layers 3 --position-tokens random"),
    Row("table3", "DI, random position tokens", None, (23.8, 23.7),
        "--no-bato --decoder-layers 3 --position-tokens random"),
    Row("table4", "neither", (45.6, 41.2), (27.8, 24.4), "--no-di --no-bato"),
    Row("table4", "DI", (46.4, 42.1), (28.8, 25.2), "--no-bato"),
    Row("table4", "BATO", (46.2, 41.8), (28.3, 24.9), "--no-di"),
    Row("table4", "DI and BATO", *BOTH),
    Row("table5", "T_i", (46.2, 41.8), (28.3, 24.9), "--no-di"),
    Row("table5", "T_s1", (46.6, 42.0), (28.5, 24.9), "--guidance t_s1"),
    Row("table5", "T_s2", (46.7, 42.2), (28.9, 25.6), "--guidance t_s2"),
    Row("table5", "Q_bal", *BOTH),
    Row("table6", "without GTG", (46.5, 42.2), (28.6, 25.4), "--no-gtg"),
    Row("table6", "with GTG", *BOTH),
    Row("table7", "single", (46.2, 41.8), (28.3, 24.9), "--no-di"),
    Row("table7", "double", *BOTH),
    Row("table7", "triple", (46.6, 42.2), (29.3, 25.5), "--selections 600,450,300"),
    Row("table8", "300, 300", (46.6, 42.3), (29.1, 25.5), "--selections 300,300"),
    Row("table8", "600, 600", (46.8, 42.4), (29.3, 25.3), "--selections 600,600"),
    Row("table8", "600, 300", *BOTH),
    Row("table9", "3", (45.8, 41.3), (28.7, 25.3), "--decoder-layers 3"),
    Row("table9", "6", *BOTH),
    Row("table9", "9", (46.9, 42.5), (28.9, 25.6), "--decoder-layers 9"),
]  # fmt: skip


def rows(tables, data):
    """The rows of the named tables, or of "all", for a data set; Tables 1 and 2 make no sense on another."""
    own = {"table1": "coco", "table2": "bdd100k"}
    return [r for r in ROWS if (r.table in tables or "all" in tables) and own.get(r.table, data) == data]


def published(row, data):
    """(box AP, mask AP) of the paper on this data set, or None."""
    return getattr(row, data, None)


def settings(row, data):
    """Preset, schedule (None: the preset's own) and further flags of train.py for a row on a data set."""
    flags = row.flags.split()
    if data != "shapes-hard":
        return row.preset, "bdd68ep" if data == "bdd100k" else row.schedule, flags
    # Preset tiny has 3 decoder layers and a tenth of the tokens; Mask DINO is tiny without the modules.
    if row.preset.startswith("maskdino"):
        flags = ["--no-di", "--no-bato"]
    if "--selections" in flags:
        flags[-1] = ",".join(str(int(size) // 10) for size in flags[-1].split(","))
    if row.table == "table9":
        flags = ["--decoder-layers", row.name]
    if "--decoder-layers 3" in " ".join(flags):
        at = flags.index("--decoder-layers")
        flags[at : at + 2] = []
    return "tiny", None, flags


def run_folder(row, data, output):
    """Where a row's run goes: rows that are the same training, in whatever table, share the folder."""
    preset, schedule, flags = settings(row, data)
    words = [preset, *([schedule] if schedule else []), *(flag.removeprefix("--") for flag in flags)]
    return Path(output) / data / "-".join(words)


def commands(row, data, data_root, output, gpus=1):
    """The command lines, lists of words, that give this row's numbers; the last writes the file that holds them."""
    preset, schedule, flags = settings(row, data)
    folder = run_folder(row, data, output)
    source = ["--data", data] + (["--data-root", data_root] if data_root else [])
    train = ["train.py", *source, "--preset", preset]
    if schedule:
        train += ["--backbone-weights", BACKBONE_WEIGHTS[preset.split("_", 1)[1]], "--schedule", schedule]
    if "--batch-size" not in flags:
        train += ["--batch-size", "8" if data == "bdd100k" else "16"]
    words = [*train, *flags]
    gpus = math.gcd(gpus, int(words[words.index("--batch-size") + 1]))  # every process takes as many images
    python = ["python"] if gpus == 1 else ["torchrun", "--nproc_per_node", str(gpus)]
    found = [[*python, *words, "--output", str(folder)]]
    if row.table == "fig1":
        checkpoint = ["--checkpoint", str(folder / "checkpoint.pt")]
        file = str(folder / "per_layer.json")
        found.append(["python", "eval.py", *checkpoint, *source, "--per-layer", "--output", file])
    return found


def table_commands(table, data, output):
    """Command lines for a whole table, beside those of its rows: the FPS column, the bar chart of Fig. 1 (c, d)."""
    mine = rows([table], data)
    if table in ("table1", "table2"):
        return [
            ["python", "-m", "benchmarks.inference", "--preset", preset] for preset in sorted({r.preset for r in mine})
        ]
    if table == "fig1":
        files = [str(run_folder(row, data, output) / "per_layer.json") for row in mine]
        return [["python", "-m", "experiments.figures", "layers", *files, "--output", f"{output}/{data}/fig1.png"]]
    return []


def result(row, data, output):
    """What eval.py or train.py has written for this row's run, {"box": {"AP": ...}, ...}; None: it has not finished."""
    path = run_folder(row, data, output) / ("per_layer.json" if row.table == "fig1" else "eval.json")
    return json.loads(path.read_text()) if path.exists() else None


def pair(numbers, form="{:.1f}"):
    """(box AP, mask AP) for printing."""
    return "-" if numbers is None else " / ".join("-" if x is None else form.format(x) for x in numbers)


def change(row, of):
    """Table 3: ((box, mask) change in percent) of a row against its system without the constraint, both by `of`(row).

    None for the rows without a constraint, and where one of the two is not there.
    """
    [standard] = [r for r in ROWS if r.table == "table3" and r.name == row.name.split(",")[0] + ", standard"]
    now, before = of(row), of(standard)
    if row is standard or not now or not before or None in (*now, *before):
        return None
    return tuple(100 * (a / b - 1) if b else None for a, b in zip(now, before, strict=True))


def with_change(row, of):
    """(box AP, mask AP) by `of`(row) for printing, in Table 3 with the change in brackets."""
    changes = change(row, of) if row.table == "table3" else None
    return pair(of(row)) + (f" ({pair(changes, '{:+.1f} %')})" if changes else "")


def markdown_row(row, data, output):
    """The lines of one row: published and reproduced AP, and the reproduced AP by size; in Fig. 1 a line per layer."""

    def line(name, paper, reproduced, scores):
        sizes = [pair([scores[kind][size] for kind in ("box", "mask")]) if scores else "-" for size in SIZES]
        return f"| {' | '.join([name, paper, reproduced, *sizes])} |"

    scores = result(row, data, output)
    paper = with_change(row, lambda r: published(r, data))
    if row.table != "fig1" or not scores:
        return [line(row.name, paper, with_change(row, lambda r: ap(result(r, data, output))), scores)]
    names = {0: "layer 0, the decoder's input", 1: "layer 1", len(scores["layers"]) - 1: "last layer"}
    layers = [(name, scores["layers"][layer]) for layer, name in names.items()]
    return [line(f"{row.name}, {n}", "-" if i else paper, pair(ap(s)), s) for i, (n, s) in enumerate(layers)]


def ap(scores):
    """(box AP, mask AP) of what eval.py writes, None where there is nothing."""
    return (scores["box"]["AP"], scores["mask"]["AP"]) if scores else None


def markdown(chosen, data, output):
    """Tables of the published numbers and those of the runs, box AP / mask AP."""
    lines = [f"# Reproduced on {data}", "", "Box AP / mask AP. `-`: not run yet, or not published.", ""]
    for table, title in TITLES.items():
        mine = [row for row in chosen if row.table == table]
        if mine:
            lines += [f"## {title}", "", *([NOTES[table].replace("\n", " "), ""] if table in NOTES else [])]
            lines += [f"| row | published on {data} | reproduced | small | medium | large |", "| --- " * 6 + "|"]
            lines += [line for row in mine for line in markdown_row(row, data, output)] + [""]
    return "\n".join(lines)


def show(chosen, data, data_root, output, gpus):
    """Print every row: its name, the published numbers on this data set, and the commands."""
    first = {}  # folder -> the first row that trains it
    for table, title in TITLES.items():
        mine = [row for row in chosen if row.table == table]
        if mine:
            print(f"\n{title}; on {data}")
            for line in NOTES.get(table, "").splitlines():
                print(f"  {line}")
        for row in mine:
            numbers = with_change(row, lambda r: published(r, data))
            same = first.setdefault(run_folder(row, data, output), row)
            shared = "" if same is row else f"; the run of {same.table}, {same.name}"
            print(f"  {row.name}: published {'on other data only' if numbers == '-' else numbers}{shared}")
            for command in commands(row, data, data_root, output, gpus):
                print(f"    {shlex.join(command)}")
        for command in table_commands(table, data, output) if mine else []:
            print(f"  {shlex.join(command)}")


def run(chosen, data, data_root, output, gpus):
    """Run the rows that have not finished, one after the other; write the table after each. Stops where one fails."""
    table = Path(output) / data / "results.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    for row in chosen:
        for command in commands(row, data, data_root, output, gpus) if result(row, data, output) is None else []:
            folder = run_folder(row, data, output)
            if "train.py" in command:
                if (folder / "eval.json").exists():
                    continue  # trained for another table
                if any((folder / name).exists() for name in ("checkpoint.pt", "log.jsonl")):
                    command = [*command, "--resume"]
            print(f"{TITLES[row.table]}, {row.name}: {shlex.join(command)}", flush=True)
            module = ["-m", "torch.distributed.run"] if command[0] == "torchrun" else []  # it may not be on the PATH
            words = [sys.executable, *module, *command[1:]]
            with ThreadPoolExecutor(1) as pool:  # which lets it save on Ctrl-C: subprocess.run alone would kill it
                status = pool.submit(subprocess.run, words, cwd=ROOT).result().returncode
            if status or ("train.py" in command and not (folder / "eval.json").exists()):
                where = f"experiments.tables: error: {row.table}, {row.name}"
                sys.exit(f"{where}: stopped before its end (status {status}); see above")
        table.write_text(markdown(chosen, data, output))
    print(f"{table}: written")


def main():
    parser = argparse.ArgumentParser(
        description="Prints the rows of the paper's tables as commands of train.py, the published box AP / mask AP "
        "beside them; with --run, runs them and compares.",
    )
    add = parser.add_argument
    add("tables", nargs="*", default=["all"], metavar="TABLE", help=f"{', '.join(TITLES)} or all (default: all)")
    sets = "what to train on (default: print the commands for each); tables 1 and 2 exist on their own data set only"
    add("--data", choices=DATA, help=f"{sets}, and shapes-hard takes the preset tiny")
    root = "folder of the data set (default: datasets/NAME; of shapes-hard, that of train.py)"
    add("--data-root", metavar="DIR", help=root)
    gpus = "train on N GPUs, with torchrun, or on as many of them as divide the batch (default: 1)"
    add("--gpus", type=int, default=1, metavar="N", help=gpus)
    add("--run", action="store_true", help="run what has not finished yet, one row after the other")
    output = "folder of the runs; a table of the results goes to DIR/DATA/results.md (default: runs/experiments)"
    add("--output", default="runs/experiments", metavar="DIR", help=output)
    args = parser.parse_args()
    for table in args.tables:
        if table not in (*TITLES, "all"):
            parser.error(f"no table {table!r}: choose from {', '.join(TITLES)}, all")
    if args.run and not args.data:
        parser.error(f"--run needs --data: {', '.join(DATA)}")
    if args.data_root and not args.data:
        parser.error("--data-root needs --data: it is the folder of one data set")
    if args.gpus < 1:
        parser.error(f"--gpus {args.gpus}: at least 1")
    for data in [args.data] if args.data else DATA:
        chosen = rows(args.tables, data)
        if args.data and not chosen:
            parser.error(f"{', '.join(args.tables)}: not on {data}")
        data_root = args.data_root or (None if data == "shapes-hard" else f"datasets/{data}")
        (run if args.run else show)(chosen, data, data_root, args.output, args.gpus)


if __name__ == "__main__":
    main()
