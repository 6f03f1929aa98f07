"""Digits of other hands: MNIST's, with strokes that its writers hardly made.

Distances are in pixels of 28×28, places (down, to the right) from the upper left corner.
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mnist.data import IMAGE_SHAPE, derived_seed
from mnist.normaliser import normalise_digits
from mnist.training.drawing import (
    SIZE,
    Ink,
    Maker,
    Originals,
    Points,
    end,
    polar,
    radius_of,
    strokes,
)


def _with(ink: Ink, starts: Points, steps: Points, rng: Generator) -> Ink:
    """The digits with one more stroke each, about as thick as theirs."""
    return np.maximum(
        ink, strokes(starts, starts + steps, radius_of(ink) * rng.uniform(0.7, 1.2, len(ink)))
    )


def ones_with_upstroke(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 1 with a stroke up to its top, and now and then a bar below it."""
    ink = digits.draw(rng, np.full(count, 1))
    top = end(ink, lambda place: -place[..., 0])
    ink = _with(ink, top, polar(rng.uniform(4, 17, count), rng.uniform(105, 150, count)), rng)
    foot = end(ink, lambda place: place[..., 0] + 0.01 * place[..., 1])
    length = rng.uniform(3, 9, count) * (rng.random(count) < 0.35)
    tilt = rng.uniform(-12, 12, count)
    bar = polar(2 * length, tilt)
    barred = _with(ink, foot - bar / 2, bar, rng)
    return np.where((length > 0)[:, None, None], barred, ink)


def barred_sevens(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 7 with a bar through its stem."""
    ink = digits.draw(rng, np.full(count, 7))
    foot = end(ink, lambda place: place[..., 0])
    top = end(ink, lambda place: place[..., 1] - place[..., 0])
    share = rng.uniform(0.4, 0.65, count)[:, None]
    bar = polar(rng.uniform(7, 13, count), rng.uniform(-35, 10, count))
    return _with(ink, foot + share * (top - foot) - bar / 2, bar, rng)


def flagless_sevens(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 7 with a bar through its stem, and little of a flag."""
    ink, place = digits.draw(rng, np.full(count, 7)), np.arange(SIZE)
    corner = end(ink, lambda place: place[..., 1] - place[..., 0])
    foot = end(ink, lambda place: place[..., 0])
    slope = (corner - foot)[:, 1] / np.minimum(corner - foot, -1)[:, 0]
    stem = corner[:, 1, None] + slope[:, None] * (place - corner[:, :1])
    left = stem - radius_of(ink)[:, None] - rng.uniform(2.5, 8, (count, 1))
    ink = ink * (place[None, None, :] >= left[:, :, None])
    share = rng.uniform(0.4, 0.65, count)[:, None]
    bar = polar(rng.uniform(9, 16, count), rng.uniform(-30, 10, count))
    return _with(ink, foot + share * (corner - foot) - bar / 2, bar, rng)


def footed_nines(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 9 whose stem ends in a stroke to the left: to the right as well it were a closed 2."""
    ink = digits.draw(rng, np.full(count, 9))
    foot = end(ink, lambda place: place[..., 0])
    left = polar(rng.uniform(5, 15, count), rng.uniform(160, 220, count))
    return _with(ink, foot, left, rng)


def mirrored_nines(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 9 like a rho, whose stem is on the left of its loop."""
    return digits.draw(rng, np.full(count, 9))[..., ::-1]


def short_fours(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 4 whose stem ends soon below its bar, or begins soon above it, or both."""
    ink, place = digits.draw(rng, np.full(count, 4)), np.arange(SIZE)
    among = (place >= SIZE // 2 - 2) & (place < 20)
    bar = np.where(among, ink.sum(2), 0).argmax(1)
    stem = np.where(place >= SIZE // 2, (ink * (place > 14)[None, :, None]).sum(1), 0).argmax(1)
    stop = bar + radius_of(ink) + rng.uniform(0.5, 3.5, count)
    kind = rng.random(count)
    stop = np.where(kind < 0.75, stop, SIZE)
    start = np.where(kind > 0.4, bar - rng.uniform(1, 6, count), 0)
    down, right = place[None, :, None], place[None, None, :]
    above = (down < start[:, None, None]) & (right > (stem - 3)[:, None, None])
    result: Ink = ink * (down < stop[:, None, None]) * ~above
    return result


def looped_twos(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 2 with a loop where its stroke turns to the right."""
    ink = digits.draw(rng, np.full(count, 2))
    corner = end(ink, lambda place: place[..., 0] - place[..., 1])
    radii = rng.uniform(1.5, 4, (count, 2))
    middle = corner + radii * [-1, 0.5]
    return np.maximum(ink, _rings(middle, radii, radius_of(ink)))


def _rings(middle: Points, radii: Points, thickness: NDArray[np.float64]) -> Ink:
    """Ellipses with these middles and radii (down, to the right), n×28×28."""
    place = np.arange(SIZE) + 0.5
    y = (place[None, :, None] - middle[:, 0, None, None]) / radii[:, 0, None, None]
    x = (place[None, None, :] - middle[:, 1, None, None]) / radii[:, 1, None, None]
    distance = np.abs(np.hypot(y, x) - 1) * radii.min(1)[:, None, None]
    result: Ink = (thickness[:, None, None] + 0.3 - distance).clip(0, 1).astype(np.float32)
    return result


def _twos(digits: Originals, rng: Generator, count: int, looped: float) -> Ink:
    """2s, a share of them with a loop where they turn to the right."""
    with_loop = looped_twos(digits, rng, count)
    chosen = (rng.random(count) < looped)[:, None, None]
    return np.where(chosen, with_loop, digits.draw(rng, np.full(count, 2)))


def curled_twos(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 2 that begins with a curl, and may have a loop where it turns to the right as well."""
    ink = _twos(digits, rng, count, looped=0.5)
    start = end(ink, lambda place: -place[..., 0] - 1.5 * place[..., 1])
    radii = rng.uniform(1.5, 3.5, (count, 2))
    return np.maximum(ink, _rings(start + radii * [0.5, 0.8], radii, radius_of(ink)))


def closed_twos(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 2 whose head is a closed loop, like that of a 9; its foot may have a loop as well."""
    ink = _twos(digits, rng, count, looped=0.3)
    rows = (ink > 0).any(2)
    top, bottom = rows.argmax(1), SIZE - np.flip(rows, 1).argmax(1)
    start = end(ink, lambda place: -place[..., 0] - 1.5 * place[..., 1])
    row = top + rng.uniform(0.35, 0.6, count) * (bottom - top)
    near: NDArray[np.bool_] = np.abs(np.arange(SIZE)[None, :] - row[:, None]) <= 1.5
    stem = end(ink * near[:, :, None], lambda place: place[..., 1])
    return _with(ink, start, stem - start, rng)


def slanted_fives(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 5 whose flag and stem are one stroke, down from the upper right."""
    ink, place = digits.draw(rng, np.full(count, 5)), np.arange(SIZE)
    top = ink.any(2).argmax(1)[:, None, None]
    flag = end(ink, lambda place: place[..., 1] - 1.5 * place[..., 0])
    down = place[None, :, None]
    height = SIZE - ink[:, ::-1].any(2).argmax(1)[:, None, None] - top
    stem = ink * (down >= top + 0.3 * height) * (down < top + 0.5 * height)
    turn = end(stem, lambda place: -place[..., 1])
    bowl = ink * (down >= turn[:, :1, None] - 1)
    result: Ink = np.maximum(
        bowl, strokes(turn, flag, radius_of(ink) * rng.uniform(0.7, 1.2, count))
    )
    return result


def open_zeros(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 0 with a gap at its top or right."""
    ink = digits.draw(rng, np.full(count, 0))
    place = np.arange(SIZE) + 0.5 - SIZE / 2
    degrees = np.degrees(np.arctan2(place[:, None], place[None, :]))
    middle = rng.uniform(-150, 10, count)[:, None, None]
    width = rng.uniform(6, 20, count)[:, None, None]
    result: Ink = ink * (np.abs(degrees - middle) > width)
    return result


def footed_zeros(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 0 that is open below, with a foot on each side, like an omega."""
    ink = digits.draw(rng, np.zeros(count, np.int64))
    place = np.arange(SIZE) + 0.5 - SIZE / 2
    degrees = np.degrees(np.arctan2(place[:, None], place[None, :]))
    off = degrees - rng.uniform(70, 110, count)[:, None, None]
    width = rng.uniform(8, 25, count)[:, None, None]
    opened = ink * (np.abs(off) > width)
    left, right = (
        end(opened * (side * off > 0) * (np.abs(off) < 60), lambda place: place[..., 0])
        for side in (1, -1)
    )
    lengths = rng.uniform(2, 7, (2, count))
    opened = _with(opened, left, polar(lengths[0], rng.uniform(150, 200, count)), rng)
    return _with(opened, right, polar(lengths[1], rng.uniform(-20, 30, count)), rng)


def _farthest(ink: Ink, degrees: NDArray[np.float64]) -> Points:
    """The inked pixel of each that is farthest in these directions; 0 degrees is to the right, 90
    down."""
    radians = np.radians(degrees)
    down, right = np.sin(radians)[:, None, None], np.cos(radians)[:, None, None]
    return end(ink, lambda place: down * place[..., 0] + right * place[..., 1])


def tailed_zeros(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 0, often low, with a stroke out of it to the right, or into it from the left, as zeros have
    that are joined."""
    ink = digits.draw(rng, np.full(count, 0))
    rows = (np.arange(SIZE) - SIZE / 2) / rng.uniform(0.5, 1, (count, 1)) + SIZE / 2
    ink = np.take_along_axis(ink, rows.round().clip(0, SIZE - 1).astype(int)[..., None], 1)
    leaves = _farthest(ink, rng.uniform(-85, 45, count))
    out = polar(rng.uniform(2, 9, count), rng.uniform(-30, 25, count))
    tailed = _with(ink, leaves, out, rng)
    enters = _farthest(ink, rng.uniform(100, 240, count))
    into = polar(rng.uniform(2, 7, count) * (rng.random(count) < 0.4), rng.uniform(150, 215, count))
    return _with(tailed, enters, into, rng)


def barred_zeros(digits: Originals, rng: Generator, count: int) -> Ink:
    """A 0 with a bar through it, flat or rising."""
    ink = digits.draw(rng, np.full(count, 0))
    middle = np.full((count, 2), SIZE / 2) + rng.uniform(-2, 2, (count, 2))
    degrees = np.where(
        rng.random(count) < 0.5, rng.uniform(-20, 20, count), rng.uniform(-65, -35, count)
    )
    bar = polar(rng.uniform(8, 20, count), degrees)
    return _with(ink, middle - bar / 2, bar, rng)


HANDS: tuple[tuple[Maker, int], ...] = (
    *[(ones_with_upstroke, 1)] * 2,
    *[(barred_sevens, 7)] * 2,
    (flagless_sevens, 7),
    *[(footed_nines, 9)] * 2,
    (mirrored_nines, 9),
    *[(short_fours, 4)] * 2,
    (looped_twos, 2),
    (curled_twos, 2),
    *[(closed_twos, 2)] * 2,
    (slanted_fives, 5),
    (open_zeros, 0),
    (footed_zeros, 0),
    *[(tailed_zeros, 0)] * 2,
    (barred_zeros, 0),
)
"""Digits as others write them, and their labels, in turn; the more there are of one the more often
it is made."""


def other_hands(
    images: NDArray[np.uint8], labels: NDArray[np.int64], count: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Digits with strokes that MNIST's hardly have, ``count``×28×28, and their labels."""
    digits = Originals(images, labels)
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
