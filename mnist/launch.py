"""What ``scripts/*`` run: a job under ``accelerate launch``, with options checked beforehand.

python -m mnist.launch JOB [--processes N] [options of jobs/train.py or jobs/evaluate.py]

On several nodes of a cluster it is started once on each, as slurm/job.sh does, with the address and
a free port of the first: --rendezvous ADDRESS:PORT.
"""

import argparse
import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from mnist.system import end_quietly_when_interrupted

if __name__ == "__main__":
    end_quietly_when_interrupted()  # before what takes long to import
import psutil

from mnist.cli import EXIT_CODE_FILE, InputError, WorldError, exit_codes
from mnist.evaluation.config import parse_evaluate_config
from mnist.reading.config import parse_read_config
from mnist.system import leave, open_terminals, stop_signals
from mnist.threads import take_binding
from mnist.training.config import parse_train_config

_PARSERS = {
    "train.py": parse_train_config,
    "evaluate.py": parse_evaluate_config,
    "read.py": parse_read_config,
}
_RENDEZVOUS = "patient"  # of the launchers of several nodes


def main(script: str, arguments: list[str]) -> NoReturn:
    """Check the options, then launch; ends the process with the job's exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--rendezvous")
    try:
        ours, options = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}") from None
    if ours.processes is not None and ours.processes < 1:
        raise InputError(f"--processes takes 1 or more, not {ours.processes}")
    if ours.rendezvous and os.environ.get("SLURM_NODEID") != "0":
        os.environ.pop(EXIT_CODE_FILE, None)  # the job's code is that of the first node
    job = Path(script)
    if {"-h", "--help"} & set(options):
        print(
            f"scripts/{job.stem} [--processes N] [OPTIONS]: N processes; default: one per GPU, or "
            "one\n"
        )
    with contextlib.redirect_stderr(io.StringIO()):  # what is to be said, the job says
        _PARSERS[job.name](options)  # so that a mistake is answered before anything is launched
    sys.exit(launch(script, options, ours.processes, ours.rendezvous))


def launch(
    script: str, arguments: list[str], processes: int | None, rendezvous: str | None = None
) -> int:
    """Run `accelerate launch script arguments` in this process.

    Args:
        script: the job.
        arguments: its options.
        processes: the size of the world; by default all GPUs, or one where there are none.
        rendezvous: address and port of the first node, where the launchers of a SLURM step meet,
            of which each node has one.

    Returns:
        The exit code of the job itself, which Accelerate turns into a 1 and a traceback.

    Raises:
        WorldError: the launchers of several nodes do not meet.
    """
    binding = take_binding()  # or OpenMP would bind this process, and so the job's
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from mnist.distributed import accelerate_launch

    os.environ |= binding
    logging.disable()  # the launchers' own lines; the job's are its own process's
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # traces, where a store has gone
    processes = processes or max(1, torch.accelerator.device_count())
    topology = _topology(processes, rendezvous)
    # Before the user's own, which wins.
    job = [script, "--expect-world-size", str(processes), *arguments]
    _pass_signals_on(several=processes > 1)
    with tempfile.TemporaryDirectory() as aside:
        # The user's own file may be for DeepSpeed, TPUs or SageMaker, or of another version.
        plain = Path(aside) / "accelerate.yaml"
        plain.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n")
        own_code_file = Path(aside) / "code"
        own_code_file.touch()
        code_file = Path(os.environ.setdefault(EXIT_CODE_FILE, str(own_code_file)))
        try:
            accelerate_launch([*topology, "--config_file", str(plain), *job])
        except subprocess.CalledProcessError as error:
            return _shell_code(error.returncode)
        except ChildFailedError as error:
            return _shell_code(error.get_first_failure()[1].exitcode)
        except SignalException as error:  # the workers were given time to end
            return int(code_file.read_text() or 128 + error.sigval)
        except ConnectionError as error:
            if error.errno is not None:
                raise
            port = (rendezvous or "").rpartition(":")[2] or "0"
            raise WorldError(f"port {port} of this machine is in use by another program") from None
        finally:
            if code_file == own_code_file:
                del os.environ[EXIT_CODE_FILE]
    return 0


def _topology(processes: int, rendezvous: str | None) -> list[str]:
    """Accelerate's own options for a world of this size, over the nodes of a SLURM step."""
    from mnist.distributed import environment_number, launcher_precision

    machines = environment_number("SLURM_STEP_NUM_NODES", 1) if rendezvous else 1
    words = ["--num_processes", str(processes), "--num_machines", str(machines)]
    words += ["--mixed_precision", launcher_precision(), "--dynamo_backend", "no"]
    if processes > 1:  # --multi_gpu is the launcher that forms a world, on CPUs too
        address, _, port = (rendezvous or ":0").rpartition(":")
        words += ["--multi_gpu", "--main_process_port", port]
        if machines > 1:
            _register_rendezvous()
            node = str(environment_number("SLURM_NODEID", 0, least=0))
            words += ["--main_process_ip", address, "--machine_rank", node]
            words += ["--rdzv_backend", _RENDEZVOUS, "--rdzv_conf", f"rank={node}"]
    return words


def _pass_signals_on(*, several: bool) -> None:
    """Have whatever asks this process to stop ask the job's processes, which save.

    Args:
        several: whether torch's launcher starts the processes, and tells them itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    asked: set[int] = set()
    terminals = open_terminals()

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            leave(terminals)
        children = psutil.Process().children()
        if not children and not asked:  # else they have just ended, as they were asked
            os._exit(128 + number)
        torch_tells = several and number != signal.SIGUSR1 and asked <= {signal.SIGUSR1}
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


def _register_rendezvous() -> None:
    """Have the launchers of several nodes meet as torch's "static" ones do, but for minutes, saying
    for whom they wait, and heeding signals."""
    from torch import distributed as dist
    from torch.distributed.elastic.rendezvous import (
        RendezvousInfo,
        RendezvousParameters,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    from mnist.distributed import first_line
    from mnist.meeting import PATIENCE_SECONDS, RollCall, open_store

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
                    reason = first_line(error)
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


if __name__ == "__main__":
    with exit_codes(Path(sys.argv[1]).name):
        main(sys.argv[1], sys.argv[2:])
