"""The one place that knows Accelerate: launch, world, device, precision and threads."""

import dataclasses
import datetime
import gc
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from mnist.config import EXIT_CODE_FILE, EvaluateConfig, InputError, TrainConfig, WorldError
from mnist.system import StopRequest
from mnist.threads import choose, set_threads, usable_cores

T = TypeVar("T")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)

_ADVICE = "several CPU processes need `scripts/train --processes N` or a line of the README"

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
            with _contact():
                dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """The flat tensors of all ranks, of one length, as rows."""
        gathered = tensor.new_empty(self.size * len(tensor))
        with _contact():
            dist.all_gather_into_tensor(gathered, tensor)
        return gathered.view(self.size, -1)

    def meet(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce(torch.zeros(1, device=self.device))

    def from_main(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0; its InputError is raised on every rank."""
        result: list[T | InputError | None] = [None]
        if self.is_main:
            try:
                result = [function()]
            except InputError as error:
                result = [error]
        if self.size > 1:
            with _contact():
                dist.broadcast_object_list(result)
        if isinstance(result[0], InputError):
            raise result[0]
        return cast(T, result[0])

    def from_all(self, function: Callable[[], T]) -> list[T]:
        """What ``function`` returns on each rank, by rank; the InputError of any rank is raised
        on all."""
        result: T | InputError
        try:
            result = function()
        except InputError as error:
            result = error
        results: list[T | InputError | None] = [result]
        if self.size > 1:
            results = [None] * self.size
            with _contact():
                dist.all_gather_object(results, result)
        for result in cast(list[T | InputError], results):
            if isinstance(result, InputError):
                raise result
        return cast(list[T], results)


@contextmanager
def _contact() -> Iterator[None]:
    """Turn what a collective raises into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise WorldError(
            f"another process is gone ({reason}); the same command again goes on from what is saved"
        ) from None


def connect(config: TrainConfig | EvaluateConfig) -> World:
    """Form the world that the launcher laid out and settle device, precision and threads.

    Raises:
        InputError: the world is not the one asked for, or fp16 without a GPU.
    """
    if not gc.isenabled():
        # A job imports without garbage collection; what imports made need not be traversed again.
        gc.freeze()
        gc.enable()
    from_file = config.threads_in_file if isinstance(config, TrainConfig) else None
    processes = _environment_number("LOCAL_WORLD_SIZE", 1)
    wanted, lines = choose(config.threads, from_file, processes)
    threads = set_threads(wanted)
    if threads < wanted:
        lines.append(f"OpenMP gives {threads} of {wanted} threads here")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # unset, Accelerate warns of it
    try:
        _meet_after_restart()
        accelerator = Accelerator(
            # Without `cpu`, several CPU processes silently form as many worlds of one.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",  # step.py has its own, in the precision settled below
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
        )
    except (ValueError, dist.DistError) as error:
        told = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR")}
        shown = " ".join(f"{name}={value}" for name, value in told.items())
        reason = str(error).splitlines()[0]
        raise InputError(f"no world forms from {shown}: {reason}; {_ADVICE}") from None
    _check_world_size(accelerator.num_processes, config.expect_world_size)
    rank = _environment_number("RANK", accelerator.process_index, least=0)
    if rank != accelerator.process_index:
        raise InputError(f"RANK={rank}, but this is process {accelerator.process_index}; {_ADVICE}")
    world = World(
        rank=rank, size=accelerator.num_processes, device=accelerator.device, threads=threads
    )
    for line in lines if world.is_main else ():
        print(f"warning: {line}", file=sys.stderr, flush=True)
    # One for all: machines may differ in what they multiply natively.
    precision = world.from_main(lambda: _precision(config.precision, world.device))
    return dataclasses.replace(world, precision=PRECISIONS[precision])


def _meet_after_restart() -> None:
    """Form the group of processes that a launcher of torch's has started again.

    The launcher hands them the store of those that have gone, with the addresses of these: whoever
    reads one before its successor has written its own would call a dead process. (On several
    machines the launchers may count restarts differently, so that there it is left to torch.)
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if restarts == "0" or not one_machine or _environment_number("WORLD_SIZE", 1) == 1:
        return
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    store, rank, size = next(rendezvous("env://", timeout=_COLLECTIVE_TIMEOUT))
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=dist.PrefixStore(f"restart {restarts}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=_COLLECTIVE_TIMEOUT,
    )


def _environment_number(name: str, default: int, least: int = 1) -> int:
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
        asked = _environment_number(variable, size)
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
    return int(config_args.load_config_from_file(file).num_processes or 1)


def _precision(setting: str, device: torch.device) -> str:
    if setting == "auto":
        launcher = _launcher_precision()
        if launcher != "no":  # "no" is also what a launcher writes that was told nothing
            setting = launcher
        else:
            setting = "bf16" if _multiplies_bf16_natively(device) else "fp32"
    if setting == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU; on CPUs take bf16 or fp32")
    return setting


def _launcher_precision() -> str:
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


def environment(world: World) -> dict[str, Any]:
    """What a job runs on: processes, hardware, versions."""
    return {
        "world_size": world.size,
        "device": world.device.type,
        "hardware": _hardware(world.device),
        "precision": world.precision_name,
        "threads": world.threads,
        "usable_cores": usable_cores(),
        "platform": platform.platform(),
        "commit": _commit(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "accelerate", "numpy")},
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor())


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, if it runs from one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def launch(
    script: str, arguments: list[str], processes: int | None, rendezvous: str | None = None
) -> int:
    """Run `accelerate launch script arguments` in this process.

    Args:
        processes: the size of the world; by default all GPUs, or one process where there are none.
        rendezvous: address and port of the first node, where the launchers of a SLURM step meet,
            of which each node has one.

    Returns:
        The exit code of the job itself, which Accelerate turns into a 1 and a traceback.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # the launchers' own lines; the job's are its own process's
    processes = processes or max(1, torch.accelerator.device_count())
    machines = _environment_number("SLURM_STEP_NUM_NODES", 1) if rendezvous else 1
    topology = ["--num_processes", str(processes), "--num_machines", str(machines)]
    topology += ["--mixed_precision", _launcher_precision(), "--dynamo_backend", "no"]
    if processes > 1:  # --multi_gpu is the launcher that forms a world, on CPUs too
        address, _, port = (rendezvous or ":0").rpartition(":")
        topology += ["--multi_gpu", "--main_process_port", port]
        if machines > 1:
            topology += ["--main_process_ip", address, "--machine_rank", os.environ["SLURM_NODEID"]]
    # Before the user's own, which wins.
    job = [script, "--expect-world-size", str(processes), *arguments]
    for number in StopRequest.SIGNALS:
        signal.signal(number, _pass_on)
    with tempfile.NamedTemporaryFile() as aside:
        code_file = Path(os.environ.setdefault(EXIT_CODE_FILE, aside.name))
        try:
            launch_command(launch_command_parser().parse_args([*topology, *job]))
        except subprocess.CalledProcessError as error:
            return _shell_code(error.returncode)
        except ChildFailedError as error:
            return _shell_code(error.get_first_failure()[1].exitcode)
        except SignalException as error:  # the workers were given time to end
            return int(code_file.read_text() or 128 + error.sigval)
    return 0


def _pass_on(number: int, frame: object) -> None:
    """To the job's processes: they save, and their end is the launcher's."""
    children = psutil.Process().children()
    if not children:
        os._exit(128 + number)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code
