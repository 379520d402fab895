"""DI-MaskDINO, Mask DINO and Mask R-CNN from the same pretrained backbone on photographs, held-out ones to evaluate, in
equal time on one core each: python -m experiments.real_images --data-root DIR. And, when named, each module alone.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from PIL import Image

import train
from cli import config_from, positive, run_program
from config import InputError
from data import CocoInstances
from drawing import draw_rows
from experiments.plot import read_log
from experiments.real_images import mask_rcnn
from experiments.real_images.scoring import open_run
from experiments.study import ROOT, earlier_runs, mean_sd, paired, run_all, write_results
from formats.coco import coco_paths, read_annotations

FOLDER = Path(__file__).resolve().parent
SYSTEMS = {"di-maskdino": "DI-MaskDINO", "mask-dino": "Mask DINO", "mask-rcnn": "Mask R-CNN", "di": "DI alone",
           "bato": "BATO alone"}  # fmt: skip
MODULES = {"di-maskdino": [], "mask-dino": ["--no-di", "--no-bato"], "di": ["--no-bato"], "bato": ["--no-di"]}
PAIRS = [("di-maskdino", "mask-rcnn"), ("di-maskdino", "mask-dino"), ("di", "mask-dino"), ("bato", "mask-dino")]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CALIBRATION = 40  # iterations that are timed
EVALUATIONS = 6  # along a run


def training_command(args, system, folder, seed, epochs, *more):
    """The command line of a training, without the Python in front; it goes on with what is in the folder."""
    schedule = ["--epochs", epochs, "--eval-every", max(1, int(epochs / EVALUATIONS)), "--seed", seed]
    common = ["--data-root", args.data_root, "--backbone-weights", args.backbone_weights, *schedule, "--output", folder]
    if system == "mask-rcnn":
        config = our_settings(args)[0]  # the same backbone, crops and images of the evaluation
        images = ["--train-size", config.train_size, "--train-scale", *config.train_scale]
        images += ["--test-size", *config.test_size, "--backbone", config.backbone]
        return [*"-m experiments.real_images.mask_rcnn".split(), *map(str, [*common, *images, *more]),
                *shlex.split(args.mask_rcnn_flags)]  # fmt: skip
    ours = ["--data", "coco", *common, "--resume", "--per-layer", "--workers", 0, "--device", "cpu", *more]
    return ["train.py", "--preset", "small", *map(str, ours), *MODULES[system], *shlex.split(args.flags)]


def our_settings(args):
    """The Config and the images per step of DI-MaskDINO and Mask DINO."""
    flags = train.parse_arguments(["--preset", "small", *shlex.split(args.flags)])
    return config_from(flags), train.make_schedule(flags, num_images=1).step_size


def images_per_step(args, system):
    """Images per step of a system."""
    if system != "mask-rcnn":
        return our_settings(args)[1]
    return mask_rcnn.parse_arguments(training_command(args, system, "-", 0, 1)[2:]).batch_size


def cpu_seconds():
    """Seconds that this process and those it has waited for have computed: what else runs hardly changes them."""
    return sum(os.times()[:4])


def measure_epochs(args, output, num_images, earlier):
    """{system: {"epochs": that fill the minutes of computing, "speed": images per second of computing}}.

    Measured once, one system at a time, as the difference of a run of one iteration and a longer one, and kept in
    epochs.json, so that all seeds, also later ones, train as long as the `earlier` runs.
    """
    path = output / "epochs.json"
    known = {run["system"]: {"epochs": run["epochs"], "speed": run["speed"]} for run in earlier}
    known |= json.loads(path.read_text()) if path.exists() else {}
    for system in args.systems:
        if system in known:
            continue
        images, seconds = CALIBRATION * images_per_step(args, system), 0
        epochs = images // num_images + 2  # so that no epoch of both ends in the measurement and is evaluated
        for sign, stop in ((-1, 1), (1, 1 + CALIBRATION)):
            folder, before = output / "speed" / f"{system}-{stop}", cpu_seconds()
            shutil.rmtree(folder, ignore_errors=True)  # of a measurement that was stopped
            more = ["--eval-every", epochs + 1, "--max-iterations", stop]
            run_all([(folder, "checkpoint.pt", training_command(args, system, folder, 0, epochs, *more))], 1)
            seconds += sign * (cpu_seconds() - before)
        speed = images / seconds
        known[system] = {"epochs": max(1, round(60 * args.minutes * speed / num_images)), "speed": speed}
        print(f"{SYSTEMS[system]}: {speed:.2f} images per second, {known[system]['epochs']} epochs")
        path.write_text(json.dumps(known) + "\n")
    return known


def collect(args, output, epochs):
    """The scored runs, a list of dictionaries: system, seed, commit, epochs, speed, hours, curve, scores.

    hours: by the clock, evaluations included; curve: [{"minutes" of computing, "box", "mask"}, ...], AP of the
    evaluations along the run; scores: of each layer {"box": {metric: percent}, "mask": {...}, "classes": [...]}, see
    `scoring.score`.
    """
    runs = []
    for system in args.systems:
        batch_size, speed = images_per_step(args, system), epochs[system]["speed"]
        for seed in range(args.seeds):
            folder = output / f"{system}-{seed}"
            if (folder / "scores.json").exists():
                training, evaluations = read_log(folder)
                curve = [{"minutes": round(e["iteration"] * batch_size / speed / 60, 1), "box": e["box"]["AP"],
                          "mask": e["mask"]["AP"]} for e in evaluations]  # fmt: skip
                made = ", ".join((folder / "commit.txt").read_text().split())
                run = {"system": system, "seed": seed, "commit": made, **epochs[system]}
                scores = json.loads((folder / "scores.json").read_text())
                runs.append(run | {"hours": training[-1]["seconds"] / 3600, "curve": curve, "scores": scores})
    return runs


def values(runs, system, kind, metric="AP", layer=-1, seeds=None):
    """A metric of a system's runs in the order of their seeds, without those that have none; kind "gap": box - mask."""
    found = []
    for run in runs:
        if run["system"] == system and (seeds is None or run["seed"] in seeds):
            box, mask = (run["scores"][layer][k][metric] for k in ("box", "mask"))
            found.append({"box": box, "mask": mask, "gap": None if None in (box, mask) else box - mask}[kind])
    return [value for value in found if value is not None]


def table(head, rows):
    """Lines of a table in Markdown, an empty one before it."""
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])]


def markdown(runs):
    """Tables of mean ± standard deviation over the seeds, and paired differences with their 95 % intervals."""
    mine = {s: some for s in SYSTEMS if (some := [run for run in runs if run["system"] == s])}
    times = [[SYSTEMS[s], len(some), some[0]["epochs"], f"{some[0]['speed']:.2f}", mean_sd([r["hours"] for r in some])]
             for s, some in mine.items()]  # fmt: skip
    lines = table(["system", "seeds", "epochs", "images per second of computing", "hours by the clock"], times)
    cell = lambda some: mean_sd(some) if some else "-"
    rows = [[f"{kind}, {SYSTEMS[s]}", *(cell(values(runs, s, kind, metric)) for metric in METRICS)]
            for kind in ("box", "mask") for s in mine]  # fmt: skip
    lines += table(["", *METRICS], rows)
    names = [entry["name"] for entry in runs[0]["scores"][-1]["classes"]]
    rows = []
    for kind in ("box", "mask"):
        for s, some in mine.items():
            per_class = zip(*([entry[kind] for entry in run["scores"][-1]["classes"]] for run in some), strict=True)
            rows.append([f"{kind}, {SYSTEMS[s]}", *(cell([v for v in of if v is not None]) for of in per_class)])
    lines += table(["AP", *names], rows)
    layered = [s for s in mine if s in MODULES]
    if layered:
        last = len(mine[layered[0]][0]["scores"])
        kinds = {"box": "box AP", "mask": "mask AP", "gap": "box AP - mask AP"}
        rows = [[f"{name}, {SYSTEMS[s]}", *(cell(values(runs, s, kind, layer=i)) for i in range(last))]
                for kind, name in kinds.items() for s in layered]  # fmt: skip
        lines += table(["", "input", *(f"layer {i}" for i in range(1, last))], rows)
    return "\n".join([*lines[1:], *differences(runs)])


def differences(runs):
    """Lines of a table: differences of PAIRS of systems, runs of the same seed."""
    seeds = {system: {run["seed"] for run in runs if run["system"] == system} for system in SYSTEMS}
    columns = {"box AP": ("box", -1), "mask AP": ("mask", -1), "gap at input": ("gap", 0), "gap at layer 1": ("gap", 1)}
    rows = []
    for ours, other in PAIRS:
        if common := seeds[ours] & seeds[other]:
            cells = [
                paired(*(values(runs, s, kind, layer=layer, seeds=common) for s in (ours, other)))
                if other in MODULES or kind != "gap"
                else ""
                for kind, layer in columns.values()
            ]
            rows.append([f"{SYSTEMS[ours]} minus {SYSTEMS[other]}", len(common), *cells])
    return table(["difference", "seeds", *columns], rows)


def plot(runs, path):
    """PNG of box and mask AP on the held-out images over the minutes of training, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("box", "mask"), strict=True):
        for number, (system, name) in enumerate(SYSTEMS.items()):
            for run in [run for run in runs if run["system"] == system]:
                points = [(0, 0)] + [(point["minutes"], point[kind]) for point in run["curve"]]
                axes.plot(*zip(*points, strict=True), marker=".", linewidth=1.2, color=f"C{number}", label=name)
                name = None  # one line of the legend for all seeds
        axes.set(title=f"{kind} AP", xlabel="minutes of computing on one core")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("AP, percent")
    panels[0].legend(loc="lower right")
    figure.savefig(path, dpi=130)


def pictures(args, folders, path):
    """JPEG of five held-out images side by side: in the first row the ground truth, below what the systems' runs detect
    with a score of 0.3 or more.

    folders: {system: folder of its run}. The images are spread over those whose names --pictures fits; prints them.
    """
    detectors = [open_run(folder)[0] for folder in folders.values()]
    seen = CocoInstances(*coco_paths(args.data_root, "val"), False, our_settings(args)[0].test_size)
    dataset = CocoInstances(*coco_paths(args.data_root, "val"), False, (512, 1024))  # as drawn
    names = [dataset.coco.imgs[image_id]["file_name"] for image_id in dataset.image_ids]
    fitting = [i for i, name in enumerate(names) if re.fullmatch(args.pictures, name)]
    chosen = fitting[:: max(1, len(fitting) // 5)][:5]
    if not chosen:
        print(f"{path.name}: not drawn, as no held-out image has a name like {args.pictures}", file=sys.stderr)
        return
    columns = []
    for index in chosen:
        image, truth = dataset.ground_truth(index)
        found = [detector([seen[index][0]], [image.shape[1:]])[-1][0] for detector in detectors]
        shown = [{key: value[one["scores"] >= 0.3] for key, value in one.items()} for one in found]
        columns.append([(image, instances, dataset.classes) for instances in (truth, *shown)])
    Image.fromarray(draw_rows(columns).permute(1, 2, 0).numpy()).reduce(2).save(path, quality=85)
    rows = ", ".join(["ground truth", *(SYSTEMS[system] for system in folders)])
    print(f"{path.name}: rows: {rows}; columns: {', '.join(names[i] for i in chosen)}")


def split_training_images(args, output):
    """Write a data set to output/data whose held-out images are every fifth of the training images, and return it."""
    annotation_file, folder = coco_paths(args.data_root, "train")
    content = read_annotations(annotation_file, folder)
    root = output / "data"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, rest in (("train", (0, 1, 2, 3)), ("val", (4,))):
        link = root / f"{split}2017"
        if not link.exists():
            link.symlink_to(folder.resolve())
        images = [image for i, image in enumerate(content["images"]) if i % 5 in rest]
        ids = {image["id"] for image in images}
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        some = {"images": images, "annotations": annotations, "categories": content["categories"]}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(some, default=as_json))
    return root


def as_json(value):
    """For json.dumps: polygons are arrays, counts of RLE bytes."""
    return value.decode() if isinstance(value, bytes) else list(value)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data-root", required=True, metavar="DIR", help="folder of a data set in COCO's layout, with val images")
    add("--minutes", type=float, default=60, help="of computing in the training of each run (default: 60)")
    add("--seeds", type=positive, default=3, help="runs of each system (default: 3)")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS)[:3], help="to run (default: the first three)")
    add("--backbone-weights", default="MobileNet_V2_Weights.IMAGENET1K_V1", metavar="NAME-OR-FILE",
        help="pretrained backbone of all, as for train.py (default: %(default)s)")  # fmt: skip
    add("--flags", default="", help="further flags of train.py --preset small, for all but Mask R-CNN")
    add("--mask-rcnn-flags", default="", help="further flags of experiments.real_images.mask_rcnn")
    add("--choose", action="store_true", help="hold out a fifth of the training images instead of the val images, to "
        "choose the settings above without looking at those")  # fmt: skip
    add("--jobs", type=positive, default=os.cpu_count(), help="runs at a time, a core each (default: number of cores)")
    add("--output", metavar="DIR", help="folder of the runs, in which they go on when the command is given again "
        "(default: runs/real_images/ and the data's name and the minutes)")  # fmt: skip
    add("--results", default=FOLDER, metavar="DIR", help="folder of the tables and pictures (default: this one)")
    add("--pictures", default=".*", metavar="REGEX", help="draw held-out images of such names (default: any)")
    return parser.parse_args(argv)


def open_output(args):
    """The folder of the runs, the file of the results, and the settings, which must be those of both."""
    args.data_root = Path(args.data_root).resolve()
    if Path(args.backbone_weights).exists():
        args.backbone_weights = Path(args.backbone_weights).resolve()  # the runs are in another folder
    name = f"{args.data_root.name}_{args.minutes:g}min" + "_choose" * args.choose
    output = ROOT / (args.output or f"runs/real_images/{name}")
    output.mkdir(parents=True, exist_ok=True)
    settings = {"data": args.data_root.name, "backbone_weights": Path(args.backbone_weights).name}
    settings |= {key: getattr(args, key) for key in ("minutes", "flags", "mask_rcnn_flags", "choose")}
    file = Path(args.results) / f"{name}.json"
    for path, option in ((output / "settings.json", "--output"), (file, "--results")):
        if path.exists() and json.loads(path.read_text()).get("settings") != settings:
            raise InputError(f"{path}: its runs have other settings; choose another {option}, or give the same flags")
    (output / "settings.json").write_text(json.dumps({"settings": settings}) + "\n")
    return output, file, settings


def main():
    args = parse_arguments()
    output, file, settings = open_output(args)
    if args.choose:
        args.data_root = split_training_images(args, output)
    train_set = CocoInstances(*coco_paths(args.data_root, "train"), training=True)
    runs = earlier_runs(file)
    print(f"kept: {len(runs)} runs of {file.name}")
    known = {(run["system"], run["seed"]) for run in runs}
    epochs = measure_epochs(args, output, len(train_set), runs)
    work = [
        (system, seed, output / f"{system}-{seed}")
        for seed in range(args.seeds) for system in args.systems if (system, seed) not in known
    ]  # fmt: skip
    commands = [training_command(args, system, f, seed, epochs[system]["epochs"]) for system, seed, f in work]
    run_all([(f, "eval.json", command) for (_, _, f), command in zip(work, commands, strict=True)], args.jobs)
    scoring = ["-m", "experiments.real_images.scoring", "--data-root", args.data_root]
    run_all([(f, "scores.json", [*scoring, f]) for _, _, f in work], args.jobs)

    order = lambda run: (run["seed"], list(SYSTEMS).index(run["system"]))
    runs = write_results(file, collect(args, output, epochs), order, settings=settings)
    print(markdown(runs))
    folders = {s: output / f"{s}-0" for s in SYSTEMS if (output / f"{s}-0" / "checkpoint.pt").exists()}
    if folders:
        pictures(args, folders, file.with_suffix(".jpg"))
    try:
        plot(runs, file.with_suffix(".png"))
    except ImportError:
        print(f"{file.stem}.png: not drawn, as matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    sys.argv[0] = "experiments.real_images"
    run_program(main)
