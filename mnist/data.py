"""Images and labels as tensors in memory, the network's input, and the batch sampler.

Whatever is random here is a pure function of its arguments, so every process knows its own samples
and no random state is ever saved.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mnist.arrays import open_rows
from mnist.cli import InputError

MEAN = 0.1307  # of the training pixels, scaled to 0..1
STD = 0.3081
IMAGE_SHAPE = (28, 28)

_CHUNK_IMAGES = 1024  # 3 MB in float32; a larger chunk's fresh pages cost ten times its arithmetic
_BLOCK_IMAGES = 1024  # 1.6 MB in bf16: fits a core's cache


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``derived_seed(seed, "order", epoch)``.

    Hashing keeps the streams of neighbouring seeds and epochs apart, and makes every random
    choice a pure function of its key, so that no random state ever needs saving.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ------------------------------------------------------------------------- tensors in memory


@dataclass(frozen=True)
class Digits:
    """Images as stored, uint8 N x 28 x 28 (0 is background), and their labels, int64 N."""

    images: Tensor
    labels: Tensor


def load_mnist(data_dir: Path, split: Literal["train", "test"]) -> Digits:
    """Read one split from the raw files: 60,000 or 10,000 digits.

    Raises:
        InputError: a file is missing, or does not hold what its name says.
    """
    prefix = data_dir / "MNIST" / "raw" / {"train": "train", "test": "t10k"}[split]
    # Copies, since torch warns of tensors over memory that cannot be written.
    images, labels = (
        np.array(open_rows(Path(f"{prefix}-{kind}-ubyte"), "an IDX file of unsigned bytes")[:])
        for kind in ("images-idx3", "labels-idx1")
    )
    if images.shape != (len(labels), *IMAGE_SHAPE) or labels.ndim != 1:
        raise InputError(
            f"{prefix}-*: expected images of 28 by 28 and as many labels, found {images.shape} and "
            f"{labels.shape}"
        )
    return Digits(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """The network's input: (pixel - MEAN) / STD for pixels scaled to 0..1, flattened.

    Takes uint8 N x 28 x 28, or floats already in 0..1; returns N x 784 of ``dtype``. Computed in
    float32, in chunks, so that the peak memory is the result and a few MB.
    """
    scale = 1.0 if images.is_floating_point() else 255.0
    offset = torch.tensor(-MEAN / STD, device=images.device)

    def normalised(part: Tensor) -> Tensor:
        floats = part.flatten(1).to(torch.float32, copy=True)
        return torch.add(offset, floats, alpha=1 / (scale * STD), out=floats)  # in one pass

    if len(images) <= _CHUNK_IMAGES:
        return normalised(images).to(dtype)
    result = torch.empty(len(images), math.prod(IMAGE_SHAPE), dtype=dtype, device=images.device)
    for begin in range(0, len(images), _CHUNK_IMAGES):
        chunk = slice(begin, begin + _CHUNK_IMAGES)
        result[chunk] = normalised(images[chunk])
    return result


def denormalise(images: Tensor) -> Tensor:
    """Pixels, uint8 N x 28 x 28, of the network's input, N x 784."""
    pixels = images.float().mul_(STD).add_(MEAN).mul_(255).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).view(-1, *IMAGE_SHAPE)


def split_validation(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training part and of a validation part of exactly ``size`` samples.

    Both int64, ascending, disjoint and together everything. Every digit has its share of the
    validation part, rounded by largest remainder (the lower digit first where they tie). The
    choice depends on (labels, size, seed) alone.
    """
    assert 0 <= size <= len(labels)
    counts = torch.bincount(labels).tolist()
    # Whole numbers: a share in floating point may round differently from machine to machine.
    shares = [size * count // max(len(labels), 1) for count in counts]
    remainders = [size * count % max(len(labels), 1) for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda digit: -remainders[digit])
    for digit in by_remainder[: size - sum(shares)]:
        shares[digit] += 1
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit, share in enumerate(shares):
        generator = torch.Generator().manual_seed(derived_seed(seed, "validation", digit))
        chosen = torch.randperm(counts[digit], generator=generator)[:share]
        held_out[(labels == digit).nonzero()[chosen, 0]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


# ------------------------------------------------------------------------------------ batches


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of 0..size-1, int64, from (size, seed, epoch)."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """This rank's contiguous part of ``count`` positions; sizes differ by at most one."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


class GlobalBatches:
    """This rank's slice of every global batch from ``start_step`` up to ``stop_step``.

    A step takes the next ``batch_size`` samples (over all processes) of its epoch's order; the
    last batch of an epoch is smaller, so that each sample comes exactly once per epoch. Yields
    int64 index tensors, views of the order, which are empty for ranks that nothing is left for.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        stop_step: int,
    ) -> None:
        assert size > 0 and batch_size > 0 and 0 <= rank < world_size and start_step >= 0
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_step, self.stop_step = start_step, stop_step
        self.steps_per_epoch = math.ceil(size / batch_size)

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[Tensor]:
        step = self.start_step
        while step < self.stop_step:
            epoch, first = divmod(step, self.steps_per_epoch)
            batches = torch.split(epoch_order(self.size, self.seed, epoch), self.batch_size)
            last = min(self.steps_per_epoch, first + self.stop_step - step)
            for batch in batches[first:last]:
                yield batch[rank_slice(len(batch), self.rank, self.world_size)]
            step += last - first


class BatchedDigits:
    """Images, uint8 N x 28 x 28, and labels, int64 N; one gather makes a block of batches.

    In float32 they are normalised block by block: in a cache that costs a step no more than
    gathering four times the bytes does, and a job starts earlier. In half precision, which costs
    one more rounding and saves half of the gathering, all at once: gathering a block then takes a
    third of the time.
    """

    def __init__(self, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        assert len(images) == len(labels)
        self.images, self.labels, self.dtype = images, labels, dtype
        self._inputs = None if dtype == torch.float32 else normalise(images, dtype)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Images B x 784 and labels B for each tensor of indices B, on the data's device."""
        sizes = [len(batch) for batch in batches]
        indices = torch.cat(batches).to(self.images.device, non_blocking=True)
        images = self.part(indices).split(sizes)
        return list(zip(images, self.labels.index_select(0, indices).split(sizes), strict=True))

    def part(self, rows: slice | Tensor) -> Tensor:
        """Normalised images, n x 784, of a slice or of int64 indices."""
        held = self.images if self._inputs is None else self._inputs
        chosen = held[rows] if isinstance(rows, slice) else held.index_select(0, rows)
        return normalise(chosen, self.dtype) if self._inputs is None else chosen

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels of all in order, so many at once; at least one chunk."""
        for start in range(0, max(1, len(self)), size):
            rows = slice(start, start + size)
            yield self.part(rows), self.labels[rows]


def load_batches(digits: BatchedDigits, sampler: GlobalBatches) -> Iterator[tuple[Tensor, Tensor]]:
    """The sampler's batches in turn, gathered in blocks: that costs a step 20 us instead of 60."""
    indices, count = iter(sampler), max(1, _BLOCK_IMAGES // sampler.batch_size)
    while block := list(itertools.islice(indices, count)):
        yield from digits[block]
