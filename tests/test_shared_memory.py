"""Processes of one machine, here as threads: they know of one another by sockets alone."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mnist import shared_memory
from mnist.shared_memory import meet_neighbours

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="it is Linux that has it")


def in_threads(size, function, timeout=5, from_all=None):
    """What ``function(rank, neighbours)`` returns for each of a world, or raises."""
    told, meeting = [None] * size, threading.Barrier(size)

    def work(rank):
        def of_all(say):
            told[rank] = say()
            meeting.wait()
            everything = list(told)
            meeting.wait()
            return everything

        try:
            return function(rank, meet_neighbours(rank, size, timeout, from_all or of_all))
        except OSError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_nobody_goes_on_before_all_have_come(size):
    come = [0] * size

    def work(rank, neighbours):
        for turn in range(1, 30):
            time.sleep(0.002 * ((turn + rank) % 5 == 0))
            come[rank] = turn
            neighbours.wait()
            assert min(come) >= turn
            neighbours.wait()
        return "done"

    assert in_threads(size, work) == ["done"] * size


@pytest.mark.parametrize("size", [2, 3, 7])
def test_memory_is_one_for_all_and_begins_as_zeros(size):
    def work(rank, neighbours):
        memory = neighbours.share(10_000)
        assert len(memory) == 10_000 and not any(bytes(memory))
        neighbours.wait()
        memory[rank] = rank + 1
        neighbours.wait()
        return bytes(memory[:size])

    assert in_threads(size, work) == [bytes(range(1, size + 1))] * size


def test_a_neighbour_that_is_gone_is_noticed_at_once():
    def work(rank, neighbours):
        neighbours.wait()
        if rank == 1:
            for connections in neighbours._rounds:
                for connection in connections:
                    connection.close()
            return None
        started = time.monotonic()
        try:
            neighbours.wait()
            neighbours.wait()
        finally:
            assert time.monotonic() - started < 1

    found = in_threads(3, work, timeout=60)
    assert found[1] is None
    assert isinstance(found[0], ConnectionError) and isinstance(found[2], ConnectionError)


def test_a_neighbour_that_does_not_come_is_waited_for_so_long_and_no_longer():
    def work(rank, neighbours):
        if rank == 1:
            time.sleep(1.5)
            return None
        neighbours.wait()
        return None

    found = in_threads(2, work, timeout=1)
    assert isinstance(found[0], TimeoutError) and str(found[0]) == "no answer"


def test_processes_of_several_machines_have_no_memory_in_common():
    # A name that nobody here has, as another machine's; and one that is no Linux.
    for other in (b"\0mnist-elsewhere", None):

        def from_all(say, other=other):
            own = say()
            return [own, other] if isinstance(own, bytes) else [own, True]

        assert meet_neighbours(0, 2, 1, from_all) is None


def test_strangers_are_not_let_in(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert shared_memory._is_own(ours)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert not shared_memory._is_own(ours)


def test_a_stranger_who_calls_first_does_not_keep_processes_apart(monkeypatch):
    strangers, is_own = [], shared_memory._is_own

    class Listener(socket.socket):
        def listen(self, backlog):
            super().listen(backlog)
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(self.getsockname())
            strangers.append(stranger)

    seen = set()

    def first_is_strange(connection):
        name = connection.getsockname()
        return bool(name in seen or seen.add(name)) and is_own(connection)

    monkeypatch.setattr(shared_memory.socket, "socket", Listener)
    monkeypatch.setattr(shared_memory, "_is_own", first_is_strange)
    assert in_threads(3, lambda rank, neighbours: neighbours.wait()) == [None] * 3
    assert all(stranger.recv(1) == b"" for stranger in strangers)


def test_processes_of_several_users_have_no_memory_in_common(monkeypatch):
    monkeypatch.setattr(shared_memory, "_SECONDS_TO_ANSWER", 0.2)
    monkeypatch.setattr(shared_memory, "_is_own", lambda connection: False)
    assert in_threads(2, lambda rank, neighbours: neighbours) == [None] * 2


def test_a_neighbour_that_goes_before_memory_is_shared_is_noticed():
    def work(rank, neighbours):
        if rank == 0:
            neighbours._rounds[0][0].close()
            return None
        return neighbours.share(4096)

    assert isinstance(in_threads(2, work)[1], ConnectionError)
