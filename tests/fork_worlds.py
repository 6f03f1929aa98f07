"""Runs jobs in worlds of several processes, forked from one that has imported torch: 1 s, not 8,
each.

There are no training images but the first 14,000: validation, on those that a run does not train
on, is short. Reads a JSON list of [world size, job, options]. Jobs are "train", where the run ends
with its final model; "interrupt", where rank 1 is asked to stop at step 100; both "over a network",
as if each process were on a machine of its own, or "in float64", where each rank saves its weights
as well; "evaluate", with a list of the options of each evaluation; what begins with "reducers" is
test_allreduce.py's.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

from mnist.data import Digits, load_mnist
from mnist.distributed import PRECISIONS, connect
from mnist.evaluation.config import parse_evaluate_config
from mnist.evaluation.job import evaluate
from mnist.system import StopRequest
from mnist.training import allreduce, loop
from mnist.training.config import parse_train_config
from mnist.training.job import open_run, save_final
from mnist.training.loop import fit


def in_worlds(jobs: Sequence[Sequence[Any]]) -> None:
    """Have these jobs run, in a process of their own."""
    command = [sys.executable, __file__]
    subprocess.run(command, input=json.dumps(jobs), text=True, check=True, timeout=100)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class StopAt(StopRequest):
    """Asks to stop at a given step of this start."""

    def __init__(self, step: int) -> None:
        self.left = step

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


def work(job: str, options: list) -> None:
    if job == "evaluate":
        for one in options:
            evaluate(parse_evaluate_config(one))
        return
    if job.startswith("reducers"):
        sys.path.append(str(Path(__file__).parent / "training"))
        from test_allreduce import work_of_one

        work_of_one(job, *options)
        return
    if "in float64" in job:
        torch.set_default_dtype(torch.float64)
        PRECISIONS["fp32"] = torch.float64
    if "over a network" in job:
        allreduce.meet_neighbours = lambda *_: None
    config = parse_train_config(options)
    world = connect(config)
    with StopRequest() as stop, ExitStack() as stack:
        if "interrupt" in job:
            stop = StopAt(100 if world.rank == 1 else 10**9)
        start = world.from_main(lambda: open_run(config, world, stack))
        model = fit(config, world, start, stop)
        if "in float64" in job:
            weights = parameters_to_vector(model.parameters()).detach().numpy()
            np.save(config.run_folder / f"weights{world.rank}.npy", weights)
        if world.is_main:
            save_final(model, config.run_folder / "model.safetensors")


def loader_of_first(count: int):
    """``load_mnist`` for a data set of no more than its first images."""

    def load(data_dir, split):
        digits = load_mnist(data_dir, split)
        return Digits(digits.images[:count], digits.labels[:count])

    return load


def fork(rank: int, size: int, port: int, job: str, options: list) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    code = 0
    try:
        work(job, options)
    except SystemExit as stopped:
        code = 0 if "interrupt" in job and stopped.code == 75 else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    loop.load_mnist = loader_of_first(14_000)
    for size, job, options in json.load(sys.stdin):
        port = free_port()
        children = [fork(rank, size, port, job, options) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"world of {size} with {job} {options}: exit codes {codes}")
