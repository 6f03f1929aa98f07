"""What MNIST lacks, made from its own digits: marks that are no digits; those of other hands are in
hands.py.

Made once, before training, by NumPy, from the seed alone; training distorts them as all others.
Distances are in pixels of 28×28, places (down, to the right) from the upper left corner.
"""

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from mnist.data import IMAGE_SHAPE, derived_seed
from mnist.model import NO_DIGIT
from mnist.normaliser import normalise_digits
from mnist.training.config import TrainConfig
from mnist.training.drawing import SIZE, Ink, Maker, Originals, polar, strokes
from mnist.training.hands import other_hands

# Digits with a half that looks the same: joined to the other's, it would be one of them.
_ALIKE_ABOVE = "00 11 22 33 44 55 66 77 88 99 237 089 147 479 06 35 38 56 58"
_ALIKE_BESIDE = "00 11 22 33 44 55 66 77 88 99 06 237 49 147 38 35 389 56 09 58 68"
_TURNABLE = (2, 3, 4, 5, 7)  # no digit when turned by 90 degrees


def joined_halves(digits: Originals, rng: Generator, count: int) -> Ink:
    """The left or upper half of a digit and the other half of one that looks different there."""
    upright = rng.random(count) < 0.5
    pairs = np.zeros((count, 2), np.int64)
    for pair, alike in zip(pairs, np.where(upright, _ALIKE_ABOVE, _ALIKE_BESIDE), strict=True):
        while any(set(pair.tolist()) <= set(map(int, group)) for group in alike.split()):
            pair[:] = rng.integers(0, 10, 2)
    first, second = (digits.draw(rng, pairs[:, side]) for side in (0, 1))
    half = np.zeros((SIZE, SIZE), bool)
    half[: SIZE // 2] = True
    return np.where(np.where(upright[:, None, None], half, half.T), first, second)


def _side_by_side(pair: tuple[Ink, Ink], gaps: NDArray[np.int64]) -> tuple[Ink, NDArray[np.int64]]:
    """Pairs of digits with so many columns between their ink, n×28×84, and where the ink of the
    right one begins."""
    count = len(gaps)
    wide, starts = np.zeros((count, SIZE, 3 * SIZE), np.float32), np.zeros(count, np.int64)
    for index, (left, right, gap) in enumerate(zip(*pair, gaps, strict=True)):
        columns = [np.flatnonzero(image.any(0)) for image in (left, right)]
        start = max(0, columns[0][-1] + 1 + gap - columns[1][0])
        row = wide[index]
        row[:, :SIZE] = left
        row[:, start : start + SIZE] = np.maximum(row[:, start : start + SIZE], right)
        starts[index] = start + columns[1][0]
    return wide, starts


def squeezed_pairs(digits: Originals, rng: Generator, count: int) -> Ink:
    """Two digits side by side, close or touching, as wide together as 1 to 2 of them; n×28×84."""
    one, other = (digits.draw(rng, rng.integers(0, 10, count)) for _ in range(2))
    wide, _ = _side_by_side((one, other), rng.integers(-2, 4, count))
    result = np.zeros_like(wide)
    place = np.arange(3 * SIZE)
    for row, source, squeeze in zip(result, wide, rng.uniform(1, 2, count), strict=True):
        where = place * squeeze
        for y in range(SIZE):
            row[y] = np.interp(where, place, source[y], right=0)
    return result


def overfull(digits: Originals, rng: Generator, count: int) -> Ink:
    """A digit and a fifth to three fifths of its neighbour, as a wrong cut leaves them; n×28×84."""
    whole = digits.draw(rng, rng.choice([0, 2, 3, 4, 5, 6, 7, 8, 9], count))  # with a 1: a 4, say
    part = digits.draw(rng, rng.integers(0, 10, count))
    mirrored = (rng.random(count) < 0.5)[:, None, None]  # the neighbour is on the left
    whole, part = (np.where(mirrored, ink[..., ::-1], ink) for ink in (whole, part))
    wide, starts = _side_by_side((whole, part), rng.integers(-2, 2, count))
    widths = [np.count_nonzero(ink.any(0)) for ink in part]
    ends = starts + rng.uniform(0.2, 0.6, count) * np.maximum(widths, 5)
    down, right = np.arange(SIZE)[None, :, None] - SIZE / 2, np.arange(3 * SIZE)[None, None, :]
    slant = rng.uniform(-0.4, 0.4, count)[:, None, None]
    cut = wide * (right + slant * down < ends[:, None, None])
    return np.where(mirrored, cut[..., ::-1], cut)


def turned(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 2, 3, 4, 5 or 7 turned by 90 degrees, to either side."""
    ink = digits.draw(rng, np.array(_TURNABLE)[rng.integers(0, len(_TURNABLE), count)])
    left = rng.random(count) < 0.5
    return np.where(left[:, None, None], np.rot90(ink, 1, (1, 2)), np.rot90(ink, 3, (1, 2)))


def crosses(digits: Originals, rng: Generator, count: int) -> Ink:
    """Two straight strokes that cross near their middles: + and ×."""
    middle = np.full((count, 2), SIZE / 2)
    degrees = rng.choice([0.0, 45.0], count) + rng.uniform(-10, 10, count)
    lengths = rng.uniform(7, 10, count)
    radii = rng.uniform(0.6, 2.2, count)
    ink = np.zeros((count, SIZE, SIZE), np.float32)
    for turn in (0, 90):
        step = polar(
            lengths * rng.uniform(0.8, 1.2, count), degrees + turn + rng.uniform(-8, 8, count)
        )
        shift = rng.uniform(-1.5, 1.5, (count, 2))
        ink = np.maximum(ink, strokes(middle - step + shift, middle + step + shift, radii))
    return ink


def commas(digits: Originals, rng: Generator, count: int) -> Ink:
    """A thick head and a short tail that gets thinner, down and to the left; or a mere dot."""
    head = np.full((count, 2), SIZE / 2)
    radii = rng.uniform(2.5, 5, count)
    tail = radii * rng.choice([0, 1, 1, 1], count) * rng.uniform(1.2, 2.4, count)
    degrees = rng.uniform(85, 150, count)
    bend = head + polar(tail * 0.6, degrees - rng.uniform(10, 40, count))
    first = strokes(head, bend, radii, 0.5)
    return np.maximum(first, strokes(bend, head + polar(tail, degrees), radii * 0.5, 0.6))


def dashes(digits: Originals, rng: Generator, count: int) -> Ink:
    """One or two flat strokes one above the other: - and =."""
    middle = np.full((count, 2), SIZE / 2)
    step = polar(rng.uniform(4, 10, count), rng.uniform(-15, 15, count))
    radii = rng.uniform(0.6, 2.2, count)
    apart = np.stack([rng.uniform(2.5, 5, count) * rng.choice([0, 1], count), np.zeros(count)], 1)
    one, other = (
        strokes(middle - step + side, middle + step + side, radii) for side in (apart, -apart)
    )
    return np.maximum(one, other)


def halves(digits: Originals, rng: Generator, count: int) -> Ink:
    """The left, right, upper or lower half of a 0, 2, 3 or 5; those of others may be digits."""
    ink = digits.draw(rng, rng.choice([0, 2, 3, 5], count))
    part = rng.integers(0, 4, count)
    for index, quarter in enumerate(part.tolist()):
        ink[index] = np.rot90(ink[index], -quarter)
        ink[index][SIZE // 2 - 1 :] = 0
        ink[index] = np.rot90(ink[index], quarter)
    return ink


def pieces(digits: Originals, rng: Generator, count: int) -> Ink:
    """What a window of 6 to 10 pixels shows of a digit."""
    ink = digits.draw(rng, rng.integers(0, 10, count))
    for image, size, (top, left) in zip(
        ink, rng.integers(6, 11, count), rng.integers(5, 14, (count, 2)), strict=True
    ):
        window = np.zeros_like(image)
        window[top : top + size, left : left + size] = image[top : top + size, left : left + size]
        image[:] = window
    return ink


SCORED: tuple[Maker, ...] = (joined_halves, squeezed_pairs, turned, crosses, commas)
"""Those of which a model should know that they are no digits."""
TAUGHT: tuple[Maker, ...] = (*SCORED, joined_halves, overfull, dashes, halves, pieces)


def non_digits(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    count: int,
    seed: int,
    makers: tuple[Maker, ...] = TAUGHT,
) -> NDArray[np.uint8]:
    """Marks that are no digits, ``count``×28×28, of all kinds in turn.

    Args:
        images: of MNIST, N×28×28.
        labels: theirs, N.
        count: how many.
        seed: decides all.
        makers: the kinds.
    """
    digits = Originals(images, labels)
    result = np.zeros((count, *IMAGE_SHAPE), np.uint8)
    for index, maker in enumerate(makers):
        rng = np.random.default_rng(derived_seed(seed, "no digits", index))
        part = result[index :: len(makers)]
        ink = maker(digits, rng, len(part))
        part[:] = normalise_digits((ink * 255).round().astype(np.uint8)).images
    return result


def synthesise(images: Tensor, labels: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The training images N×28×28 and labels N, followed by what the settings add to them."""
    digits, all_images, all_labels = (images.numpy(), labels.numpy()), [images], [labels]
    if count := round(config.other_hands * len(labels)):
        made, known = other_hands(*digits, count, config.seed)
        all_images.append(torch.from_numpy(made))
        all_labels.append(torch.from_numpy(known))
    if count := round(config.non_digits * len(labels)):
        all_images.append(torch.from_numpy(non_digits(*digits, count, config.seed)))
        all_labels.append(torch.full((count,), NO_DIGIT))
    return torch.cat(all_images), torch.cat(all_labels)
