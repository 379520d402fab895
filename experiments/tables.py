"""The experiments of the paper as commands of train.py: python -m benchmarks.experiments table5 --data coco [--run]."""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "table1": "Table 1: COCO val2017",
    "table2": "Table 2: BDD100K, 68 epochs",
    "fig1": "Fig. 1 (c, d): the first decoder layer, BDD100K (published numbers are read off the figure)",
    "table3": "Table 3: constraints that widen the imbalance, BDD100K, 3 decoder layers, DI without BATO",
    "table4": "Table 4: the two modules, COCO, 12 epochs",
    "table5": "Table 5: guidance of BATO, COCO, 12 epochs",
    "table6": "Table 6: guiding token generation, COCO, 12 epochs",
    "table7": "Table 7: number of selections, COCO, 12 epochs",
    "table8": "Table 8: k1 and k2, COCO, 12 epochs",
    "table9": "Table 9: decoder layers, COCO, 12 epochs",
}
# The data set of the published numbers; Tables 1 and 2 make no sense on another.
PAPER_DATA = dict.fromkeys(TITLES, "coco") | dict.fromkeys(("table2", "fig1", "table3"), "bdd100k")
BACKBONE_WEIGHTS = {"r50": "ResNet50_Weights.IMAGENET1K_V1", "swin_l": "swin_large_patch4_window12_384_22k.pth"}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    table      key of TITLES
    name       of the row, as in the paper
    published  (box AP, mask AP) on PAPER_DATA[table]
    flags      of train.py, as one string, beyond those of the data set
    preset     of train.py
    schedule   of train.py on COCO
    """

    table: str
    name: str
    published: tuple[float, float]
    flags: str = ""
    preset: str = "dimaskdino_r50"
    schedule: str = "12ep"


def systems(table, name, mask_dino, di_maskdino, backbone="r50", schedule="12ep"):
    """The rows of Mask DINO and DI-MaskDINO with one backbone and schedule."""
    return [
        Row(table, f"{system}, {name}", published, preset=f"{preset}_{backbone}", schedule=schedule)
        for system, preset, published in (
            ("Mask DINO", "maskdino", mask_dino),
            ("DI-MaskDINO", "dimaskdino", di_maskdino),
        )
    ]


ROWS = [
    *systems("table1", "R50, 12 epochs", (45.7, 41.4), (46.9, 42.3)),
    *systems("table1", "R50, 24 epochs", (48.4, 44.2), (49.6, 44.8), schedule="24ep"),
    *systems("table1", "R50, 50 epochs", (51.7, 46.3), (51.9, 46.7), schedule="50ep"),
    *systems("table1", "Swin-L, 12 epochs", (52.2, 47.2), (53.3, 47.9), "swin_l"),
    *systems("table1", "Swin-L, 50 epochs", (56.8, 51.0), (57.8, 51.8), "swin_l", "50ep"),
    *systems("table2", "R50", (28.1, 25.3), (29.5, 25.7)),
    *systems("table2", "Swin-L", (30.2, 27.0), (31.4, 27.9), "swin_l"),
    *systems("fig1", "R50, layer 1", (16.6, 21.1), (21.6, 22.1)),
    Row("table3", "Mask DINO, standard", (27.5, 23.7), "--no-di --no-bato --decoder-layers 3"),
    Row("table3", "DI, standard", (27.9, 24.9), "--no-bato --decoder-layers 3"),
    Row("table3", "Mask DINO, weight of box losses / 10", (24.7, 23.0),
        "--no-di --no-bato --decoder-layers 3 --box-loss-scale 0.1"),
    Row("table3", "DI, weight of box losses / 10", (27.1, 25.2), "--no-bato --decoder-layers 3 --box-loss-scale 0.1"),
    Row("table3", "Mask DINO, random position tokens", (21.5, 21.9),
        "--no-di --no-bato --decoder-layers 3 --position-tokens random"),
    Row("table3", "DI, random position tokens", (23.8, 23.7),
        "--no-bato --decoder-layers 3 --position-tokens random"),
    Row("table4", "neither", (45.6, 41.2), "--no-di --no-bato"),
    Row("table4", "DI", (46.4, 42.1), "--no-bato"),
    Row("table4", "BATO", (46.2, 41.8), "--no-di"),
    Row("table4", "DI and BATO", (46.9, 42.3)),
    Row("table5", "T_i", (46.2, 41.8), "--guidance t_i"),
    Row("table5", "T_s1", (46.6, 42.0), "--guidance t_s1"),
    Row("table5", "T_s2", (46.7, 42.2), "--guidance t_s2"),
    Row("table5", "Q_bal", (46.9, 42.3)),
    Row("table6", "without GTG", (46.5, 42.2), "--no-gtg"),
    Row("table6", "with GTG", (46.9, 42.3)),
    Row("table7", "single", (46.2, 41.8), "--selections 300"),
    Row("table7", "double", (46.9, 42.3)),
    Row("table7", "triple", (46.6, 42.2), "--selections 600,450,300"),
    Row("table8", "300, 300", (46.6, 42.3), "--selections 300,300"),
    Row("table8", "600, 600", (46.8, 42.4), "--selections 600,600"),
    Row("table8", "600, 300", (46.9, 42.3)),
    Row("table9", "3", (45.8, 41.3), "--decoder-layers 3"),
    Row("table9", "6", (46.9, 42.3)),
    Row("table9", "9", (46.9, 42.5), "--decoder-layers 9"),
]  # fmt: skip


def rows(tables, data):
    """The rows of the named tables, or of "all", that there are on a data set."""
    return [
        row
        for row in ROWS
        if (row.table in tables or "all" in tables)
        and (row.table not in ("table1", "table2") or PAPER_DATA[row.table] == data)
    ]


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
        weights = BACKBONE_WEIGHTS[preset.split("_", 1)[1]]
        batch = "8" if data == "bdd100k" else "16"
        train += ["--backbone-weights", weights, "--schedule", schedule, "--batch-size", batch]
    python = ["python"] if gpus == 1 else ["torchrun", "--nproc_per_node", str(gpus)]
    found = [[*python, *train, *flags, "--output", str(folder)]]
    if row.table == "fig1":
        checkpoint = ["--checkpoint", str(folder / "checkpoint.pt")]
        file = str(folder / "per_layer.json")
        found.append(["python", "eval.py", *checkpoint, *source, "--per-layer", "--output", file])
    return found


def result(row, data, output):
    """(box AP, mask AP) that this row's run has left, None where it has not finished."""
    path = run_folder(row, data, output) / ("per_layer.json" if row.table == "fig1" else "eval.json")
    if not path.exists():
        return None
    scores = json.loads(path.read_text())
    if row.table == "fig1":
        scores = scores["layers"][1]
    return scores["box"]["AP"], scores["mask"]["AP"]


def pair(numbers):
    """(box AP, mask AP) for printing."""
    return "-" if numbers is None else " / ".join("-" if x is None else f"{x:.1f}" for x in numbers)


def markdown(chosen, data, output):
    """Tables of the published numbers and those of the runs, box AP / mask AP."""
    lines = [f"# Reproduced on {data}", "", "Box AP / mask AP. `-`: not run yet.", ""]
    for table, title in TITLES.items():
        mine = [row for row in chosen if row.table == table]
        if mine:
            where = "" if data == PAPER_DATA[table] else f" (on {PAPER_DATA[table]})"
            lines += [f"## {title}", "", f"| row | published{where} | reproduced |", "| --- | --- | --- |"]
            lines += [f"| {row.name} | {pair(row.published)} | {pair(result(row, data, output))} |" for row in mine]
            lines.append("")
    return "\n".join(lines)


def show(chosen, data, data_root, output, gpus):
    """Print every row: its name, the published numbers, and the commands on this data set."""
    for table, title in TITLES.items():
        mine = [row for row in chosen if row.table == table]
        if mine:
            print(f"\n{title}; here on {data}")
        for row in mine:
            print(f"  {row.name}: published {pair(row.published)} (box AP / mask AP on {PAPER_DATA[table]})")
            for command in commands(row, data, data_root, output, gpus):
                print(f"    {shlex.join(command)}")


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
                if (folder / "checkpoint.pt").exists():
                    command = [*command, "--resume"]
            print(f"{TITLES[row.table]}, {row.name}: {shlex.join(command)}", flush=True)
            words = [sys.executable, *command[1:]] if command[0] == "python" else command
            if status := subprocess.run(words, cwd=ROOT).returncode:
                sys.exit(f"experiments: error: {row.table}, {row.name}: ended with status {status}; see above")
        table.write_text(markdown(chosen, data, output))
    print(f"{table}: written")


def main():
    parser = argparse.ArgumentParser(
        description="Prints the rows of the paper's tables as commands of train.py, the published box AP / mask AP "
        "beside them; with --run, runs them and compares.",
    )
    parser.add_argument(
        "tables", nargs="*", default=["all"], metavar="TABLE", help=f"{', '.join(TITLES)} or all (default: all)"
    )
    parser.add_argument(
        "--data",
        choices=["coco", "bdd100k", "shapes-hard"],
        help="what to train on (default: print the commands for coco and bdd100k); tables 1 and 2 exist on their own "
        "data set only, and shapes-hard takes the preset tiny",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder of the data set (default: datasets/NAME; of shapes-hard, that of train.py)",
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="train on N GPUs, with torchrun (default: 1)")
    parser.add_argument("--run", action="store_true", help="run what has not finished yet, one row after the other")
    parser.add_argument(
        "--output",
        default="runs/experiments",
        metavar="DIR",
        help="folder of the runs; a table of the results goes to DIR/DATA/results.md (default: runs/experiments)",
    )
    args = parser.parse_args()
    for table in args.tables:
        if table not in (*TITLES, "all"):
            parser.error(f"no table {table!r}: choose from {', '.join(TITLES)}, all")
    if args.run and not args.data:
        parser.error("--run needs --data: coco, bdd100k or shapes-hard")
    for data in [args.data] if args.data else ["coco", "bdd100k"]:
        chosen = rows(args.tables, data)
        if args.data and not chosen:
            parser.error(f"{', '.join(args.tables)}: not on {data}")
        data_root = args.data_root or (None if data == "shapes-hard" else f"datasets/{data}")
        (run if args.run else show)(chosen, data, data_root, args.output, args.gpus)


if __name__ == "__main__":
    main()
