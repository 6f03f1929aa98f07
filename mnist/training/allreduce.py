"""Sums of all processes' gradients, each in the way that is fastest where the processes are.

A message is a gradient and, as its last element, whether its rank is asked to stop. On CPUs sums
are in the order of ranks, of float32. Between machines, and between GPUs, gradients travel in bf16
where training is in bf16. (In fp16, scaled as they are, they could overflow.)
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from mnist.data import rank_slice
from mnist.distributed import World
from mnist.meeting import COLLECTIVE_TIMEOUT, contact
from mnist.model import MLP
from mnist.shared_memory import Neighbours, meet_neighbours

_CHUNK = 2**16  # numbers that are summed, and then learned from while they are in a core's cache
# The last few numbers of a chunk may be computed in another way, and so end with other bits, unless
# they are the last ones of all. And two processes should not write to the same line of a cache.
_ALIGNED = 16
_PAGE = 4096


class Reducer(Protocol):
    """Adds up messages, of one dtype, while those that are complete already travel."""

    message: Tensor
    """This rank's own; whoever has written a part of it calls ``send``."""
    stops: Tensor
    """How many ranks are asked to stop, after ``sums``."""
    parts: list[range]
    """Layers whose gradients travel together, in the order in which they are to be sent."""
    chunks: list[slice]
    """Of the parameters, which this rank updates, in the order in which ``sums`` has them."""

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """For what is updated: every rank sees all of it."""

    def begin(self) -> None:
        """A step begins."""

    def send(self, part: int) -> None:
        """Say that this part of the message is complete, and those before it."""

    def sums(self) -> Iterator[Tensor]:
        """The sums over all ranks, chunk by chunk: each is to be used before the next is taken."""

    def settle(self) -> None:
        """Wait until all ranks have updated their chunks."""


def open_reducer(world: World, model: MLP) -> Reducer:
    """The one for this world. All ranks do this together."""
    if world.size == 1 or world.device.type != "cpu":
        return AllReduce(world, model)
    timeout = int(COLLECTIVE_TIMEOUT.total_seconds())
    with contact():
        neighbours = meet_neighbours(world.rank, world.size, timeout, world.from_all)
        if neighbours is not None:
            return SharedMemory(world, model, neighbours)
    return Network(world, model)


def sizes_of_layers(model: MLP) -> list[int]:
    """Weights and biases of each."""
    return [sum(p.numel() for p in layer.parameters()) for layer in model.layers]


class AllReduce:
    """By the backend, which on GPUs knows how these are connected; of one process, nothing."""

    def __init__(self, world: World, model: MLP) -> None:
        sizes, dtype = sizes_of_layers(model), next(model.parameters()).dtype
        self._world = world
        self.message = torch.zeros(sum(sizes) + 1, dtype=dtype, device=world.device)
        self._sent = _to_send(self.message, world) if world.size > 1 else self.message
        self.stops = self.message[-1]
        self.parts = [range(len(sizes))]
        self.chunks: list[slice] = [slice(0, sum(sizes))]

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self._world.device)

    def begin(self) -> None:
        pass

    def send(self, part: int) -> None:
        if self._sent is not self.message:
            self._sent.copy_(self.message)
        self._world.all_reduce(self._sent)
        if self._sent is not self.message:
            self.message.copy_(self._sent)

    def sums(self) -> Iterator[Tensor]:
        yield self.message[:-1]

    def settle(self) -> None:
        pass


def _to_send(message: Tensor, world: World) -> Tensor:
    """What of a message travels: itself, or it in bf16."""
    is_bf16 = world.precision == torch.bfloat16
    return torch.empty_like(message, dtype=world.precision) if is_bf16 else message


class SharedMemory:
    """On one machine: each process adds up a part of all gradients where they were computed, and
    updates this part of the weights for all.

    What all see is changed between the two waits of a step alone, when each of them is in it. What
    they write before, from the same settings or the same checkpoint, is the same.
    """

    def __init__(self, world: World, model: MLP, neighbours: Neighbours) -> None:
        sizes, dtype = sizes_of_layers(model), next(model.parameters()).dtype
        self._neighbours, size = neighbours, sum(sizes)
        width = _in_pages((size + 1) * dtype.itemsize)
        # Weights, two states of an optimizer, an average, a copy in half precision.
        shared = neighbours.share((world.size + 5) * width)
        self._memory = torch.frombuffer(shared, dtype=torch.uint8)
        self._used = 0
        messages = [self.zeros(size + 1, dtype) for _ in range(world.size)]
        self._flags = [message[-1:] for message in messages]
        self.message = messages[world.rank]
        self.stops = torch.zeros(1, dtype=dtype)
        self.parts = [range(len(sizes))]
        lines = rank_slice(-(-size // _ALIGNED), world.rank, world.size)
        own = range(_ALIGNED * lines.start, min(_ALIGNED * lines.stop, size))
        self.chunks = _chunks(own)
        self._terms = [[message[chunk] for message in messages] for chunk in self.chunks]
        self._sum = torch.empty(_CHUNK, dtype=dtype)

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        start, length = self._used, size * dtype.itemsize
        self._used += _in_pages(length)
        return self._memory[start : start + length].view(dtype)

    def begin(self) -> None:
        pass

    def send(self, part: int) -> None:
        with contact():
            self._neighbours.wait()

    def sums(self) -> Iterator[Tensor]:
        _add(self._flags, self.stops)
        for terms in self._terms:
            yield _add(terms, self._sum[: len(terms[0])])

    def settle(self) -> None:
        with contact():
            self._neighbours.wait()


class Network:
    """Over a network: a part of the messages travels while others are computed or learned from."""

    def __init__(self, world: World, model: MLP) -> None:
        sizes, dtype = sizes_of_layers(model), next(model.parameters()).dtype
        size = sum(sizes)
        self.message = torch.zeros(size + 1, dtype=dtype)
        self.stops = torch.zeros(1, dtype=dtype)
        self.parts = [range(1), range(1, len(sizes))]
        self.chunks: list[slice] = []
        self._sum = torch.empty(_CHUNK, dtype=dtype)
        sent = _to_send(self.message, world)
        first = sizes[0] // _ALIGNED * _ALIGNED
        parts = [slice(0, first), slice(first, size + 1)]
        self._exchanges = [
            _Exchange(world, self.message[part], sent[part], tag) for tag, part in enumerate(parts)
        ]
        self._terms: list[list[list[Tensor]]] = []  # of each exchange's chunks
        for part, exchange in zip(parts, self._exchanges, strict=True):
            chunks = _chunks(range(part.start, min(part.stop, size)))
            own = [slice(c.start - part.start, c.stop - part.start) for c in chunks]
            self._terms.append([[term[c] for term in exchange.terms] for c in own])
            self.chunks += chunks
        self._flags = [term[-1:] for term in self._exchanges[-1].terms]

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def begin(self) -> None:
        with contact():
            for exchange in self._exchanges:
                exchange.receive()

    def send(self, part: int) -> None:
        with contact():
            self._exchanges[part].send()

    def sums(self) -> Iterator[Tensor]:
        with contact():
            for exchange in self._exchanges:
                exchange.spread()
        for exchange, chunks in zip(self._exchanges, self._terms, strict=True):
            with contact():
                exchange.finish()
            for terms in chunks:
                yield _add(terms, self._sum[: len(terms[0])])
        _add(self._flags, self.stops)

    def settle(self) -> None:
        pass


class _Exchange:
    """Of a part of the messages: two processes send each other all of theirs; of more, each adds up
    a share and sends all others its sums. All messages travel at once: around a ring, the time that
    one takes would count as often as there are processes.

    Gloo sends at once, and both ways at the same time, where it has been told before that the other
    is ready to receive: over 1 Gbit/s that takes half the time of its collectives.
    """

    def __init__(self, world: World, message: Tensor, sent: Tensor, tag: int) -> None:
        self._message, self._sent, rank = message, sent, world.rank
        self._others = [other for other in range(world.size) if other != rank]
        self._tags = 2 * tag, 2 * tag + 1
        self._requests: list[dist.Work | None] = []
        self._spread_to: list[dist.Work | None] = []
        if world.size == 2:  # what is sent to each rank, and received of it
            self._sent_to = [sent, sent]
            self._received = [sent if other == rank else torch.empty_like(sent) for other in (0, 1)]
            self._sums: list[Tensor] = []
            self.terms = self._received
        else:
            shares = [rank_slice(len(sent), other, world.size) for other in range(world.size)]
            self._sent_to = [sent[share] for share in shares]
            own = self._sent_to[rank]
            self._received = [
                own if other == rank else torch.empty_like(own) for other in range(world.size)
            ]
            self._exact = torch.empty_like(own, dtype=message.dtype)
            self.terms = [torch.empty_like(sent)]
            self._sums = [self.terms[0][share] for share in shares]
            self._own_sum = self._sums[rank]

    def receive(self) -> None:
        """Be ready for what others send."""
        first, second = self._tags
        self._requests = [dist.irecv(self._received[r], r, tag=first) for r in self._others]
        if self._sums:
            self._spread_to = [dist.irecv(self._sums[r], r, tag=second) for r in self._others]

    def send(self) -> None:
        """This part of the message is complete."""
        if self._sent is not self._message:
            self._sent.copy_(self._message)
        self._requests += [dist.isend(self._sent_to[r], r, tag=self._tags[0]) for r in self._others]

    def spread(self) -> None:
        """Add up this rank's share, if it has one, and send it."""
        if self._sums:
            _wait(self._requests)
            self._own_sum.copy_(_add(self._received, self._exact))
            sends = [dist.isend(self._own_sum, r, tag=self._tags[1]) for r in self._others]
            self._requests = self._spread_to + sends

    def finish(self) -> None:
        """Wait for what is on its way."""
        _wait(self._requests)


def _wait(requests: Sequence[dist.Work | None]) -> None:
    for request in requests:
        assert request is not None
        request.wait()


def _in_pages(length: int) -> int:
    """Bytes, rounded up."""
    return -(-length // _PAGE) * _PAGE


def _chunks(part: range) -> list[slice]:
    return [slice(i, min(i + _CHUNK, part.stop)) for i in part[::_CHUNK]]


def _add(terms: Sequence[Tensor], out: Tensor) -> Tensor:
    """Their sum, in the order and in the dtype that ``out`` has."""
    if len(terms) > 1 and terms[0].dtype == out.dtype:
        torch.add(terms[0], terms[1], out=out)
        rest = terms[2:]
    else:
        out.copy_(terms[0])
        rest = terms[1:]
    for term in rest:
        out.add_(term)
    return out
