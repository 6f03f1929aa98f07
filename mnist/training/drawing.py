"""Drawing on MNIST's digits: what synthesis.py and hands.py make their images by.

Distances are in pixels of 28×28, places (down, to the right) from the upper left corner.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mnist.data import IMAGE_SHAPE

Ink = NDArray[Any]
"""n×height×width: how much ink there is, 0 to 1."""
Points = NDArray[Any]
"""n×2: places, down and to the right."""

SIZE = IMAGE_SHAPE[0]


class Originals:
    """MNIST's digits to draw from: 28×28, 0 to 1."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels
        self._of = [np.flatnonzero(labels == digit) for digit in range(10)]

    def draw(self, rng: Generator, digits: NDArray[np.int64]) -> Ink:
        """A random image of each of n digits."""
        chosen = [self._of[digit][int(rng.random() * len(self._of[digit]))] for digit in digits]
        return self.images[chosen].astype(np.float32) / 255


def strokes(starts: Points, stops: Points, radii: NDArray[np.float64], taper: float = 0.0) -> Ink:
    """Straight strokes with round ends, n×28×28; towards its stop a stroke gets thinner by the
    share ``taper``."""
    place = np.arange(SIZE) + 0.5
    down, right = (axis[:, None, None] for axis in (stops - starts).T)
    y = place[None, :, None] - starts[:, 0, None, None]
    x = place[None, None, :] - starts[:, 1, None, None]
    along = (y * down + x * right) / np.maximum(down**2 + right**2, 1e-9)
    along = along.clip(0, 1)
    distance = np.hypot(y - along * down, x - along * right)
    radius = radii[:, None, None] * (1 - taper * along)
    result: Ink = (radius + 0.5 - distance).clip(0, 1).astype(np.float32)
    return result


def polar(lengths: NDArray[np.float64], degrees: NDArray[np.float64]) -> Points:
    """Steps of these lengths; 0 degrees is to the right, 90 down."""
    radians = np.radians(degrees)
    return np.stack([lengths * np.sin(radians), lengths * np.cos(radians)], 1)


def radius_of(ink: Ink) -> NDArray[np.float64]:
    """About half the width of the strokes of n×28×28: twice the area over the outline."""
    filled = ink > 0.5
    padded = np.pad(filled, ((0, 0), (1, 1), (1, 1)))
    outline = sum(
        (filled & ~np.roll(padded, shift, axis)[:, 1:-1, 1:-1]).sum((1, 2))
        for shift, axis in ((1, 1), (-1, 1), (1, 2), (-1, 2))
    )
    result: NDArray[np.float64] = (filled.sum((1, 2)) / np.maximum(outline, 1)).clip(0.6, 3.0)
    return result


def end(ink: Ink, key: Callable[[Points], NDArray[np.float64]]) -> Points:
    """The inked pixel of each of n×28×28 for which ``key`` of its place is highest."""
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), -1) + 0.5
    score = np.where(ink > 0.5, key(grid), -np.inf).reshape(len(ink), SIZE * SIZE)
    result: Points = grid.reshape(-1, 2)[score.argmax(1)]
    return result


Maker = Callable[[Originals, Generator, int], Ink]
"""Draws so many marks of one kind, n×28×28."""
