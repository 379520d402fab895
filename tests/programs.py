"""Runs the programs as processes of their own, on a model of a few layers, and compares what they leave.

The processes are forked from one that has imported the programs: a new Python needs seconds for it.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from toys import NARROW

TRAINING = "--batch-size 4 --workers 0 --device cpu --epochs 4 --encoder-layers 1 --decoder-layers 2".split()
SMALL = [*TRAINING, "--backbone", NARROW]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["programs", "train", "eval", "predict"])


def run_child(function, arguments, environment, output):
    """In the new process: stdout and stderr go to files, then the function runs as a program would."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if hasattr(signal, "SIGHUP"):  # nohup, under which the tests may run, would have it ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.update(environment)
    try:
        function(*arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1 if end.code else 0
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():  # as at the end of a program; os._exit leaves them
        process.kill()
    os._exit(status)


def run_main(program, flags):
    sys.argv = [f"{program}.py", *flags]
    importlib.import_module("cli").run_program(importlib.import_module(program).main)


class Process:
    """A running program or function; `output`: a path that the names of its stdout and stderr begin with."""

    def __init__(self, function, *arguments, output, **environment):
        self.output = output
        environment = {name: str(value) for name, value in environment.items()}
        self.process = FORKS.Process(target=run_child, args=(function, arguments, environment, str(output)))
        self.process.start()

    def wait(self, timeout=120):
        """The exit status; negative where a signal ended it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.err}")
        return self.process.exitcode

    def signal(self, number):
        os.kill(self.process.pid, number)

    def until(self, condition, timeout=120):
        """Wait until `condition()` is true; it must become so before the process ends."""
        end = time.monotonic() + timeout
        while not condition():
            time.sleep(0.02)
            assert self.process.is_alive() or condition(), self.err
            if time.monotonic() > end:
                self.process.kill()
                raise TimeoutError(f"not so after {timeout} s: {self.err}")

    out = property(lambda self: Path(f"{self.output}.out").read_text())
    err = property(lambda self: Path(f"{self.output}.err").read_text())


def program(name, *flags, output, **environment):
    """A program as the user runs it, e.g. program("train", "--epochs", 1, output=tmp_path / "run")."""
    return Process(run_main, name, [str(flag) for flag in flags], output=output, **environment)


def group(start, output, world=2, **environment):
    """`world` processes that know each other as torchrun's do: start(rank, output=..., **environment) makes one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world}
    return [start(rank, output=f"{output}.{rank}", **environment, RANK=rank, LOCAL_RANK=rank) for rank in range(world)]


def checkpoint(folder, name="checkpoint.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def log(folder):
    """The entries of a log without what tells the time."""
    times = "seconds", "images_per_second", "waiting"
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in times} for entry in entries]


def assert_same_run(folder, other):
    """Weights, state of the optimizer and log are equal, bit for bit."""
    ours, theirs = checkpoint(folder), checkpoint(other)
    assert ours["iteration"] == theirs["iteration"]
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    for key, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(ours["optimizer"]["state"][key][name], value)
    assert log(folder) == log(other)


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
