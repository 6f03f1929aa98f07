"""Where the processes of a world, and the launchers of several nodes, wait for one another.

Before they work they import and load, from disks that may be cold and on machines that may be
paused: they wait for minutes, say for whom, and heed signals. Once they work, whoever is not there
within a minute is gone, which is the affair of collectives.
"""

import datetime
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from torch import distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from mnist.cli import EXIT_CODE_FILE, WorldError
from mnist.system import StopRequest

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
"""Once all have met."""
# How long processes may wait for one another until all of them work: before, they import and load
# from disks that may be cold, on machines that may have been paused.
PATIENCE_SECONDS = 600.0
_SECONDS_BEFORE_LINE, _SECONDS_BETWEEN_LINES = 10.0, 30.0  # that says who is waited for
_SECONDS_FOR_A_NAME = 10.0  # that no machine has, before it is a mistake
_SECONDS_TO_END = 4.0  # of a process that loads when it is asked to stop, and has nothing to save


@contextmanager
def contact() -> Iterator[None]:
    """Turn what a collective raises into one line."""
    try:
        yield
    except WorldError:
        raise
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WorldError(
            f"another process is gone ({reason}); the same command again goes on from what is saved"
        ) from None


class RollCall(threading.Thread):
    """Tells a store that this one of several is here, and asks it who else is.

    In a thread of its own: who asks a store waits for the answer in C++, where no signal is heard,
    and for ever if its host is paused.
    """

    def __init__(
        self,
        name: str,
        noun: str,
        rank: int,
        size: int,
        address: str,
        open_store: Callable[[], Store],
    ) -> None:
        super().__init__(daemon=True)
        self.store: Store | None = None
        self.complete = False
        self._name, self._noun, self._rank, self._size = name, noun, rank, size
        self._address, self.open_store = address, open_store
        self._missing: list[int] | None = None
        self._heard = -math.inf  # when the store has answered
        self._over = False
        self._error: Exception | None = None

    def run(self) -> None:
        """What the thread does."""
        try:
            store = self.store = self.open_store()
            store.set(self._key(self._rank), "")
            store.add(self._name, 1)
            looked, pause = time.monotonic(), 0.005
            while store.add(self._name, 0) < self._size and not self._over:
                self._heard = time.monotonic()
                if self._heard - looked > 0.5:
                    self._missing, looked = self._look(store), self._heard
                time.sleep(pause)
                pause = min(2 * pause, 0.2)
            self.complete = True
        except Exception as error:
            self._error = error  # for the thread that waits

    def _key(self, rank: int) -> str:
        return f"{self._name}: {rank}"

    def _look(self, store: Store) -> list[int] | None:
        if any(store.check([self._key(rank)]) for rank in range(self._rank)):
            return None
        return [rank for rank in range(self._size) if not store.check([self._key(rank)])]

    def _absent(self) -> str | None:
        """Who has not come, for a person to read; None if a lower one of those here tells it."""
        if self.complete:
            return None
        if time.monotonic() - self._heard > 5:
            return f"{self._noun} 0 of {self._size} at {self._address}"
        if not self._missing:
            return None
        shown = ", ".join(map(str, self._missing[:8])) + (" and more" if self._missing[8:] else "")
        return f"{self._noun}{'s' if self._missing[1:] else ''} {shown} of {self._size}"

    def wait(self, come: Callable[[], bool] | None = None, stop: StopRequest | None = None) -> None:
        """Start, and wait until all are here, by their own word or as ``come`` tells.

        Raises:
            WorldError: they did not come within ten minutes.
            SystemExit: with 75: ``stop`` was requested.
            Exception: what ``open_store`` or the store has raised.
        """
        self.start()
        began, asked = time.monotonic(), math.inf
        next_line, pause = _SECONDS_BEFORE_LINE, 0.001
        while not (come() if come else self.complete):
            waited = time.monotonic() - began
            if self._error and not come:
                raise self._error
            if stop is not None and stop.requested:
                asked = min(asked, waited)
            # Not at once: of a process that is lost its launcher tells the others by a signal, too,
            # and who is told a little later would take this one for lost.
            if waited - asked > 0.5:
                time.sleep(0.5)
                if absent := self._absent():
                    _say_interrupted(f", waiting for {absent}")
                raise SystemExit(75)
            if waited > PATIENCE_SECONDS:
                raise WorldError(
                    f"{self._absent() or 'another one'} did not come within "
                    f"{_duration(PATIENCE_SECONDS)}; the same command again tries again"
                )
            if waited > next_line and (absent := self._absent()):
                next_line = waited + _SECONDS_BETWEEN_LINES
                _say(
                    f"waiting for {absent} ({_duration(waited)} so far, "
                    f"{_duration(PATIENCE_SECONDS)} at most)"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        self._over = True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_interrupted(meanwhile: str = "") -> None:
    _say(
        f"interrupted before the first step{meanwhile}: nothing to save; the same command again "
        "goes on"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 120 else f"{seconds:.0f} s"


class Meeting:
    """Where the processes of a world wait for one another as long as they prepare their work."""

    def __init__(self, rank: int, size: int, store: Store, stop: StopRequest | None = None) -> None:
        """All processes do this together.

        Args:
            rank: of this process.
            size: of the world.
            store: one that they share.
            stop: what ends a process that waits.
        """
        self._rank, self._size, self._store, self._stop = rank, size, store, stop
        self._turn = 0
        # Over the store alone, a process that is gone would not be noticed. Also on GPUs: NCCL
        # begins with a wait that hears no signal.
        patience = datetime.timedelta(seconds=2 * PATIENCE_SECONDS)
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=patience))

    def wait(self) -> None:
        """Wait until all processes are here; see ``World.preparing``."""
        if self._stop is not None and self._stop.requested:
            time.sleep(1)  # as the others do
            if self._rank == 0:
                _say_interrupted()
            raise SystemExit(75)
        self._turn += 1
        address = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        name = f"turn {self._turn}"
        roll = RollCall(name, "rank", self._rank, self._size, address, lambda: self._store)
        with contact():
            barrier = dist.barrier(self._group, async_op=True)
        roll.wait(barrier.is_completed, self._stop)
        with contact():
            barrier.wait()

    def add(self, name: str, number: int) -> int:
        """Add to a number that all processes share; see ``shared_counter``."""
        with contact():
            return int(self._store.add(name, number))

    @contextmanager
    def ended_by_request(self) -> Iterator[None]:
        """End this process, should it be asked to stop and not come to ``wait`` within seconds."""
        over = threading.Event()
        if self._stop is not None:
            threading.Thread(target=self._end_on_request, args=(over,), daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _end_on_request(self, over: threading.Event) -> None:
        assert self._stop is not None
        while not over.wait(0.1):
            if self._stop.requested and not over.wait(_SECONDS_TO_END):
                if self._rank == 0:
                    _say_interrupted()
                    if EXIT_CODE_FILE in os.environ:
                        Path(os.environ[EXIT_CODE_FILE]).write_text("75")
                os._exit(75)


def shared_counter(name: str, meeting: Meeting | None) -> Callable[[int], int]:
    """A number that the processes of a world share, from 0: adds to it and returns what it is then.
    None waits for another.

    Args:
        name: for one counter of the job.
        meeting: the world's; None of a single process.

    Raises:
        WorldError: of what is returned: the machine that holds it is gone.
    """
    held = 0

    def add(number: int) -> int:
        nonlocal held
        if meeting is not None:
            return meeting.add(f"counter {name}", number)
        held += number
        return held

    return add


def open_store(host: str, port: int, size: int, serves: bool) -> Store:
    """A store at an address, by this process or, as soon as there is one, by another.

    Torch's own attempts print traces of C++ as they fail.

    Raises:
        OSError, UnicodeError: no machine has, or can have, this name.
        dist.DistError: the port is taken, or the store is gone again.
    """
    began = time.monotonic()
    while True:
        try:
            if serves:
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            nowhere = isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
            if nowhere and time.monotonic() - began > _SECONDS_FOR_A_NAME:
                raise
        time.sleep(0.1)
    return TCPStore(
        host,
        port,
        size,
        is_master=serves,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        multi_tenant=True,
    )
