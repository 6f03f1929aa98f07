"""What MNIST lacks, made from its own digits: marks that are no digits, and digits of other hands.

Made once, before training, by NumPy, from the seed alone; training distorts them as all others.
Distances are in pixels of 28×28, places (down, to the right) from the upper left corner.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from mnist.data import IMAGE_SHAPE, derived_seed
from mnist.model import NO_DIGIT
from mnist.normaliser import normalise_digits
from mnist.training.config import TrainConfig

Ink = NDArray[Any]
"""n×height×width: how much ink there is, 0 to 1."""
Points = NDArray[Any]
"""n×2: places, down and to the right."""

_SIZE = IMAGE_SHAPE[0]
# Digits with a half that looks the same: joined to the other's, it would be one of them.
_ALIKE_ABOVE = "00 11 22 33 44 55 66 77 88 99 237 089 147 479 06 35 38 56 58"
_ALIKE_BESIDE = "00 11 22 33 44 55 66 77 88 99 06 237 49 147 38 35 389 56 09 58 68"
_TURNABLE = (2, 3, 4, 5, 7)  # no digit when turned by 90 degrees


class Digits:
    """MNIST's digits to draw from: 28×28, 0 to 1."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels
        self._of = [np.flatnonzero(labels == digit) for digit in range(10)]

    def draw(self, rng: Generator, digits: NDArray[np.int64]) -> Ink:
        """A random image of each of n digits."""
        chosen = [self._of[digit][int(rng.random() * len(self._of[digit]))] for digit in digits]
        return self.images[chosen].astype(np.float32) / 255


# ------------------------------------------------------------------------------------- drawing


def _strokes(starts: Points, stops: Points, radii: NDArray[np.float64], taper: float = 0.0) -> Ink:
    """Straight strokes with round ends, n×28×28; towards its stop a stroke gets thinner by the
    share ``taper``."""
    place = np.arange(_SIZE) + 0.5
    down, right = (axis[:, None, None] for axis in (stops - starts).T)
    y = place[None, :, None] - starts[:, 0, None, None]
    x = place[None, None, :] - starts[:, 1, None, None]
    along = (y * down + x * right) / np.maximum(down**2 + right**2, 1e-9)
    along = along.clip(0, 1)
    distance = np.hypot(y - along * down, x - along * right)
    radius = radii[:, None, None] * (1 - taper * along)
    result: Ink = (radius + 0.5 - distance).clip(0, 1).astype(np.float32)
    return result


def _polar(lengths: NDArray[np.float64], degrees: NDArray[np.float64]) -> Points:
    """Steps of these lengths; 0 degrees is to the right, 90 down."""
    radians = np.radians(degrees)
    return np.stack([lengths * np.sin(radians), lengths * np.cos(radians)], 1)


def _radius_of(ink: Ink) -> NDArray[np.float64]:
    """About half the width of the strokes of n×28×28: twice the area over the outline."""
    filled = ink > 0.5
    padded = np.pad(filled, ((0, 0), (1, 1), (1, 1)))
    outline = sum(
        (filled & ~np.roll(padded, shift, axis)[:, 1:-1, 1:-1]).sum((1, 2))
        for shift, axis in ((1, 1), (-1, 1), (1, 2), (-1, 2))
    )
    result: NDArray[np.float64] = (filled.sum((1, 2)) / np.maximum(outline, 1)).clip(0.6, 3.0)
    return result


def _end(ink: Ink, key: Callable[[Points], NDArray[np.float64]]) -> Points:
    """The inked pixel of each of n×28×28 for which ``key`` of its place is highest."""
    grid = np.stack(np.meshgrid(np.arange(_SIZE), np.arange(_SIZE), indexing="ij"), -1) + 0.5
    score = np.where(ink > 0.5, key(grid), -np.inf).reshape(len(ink), _SIZE * _SIZE)
    result: Points = grid.reshape(-1, 2)[score.argmax(1)]
    return result


# ----------------------------------------------------------------------------- what is no digit


def joined_halves(digits: Digits, rng: Generator, count: int) -> Ink:
    """The left or upper half of a digit and the other half of one that looks different there."""
    upright = rng.random(count) < 0.5
    pairs = np.zeros((count, 2), np.int64)
    for pair, alike in zip(pairs, np.where(upright, _ALIKE_ABOVE, _ALIKE_BESIDE), strict=True):
        while any(set(pair.tolist()) <= set(map(int, group)) for group in alike.split()):
            pair[:] = rng.integers(0, 10, 2)
    first, second = (digits.draw(rng, pairs[:, side]) for side in (0, 1))
    half = np.zeros((_SIZE, _SIZE), bool)
    half[: _SIZE // 2] = True
    return np.where(np.where(upright[:, None, None], half, half.T), first, second)


def squeezed_pairs(digits: Digits, rng: Generator, count: int) -> Ink:
    """Two digits side by side, close or touching, as wide together as 1 to 2 of them."""
    pair = [
        digits.draw(rng, some) for some in (rng.integers(0, 10, count), rng.integers(0, 10, count))
    ]
    wide = np.zeros((count, _SIZE, 3 * _SIZE), np.float32)
    for row, left, right, gap in zip(wide, *pair, rng.integers(-2, 4, count), strict=True):
        columns = [np.flatnonzero(image.any(0)) for image in (left, right)]
        start = max(0, columns[0][-1] + 1 + gap - columns[1][0])
        row[:, :_SIZE] = left
        row[:, start : start + _SIZE] = np.maximum(row[:, start : start + _SIZE], right)
    result = np.zeros_like(wide)
    place = np.arange(3 * _SIZE)
    for row, source, squeeze in zip(result, wide, rng.uniform(1, 2, count), strict=True):
        where = place * squeeze
        for y in range(_SIZE):
            row[y] = np.interp(where, place, source[y], right=0)
    return result


def turned(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 2, 3, 4, 5 or 7 turned by 90 degrees, to either side."""
    ink = digits.draw(rng, np.array(_TURNABLE)[rng.integers(0, len(_TURNABLE), count)])
    left = rng.random(count) < 0.5
    return np.where(left[:, None, None], np.rot90(ink, 1, (1, 2)), np.rot90(ink, 3, (1, 2)))


def crosses(digits: Digits, rng: Generator, count: int) -> Ink:
    """Two straight strokes that cross near their middles: + and ×."""
    middle = np.full((count, 2), _SIZE / 2)
    degrees = rng.choice([0.0, 45.0], count) + rng.uniform(-10, 10, count)
    lengths = rng.uniform(7, 10, count)
    radii = rng.uniform(0.6, 2.2, count)
    ink = np.zeros((count, _SIZE, _SIZE), np.float32)
    for turn in (0, 90):
        step = _polar(
            lengths * rng.uniform(0.8, 1.2, count), degrees + turn + rng.uniform(-8, 8, count)
        )
        shift = rng.uniform(-1.5, 1.5, (count, 2))
        ink = np.maximum(ink, _strokes(middle - step + shift, middle + step + shift, radii))
    return ink


def commas(digits: Digits, rng: Generator, count: int) -> Ink:
    """A thick head and a short tail that gets thinner, down and to the left; or a mere dot."""
    head = np.full((count, 2), _SIZE / 2)
    radii = rng.uniform(2.5, 5, count)
    tail = radii * rng.choice([0, 1, 1, 1], count) * rng.uniform(1.2, 2.4, count)
    degrees = rng.uniform(85, 150, count)
    bend = head + _polar(tail * 0.6, degrees - rng.uniform(10, 40, count))
    first = _strokes(head, bend, radii, 0.5)
    return np.maximum(first, _strokes(bend, head + _polar(tail, degrees), radii * 0.5, 0.6))


def dashes(digits: Digits, rng: Generator, count: int) -> Ink:
    """One or two flat strokes one above the other: - and =."""
    middle = np.full((count, 2), _SIZE / 2)
    step = _polar(rng.uniform(4, 10, count), rng.uniform(-15, 15, count))
    radii = rng.uniform(0.6, 2.2, count)
    apart = np.stack([rng.uniform(2.5, 5, count) * rng.choice([0, 1], count), np.zeros(count)], 1)
    one, other = (
        _strokes(middle - step + side, middle + step + side, radii) for side in (apart, -apart)
    )
    return np.maximum(one, other)


def halves(digits: Digits, rng: Generator, count: int) -> Ink:
    """The left, right, upper or lower half of a 0, 2, 3 or 5; those of others may be digits."""
    ink = digits.draw(rng, rng.choice([0, 2, 3, 5], count))
    part = rng.integers(0, 4, count)
    for index, quarter in enumerate(part.tolist()):
        ink[index] = np.rot90(ink[index], -quarter)
        ink[index][_SIZE // 2 - 1 :] = 0
        ink[index] = np.rot90(ink[index], quarter)
    return ink


def pieces(digits: Digits, rng: Generator, count: int) -> Ink:
    """What a window of 6 to 10 pixels shows of a digit."""
    ink = digits.draw(rng, rng.integers(0, 10, count))
    for image, size, (top, left) in zip(
        ink, rng.integers(6, 11, count), rng.integers(5, 14, (count, 2)), strict=True
    ):
        window = np.zeros_like(image)
        window[top : top + size, left : left + size] = image[top : top + size, left : left + size]
        image[:] = window
    return ink


Maker = Callable[[Digits, Generator, int], Ink]

SCORED: tuple[Maker, ...] = (joined_halves, squeezed_pairs, turned, crosses, commas)
"""Those of which a model should know that they are no digits."""
TAUGHT: tuple[Maker, ...] = (*SCORED, joined_halves, dashes, halves, pieces)


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
    digits = Digits(images, labels)
    result = np.zeros((count, *IMAGE_SHAPE), np.uint8)
    for index, maker in enumerate(makers):
        rng = np.random.default_rng(derived_seed(seed, "no digits", index))
        part = result[index :: len(makers)]
        ink = maker(digits, rng, len(part))
        part[:] = normalise_digits((ink * 255).round().astype(np.uint8)).images
    return result


# --------------------------------------------------------------------------- digits of other hands


def _with(ink: Ink, starts: Points, steps: Points, rng: Generator) -> Ink:
    """The digits with one more stroke each, about as thick as theirs."""
    return np.maximum(
        ink, _strokes(starts, starts + steps, _radius_of(ink) * rng.uniform(0.7, 1.2, len(ink)))
    )


def ones_with_upstroke(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 1 with a stroke up to its top, and now and then a bar below it."""
    ink = digits.draw(rng, np.full(count, 1))
    top = _end(ink, lambda place: -place[..., 0])
    ink = _with(ink, top, _polar(rng.uniform(4, 17, count), rng.uniform(105, 170, count)), rng)
    foot = _end(ink, lambda place: place[..., 0] + 0.01 * place[..., 1])
    length = rng.uniform(3, 9, count) * (rng.random(count) < 0.35)
    tilt = rng.uniform(-12, 12, count)
    bar = _polar(2 * length, tilt)
    barred = _with(ink, foot - bar / 2, bar, rng)
    return np.where((length > 0)[:, None, None], barred, ink)


def barred_sevens(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 7 with a bar through its stem."""
    ink = digits.draw(rng, np.full(count, 7))
    foot = _end(ink, lambda place: place[..., 0])
    top = _end(ink, lambda place: place[..., 1] - place[..., 0])
    share = rng.uniform(0.4, 0.65, count)[:, None]
    bar = _polar(rng.uniform(7, 13, count), rng.uniform(-35, 10, count))
    return _with(ink, foot + share * (top - foot) - bar / 2, bar, rng)


def footed_nines(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 9 whose stem ends in a stroke to the left, or to both sides."""
    ink = digits.draw(rng, np.full(count, 9))
    foot = _end(ink, lambda place: place[..., 0])
    left = _polar(rng.uniform(5, 15, count), rng.uniform(160, 220, count))
    right = _polar(rng.uniform(0, 6, count), rng.uniform(-20, 20, count))
    return _with(_with(ink, foot, left, rng), foot, right, rng)


def mirrored_nines(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 9 like a rho, whose stem is on the left of its loop."""
    return digits.draw(rng, np.full(count, 9))[..., ::-1]


def short_fours(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 4 whose stem ends soon below its bar, and may begin soon above it."""
    ink, place = digits.draw(rng, np.full(count, 4)), np.arange(_SIZE)
    among = (place >= _SIZE // 2 - 2) & (place < 20)
    bar = np.where(among, ink.sum(2), 0).argmax(1)
    stem = np.where(place >= _SIZE // 2, (ink * (place > 14)[None, :, None]).sum(1), 0).argmax(1)
    stop = bar + _radius_of(ink) + rng.uniform(0.5, 3.5, count)
    start = np.where(rng.random(count) < 0.5, bar - rng.uniform(1, 6, count), 0)
    down, right = place[None, :, None], place[None, None, :]
    above = (down < start[:, None, None]) & (right > (stem - 3)[:, None, None])
    result: Ink = ink * (down < stop[:, None, None]) * ~above
    return result


def looped_twos(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 2 with a loop where its stroke turns to the right."""
    ink = digits.draw(rng, np.full(count, 2))
    corner = _end(ink, lambda place: place[..., 0] - place[..., 1])
    radii = rng.uniform(1.5, 4, (count, 2))
    middle = corner + radii * [-1, 0.5]
    place = np.arange(_SIZE) + 0.5
    y = (place[None, :, None] - middle[:, 0, None, None]) / radii[:, 0, None, None]
    x = (place[None, None, :] - middle[:, 1, None, None]) / radii[:, 1, None, None]
    distance = np.abs(np.hypot(y, x) - 1) * radii.min(1)[:, None, None]
    ring = (_radius_of(ink)[:, None, None] + 0.3 - distance).clip(0, 1).astype(np.float32)
    result: Ink = np.maximum(ink, ring)
    return result


def slanted_fives(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 5 whose flag and stem are one stroke, down from the upper right."""
    ink, place = digits.draw(rng, np.full(count, 5)), np.arange(_SIZE)
    top = ink.any(2).argmax(1)[:, None, None]
    flag = _end(ink, lambda place: place[..., 1] - 1.5 * place[..., 0])
    down = place[None, :, None]
    height = _SIZE - ink[:, ::-1].any(2).argmax(1)[:, None, None] - top
    stem = ink * (down >= top + 0.3 * height) * (down < top + 0.5 * height)
    turn = _end(stem, lambda place: -place[..., 1])
    bowl = ink * (down >= turn[:, :1, None] - 1)
    result: Ink = np.maximum(
        bowl, _strokes(turn, flag, _radius_of(ink) * rng.uniform(0.7, 1.2, count))
    )
    return result


def open_zeros(digits: Digits, rng: Generator, count: int) -> Ink:
    """A 0 with a gap at its top or right."""
    ink = digits.draw(rng, np.full(count, 0))
    place = np.arange(_SIZE) + 0.5 - _SIZE / 2
    degrees = np.degrees(np.arctan2(place[:, None], place[None, :]))
    middle = rng.uniform(-150, 10, count)[:, None, None]
    width = rng.uniform(6, 20, count)[:, None, None]
    result: Ink = ink * (np.abs(degrees - middle) > width)
    return result


HANDS: tuple[tuple[Maker, int], ...] = (
    *[(ones_with_upstroke, 1)] * 3,
    (barred_sevens, 7),
    *[(footed_nines, 9)] * 2,
    (mirrored_nines, 9),
    *[(short_fours, 4)] * 2,
    (looped_twos, 2),
    *[(slanted_fives, 5)] * 2,
    (open_zeros, 0),
)
"""Digits as others write them, and their labels, in turn; the more there are of one the more often
it is made."""


def other_hands(
    images: NDArray[np.uint8], labels: NDArray[np.int64], count: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Digits with strokes that MNIST's hardly have, ``count``×28×28, and their labels."""
    digits = Digits(images, labels)
    result = np.zeros((count, *IMAGE_SHAPE), np.uint8)
    made = np.zeros(count, np.int64)
    for index, (maker, label) in enumerate(HANDS):
        rng = np.random.default_rng(derived_seed(seed, "other hands", index))
        part = result[index :: len(HANDS)]
        part[:] = normalise_digits(
            (maker(digits, rng, len(part)) * 255).round().astype(np.uint8)
        ).images
        made[index :: len(HANDS)] = label
    return result, made


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
