"""Whose matrix products a run takes: a trial before its first step."""

import copy
import dataclasses
import time

import torch

from mnist.data import IMAGE_SHAPE
from mnist.distributed import World
from mnist.model import CLASSES, MLP
from mnist.products import Kind
from mnist.training.config import TrainConfig
from mnist.training.step import Learner

_SECONDS = 0.02  # for each kind
_NEAR_TIE = 1.1


def faster_products(config: TrainConfig, world: World) -> Kind:
    """Whose products make the faster steps of this run, as this process measures it.

    Times whole steps of a network of the run's widths, since the kinds differ in what they need
    besides products. The shortest of several counts: machines are not always idle.
    """
    if world.device.type != "cpu":
        return "torch"
    half = world.precision != torch.float32
    # In half precision the bits of oneDNN's depend less on the threads.
    kinds: tuple[Kind, Kind] = ("onednn", "torch") if half else ("torch", "onednn")
    count = max(1, config.batch_size // world.size)
    alone = dataclasses.replace(world, rank=0, size=1, meeting=None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, IMAGE_SHAPE[0] * IMAGE_SHAPE[1], generator=generator)
    labels = torch.arange(count) % CLASSES
    model = MLP(config.hidden_sizes).initialise(0)
    learners = [Learner(copy.deepcopy(model), config, alone, kind) for kind in kinds]
    inputs = [images.to(learner.input_dtype) for learner in learners]
    seconds: list[list[float]] = [[], []]
    while any(len(spent) < 4 or sum(spent[1:]) < _SECONDS for spent in seconds):
        for learner, each, spent in zip(learners, inputs, seconds, strict=True):
            started = time.perf_counter()
            learner.step(each, labels, count, 0.0)
            spent.append(time.perf_counter() - started)
    first, second = (min(spent[1:]) for spent in seconds)  # without that which makes its kernels
    return kinds[1] if first > _NEAR_TIE * second else kinds[0]
