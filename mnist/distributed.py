"""The one place that knows Accelerate: the world of processes, device, precision and threads."""

import dataclasses
import gc
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, cast

import psutil
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from mnist.cli import InputError, WorldError
from mnist.meeting import COLLECTIVE_TIMEOUT, Meeting, RollCall, contact, open_store
from mnist.system import StopRequest, warn
from mnist.threads import choose, set_threads

T = TypeVar("T")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_ADVICE = "several CPU processes need `scripts/train --processes N` or a line of the README"

_OTHER_ENGINES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)

# Where launchers say how many processes they have started (torchrun and Accelerate; MPIs; SLURM).
_WORLD_SIZE_VARIABLES = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The processes that train together, as one of them sees it."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    threads: int = 1
    meeting: "Meeting | None" = None  # of a world of several

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files: rank 0."""
        return self.rank == 0

    @property
    def precision_name(self) -> str:
        """The precision as ``--precision`` names it."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.precision)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over all ranks, in place."""
        if self.size > 1:
            with contact():
                dist.all_reduce(tensor)

    def meet(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce(torch.zeros(1, device=self.device))

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around what takes each rank a time of its own; at its end, wait until every rank is here.

        That wait may take ten minutes, and says for whom; in a collective nobody waits longer than
        one. A process that is asked to stop meanwhile has nothing to save, and ends.

        Raises:
            WorldError: a rank is gone, or does not come.
            SystemExit: with 75: the process was asked to stop.
        """
        if self.meeting is None:
            yield
            return
        with self.meeting.ended_by_request():
            yield
            self.meeting.wait()

    def from_main(self, function: Callable[[], T], prepares: bool = False) -> T:
        """What ``function`` returns on rank 0; its InputError is raised on every rank. If it
        ``prepares``, the others wait for minutes, else one."""
        result: list[T | InputError | None] = [None]
        with self.preparing() if prepares else nullcontext():
            if self.is_main:
                try:
                    result = [function()]
                except InputError as error:
                    result = [error]
        if self.size > 1:
            with contact():
                dist.broadcast_object_list(result)
        if isinstance(result[0], InputError):
            raise result[0]
        return cast(T, result[0])

    def from_all(self, function: Callable[[], T], prepares: bool = False) -> list[T]:
        """What ``function`` returns on each rank, by rank; the InputError of any rank is raised
        on all. If it ``prepares``, ranks may need minutes for it, else one."""
        result: T | InputError
        with self.preparing() if prepares else nullcontext():
            try:
                result = function()
            except InputError as error:
                result = error
        results: list[T | InputError | None] = [result]
        if self.size > 1:
            results = [None] * self.size
            with contact():
                dist.all_gather_object(results, result)
        for result in cast(list[T | InputError], results):
            if isinstance(result, InputError):
                raise result
        return cast(list[T], results)


class JobSettings(Protocol):
    """What the settings of every job say of its world."""

    @property
    def precision(self) -> str: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def expect_world_size(self) -> int | None: ...


def connect(
    config: JobSettings, stop: StopRequest | None = None, threads_in_file: int | None = None
) -> World:
    """Form the world that the launcher laid out and settle device, precision and threads.

    Args:
        config: the settings.
        stop: what ends a process that waits for others before all of them work. Until this
            returns, that is left to signals themselves.
        threads_in_file: what a --config says, which was perhaps written on another machine.

    Raises:
        InputError: the world is not the one asked for, or fp16 without a GPU.
        WorldError: a process did not come, or is gone.
    """
    # 0.7 s, for which nobody waits who only predicts.
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import parse_flag_from_env

    if not gc.isenabled():
        # A job imports without garbage collection; what imports made need not be traversed again.
        gc.freeze()
        gc.enable()
    processes = environment_number("LOCAL_WORLD_SIZE", 1)
    wanted, lines = choose(config.threads, threads_in_file, processes)
    threads = set_threads(wanted)
    if threads < wanted:
        lines.append(f"OpenMP gives {threads} of {wanted} threads here")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # unset, Accelerate warns of it
    # Without `cpu`, several CPU processes silently form as many worlds of one.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    store = _meet(cpu, config.expect_world_size)
    lines += _leave_other_engines()
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",  # step.py has its own, in the precision settled below
            kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        )
    except ValueError as error:
        raise InputError(_no_world(error, _ADVICE)) from None
    except dist.DistError as error:
        raise WorldError(_no_world(error)) from None
    size = accelerator.num_processes
    _check_world_size(size, config.expect_world_size)
    rank = environment_number("RANK", accelerator.process_index, least=0)
    if rank != accelerator.process_index:
        raise InputError(f"RANK={rank}, but this is process {accelerator.process_index}; {_ADVICE}")
    meeting = None
    if size > 1:
        with contact():
            meeting = Meeting(rank, size, store or _get_default_store(), stop)
    world = World(rank=rank, size=size, device=accelerator.device, threads=threads, meeting=meeting)
    for line in lines if world.is_main else ():
        warn(line)
    # One for all: machines may differ in what they multiply natively.
    precision = world.from_main(lambda: _precision(config.precision, world.device), prepares=True)
    return dataclasses.replace(world, precision=PRECISIONS[precision])


def _leave_other_engines() -> list[str]:
    """Take out of the environment what a launcher configured for other programs says; a line for
    each. The step is this project's own, and data parallel."""
    names = [name for name in _OTHER_ENGINES if os.environ.get(name, "false").lower() != "false"]
    return [
        f"{name}={os.environ.pop(name)} is not for this job, which is data parallel"
        for name in names
    ]


def _meet(cpu: bool, expected_size: int | None) -> Store | None:
    """Wait until all processes of the launcher are here, then form the group that Accelerate would.

    Accelerate has one timeout for both, and what waits there hears no signal. And a launcher of
    torch's that starts processes again hands them the store of those that have gone, with their
    addresses: whoever reads one before its successor has written its own would call a dead process.

    Returns:
        The store, or None where Accelerate is to form the world: without what says where to meet;
        and after restarts on several machines, whose launchers may count them differently.
    """
    size = environment_number("WORLD_SIZE", 1)
    host = os.environ.get("MASTER_ADDR", "")
    told = host and os.environ.get("RANK") and (cpu or os.environ.get("LOCAL_RANK"))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if size == 1 or not told or dist.is_initialized() or (restarts != "0" and not one_machine):
        return None
    _check_world_size(size, expected_size)
    rank = environment_number("RANK", 0, least=0)
    port = environment_number("MASTER_PORT", 29500)  # without one, Accelerate takes this
    os.environ["MASTER_PORT"] = str(port)
    if rank >= size or port > 65535:
        raise InputError(_no_world("there is no such rank or port", _ADVICE))
    launcher_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not launcher_serves
    opens = partial(open_store, host, port, size, serves)
    roll = RollCall(f"start {restarts}", "rank", rank, size, f"{host}:{port}", opens)
    try:
        roll.wait()
    except (OSError, UnicodeError, dist.DistError) as error:
        if isinstance(error, socket.gaierror | UnicodeError):
            raise InputError(_no_world(f"no machine is called {host}")) from None
        if "EADDRINUSE" in str(error):
            raise InputError(_no_world("this port is in use; choose another")) from None
        raise WorldError(_no_world(error)) from None
    assert roll.store is not None
    store = PrefixStore(f"start {restarts}", roll.store)
    device = "cpu" if cpu else cast(torch.device, torch.accelerator.current_accelerator())
    with contact():
        dist.init_process_group(
            dist.get_default_backend_for_device(device),
            store=store,
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    return store


def _no_world(reason: object, advice: str | None = None) -> str:
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    told = " ".join(f"{name}={os.environ.get(name)}" for name in names)
    why = f"no world forms from {told}: {first_line(reason)}"
    return why if advice is None else f"{why}; {advice}"


def first_line(error: object) -> str:
    """Of what torch has to say, which may go on with a trace."""
    return str(error).splitlines()[0]


def environment_number(name: str, default: int, least: int = 1) -> int:
    """A number that a launcher or scheduler has put into the environment.

    Raises:
        InputError: what is there is none, or too small.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}={text} in the environment is not a number of {least} or more")
    return int(text)


def _check_world_size(size: int, expected: int | None) -> None:
    if expected is not None and size != expected:
        raise InputError(
            f"--expect-world-size {expected}, but {size} process(es) train together; {_ADVICE}"
        )
    for variable in _WORLD_SIZE_VARIABLES:
        asked = environment_number(variable, size)
        # A SLURM step may have one task, a launcher of several processes, per node.
        if asked > size or (asked < size and variable == "WORLD_SIZE"):
            told = f"{variable}={asked}"
            raise InputError(f"{told}, but {size} process(es) train together; {_ADVICE}")
    asked = _processes_asked_of_accelerate()
    if asked > size:
        raise InputError(
            f"`accelerate launch` was asked for {asked} processes and started {size}; {_ADVICE}"
        )


def _processes_asked_of_accelerate() -> int:
    """What the parent's command line or Accelerate's configuration file asks for, else 1.

    On CPUs `accelerate launch --num_processes 2` starts one process and tells it nothing.
    """
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return 1
    if not re.search(r"accelerate\S* launch|accelerate[.-]\S*launch", " ".join(words[:3])):
        return 1
    job = Path(sys.argv[0]).name
    ours = next((i for i, word in enumerate(words) if Path(word).name == job), None)
    words = words[:ours]  # what follows are options of the job

    def value(name: str) -> str | None:
        pattern = re.compile(rf"--{name.replace('_', '[-_]')}(?:=(.*))?")
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if match := pattern.fullmatch(word):
                return match[1] or following
        return None

    explicit = value("num_processes")
    if explicit is not None:
        return int(explicit)
    from accelerate.commands.config import config_args

    file = value("config_file") or config_args.default_config_file
    if not Path(file).is_file():
        return 1
    try:
        return int(config_args.load_config_from_file(file).num_processes or 1)
    except (AttributeError, TypeError, ValueError):  # of other machines, or of another version
        return 1


def _precision(setting: str, device: torch.device) -> str:
    if setting == "auto":
        launcher = launcher_precision()
        if launcher != "no":  # "no" is also what a launcher writes that was told nothing
            setting = launcher
        else:
            setting = "bf16" if _multiplies_bf16_natively(device) else "fp32"
    if setting == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU; on CPUs take bf16 or fp32")
    return setting


def launcher_precision() -> str:
    """What the launcher was told, or "no".

    Raises:
        InputError: it is one that this project does not have.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise InputError(f"--mixed_precision {precision} is not supported: no, bf16 or fp16")
    return precision


def _multiplies_bf16_natively(device: torch.device) -> bool:
    """Without such hardware bf16 works, many times slower than fp32."""
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def widest_float(device: torch.device) -> torch.dtype:
    """For sums over many images: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def accelerate_launch(words: Sequence[str]) -> None:
    """Run ``accelerate launch`` with these words in this process, whose handlers of signals stay.

    Raises:
        subprocess.CalledProcessError, torch's ChildFailedError: the job failed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = launch_command_parser().parse_args(list(words))
    # Torch's handlers would replace those of the caller.
    options.signals_to_handle = "SIGQUIT"
    launch_command(options)
