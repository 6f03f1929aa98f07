"""Full speed on a machine that is not idle: fewer threads while others need the cores.

The threads of a step wait for one another some thirty times, spinning. Where one of them is not
running, as something else has its core, each wait lasts a tick of the scheduler: a step of two
threads then takes five to twenty times as long, one of a single thread no longer than ever.
"""

import os
import resource
import time
from collections.abc import Callable

import psutil
import torch

from mnist.system import warn
from mnist.threads import surroundings, usable_cores

_WINDOW_SECONDS = 0.04  # several slices that the scheduler gives
_WINDOW_STEPS = 6
# Others are at work if the system takes cores away so often a second (25 times on an idle machine,
# nearly 200 beside a busy loop), or if steps take so many times as long as the best did; or if both
# are somewhat so.
_SWITCHES, _SLOWER = 120.0, 2.0
_SOME_SWITCHES, _SOMEWHAT_SLOWER = 50.0, 1.3
_BETTER = 0.95  # of the time: worth a change
_EXCESS_STEPS = 3.0  # that a trial may cost
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 2.0  # between trials
_FREE_CORES = 0.4  # idle, for each thread more


class Pace:
    """Takes as many threads for a loop's steps as make them fastest, up to those it was given.

    Nothing is tried unless steps take longer than they did, or the system takes cores away; then
    the next fewer threads are, for a few steps, and kept if they are faster. Of more threads the
    same, when cores are idle. Threads never change unless the bits stay the same.
    """

    def __init__(self, threads: int, results: Callable[[], list[torch.Tensor]]) -> None:
        """
        Args:
            threads: at most; with 1, or where the user has said how OpenMP's threads wait or where
                they are, nothing changes.
            results: what the loop computes, in all the sizes it has; compared at each number of
                threads before that is tried.
        """
        fixed = threads == 1 or surroundings().owns_openmp
        counts = {1, threads // 2, threads - 1, threads} - {0}
        self._rungs = [threads] if fixed else sorted(counts)
        self._results = results
        self._allowed: dict[int, bool] = {threads: True}
        self._at = len(self._rungs) - 1
        self._best = [float("inf")] * len(self._rungs)
        self._from: int | None = None  # the rung to go back to, in a trial
        self._mean = float("inf")  # seconds of a step, before the trial
        self._down = True  # the direction of the next trial
        self._reach = 1  # rungs down from here, at the next trial of fewer
        self._pause, self._next_trial = _PAUSE_SECONDS, 0.0
        self._cores = _Cores()
        self._begin_window()

    @property
    def threads(self) -> int:
        """As many as steps have now."""
        return self._rungs[self._at]

    def count(self, seconds: float) -> None:
        """After each step: how long it took."""
        if len(self._rungs) > 1:
            self._count(seconds, time.perf_counter())

    def close(self) -> None:
        """Go back to the threads of the beginning."""
        if self._at != len(self._rungs) - 1:
            self._set(len(self._rungs) - 1)

    def _begin_window(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._switches = _switches()

    def _count(self, seconds: float, now: float) -> None:
        self._steps += 1
        if self._steps == 1 and self._from is not None:
            return  # the first with other threads wakes them
        self._seconds += seconds
        counted = self._steps - (self._from is not None)
        if self._from is not None and self._seconds > (counted + _EXCESS_STEPS) * self._mean:
            self._end_trial(better=False, now=now)
        elif counted >= _WINDOW_STEPS and self._seconds >= _WINDOW_SECONDS:
            mean = self._seconds / counted
            self._best[self._at] = min(self._best[self._at], mean)
            if self._from is not None:
                self._end_trial(better=mean < _BETTER * self._mean, now=now)
            else:
                self._look(mean, now)
            self._begin_window()

    def _look(self, mean: float, now: float) -> None:
        """Begin a trial if there is reason to."""
        rate = (_switches() - self._switches) / self._seconds
        times = mean / self._best[self._at]
        disturbed = rate > _SWITCHES or times > _SLOWER
        disturbed |= rate > _SOME_SWITCHES and times > _SOMEWHAT_SLOWER
        if now < self._next_trial:
            return
        fewer, more = max(self._at - self._reach, 0), self._at + 1
        up = more < len(self._rungs) and self._cores.are_free(self._rungs[more] - self.threads)
        down = fewer < self._at and disturbed
        if not (up or down):
            return
        to = fewer if down and (self._down or not up) else more
        if not self._is_allowed(to):
            self._reach_further(to)
            return
        self._from, self._mean = self._at, mean
        self._set(to)

    def _end_trial(self, better: bool, now: float) -> None:
        assert self._from is not None
        tried_down = self._at < self._from
        if better:
            self._down, self._pause, self._next_trial = tried_down, _PAUSE_SECONDS, now
            self._reach = 1
        else:
            if tried_down:
                self._reach_further(self._at)
            self._set(self._from)
            self._down = not tried_down
            self._next_trial = now + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        self._from = None

    def _reach_further(self, tried: int) -> None:
        """Next time: one thread fewer may be too many still; after the lowest rung, begin anew."""
        self._reach = self._reach + 1 if tried else 1

    def _set(self, rung: int) -> None:
        self._at = rung
        torch.set_num_threads(self.threads)
        self._begin_window()

    def _is_allowed(self, rung: int) -> bool:
        """Whether all is the same bit for bit with so many threads."""
        threads = self._rungs[rung]
        if threads not in self._allowed:
            torch.set_num_threads(self._rungs[-1])
            expected = self._results()
            torch.set_num_threads(threads)
            found = self._results()
            torch.set_num_threads(self.threads)
            self._allowed[threads] = all(map(torch.equal, expected, found))
        return self._allowed[threads]


def _switches() -> int:
    """How often this process had to leave a core that it would have kept."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class _Cores:
    """Whether cores are idle, of those that this process may use; where that is not known (no
    Linux), they are always taken for that."""

    def __init__(self) -> None:
        self._known = hasattr(os, "sched_getaffinity")
        self._before = self._times()

    def _times(self) -> tuple[float, float]:
        """Idle seconds of all usable cores, and when."""
        if not self._known:
            return 0.0, 0.0
        usable = os.sched_getaffinity(0)
        each = enumerate(psutil.cpu_times(percpu=True))
        return sum(core.idle + core.iowait for i, core in each if i in usable), time.perf_counter()

    def are_free(self, count: int) -> bool:
        """Whether nearly so many were idle since this was last asked."""
        (idle, now), (idle_before, before) = self._times(), self._before
        if self._known and now - before < _PAUSE_SECONDS:
            return False
        self._before = idle, now
        return not self._known or idle - idle_before >= _FREE_CORES * count * (now - before)


_WATCH_SECONDS = 10.0
_FALLEN = 1 / 3


class SpeedWatch:
    """Says in one line when a loop's speed falls to a third of its own best for ten seconds; where
    several processes step together, the first of them says it."""

    def __init__(self, doing: str, threads: int, is_main: bool = True) -> None:
        self._doing, self._threads, self._is_main = doing, threads, is_main
        self._best, self._slow_seconds, self._said = 0.0, 0.0, False
        self._images, self._seconds = 0, 0.0
        self._busy = _busy_seconds()

    def count(self, images: int, seconds: float) -> None:
        """After each step."""
        self._images += images
        self._seconds += seconds
        if self._seconds < 1:
            return
        speed = self._images / self._seconds
        self._best = max(self._best, speed)
        if speed > _FALLEN * self._best:
            self._slow_seconds, self._busy = 0.0, _busy_seconds()
            self._said = self._said and speed < 2 * _FALLEN * self._best
        else:
            self._slow_seconds += min(self._seconds, 2.0)  # one step may be long for other reasons
            if self._slow_seconds >= _WATCH_SECONDS and self._is_main and not self._said:
                self._said = True
                warn(
                    f"{self._doing} is at {speed:,.0f} images/s, a third or less of its best "
                    f"({self._best:,.0f}), for 10 s{self._reason()}"
                )
        self._images, self._seconds = 0, 0.0

    def _reason(self) -> str:
        cores = usable_cores()
        if cores < self._threads:
            return f": {self._threads} threads, and {cores} core(s) can be used"
        others, own, now = (
            after - before for after, before in zip(_busy_seconds(), self._busy, strict=True)
        )
        share = (others - own) / now
        if share > 0.3:
            return f": other processes use {share:.1f} of {os.cpu_count()} cores"
        return ""


def _busy_seconds() -> tuple[float, float, float]:
    """CPU seconds of all processes, those of this one, and the time."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
    own = psutil.Process().cpu_times()
    return busy, own.user + own.system, time.perf_counter()
