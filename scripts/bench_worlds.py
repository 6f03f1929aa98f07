"""Worlds of several processes for scripts/bench, which has them train, one world after another.

A world is started once, and waits for orders: so what is compared runs within seconds. As a script,
this is one of its processes; the first reads orders as lines of JSON and prints the seconds each
took.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from mnist.data import load_mnist, normalise, rank_slice
from mnist.distributed import PRECISIONS, World, connect
from mnist.runs.metrics import read_metrics
from mnist.training.config import TrainConfig
from mnist.training.job import open_run
from mnist.training.loop import fit


def usual_network() -> nn.Sequential:
    """The network as it is usually written."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Workers:
    """A world of processes that do as they are told.

    Args:
        kind: "ours", or "ddp" for Accelerate's DistributedDataParallel.
        size: the number of processes.
        threads: of each.
        precision: of the large products.
        places: for each process, the words before its command, and more of its environment.
        address: of the first process.
    """

    def __init__(
        self,
        kind: str,
        size: int,
        threads: int,
        precision: str,
        places: Sequence[tuple[list[str], dict[str, str]]] | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        shared = os.environ | {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": str(threads),
            "ACCELERATE_USE_CPU": "true",
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        self._processes: list[subprocess.Popen[str]] = []
        for rank in range(size):
            words, more = places[rank] if places else ([], {})
            local_rank, local_size = (0, 1) if places else (rank, size)
            own = {"RANK": rank, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
            self._processes.append(
                subprocess.Popen(
                    [*words, sys.executable, __file__, kind, precision],
                    env=shared | {name: str(value) for name, value in own.items()} | more,
                    stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=self._said,
                    text=True,
                )
            )

    def measure(self, **order: Any) -> Callable[[], float]:
        """The seconds that an order takes."""

        def seconds() -> float:
            first = self._processes[0]
            assert first.stdin is not None and first.stdout is not None
            print(json.dumps(order), file=first.stdin, flush=True)
            line = first.stdout.readline()
            if not line:
                self._said.seek(0)
                raise RuntimeError(f"a process has ended:\n{self._said.read().decode()}")
            return float(line)

        return seconds

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._said.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


class TwoNetworks:
    """Two network namespaces, joined by a pair of interfaces of some bits a second.

    Raises:
        RuntimeError: the system does not let this user make them.
    """

    def __init__(self) -> None:
        self._names = [f"mnist-bench-{os.getpid()}-{side}" for side in "ab"]
        self._stack = ExitStack()
        try:
            for name in self._names:
                _run("ip", "netns", "add", name)
                self._stack.callback(_run, "ip", "netns", "del", name)
            ends = ["netns", self._names[0], "type", "veth", "peer", "name", "bench"]
            _run("ip", "link", "add", "bench", *ends, "netns", self._names[1])
            for number, name in enumerate(self._names, 1):
                _run("ip", "-n", name, "address", "add", f"10.0.0.{number}/24", "dev", "bench")
                for interface in ("bench", "lo"):
                    _run("ip", "-n", name, "link", "set", interface, "up")
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "TwoNetworks":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    address = "10.0.0.1"

    @property
    def places(self) -> list[tuple[list[str], dict[str, str]]]:
        """For ``Workers``, a process in each."""
        more = {"GLOO_SOCKET_IFNAME": "bench"}
        return [(["ip", "netns", "exec", name], more) for name in self._names]

    def set_rate(self, rate: str) -> None:
        """Let so much through, each way, in the words of ``tc``."""
        for name in self._names:
            shaped = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            _run("tc", "-n", name, "qdisc", "replace", "dev", "bench", "root", *shaped)


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"there is no {words[0]} (Debian's package iproute2)") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


# ------------------------------------------------------------------------ one of the processes


def ours(precision: str) -> None:
    """The real loop, as its own metrics time it."""
    config = TrainConfig(threads=int(os.environ["OMP_NUM_THREADS"]), precision=precision)  # type: ignore[arg-type]
    world = connect(config)
    while order := world.from_main(_read, prepares=True):
        if "exchanges" in order:
            seconds = exchange(world, **order)
        else:
            seconds = train(world, **order)
        if world.is_main:
            print(seconds, flush=True)


def train(
    world: World,
    folder: str,
    data_dir: str,
    batch_size: int,
    epochs: int = 1,
    precision: str | None = None,
) -> float:
    """Epochs of all images."""
    name = precision or world.precision_name
    config = TrainConfig(
        validation_size=0,
        epochs=epochs,
        batch_size=batch_size,
        precision=name,  # type: ignore[arg-type]
        data_dir=Path(data_dir),
        runs_dir=Path(folder),
        run_name=f"{os.environ['MASTER_PORT']}-{batch_size}-{name}",
        fresh=True,
    )
    world = World(**vars(world) | {"precision": PRECISIONS[name]})
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        fit(config, world, world.from_main(lambda: open_run(config, world, stack)))
    if not world.is_main:
        return 0.0
    return float(read_metrics(config.run_folder / "metrics.jsonl")[-1]["seconds"])


def exchange(
    world: World, exchanges: int, numbers: int, at_once: int = 1, cpu: bool = False
) -> float:
    """Each of two processes sends the other so many numbers, so many messages at once; or the CPU
    seconds of that."""
    sent, received = (torch.zeros(at_once, numbers, dtype=world.precision) for _ in range(2))
    clock = time.process_time if cpu else time.perf_counter
    for turn in range(2):  # the first warms up
        world.meet()
        started = clock()
        for _ in range(exchanges if turn else 20):
            works = [dist.irecv(row, 1 - world.rank, tag=tag) for tag, row in enumerate(received)]
            works += [dist.isend(row, 1 - world.rank, tag=tag) for tag, row in enumerate(sent)]
            for work in works:
                assert work is not None
                work.wait()
    return clock() - started


def ddp(precision: str) -> None:
    """The network and optimizer under Accelerate, with all images in memory."""
    from accelerate import Accelerator  # noqa: TID251  # what ours is compared with
    from accelerate.utils import broadcast_object_list  # noqa: TID251

    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(cpu=True, mixed_precision=mixed)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    plain = usual_network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    model, optimizer = accelerator.prepare(plain, optimizer)
    images, labels, rank = torch.empty(0), torch.empty(0), accelerator.process_index
    while True:
        orders = [_read() if accelerator.is_main_process else None]
        (order,) = broadcast_object_list(orders)
        if not order:
            return
        if not len(images):
            digits = load_mnist(Path(order["data_dir"]), "train")
            images, labels = normalise(digits.images, torch.float32), digits.labels
        generator = torch.Generator().manual_seed(0)
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        for _ in range(order.get("epochs", 1)):
            rows = torch.randperm(len(labels), generator=generator)
            for batch in rows.split(order["batch_size"]):
                own = batch[rank_slice(len(batch), rank, accelerator.num_processes)]
                loss = nn.functional.cross_entropy(model(images[own]), labels[own])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            print(time.perf_counter() - started, flush=True)


def _read() -> dict[str, Any]:
    """The next order, or none at the end."""
    order: dict[str, Any] = json.loads(sys.stdin.readline() or "{}")
    return order


if __name__ == "__main__":
    {"ours": ours, "ddp": ddp}[sys.argv[1]](sys.argv[2])
