"""The one place that knows Accelerate: launch, world, device, precision and threads."""

import dataclasses
import gc
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch import distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from mnist.config import EXIT_CODE_FILE, EvaluateConfig, InputError, TrainConfig, WorldError
from mnist.meeting import (
    COLLECTIVE_TIMEOUT,
    PATIENCE_SECONDS,
    Meeting,
    RollCall,
    contact,
    open_store,
)
from mnist.system import StopRequest, leave, open_terminals, stop_signals, warn
from mnist.threads import choose, set_threads, usable_cores

T = TypeVar("T")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_RENDEZVOUS = "patient"  # of the launchers of several nodes

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

    def gather(self, tensor: Tensor) -> Tensor:
        """The flat tensors of all ranks, of one length, as rows."""
        gathered = tensor.new_empty(self.size * len(tensor))
        with contact():
            dist.all_gather_into_tensor(gathered, tensor)
        return gathered.view(self.size, -1)

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


def connect(config: TrainConfig | EvaluateConfig, stop: StopRequest | None = None) -> World:
    """Form the world that the launcher laid out and settle device, precision and threads.

    Args:
        config: the settings.
        stop: what ends a process that waits for others before all of them work. Until this
            returns, that is left to signals themselves.

    Raises:
        InputError: the world is not the one asked for, or fp16 without a GPU.
        WorldError: a process did not come, or is gone.
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
    rank = _environment_number("RANK", accelerator.process_index, least=0)
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
    size = _environment_number("WORLD_SIZE", 1)
    host = os.environ.get("MASTER_ADDR", "")
    told = host and os.environ.get("RANK") and (cpu or os.environ.get("LOCAL_RANK"))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if size == 1 or not told or dist.is_initialized() or (restarts != "0" and not one_machine):
        return None
    _check_world_size(size, expected_size)
    rank = _environment_number("RANK", 0, least=0)
    port = _environment_number("MASTER_PORT", 29500)  # without one, Accelerate takes this
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
    why = f"no world forms from {told}: {_first_line(reason)}"
    return why if advice is None else f"{why}; {advice}"


def _first_line(error: object) -> str:
    return str(error).splitlines()[0]


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
    try:
        return int(config_args.load_config_from_file(file).num_processes or 1)
    except (AttributeError, TypeError, ValueError):  # of other machines, or of another version
        return 1


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

    Raises:
        WorldError: the launchers of several nodes do not meet.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # the launchers' own lines; the job's are its own process's
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # traces, where a store has gone
    processes = processes or max(1, torch.accelerator.device_count())
    machines = _environment_number("SLURM_STEP_NUM_NODES", 1) if rendezvous else 1
    topology = ["--num_processes", str(processes), "--num_machines", str(machines)]
    topology += ["--mixed_precision", _launcher_precision(), "--dynamo_backend", "no"]
    if processes > 1:  # --multi_gpu is the launcher that forms a world, on CPUs too
        address, _, port = (rendezvous or ":0").rpartition(":")
        topology += ["--multi_gpu", "--main_process_port", port]
        if machines > 1:
            _register_rendezvous()
            node = str(_environment_number("SLURM_NODEID", 0, least=0))
            topology += ["--main_process_ip", address, "--machine_rank", node]
            topology += ["--rdzv_backend", _RENDEZVOUS, "--rdzv_conf", f"rank={node}"]
    # Before the user's own, which wins.
    job = [script, "--expect-world-size", str(processes), *arguments]
    asked: set[int] = set()
    terminals = open_terminals()

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            leave(terminals)
        children = psutil.Process().children()
        if not children and not asked:  # else they have just ended, as they were asked
            os._exit(128 + number)
        torch_tells = processes > 1 and number != signal.SIGUSR1 and asked <= {signal.SIGUSR1}
        asked.add(number)
        for child in children:  # they save, and their end is the launcher's
            with suppress(psutil.NoSuchProcess):
                if not torch_tells:
                    child.send_signal(number)
                child.send_signal(signal.SIGCONT)  # one that is stopped hears nothing else
        if torch_tells:
            raise SignalException("", signal.Signals(number))  # torch tells them, and waits

    for number in stop_signals():
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory() as aside:
        # The user's own file may be for DeepSpeed, TPUs or SageMaker, or of another version.
        plain = Path(aside) / "accelerate.yaml"
        plain.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n")
        own_code_file = Path(aside) / "code"
        own_code_file.touch()
        code_file = Path(os.environ.setdefault(EXIT_CODE_FILE, str(own_code_file)))
        topology += ["--config_file", str(plain)]
        options = launch_command_parser().parse_args([*topology, *job])
        # Torch's handlers would replace these, and not wake up a worker that is stopped.
        options.signals_to_handle = "SIGQUIT"
        try:
            launch_command(options)
        except subprocess.CalledProcessError as error:
            return _shell_code(error.returncode)
        except ChildFailedError as error:
            return _shell_code(error.get_first_failure()[1].exitcode)
        except SignalException as error:  # the workers were given time to end
            return int(code_file.read_text() or 128 + error.sigval)
        except ConnectionError as error:
            if error.errno is not None:
                raise
            raise WorldError(f"port {port} of this machine is in use by another program") from None
        finally:
            if code_file == own_code_file:
                del os.environ[EXIT_CODE_FILE]
    return 0


def _register_rendezvous() -> None:
    """Have the launchers of several nodes meet as torch's "static" ones do, but for minutes, saying
    for whom they wait, and heeding signals."""
    from torch.distributed.elastic.rendezvous import (
        RendezvousInfo,
        RendezvousParameters,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Rendezvous(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return _RENDEZVOUS

        def next_rendezvous(self) -> RendezvousInfo:
            if self._store is None:
                host, port, size = self.master_addr, self.master_port, self.world_size
                opens = partial(open_store, host, port, size, self.rank == 0)
                roll = RollCall("nodes", "node", self.rank, size, f"{host}:{port}", opens)
                try:
                    roll.wait()
                except (OSError, UnicodeError, dist.DistError) as error:
                    reason = _first_line(error)
                    raise WorldError(f"no launchers meet at {host}:{port}: {reason}") from None
                self._store = roll.store
            return super().next_rendezvous()

    def create(parameters: RendezvousParameters) -> Rendezvous:
        host, _, port = parameters.endpoint.rpartition(":")
        rank = parameters.get_as_int("rank")
        assert rank is not None
        timeout = int(PATIENCE_SECONDS)
        return Rendezvous(host, int(port), rank, parameters.max_nodes, parameters.run_id, timeout)

    rendezvous_handler_registry.register(_RENDEZVOUS, create)


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code
