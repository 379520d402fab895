"""DI-MaskDINO, Mask DINO and Mask R-CNN on real images, held-out ones to evaluate, in equal time on one core each, from
random weights: python -m experiments.real_images --data-root DIR.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import torch
from pycocotools import mask as mask_utils
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from cli import positive, run_program
from config import InputError
from data import CocoInstances
from experiments.real_images.scoring import LIMITS, open_run
from experiments.study import ROOT, commit, earlier_runs, machine, mean_sd, paired, run_all
from formats.coco import coco_paths, read_annotations

FOLDER = Path(__file__).resolve().parent
SYSTEMS = {"di-maskdino": "DI-MaskDINO (tiny)", "mask-dino": "Mask DINO (tiny)", "mask-rcnn": "Mask R-CNN (ResNet-18)"}
MODULES = {"di-maskdino": [], "mask-dino": ["--no-di", "--no-bato"]}
# Chosen on the training images (README.md): hundreds of small instances an image that look alike.
TINY_FLAGS = (
    "--preset tiny --selections 400,300 --denoising-queries 100 --loss-points 512 --box-init head --lr 0.001 "
    "--class-weight 4 --box-weight 20 --giou-weight 5 --mask-weight 2 --dice-weight 2"
)
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COLOURS = ["#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4"]
CALIBRATION = 60  # iterations, of which the last 20 are timed
EVALUATIONS = 3  # along a run


def training_command(args, system, folder, seed, epochs, *more):
    """The command line of a training, without the Python in front; it goes on with what is in the folder."""
    size = ["--train-size", args.size, "--train-scale", *args.scale, "--test-size", args.size, 2 * args.size]
    schedule = ["--epochs", epochs, "--eval-every", max(1, int(epochs / EVALUATIONS)), "--batch-size", args.batch_size]
    common = ["--data-root", args.data_root, *size, *schedule, "--seed", seed, "--output", folder, *more]
    if system == "mask-rcnn":
        return list(map(str, ["-m", "experiments.real_images.mask_rcnn", *common, *shlex.split(args.mask_rcnn_flags)]))
    ours = ["--data", "coco", *common, "--resume", "--per-layer", "--workers", 0, "--device", "cpu"]
    return list(map(str, ["train.py", *ours, *MODULES[system], *shlex.split(args.flags)]))


def read_log(folder):
    """The entries of a run's log: those of the training and those of the evaluations."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [e for e in entries if "loss" in e], [e for e in entries if "box" in e]


def measure_epochs(args, output, num_images, earlier):
    """{system: epochs that fill the time}, by the speed of a few iterations on a machine as busy as in the runs.

    Measured once and kept in epochs.json, so that all seeds, also later ones, train as long as the `earlier` runs.
    """
    path = output / "epochs.json"
    known = {run["system"]: run["epochs"] for run in earlier}
    known |= json.loads(path.read_text()) if path.exists() else {}
    if missing := [system for system in args.systems if system not in known]:
        folders = {system: output / "speed" / system for system in missing}
        stop = ["--max-iterations", CALIBRATION]
        # So many epochs that none ends within the measurement, and none is evaluated.
        epochs = CALIBRATION * args.batch_size // num_images + 1
        runs = [(f, "checkpoint.pt", training_command(args, s, f, 0, epochs, "--eval-every", epochs + 1, *stop))
                for s, f in folders.items()]  # fmt: skip
        run_all(runs, args.jobs)
        for system, folder in folders.items():
            speed = read_log(folder)[0][-1]["images_per_second"]
            passes = 60 * args.minutes * speed / num_images
            known[system] = round(passes, 2) if system == "mask-rcnn" and passes >= 1 else max(1, round(passes))
            print(f"{SYSTEMS[system]}: {speed:.2f} images per second, {known[system]} epochs in {args.minutes:g} min")
        path.write_text(json.dumps(known) + "\n")
    return known


def training_seconds(training, iteration, batch_size):
    """Seconds of training, without evaluations, up to an iteration, from the speed in the lines of the log."""
    seconds, last = 0.0, 0
    for entry in training:
        steps = min(entry["iteration"], iteration) - last
        seconds += max(0, steps) * batch_size / entry["images_per_second"]
        last = min(entry["iteration"], iteration)
    return seconds


def collect(args, output, epochs):
    """The scored runs, a list of dictionaries: system, seed, commit, epochs, seconds of training, curve, scores.

    curve: [{"seconds", "box", "mask"}, ...], AP of the evaluations along the run; scores: {"100": [per layer {"box":
    {metric: percent}, "mask": {...}}], "400": [...]}, see `scoring.score`.
    """
    runs = []
    for system in args.systems:
        for seed in range(args.seeds):
            folder = output / f"{system}-{seed}"
            if (folder / "scores.json").exists():
                training, evaluations = read_log(folder)
                time = lambda entry: round(training_seconds(training, entry["iteration"], args.batch_size))  # noqa: E731, B023
                curve = [{"seconds": time(e), "box": e["box"]["AP"], "mask": e["mask"]["AP"]} for e in evaluations]
                made = ", ".join((folder / "commit.txt").read_text().split())
                run = {"system": system, "seed": seed, "commit": made, "epochs": epochs[system]}
                scores = json.loads((folder / "scores.json").read_text())
                runs.append(run | {"seconds": time(training[-1]), "curve": curve, "scores": scores})
    return runs


def values(runs, system, limit, kind, metric="AP", layer=-1, seeds=None):
    """A metric of a system's runs in the order of their seeds, without those that have none; kind "gap": box - mask."""
    found = []
    for run in runs:
        if run["system"] == system and (seeds is None or run["seed"] in seeds):
            scores = run["scores"][str(limit)][layer]
            box, mask = (scores[k][metric] for k in ("box", "mask"))
            found.append({"box": box, "mask": mask, "gap": None if None in (box, mask) else box - mask}[kind])
    return [value for value in found if value is not None]


def markdown(runs):
    """Tables of mean ± standard deviation over the seeds, and paired differences with their 95 % intervals."""
    systems = [system for system in SYSTEMS if any(run["system"] == system for run in runs)]
    lines = ["| system | seeds | epochs | minutes of training |", "| --- | --- | --- | --- |"]
    for system in systems:
        mine = [run for run in runs if run["system"] == system]
        minutes = mean_sd([run["seconds"] / 60 for run in mine])
        lines.append(f"| {SYSTEMS[system]} | {len(mine)} | {mine[0]['epochs']} | {minutes} |")
    for limit in LIMITS:
        lines += ["", f"| at most {limit} detections | {' | '.join(METRICS)} |", "| --- " * (len(METRICS) + 1) + "|"]
        for kind in ("box", "mask"):
            for system in systems:
                some = [values(runs, system, limit, kind, metric) for metric in METRICS]
                cells = [mean_sd(v) if v else "-" for v in some]
                lines.append(f"| {kind}, {SYSTEMS[system]} | {' | '.join(cells)} |")
    layered = [system for system in systems if system in MODULES]
    if layered:
        last = len(next(run for run in runs if run["system"] in layered)["scores"][str(LIMITS[-1])]) - 1
        columns = [f"at most {LIMITS[-1]} detections", "input", *(f"layer {i}" for i in range(1, last + 1))]
        lines += ["", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        for kind, name in (("box", "box AP"), ("mask", "mask AP"), ("gap", "box AP - mask AP")):
            for system in layered:
                cells = [mean_sd(values(runs, system, LIMITS[-1], kind, layer=i)) for i in range(last + 1)]
                lines.append(f"| {name}, {SYSTEMS[system]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *differences(runs)])


def differences(runs):
    """Lines of a table: DI-MaskDINO minus the others, pairs of the same seed."""
    seeds = {system: {run["seed"] for run in runs if run["system"] == system} for system in SYSTEMS}
    columns = [(f"{kind} AP, at most {limit}", limit, kind, -1) for limit in LIMITS for kind in ("box", "mask")]
    columns += [(f"gap at {name}", LIMITS[-1], "gap", i) for i, name in enumerate(("input", "layer 1"))]
    lines = [f"| DI-MaskDINO minus | seeds | {' | '.join(name for name, *_ in columns)} |",
             "| --- " * (len(columns) + 2) + "|"]  # fmt: skip
    for other in ("mask-dino", "mask-rcnn"):
        if common := seeds["di-maskdino"] & seeds[other]:
            cells = [
                paired(*(values(runs, s, limit, kind, layer=layer, seeds=common) for s in ("di-maskdino", other)))
                if other in MODULES or kind != "gap"
                else ""
                for _, limit, kind, layer in columns
            ]
            lines.append(f"| {SYSTEMS[other]} | {len(common)} | {' | '.join(cells)} |")
    return lines


def plot(runs, path):
    """PNG of box and mask AP on the held-out images over the minutes of training, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("box", "mask"), strict=True):
        for number, (system, name) in enumerate(SYSTEMS.items()):
            for run in [run for run in runs if run["system"] == system]:
                points = [(0, 0)] + [(point["seconds"] / 60, point[kind]) for point in run["curve"]]
                axes.plot(*zip(*points, strict=True), marker=".", linewidth=1.2, color=f"C{number}", label=name)
                name = None  # one line of the legend for all seeds
        axes.set(title=f"{kind} AP, at most 100 detections", xlabel="minutes of training on one core")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("AP, percent")
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=130)


def decode(mask):
    """A mask (H, W) bool of one that may be RLE."""
    return torch.from_numpy(mask_utils.decode(mask)).bool() if isinstance(mask, dict) else mask


def draw(image, instances):
    """Masks and thin boxes over an image (3, H, W) uint8, each instance in another colour, without names."""
    if not len(instances["masks"]):
        return image
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(instances["masks"]))]
    image = draw_segmentation_masks(image, instances["masks"], alpha=0.4, colors=colours)
    limits = torch.tensor([image.shape[2], image.shape[1]] * 2) - 1
    return draw_bounding_boxes(image, instances["boxes"].clamp(min=0).minimum(limits), colors=colours)


def pictures(args, output, count=4, threshold=0.5):
    """A matplotlib Figure: held-out images in rows; the ground truth and what the systems' first runs detect."""
    from matplotlib.figure import Figure

    detectors = {
        SYSTEMS[s]: open_run(output / f"{s}-0") for s in args.systems if (output / f"{s}-0/scores.json").exists()
    }
    dataset = CocoInstances(*coco_paths(args.data_root, "val"), False, (args.size, 2 * args.size))
    chosen = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    figure = Figure(figsize=(4 * (1 + len(detectors)), 4 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), 1 + len(detectors), squeeze=False)
    for index, panels in zip(chosen, grid, strict=True):
        image, truth = dataset.ground_truth(index)
        columns = {f"ground truth: {len(truth['masks'])}": truth}
        for name, (detector, _) in detectors.items():
            [found] = detector([image / 255], [image.shape[1:]])[-1]
            best = range(int((found["scores"] >= threshold).sum()))  # they are in the order of their scores
            masks = [decode(found["masks"][i]) for i in best]
            masks = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.bool)
            columns[f"{name}: {len(best)}"] = {"boxes": found["boxes"][: len(best)], "masks": masks}
        for axes, (title, instances) in zip(panels, columns.items(), strict=True):
            axes.imshow(draw(image, instances).permute(1, 2, 0).numpy())
            axes.set_title(title, fontsize=11)
            axes.set_axis_off()
    return figure


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
    add("--minutes", type=float, default=30, help="of training for each run, evaluations apart (default: 30)")
    add("--seeds", type=positive, default=3, help="runs of each system (default: 3)")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="which to run (default: all)")
    add("--size", type=positive, default=256, help="side of training crops, shorter side at evaluation (default: 256)")
    add(
        "--scale",
        type=float,
        nargs=2,
        default=[0.8, 1.25],
        metavar=("MIN", "MAX"),
        help="scale jitter (default: 0.8 1.25)",
    )
    add("--batch-size", type=positive, default=2, help="images per step (default: 2)")
    add("--flags", default=TINY_FLAGS, help="further flags of train.py, for our two systems (default: %(default)s)")
    add("--mask-rcnn-flags", default="", help="further flags of experiments.real_images.mask_rcnn")
    add("--choose", action="store_true", help="hold out a fifth of the training images instead of the val images, to "
        "choose the settings above without looking at those")  # fmt: skip
    add("--jobs", type=positive, default=os.cpu_count(), help="runs at a time, a core each (default: number of cores)")
    add("--output", default="runs/real_images", metavar="DIR", help="folder of the runs (default: runs/real_images)")
    add("--results", default=FOLDER, metavar="DIR", help="folder of results.json and the pictures (default: this one)")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    output, results = ROOT / args.output, Path(args.results)
    args.data_root = Path(args.data_root).resolve()
    output.mkdir(parents=True, exist_ok=True)
    settings = {"data": args.data_root.name}
    settings |= {name: getattr(args, name) for name in ("minutes", "size", "scale", "batch_size", "flags",
                                                        "mask_rcnn_flags", "choose")}  # fmt: skip
    path = output / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(f"{path}: its runs have other settings; choose another --output, or give the same flags")
    path.write_text(json.dumps(settings) + "\n")
    if args.choose:
        args.data_root = split_training_images(args, output)
    train_set = CocoInstances(*coco_paths(args.data_root, "train"), training=True)
    runs = earlier_runs(results / "results.json", settings=settings)
    known = {(run["system"], run["seed"]) for run in runs}
    epochs = measure_epochs(args, output, len(train_set), runs)
    work = [
        (system, seed, output / f"{system}-{seed}")
        for seed in range(args.seeds) for system in args.systems if (system, seed) not in known
    ]  # fmt: skip
    run_all([(f, "eval.json", training_command(args, system, f, seed, epochs[system])) for system, seed, f in work],
            args.jobs)  # fmt: skip
    scoring = ["-m", "experiments.real_images.scoring", "--data-root", args.data_root]
    run_all([(f, "scores.json", [*scoring, f]) for _, _, f in work], args.jobs)

    runs += [run for run in collect(args, output, epochs) if (run["system"], run["seed"]) not in known]
    runs.sort(key=lambda run: (run["seed"], list(SYSTEMS).index(run["system"])))
    content = {"settings": settings, "commit": commit(), "machine": machine(), "runs": runs}
    (results / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(runs))
    try:
        plot(runs, results / "plot.png")
        pictures(args, output).savefig(results / "pictures.png", dpi=100)
    except ImportError:
        print("plot.png, pictures.png: not drawn, as matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    sys.argv[0] = "experiments.real_images"
    run_program(main)
