"""Process 1 of the container: runs a command, passes signals on, ends when all processes have.

docker run IMAGE [OPTIONS]                    scripts/train OPTIONS
docker run IMAGE train|evaluate|read|export|test|bench …  the script of that name
docker run IMAGE COMMAND …                    any other command

Needed because the kernel drops a signal that process 1 has no handler for, and kills all others
when process 1 ends, while a job whose launcher died of the signal is still saving.
"""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

_SCRIPTS = Path(__file__).parent
_NAMES = ("train", "evaluate", "read", "export", "test", "bench")
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)
_PATIENCE_SECONDS = 60


def command_of(arguments: list[str]) -> list[str]:
    """What to run for the arguments of `docker run IMAGE`."""
    if not arguments or arguments[0].startswith("-"):
        arguments = ["train", *arguments]
    if arguments[0] in _NAMES:
        return [str(_SCRIPTS / arguments[0]), *arguments[1:]]
    return arguments


def run(command: list[str]) -> int:
    """Run a command; returns its exit code when it and everything it started have ended."""
    # Processes whose parent dies become ours, also where somebody else is process 1 (`--init`).
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        # `--network none`: this machine's name means no address, on which torchrun waits for 5 min.
        os.environ.setdefault("PET_LOCAL_ADDR", "127.0.0.1")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    started = None
    early = []

    def pass_on(number: int, frame: object) -> None:
        if started is None:
            early.append(number)
        else:
            _send(number, [started])

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    try:
        # Python ignores these two; the command should not.
        default = [signal.SIGPIPE, signal.SIGXFSZ]
        pid = os.posix_spawnp(command[0], command, os.environ, setsigdef=default)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    started = psutil.Process(pid)
    for number in early:
        _send(number, [started])

    code = 0
    with suppress(ChildProcessError):  # none is left
        while True:
            ended, status = os.wait()
            if ended == pid:
                code = os.waitstatus_to_exitcode(status)
                signal.signal(signal.SIGALRM, lambda *_: _send(signal.SIGKILL, _descendants()))
                signal.alarm(_PATIENCE_SECONDS)
                _send(signal.SIGTERM, _descendants())
    return 128 - code if code < 0 else code


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _send(number: int, processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(run(command_of(sys.argv[1:])))
