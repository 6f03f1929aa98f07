"""Sums of gradients against NumPy's, in memory and over a network, and processes that are gone."""

import itertools
import os
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from fork_worlds import in_worlds

from mnist.cli import WorldError
from mnist.distributed import connect
from mnist.model import MLP
from mnist.training.allreduce import Network, SharedMemory, open_reducer
from mnist.training.config import TrainConfig

# An odd number of weights, of which the first layer's are no multiple of 16, in several chunks.
WIDTHS = (257, 130, 9, 7)


WORLDS = [(2, "fp32"), (2, "bf16"), (3, "bf16"), (5, "fp32")]


def work_of_one(job, precision, way):
    """What one process does."""
    config = TrainConfig(precision=precision, hidden_sizes=WIDTHS, threads=1)
    world = connect(config)
    model = MLP(WIDTHS)
    reducer = open_reducer(world, model)
    assert isinstance(reducer, SharedMemory)
    if way == "network":
        reducer = Network(world, model)
    if "gone" in job:
        notice_who_is_gone(world, reducer)
    else:
        compare_sums(world, model, reducer)


def compare_sums(world, model, reducer):
    size = sum(p.numel() for p in model.parameters())
    if isinstance(reducer, SharedMemory):  # each number is updated by one process
        chunks = [chunk for rank in world.from_all(lambda: reducer.chunks) for chunk in rank]
        assert [n for chunk in chunks for n in range(size)[chunk]] == list(range(size))
    totals = reducer.zeros(size, torch.float32)
    for step in range(3):
        messages = [
            torch.randn(size, generator=torch.Generator().manual_seed(100 * step + rank))
            for rank in range(world.size)
        ]
        stops = [rank % 2 == 1 and step == 1 for rank in range(world.size)]
        reducer.begin()
        time.sleep(0.01 * (world.rank == step % world.size))
        reducer.message[:-1] = torch.inf  # a part is not looked at before it is sent
        reducer.message[-1] = stops[world.rank]
        ends = itertools.accumulate(
            sum(p.numel() for p in layer.parameters()) for layer in model.layers
        )
        layers = list(itertools.pairwise([0, *ends]))
        for number, part in enumerate(reducer.parts):
            where = slice(layers[part[0]][0], layers[part[-1]][1])
            reducer.message[where] = messages[world.rank][where]
            reducer.send(number)
        for chunk, found in zip(reducer.chunks, reducer.sums(), strict=True):
            totals[chunk] = found
        reducer.settle()
        assert reducer.stops.item() == sum(stops)
        assert np.array_equal(totals.numpy(), expected(messages, world.precision, reducer))
        reducer.settle()


def expected(messages, precision, reducer):
    """Their sum in float32, one rank after another; what travels is rounded to the precision."""

    def rounded(values):
        halved = isinstance(reducer, Network) and precision != torch.float32
        return values.to(precision).float() if halved else values

    total = np.zeros(len(messages[0]), np.float32)
    for message in messages:
        total += rounded(message).numpy()
    return total if len(messages) == 2 else rounded(torch.from_numpy(total)).numpy()


def notice_who_is_gone(world, reducer):
    for step in range(9):
        reducer.begin()
        if step == 5 and world.rank == 1:
            os._exit(0)
        with ExitStack() as stack:
            if step == 5:
                stack.enter_context(pytest.raises(WorldError, match="another process is gone"))
                started = time.monotonic()
            for part in range(len(reducer.parts)):
                reducer.send(part)
            for _ in reducer.sums():
                pass
            reducer.settle()
        if step == 5:
            assert time.monotonic() - started < 5
            os._exit(0)


@pytest.mark.parametrize("way", ["memory", "network"])
def test_sums_are_those_of_numpy_bit_for_bit(way):
    in_worlds([(size, "reducers", [precision, way]) for size, precision in WORLDS])


@pytest.mark.parametrize("way", ["memory", "network"])
def test_a_process_that_is_gone_is_noticed(way):
    in_worlds([(size, "reducers, one is gone", ["fp32", way]) for size in (2, 3)])
