"""A digit cut out of anything, made what MNIST's are: the one place that knows that convention.

MNIST's makers took NIST's bitmaps of 128×128: the box around the ink, squared, resampled to 20×20
by area, then placed in 28×28 with the barycentre in the middle. How exactly was found out by
Yadav and Bottou (2019, "Cold Case: The Lost MNIST Digits"); what follows them here gives MNIST's
own bytes for 399 of 400 bitmaps. Finding the ink is not done here.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist.data import IMAGE_SHAPE

INK_SIZE = 20
"""Pixels of the longer side of a digit's ink, within the 28."""

_LEAST_BOX = 10  # pixels of the source: what is smaller, a comma, does not fill the 20
_COVERED = 0.99  # of its place, by a source pixel that lies over more than one of the 20
_FINER = 4  # times: by which drawings with steps are enlarged
_EDGE = 1e-11  # of a pixel: nearer to its border is on it


@dataclass(frozen=True)
class Normalised:
    """Digits as MNIST has them, and where their pixels come from."""

    images: NDArray[np.uint8]
    """n×28×28, ink high, ground 0; without any ink where the source has none."""
    origins: NDArray[np.float64]
    """n×2: where in the source, in pixels from its upper left corner down and to the right, the
    upper left corner of the 28×28 lies."""
    scales: NDArray[np.float64]
    """n: source pixels that a pixel of the 28×28 is wide and high."""

    def to_source(self, index: int, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points of a 28×28 image, k×2, down and to the right from its corner, in its source."""
        source: NDArray[np.float64] = self.origins[index] + self.scales[index] * points
        return source


def normalise_digits(
    inks: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    masks: Sequence[NDArray[np.bool_]] | NDArray[np.bool_] | None = None,
) -> Normalised:
    """Make digits what MNIST's are.

    How much ground surrounds a digit, and where it lies in it, changes nothing. What has to be
    enlarged and has two levels, with steps where a pen drew a line, is smoothed before.

    Args:
        inks: n arrays, each of any height and width, or one n×height×width: how much ink there is,
            0 none, 255 full.
        masks: of the same shapes, where a digit's own ink is; by default wherever there is ink.
    """
    boxes = _boxes(inks, masks)
    tops, lefts, heights, widths = boxes.T
    sides = np.maximum(np.maximum(heights, widths), _LEAST_BOX)
    # Around the middle of the ink; what is over lies below it and to its right.
    corners = np.stack([tops - (sides - heights) // 2, lefts - (sides - widths) // 2], 1)
    images = np.zeros((len(boxes), *IMAGE_SHAPE), np.uint8)
    scales = sides / INK_SIZE
    margin = (IMAGE_SHAPE[0] - INK_SIZE) // 2
    origins = corners - np.where(heights > 0, 0, margin)[:, None] * scales[:, None]
    for side in np.unique(sides[heights > 0]).tolist():
        chosen = np.flatnonzero((sides == side) & (heights > 0))
        squares = np.zeros((len(chosen), side, side), np.float32)
        for square, index in zip(squares, chosen.tolist(), strict=True):
            top, left, height, width = boxes[index].tolist()
            down, right = (boxes[index, :2] - corners[index]).tolist()
            box = slice(top, top + height), slice(left, left + width)
            part = square[down : down + height, right : right + width]
            part[:] = inks[index][box] if masks is None else inks[index][box] * masks[index][box]
        if side < INK_SIZE and (stepped := _are_stepped(squares)).any():
            smooth = normalise_digits(_smoothed(squares[stepped]))
            few, chosen, squares = chosen[stepped], chosen[~stepped], squares[~stepped]
            images[few], scales[few] = smooth.images, smooth.scales / _FINER
            origins[few] = corners[few] + smooth.origins / _FINER - 1
        digits = _resample(squares)
        places = _place(digits)
        origins[chosen] -= places * scales[chosen, None]
        _paste(digits, places, images, chosen)
    return Normalised(images, origins, scales)


def _are_stepped(squares: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of n×side×side have no ink but full ink."""
    full = squares.max((1, 2), keepdims=True)
    result: NDArray[np.bool_] = ((squares == 0) | (squares == full)).all((1, 2))
    return result


def _smoothed(squares: NDArray[np.float32]) -> NDArray[np.uint8]:
    """n×side×side, with a pixel more around, enlarged with linear interpolation."""
    side = squares.shape[1] + 2
    places = (np.arange(_FINER * side) + 0.5) / _FINER - 0.5
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(side))).astype(np.float32)
    padded = np.pad(255 * np.sign(squares), ((0, 0), (1, 1), (1, 1)))
    result: NDArray[np.uint8] = np.rint(weights @ padded @ weights.T).astype(np.uint8)
    return result


def _boxes(
    inks: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    masks: Sequence[NDArray[np.bool_]] | NDArray[np.bool_] | None,
) -> NDArray[np.int64]:
    """Top, left, height and width of the ink, n×4; heights and widths of 0 where there is none."""
    if isinstance(inks, np.ndarray) and len(inks):
        found = inks if masks is None else inks * masks
        extents = [_extent(np.any(found, axis)) for axis in (2, 1)]
        return np.stack([*extents[0], *extents[1]], 1)[:, [0, 2, 1, 3]]
    boxes = np.zeros((len(inks), 4), np.int64)
    for index, ink in enumerate(inks):
        found = ink if masks is None else ink * masks[index]
        rows, columns = (np.flatnonzero(found.any(axis)) for axis in (1, 0))
        if len(rows):
            boxes[index] = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    return boxes


def _extent(occupied: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first True of each row of n×k, and how many places there are from it to the last."""
    if not occupied.shape[1]:
        return np.zeros(len(occupied), np.int64), np.zeros(len(occupied), np.int64)
    first = occupied.argmax(1)
    stop = occupied.shape[1] - occupied[:, ::-1].argmax(1)
    return first, np.where(occupied.any(1), stop - first, 0)


@functools.lru_cache(maxsize=4096)
def _weights(side: int) -> NDArray[np.float32]:
    """How much of each of ``side`` pixels falls into each of the 20, 20×side.

    Small sources are doubled until they have 20. A pixel that lies within one of the 20 counts
    whole, one that lies over several with 0.99 of its extent: MNIST's makers' arithmetic.
    """
    doubled = side
    while doubled < INK_SIZE:
        doubled *= 2
    scale = INK_SIZE / doubled
    weights = np.zeros((INK_SIZE, doubled))
    for pixel in range(doubled):
        start, stop = scale * pixel, scale * (pixel + _COVERED)
        first, last = int(start + _EDGE), math.ceil(stop - _EDGE) - 1
        if first == last:
            weights[first, pixel] = scale
        else:
            weights[first : last + 1, pixel] = 1
            weights[first, pixel] = first + 1 - start
            weights[last, pixel] = stop - last
    result: NDArray[np.float32] = weights.reshape(INK_SIZE, side, -1).sum(2).astype(np.float32)
    return result


def _resample(squares: NDArray[np.float32]) -> NDArray[np.uint8]:
    """n×side×side as n×20×20; if none of it is fully inked, the most is made so."""
    weights = _weights(squares.shape[1])
    small: NDArray[Any] = weights @ squares @ weights.T
    full = np.clip(small.max((1, 2), keepdims=True), 1, 255)
    digits: NDArray[np.uint8] = np.floor(small * (255 / full) + 0.5).clip(0, 255).astype(np.uint8)
    return digits


def _place(digits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where in 28×28 the corner of each of n×20×20 goes, n×2: the barycentre to the middle."""
    sums = digits.sum(2, dtype=np.float64), digits.sum(1, dtype=np.float64)
    middles = np.arange(INK_SIZE) + 0.5
    barycentres = np.stack([sums[0] @ middles, sums[1] @ middles], 1) / sums[0].sum(1)[:, None]
    places: NDArray[np.int64] = np.trunc(15 - barycentres).astype(np.int64)
    return places


def _paste(
    digits: NDArray[np.uint8],
    places: NDArray[np.int64],
    images: NDArray[np.uint8],
    chosen: NDArray[np.int64],
) -> None:
    """Write n×20×20 into those of the images that are chosen; what would lie outside is lost."""
    size, margin = IMAGE_SHAPE[0], INK_SIZE
    canvas = np.zeros((len(digits), size + 2 * margin, size + 2 * margin), np.uint8)
    rows, columns = (margin + places.T)[:, :, None] + np.arange(INK_SIZE)
    canvas[np.arange(len(digits))[:, None, None], rows[:, :, None], columns[:, None]] = digits
    images[chosen] = canvas[:, margin : margin + size, margin : margin + size]
