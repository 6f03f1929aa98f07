"""Whose matrix products a run takes: a trial before its first step."""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mnist.data import IMAGE_SHAPE
from mnist.distributed import World
from mnist.model import CLASSES, MLP
from mnist.products import Kind
from mnist.training.config import TrainConfig
from mnist.training.step import Learner

_SECONDS = 0.02  # for each kind
_LONGEST_SECONDS = 0.2  # for each, where steps are disturbed
_UNDISTURBED = 3  # steps
_RUNNING = 0.9  # of the time, all threads: else one has lost its core, and the others wait for it
_NEAR_TIE, _NEAR_TIE_OF_THREADS = 1.1, 1.5  # the latter in half precision


def faster_products(config: TrainConfig, world: World) -> Kind:
    """Whose products make the faster steps of this run, as this process measures it.

    Times whole steps of a network of the run's widths, since the kinds differ in what they need
    besides products. A run should choose the same beside other processes as alone: where these
    disturb the steps, those of a single thread are compared.
    """
    if world.device.type != "cpu":
        return "torch"
    half = world.precision != torch.float32
    kinds: tuple[Kind, Kind] = ("onednn", "torch") if half else ("torch", "onednn")
    threads = torch.get_num_threads()
    # In half precision the bits of oneDNN's depend less on the threads. A run with torch's may have
    # to keep all of them where others want the cores, and be many times slower.
    near_tie = _NEAR_TIE_OF_THREADS if half and threads > 1 else _NEAR_TIE
    count = -(-config.batch_size // world.size)
    alone = dataclasses.replace(world, rank=0, size=1, meeting=None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, IMAGE_SHAPE[0] * IMAGE_SHAPE[1], generator=generator)
    labels = torch.arange(count) % CLASSES
    model = MLP(config.hidden_sizes).initialise(0)
    steps: list[Callable[[], None]] = []
    for kind in kinds:
        learner = Learner(copy.deepcopy(model), config, alone, kind)
        inputs = images.to(learner.input_dtype)
        steps.append(partial(learner.step, inputs, labels, count, 0.0))
    timings = _time(steps)
    if threads > 1 and not all(timing.is_undisturbed for timing in timings):
        torch.set_num_threads(1)
        timings = _time(steps)
        torch.set_num_threads(threads)
    first, second = (timing.shortest for timing in timings)
    return kinds[1] if first > near_tie * second else kinds[0]


class _Timing:
    """Of the steps of one kind, without the first, which makes its kernels."""

    def __init__(self) -> None:
        self._steps, self._undisturbed = -1, 0
        self._seconds, self.shortest = 0.0, float("inf")

    def add(self, step: Callable[[], None]) -> None:
        """Time one."""
        started, cpu = time.perf_counter(), time.process_time()
        step()
        cpu, seconds = time.process_time() - cpu, time.perf_counter() - started
        self._steps += 1
        if self._steps:
            self._seconds += seconds
            self.shortest = min(self.shortest, seconds)
            self._undisturbed += cpu > _RUNNING * torch.get_num_threads() * seconds

    @property
    def is_undisturbed(self) -> bool:
        """Whether in some steps all threads were running."""
        return self._undisturbed >= _UNDISTURBED

    @property
    def is_known(self) -> bool:
        """Whether there are enough."""
        enough = _SECONDS if self.is_undisturbed else _LONGEST_SECONDS
        return self._steps >= _UNDISTURBED and self._seconds >= enough


def _time(steps: Sequence[Callable[[], None]]) -> list[_Timing]:
    """In turn, as machines change their speed."""
    timings = [_Timing() for _ in steps]
    while not all(timing.is_known for timing in timings):
        for step, timing in zip(steps, timings, strict=True):
            timing.add(step)
    return timings
