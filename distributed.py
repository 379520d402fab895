"""The processes of a program: how they find each other, exchange values, end together, and which of them speaks."""

import math
import os
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from config import InputError
from files import explaining

PATIENCE = 30.0  # seconds that a process waits for the others without a word


def join_processes(device):
    """This process's device of those of `choose_device`, its rank, its rank on its node, and the number of processes.

    torchrun says which in RANK, LOCAL_RANK and WORLD_SIZE; without it there is one process. Raises InputError.
    """
    rank, world, local_rank = (environment(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world is None and (tasks := environment("SLURM_NTASKS") or 1) > 1:
        warn(f"SLURM_NTASKS is {tasks} and WORLD_SIZE not set: each process works alone; torchrun makes them one")
    if world in (None, 1):
        return device, 0, 0, 1
    if rank not in range(world):
        raise InputError(f"RANK is {rank} of WORLD_SIZE {world} processes; start them with torchrun")
    if device.type == "cuda":
        there = torch.cuda.device_count()
        local_rank = 0 if local_rank is None and there == 1 else local_rank
        if local_rank not in range(there):
            here = f"LOCAL_RANK is {local_rank}, this node has {there} GPU(s)"
            raise InputError(f"{here}; start with torchrun, and lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # gloo also on GPUs: the few numbers that the processes exchange in every step are on the host. The timeout is for
    # those that wait for an evaluation: at COCO's size pycocotools alone needs minutes for every layer.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    failure = f"the {world} processes do not find each other"
    waiting = f"process {rank} of {world} waits for the others at {os.environ.get('MASTER_ADDR')}"
    timer = threading.Timer(PATIENCE, print, [waiting], {"file": sys.stderr, "flush": True})
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # in C++ none of Python's would be heard
    timer.start()
    try:
        with explaining((ValueError, RuntimeError), failure, "start them with torchrun"):
            dist.init_process_group(backend, timeout=timedelta(days=1))
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, handler)
    if rank > 0:
        warnings.simplefilter("ignore")  # the first process gives them
    return device, rank, local_rank or 0, world


def environment(name):
    """The number in an environment variable, None where it is not set. Raises InputError."""
    try:
        return int(os.environ[name]) if name in os.environ else None
    except ValueError:
        raise InputError(f"{name} is {os.environ[name]!r} and not a number; start with torchrun") from None


def process_count():
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank():
    """The rank of this process, 0 where there is but one."""
    return dist.get_rank() if process_count() > 1 else 0


def gather(value):
    """The picklable value of every process, ordered by rank, the same list in each; [value] where there is but one.

    Says so where it waits for long. Raises InputError where a process is gone.
    """
    everywhere, begin, patience = [value] * process_count(), time.monotonic(), PATIENCE
    if len(everywhere) == 1:
        return everywhere
    rank = process_rank()
    with explaining(RuntimeError, f"another process than {rank} has ended or is out of reach"):
        arrival = dist.barrier(async_op=True)  # waiting in `all_gather_object` a process would heed no signal
        while not arrival.is_completed():
            time.sleep(0.0005)
            if time.monotonic() - begin > patience:
                print(f"process {rank} has waited {patience:.0f} s for the others", file=sys.stderr, flush=True)
                patience = math.inf
        arrival.wait()
        dist.all_gather_object(everywhere, value)
    return everywhere


def together(function):
    """What `function()` returns; where it raises an error in any process, all of them end, see `end_if`."""
    try:
        result, error = function(), None
    except Exception as found:
        result, error = None, found
    end_if(error)
    return result


def end_if(error):
    """End all processes if there is an error in any, None being none; the first of those with one raises it."""
    failed = [rank for rank, bad in enumerate(gather(error is not None)) if bad]
    if failed and process_rank() == failed[0]:
        raise error
    if failed:
        sys.exit(1)


def require_same(**settings):
    """Raise InputError unless all processes have the same settings; prints a line on each that differs."""
    everywhere = gather(settings)
    differing = [name for name in settings if any(found[name] != everywhere[0][name] for found in everywhere)]
    for name in differing:
        values = [str(found[name]) for found in everywhere]
        first = {value: values.index(value) for value in values}
        warn(f"{name}: " + ", ".join(f"{value} in process {rank}" for value, rank in first.items()))
    advice = "start all with the same flags and, to resume, with the same checkpoint.pt in --output on every node"
    end_if(InputError(f"the processes differ in {', '.join(differing)}; {advice}") if differing else None)


def say(line):
    """Print a line, in the process of rank 0 alone."""
    if process_rank() == 0:
        print(line, flush=True)


def warn(line):
    """Print a warning on stderr, in the process of rank 0 alone."""
    if process_rank() == 0:
        print(f"{Path(sys.argv[0]).name}: warning: {line}", file=sys.stderr, flush=True)
