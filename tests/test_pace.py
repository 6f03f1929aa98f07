"""Threads that follow what a machine has left, on a clock of the test's own."""

import pytest
import torch

from mnist import pace as pace_module
from mnist.pace import Pace, SpeedWatch
from mnist.threads import Surroundings

THREADS = torch.get_num_threads()


class Machine:
    """A loop on a simulated machine: seconds of a step by threads, and what the system says."""

    def __init__(self, monkeypatch):
        self.now, self.taken, self.idle = 0.0, 0.0, 0.0
        self.threads = None
        self.busy = False
        monkeypatch.setattr(pace_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(pace_module, "_switches", lambda: int(self.taken))
        monkeypatch.setattr(pace_module._Cores, "_times", lambda _: (self.idle, self.now))
        monkeypatch.setattr(torch, "set_num_threads", self.set_threads)
        monkeypatch.setattr(pace_module, "surroundings", lambda: Surroundings(cores=2))

    def set_threads(self, count):
        self.threads = count

    def run(self, pace, seconds):
        """Steps for so long; returns how many."""
        end, steps = self.now + seconds, 0
        while self.now < end:
            several = pace.threads > 1
            step = (0.010 if self.busy else 0.001) if several else 0.0015
            self.now += step
            self.taken += step * (190 if self.busy and several else 25)
            self.idle += 0 if self.busy or several else step
            pace.count(step)
            steps += 1
        return steps


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def same():
    return [torch.zeros(3)]


def test_an_idle_machine_keeps_all_threads_and_tries_nothing(machine):
    pace = Pace(2, lambda: pytest.fail("nothing is to be tried"))
    machine.run(pace, 20)
    assert pace.threads == 2 and machine.threads is None


def test_threads_follow_a_neighbour_that_comes_and_goes(machine):
    pace = Pace(2, same)
    for busy in (True, False, True, False):
        machine.busy = busy
        machine.run(pace, 3)
        assert pace.threads == (1 if busy else 2) == (machine.threads or 2)
    machine.busy = True
    machine.run(pace, 3)
    pace.close()
    assert machine.threads == 2


def test_beside_a_neighbour_a_run_has_nearly_the_speed_of_one_thread(machine):
    machine.busy = True
    pace = Pace(2, same)
    machine.run(pace, 1)
    assert machine.run(pace, 10) >= 0.97 * 10 / 0.0015


def test_threads_that_change_a_bit_are_never_taken(machine):
    def results():  # as a product that sums in another order
        return [torch.zeros(3), torch.full((2,), 1.0 if machine.threads == 1 else 1.0 + 2**-23)]

    machine.busy = True
    pace = Pace(2, results)
    machine.run(pace, 3)
    assert pace.threads == machine.threads == 2


@pytest.mark.parametrize("reason", ["one thread", "the user's OpenMP"])
def test_threads_stay(machine, monkeypatch, reason):
    if reason == "the user's OpenMP":
        found = Surroundings(cores=2, owns_openmp=True)
        monkeypatch.setattr(pace_module, "surroundings", lambda: found)
    machine.busy = True
    machine.run(Pace(1 if reason == "one thread" else 2, same), 3)
    assert machine.threads is None


def test_where_one_thread_fewer_is_too_many_still_few_are_tried(machine):
    pace = Pace(16, same)
    assert pace._rungs == [1, 8, 15, 16]
    machine.busy = True
    machine.run(pace, 3)  # here more than one thread never helps
    assert pace.threads == 1


def test_real_threads_change_and_come_back(monkeypatch):
    monkeypatch.setattr(pace_module, "surroundings", lambda: Surroundings(cores=2))
    pace = Pace(2, same)
    try:
        pace._set(0)
        assert torch.get_num_threads() == 1
        pace.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(THREADS)


def watched(monkeypatch, capsys, speeds, *, threads=2, cores=2, others=0.0, is_main=True):
    """What is said of a loop of so many images/s, each for ten steps of half a second."""
    now = [0.0]
    monkeypatch.setattr(pace_module, "usable_cores", lambda: cores)
    monkeypatch.setattr(pace_module.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(
        pace_module, "_busy_seconds", lambda: (now[0] * (1.5 + others), now[0] * 1.5, now[0])
    )
    watch = SpeedWatch("training", threads, is_main)
    for speed in speeds:
        for _ in range(10):
            now[0] += 0.5
            watch.count(speed // 2, 0.5)
    return capsys.readouterr().err


def test_a_third_of_the_best_speed_for_ten_seconds_is_said_once(monkeypatch, capsys):
    said = watched(monkeypatch, capsys, [30_000, 9_000, 9_000, 9_000, 9_000], others=1.9)
    assert said == (
        "warning: training is at 9,000 images/s, a third or less of its best (30,000), for 10 s: "
        "other processes use 1.9 of 4 cores\n"
    )
    again = [30_000, 9_000, 9_000, 9_000, 30_000, 30_000, 9_000, 9_000, 9_000]
    assert watched(monkeypatch, capsys, again).count("warning") == 2
    assert watched(monkeypatch, capsys, again, is_main=False) == ""


def test_the_reason_may_be_cores_that_are_gone_or_unknown(monkeypatch, capsys):
    slow = [30_000, 9_000, 9_000, 9_000]
    assert watched(monkeypatch, capsys, slow, threads=4, cores=2).endswith(
        "for 10 s: 4 threads, and 2 core(s) can be used\n"
    )
    assert watched(monkeypatch, capsys, slow).endswith("for 10 s\n")


@pytest.mark.parametrize("speeds", [[30_000, 11_000] * 3, [30_000, 9_000, 30_000] * 3, [9_000] * 9])
def test_a_slower_phase_is_not_worth_a_line(monkeypatch, capsys, speeds):
    assert watched(monkeypatch, capsys, speeds) == ""
