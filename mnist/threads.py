"""How many threads a process computes with, whatever its environment tells OpenMP.

oneDNN takes it that a parallel region has as many threads as torch was told, and leaves out the
work of those that are missing: with OMP_THREAD_LIMIT=1 a model of 98.39% scores 54%. So a job takes
such variables out of its environment before torch loads OpenMP, and then counts. Imports no torch
by itself.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mnist.cli import InputError

if TYPE_CHECKING:
    import torch

# By these OpenMP gives fewer threads than are asked for; newer ones add _ALL and _DEV.
_GIVES_FEWER = ("OMP_DYNAMIC", "OMP_MAX_ACTIVE_LEVELS", "OMP_THREAD_LIMIT")
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
"""By these OpenMP binds threads to cores, the main one as soon as it is loaded: the affinity of
this process, and of those that it starts, is one core from then on."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a process has found before torch was loaded."""

    cores: int
    """That it may use."""
    asked: int | None = None
    """The user's OMP_NUM_THREADS, if any."""
    limit: int | None = None
    """OMP_THREAD_LIMIT, if any."""
    owns_openmp: bool = False
    """Whether the user has said more of OpenMP than how many threads: how they wait, or where."""


@cache
def surroundings() -> Surroundings:
    """What this process has found around it; to be called first before torch is imported, as it
    takes out of the environment what would make products wrong."""
    users = _users_environment()
    found = Surroundings(
        asked=_first_number(users.get("OMP_NUM_THREADS")),
        owns_openmp=any(
            name.startswith(("OMP_", "GOMP_", "KMP_")) and name != "OMP_NUM_THREADS"
            for name in users
        ),
        limit=_first_number(os.environ.get("OMP_THREAD_LIMIT")),
        cores=_count_cores(),
    )
    for name in list(os.environ):
        if name.startswith(_GIVES_FEWER):
            del os.environ[name]
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":  # each would take the first core
        take_binding()
    return found


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, and its container's quota."""
    bound = any(name in os.environ for name in BINDING)
    return surroundings().cores if bound else _count_cores()


def take_binding() -> dict[str, str]:
    """Take the variables by which OpenMP binds threads out of the environment; return them."""
    return {name: os.environ.pop(name) for name in BINDING if name in os.environ}


def _first_number(text: str | None) -> int | None:
    """Of a variable of OpenMP's, such as ``8`` or ``8,2``, or None."""
    first = (text or "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def _launcher() -> psutil.Process | None:
    """The parent process, if it is a launcher of jobs."""
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return None
    try:
        parent = psutil.Process(os.getppid())
        name = Path(parent.exe()).name
    except psutil.Error:
        return None
    return parent if name.startswith(("python", "pypy")) else None  # not a user's shell


def _users_environment() -> dict[str, str]:
    """The environment that a person or a site has made.

    Launchers set OMP_NUM_THREADS=1 for their children where it was unset, which is nobody's wish;
    their own environment tells.
    """
    launcher = _launcher()
    if launcher is None:
        return dict(os.environ)
    try:
        return launcher.environ()
    except psutil.Error:
        return {}


def _count_cores() -> int:
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        _undo_binding_by_launcher()
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores


def _undo_binding_by_launcher() -> None:
    """Take back the affinity that the launcher had before it loaded OpenMP, which bound it to its
    first core: as wide as that of the process that started it."""
    launcher, own = _launcher(), os.sched_getaffinity(0)
    bound = os.environ.get("OMP_PROC_BIND", "false").lower() != "false"
    if launcher is None or not bound or len(own) > 1:
        return
    try:
        before = os.sched_getaffinity(launcher.ppid())
        if own == {min(before)}:
            os.sched_setaffinity(0, before)
    except (OSError, psutil.Error):
        pass


def choose(explicit: int | None, from_file: int | None, processes: int) -> tuple[int, list[str]]:
    """The threads to compute with, and a line for each thing that has lowered them.

    Args:
        explicit: what --threads says, which always wins.
        from_file: what a --config says, which was perhaps written on another machine.
        processes: that share this machine.
    """
    if explicit is not None:
        return explicit, []
    found, threads = surroundings(), max(1, usable_cores() // processes)
    lines: list[str] = []
    source, wished = "threads in --config", from_file
    if wished is None:
        source, wished = "OMP_NUM_THREADS", found.asked
    if wished is not None and wished > threads:
        lines.append(
            f"{source} is {wished}, and {threads} core(s) can be used: {threads} thread(s)"
        )
    elif wished is not None:
        threads = wished
    if found.limit is not None and found.limit < threads:
        threads = found.limit
        lines.append(f"OMP_THREAD_LIMIT allows {threads} thread(s); --threads wins over it")
    return threads, lines


def set_threads(threads: int) -> int:
    """Have torch compute with so many threads, or with as many as OpenMP gives; return how many.

    Raises:
        InputError: products are wrong all the same.
    """
    import torch

    torch.set_num_threads(threads)
    given = _team_size(threads)
    if given < threads:
        torch.set_num_threads(given)
    for dtype in (torch.float32, torch.bfloat16):
        if not _is_whole(dtype):
            told = {name: text for name, text in os.environ.items() if name.startswith("OMP_")}
            raise InputError(
                f"matrix products are wrong with {given} threads here: OpenMP does not give what "
                f"it was asked for ({told}); unset such variables, or take --threads 1"
            )
    return given


def _team_size(threads: int) -> int:
    """How many threads a parallel region has that asks for so many."""
    process = ctypes.CDLL(None)
    if not hasattr(process, "GOMP_parallel"):  # no OpenMP, or one that cannot be asked: Apple's
        return threads
    if hasattr(process, "omp_set_dynamic"):  # for this thread, where it is loaded already
        process.omp_set_dynamic(0)
    members: list[int] = []
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: members.append(threading.get_native_id())
    )
    process.GOMP_parallel(region, None, threads, 0)
    return len(members)


def _is_whole(dtype: "torch.dtype") -> bool:
    """Whether a product of oneDNN's, large enough to be shared out, is right in all its parts."""
    import torch

    product: Callable[..., Any] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    rows, inner, columns = 64, 784, 512
    left, right = torch.ones(rows, inner), torch.ones(columns, inner)
    left[::2] *= 2
    left[::3] *= -1
    right[::2] *= -2
    expected = inner * left[:, :1] * right[:, 0]  # all exact in bf16
    try:
        if product is None:
            found = torch.nn.functional.linear(left.to(dtype), right.to(dtype))
        else:
            found = product(left.to(dtype), right.to(dtype), None, "none", [], "")
    except RuntimeError:  # not on this CPU, so that nothing takes it
        return True
    return torch.equal(found.float(), expected)
