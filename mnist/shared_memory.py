"""Processes of one machine: memory that all of them have, and a barrier of microseconds.

The memory has no name, and goes with its processes, however they end. So do the sockets of the
barrier, by which a process learns at once that another is gone.
"""

import mmap
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

_LOOKS = 100  # at a socket, of a microsecond each, before a process lets its core go
_TOKEN = b"."
_BACKLOG = 128  # calls that wait for an answer, others' too
_SECONDS_TO_ANSWER = 5.0  # of a process that has called already, or listens
_CREDENTIALS = struct.Struct("iII")  # of a process: its number, its user, its group
_TIME = struct.Struct("ll")  # seconds and microseconds


class Neighbours:
    """All processes of a world, which run on one machine.

    A barrier takes log2(size) rounds, in which each process tells one other that it is here, and
    hears it of a third (Hensgen, Finkel and Manber 1988).
    """

    def __init__(
        self, rank: int, told: Sequence[socket.socket], heard: Sequence[socket.socket]
    ) -> None:
        self._rank = rank
        self._rounds = list(zip(told, heard, strict=True))

    def wait(self) -> None:
        """Until all are here.

        Raises:
            OSError: another is gone, or does not come within the time that sockets wait.
        """
        for told, heard in self._rounds:
            told.send(_TOKEN)
            _receive(heard)

    def share(self, size: int) -> mmap.mmap:
        """Zeros, so many bytes: one memory for all. All processes do this together.

        Raises:
            OSError: another is gone, or there is no memory.
        """
        told, heard = self._rounds[0]  # the next rank, and the one before
        memory = os.memfd_create("gradients") if self._rank == 0 else _receive_file(heard)
        try:
            if self._rank == 0:
                os.ftruncate(memory, size)
            socket.send_fds(told, [_TOKEN], [memory])
            if self._rank == 0:
                os.close(_receive_file(heard))  # its own comes back
            return mmap.mmap(memory, size)
        finally:
            os.close(memory)


def _receive(heard: socket.socket) -> None:
    for _ in range(_LOOKS):
        try:
            token = heard.recv(1, socket.MSG_DONTWAIT)
            break
        except BlockingIOError:
            os.sched_yield()
    else:
        try:
            token = heard.recv(1)
        except BlockingIOError:
            raise TimeoutError("no answer") from None
    if not token:
        raise ConnectionResetError("connection closed by peer")


def _receive_file(heard: socket.socket) -> int:
    _, files, *_ = socket.recv_fds(heard, 1, 1)
    if not files:
        raise ConnectionResetError("connection closed by peer")
    return files[0]


def meet_neighbours(
    rank: int, size: int, timeout: int, from_all: Callable[[Callable[[], Any]], list[Any]]
) -> Neighbours | None:
    """Those of a world of several, or None if they are not all here, of one user, on a Linux.

    Names of sockets without a file are the machine's (a network namespace's) own. All processes do
    this together.

    Args:
        rank: of this process.
        size: of the world.
        timeout: whole seconds that a barrier waits at most.
        from_all: returns what a function returns on each rank.
    """
    known = hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")
    distances = [1 << power for power in range((size - 1).bit_length())]
    told: list[socket.socket] = []
    heard: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        if known:
            listener.bind(b"\0mnist-" + os.urandom(16).hex().encode())
            listener.listen(_BACKLOG)
        names = from_all(lambda: listener.getsockname() if known else None)

        def call() -> bool:
            """Whether all that this one is to tell are here."""
            try:
                for distance in distances:
                    told.append(socket.socket(socket.AF_UNIX))
                    told[-1].settimeout(_SECONDS_TO_ANSWER)
                    told[-1].connect(names[(rank + distance) % size])
                    told[-1].send(struct.pack("i", distance))
                    told[-1].settimeout(None)
            except OSError:
                return False
            return True

        def answer() -> bool:
            """Whether all that this one is to hear are processes of this user."""
            listener.settimeout(_SECONDS_TO_ANSWER)
            try:
                while len(heard) < len(distances):
                    connection, _ = listener.accept()
                    if not _is_own(connection):
                        connection.close()
                        continue
                    # Python's own timeout would ask before it looks.
                    limit = _TIME.pack(timeout, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
                    (distance,) = struct.unpack("i", connection.recv(4))
                    heard[distance] = connection
            except (OSError, struct.error):
                return False
            return True

        if None not in names and all(from_all(call)) and all(from_all(answer)):
            return Neighbours(rank, told, [heard[distance] for distance in distances])
    for connection in (*told, *heard.values()):
        connection.close()
    return None


def _is_own(connection: socket.socket) -> bool:
    """Whether a process of this user is at the other end: anyone on the machine may call."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(told)[1] == os.geteuid())
