"""Runs a measurement in this checkout and in another one in turn, each in a process of its own, and compares them."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
# The measuring program is this checkout's; the modules that it measures are those in the working directory.
START = """import importlib, sys; root, name = sys.argv[1:3]; del sys.argv[1:3]
sys.path.insert(0, root); import benchmarks; del sys.path[0]; importlib.import_module(name).main()"""


def add_arguments(parser, presets):
    """The flags that the programs share."""
    add, default = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--preset", choices=presets, default="dimaskdino_r50", help="default: %(default)s")
    add("--batch-size", type=int, default=1, help="default: %(default)s")
    add("--precision", choices=["float32", "tf32", "bfloat16", "float16"], default="float32", help="default: float32")
    add("--compile", action="store_true", help="this checkout with torch.compile; the other one without")
    add("--device", default=default, choices=["cpu", "cuda"], help="default here: %(default)s")
    add("--runs", type=int, default=5, help="timed runs, after untimed ones; default: %(default)s")
    add("--beside", metavar="DIR", help="another checkout, in turn with this one; with ratios, this one to that")
    add("--folder", help=argparse.SUPPRESS)  # of what the processes exchange; given to those that measure


def set_precision(args):
    """Sets how float32 is computed, and returns the dtype of autocast or None."""
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    return getattr(torch, args.precision) if args.precision.endswith("16") else None


def timed(function, device):
    """{"seconds", "processor seconds"} of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - wall, "processor seconds": time.process_time() - cpu}


def peak_memory(device):
    """The most gigabytes held so far: of GPU memory in tensors, or of main memory by the whole process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def same_weights(model, folder):
    """Gives a model the weights of the first process that asks. A module may have moved below another since."""
    path = Path(folder) / "weights.pt"
    if not path.exists():
        torch.save(model.state_dict(), path)
    weights = torch.load(path, weights_only=True)
    ends = lambda name: next(found for found in weights if f".{name}".endswith(f".{found}"))
    model.load_state_dict({name: weights[ends(name)] for name in model.state_dict()})


def serve(untimed, measure):
    """In a process that measures: for the first line of stdin a line with the figures that `untimed` returns, for every
    further one with those of `measure`.
    """
    for number, _ in enumerate(sys.stdin):
        print("RESULT", json.dumps(measure() if number else untimed()), flush=True)


def ask(process):
    """The next measurement of a process."""
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
        print(line, end="")
    sys.exit("benchmarks: the process that measures has ended, see above")


def compare(name, args, report):
    """Measures with the program `benchmarks.NAME` and prints the medians; then calls report(folder), the processes'."""
    checkouts = [Path(args.beside).resolve(), ROOT] if args.beside else [ROOT]
    for checkout in checkouts:
        if not (checkout / "model.py").exists():
            sys.exit(f"benchmarks.{name}: {checkout}: has no model.py; give the root of a checkout")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"benchmarks.{name}: torch sees no GPU; run it with --device cpu")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{machine}; torch {torch.__version__}; {args.preset}, {args.precision}, {args.batch_size} x {args.size}",
        flush=True,
    )
    processes, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        for checkout in checkouts:
            flags = [flag for flag in sys.argv[1:] if flag != "--compile" or checkout == ROOT]
            command = [sys.executable, "-c", START, ROOT, f"benchmarks.{name}", *flags, "--folder", folder]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, cwd=checkout, **pipes))
            results.append([ask(processes[-1])])
        for _ in range(args.runs):
            for process, found in zip(processes, results, strict=True):
                found.append(ask(process))
        for process in processes:
            process.communicate()
        print_table(checkouts, results, args)
        report(folder)


def print_table(checkouts, results, args):
    """A row for every figure: its median in each checkout, and their ratio. First those that were taken once."""
    titles = [str(checkout) for checkout in checkouts[:-1]] + ["compiled" if args.compile else "eager"]
    print(f"\n| | {' | '.join(titles)} | ratio |\n|---|{'---|' * len(titles)}---|")
    for key in {**results[-1][0], **results[-1][-1]}:
        found = [[run[key] for run in runs if key in run] for runs in results]
        values = [median(values) if values else None for values in found]
        ratio = f"{values[1] / values[0]:.3f}" if len(values) > 1 and all(values) else ""
        print(f"| {key} | {' | '.join('' if value is None else f'{value:.4g}' for value in values)} | {ratio} |")
