"""What the studies share: runs side by side that can be continued, and the statistics of several seeds."""

import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy import stats

from config import InputError
from files import write_whole

ROOT = Path(__file__).resolve().parents[1]


def run_all(runs, jobs, launcher=()):
    """Run what has not finished, `jobs` runs at a time with one thread each: so many are faster than one on all cores.

    runs: [(folder, file in it that a finished run has, command), ...]; a command is a list of words without the Python
    in front, and goes on where it was stopped. Its output goes to folder/output.txt, the commit to folder/commit.txt.
    launcher: words before each command. Raises InputError after the other runs if one has failed.
    """

    def run_one(folder, file, command):
        if (folder / file).exists():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "commit.txt", "a+") as commits:  # a line for each that had a part in the run
            commits.seek(0)
            if commit() not in commits.read().split():
                commits.write(commit() + "\n")
        words = [*launcher, sys.executable, *map(str, command)]
        print(shlex.join(words), flush=True)
        with open(folder / "output.txt", "a") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            status = subprocess.run(words, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode
        if status or not (folder / file).exists():
            return f"{folder}: stopped before its end (status {status}), see output.txt there; run this again to go on"

    pool = ThreadPoolExecutor(jobs)
    try:
        problems = [problem for problem in pool.map(run_one, *zip(*runs, strict=True)) if problem]
    finally:
        pool.shutdown(cancel_futures=True)  # on an interrupt nothing new begins
    if problems:
        raise InputError(problems[0])


def earlier_runs(path, **recipe):
    """The runs of a results.json of the same recipe, [] if there are none.

    They count as finished, also on a machine that lacks their folders, if they name the commit that trained them.
    recipe: entries of the file that must be equal.
    """
    content = json.loads(path.read_text()) if path.exists() else {}
    same = all(content.get(name) == value for name, value in recipe.items())
    return [run for run in content["runs"] if "commit" in run] if same and content else []


def write_results(path, runs, order, **recipe):
    """Write runs to a results.json, in an order, a function of a run; returns them with those that another command has
    written there meanwhile, which stay.
    """
    runs = {order(run): run for run in [*runs, *earlier_runs(path, **recipe)]}
    runs = [runs[key] for key in sorted(runs)]
    write_whole(path, json.dumps(recipe | {"commit": commit(), "machine": machine(), "runs": runs}, indent=1) + "\n")
    return runs


def commit():
    """Short hash of the commit in use, "+" behind it where files have been changed since; "unknown" without git."""
    try:
        git = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine():
    """The processor and torch's version in one line."""
    try:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or 'unknown CPU'}, torch {torch.__version__}"


def mean_sd(values):
    """Mean ± standard deviation (n - 1) of some numbers, for printing."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def paired(ours, theirs):
    """Mean of the differences of pairs and Student's 95 % interval of it, for printing: "+3.6 [+2.1, +5.1]"."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}"
    middle, half = mean(differences), stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"
