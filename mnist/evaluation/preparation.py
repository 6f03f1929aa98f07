"""What is done to users' images before they are scored: as little as makes them what MNIST's are.

Finding the ink of a digit is in ink.py, MNIST's convention in normaliser.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mnist.data import IMAGE_SHAPE
from mnist.evaluation.folders import LONGEST
from mnist.normaliser import INK_SIZE, normalise_digits

Mode = Literal["auto", "as-is", "mnist"]

AS_THEY_ARE, INVERTED, NORMALISED, WITHOUT_DIGIT = range(4)
TREATMENTS = ("as they are", "inverted", "normalised", "without digit")
"""What can become of an image, by number."""

SAMPLES = 8
"""Images of each treatment that are kept to be looked at."""

_GROUND = 40  # of 255: more is ink, also where JPEG has spread some
_LEAST_SIDE = 14  # pixels: of MNIST's 70,000 images all have an ink of 14 to 20
_MIDDLE, _OFF = 14.5, 0.75  # of the barycentre: MNIST's are between 13.98 and 15.00


@dataclass
class Prepared:
    """Images as the network gets them."""

    images: NDArray[Any]
    """n×28×28, uint8 of 0 to 255 or float32 of 0 to 1; blank where no digit is found."""
    treatments: NDArray[np.int64]
    """n, of ``TREATMENTS``."""
    sources: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    """By place among the n, the first few of each treatment but the first as they came:
    height×width, or ×3."""


def as_they_are(images: NDArray[Any]) -> Prepared:
    """n×28×28, untouched."""
    return Prepared(images, np.full(len(images), AS_THEY_ARE))


def prepare(images: Iterable[NDArray[Any]], count: int, mode: Mode) -> Prepared:
    """Make images what MNIST's are.

    Under ``auto`` those of 28×28 that look like MNIST's stay as they are, to the bit, and those
    that do once they are inverted are only that; under ``mnist`` every digit is normalised.

    Args:
        images: height×width or height×width×3, uint8, or height×width of floats of 0 to 1; of any
            sizes, and all of one type.
        count: how many they are, n.
        mode: not ``as-is``.
    """
    packed = isinstance(images, np.ndarray) and images.shape[1:] == IMAGE_SHAPE
    if mode == "auto" and packed and look_like_mnist(np.asarray(images)).all():  # as most are
        return as_they_are(np.asarray(images))
    result = as_they_are(np.zeros((count, *IMAGE_SHAPE), np.uint8))
    for place, image in enumerate(images):
        if place == 0 and image.dtype != np.uint8:
            result.images = result.images.astype(np.float32)
        result.images[place], result.treatments[place] = _prepare_one(image, mode)
        treatment = result.treatments[place]
        earlier = np.count_nonzero(result.treatments[:place] == treatment)
        if treatment != AS_THEY_ARE and earlier < SAMPLES:
            result.sources[place] = _thumbnail(image)
    return result


def _prepare_one(image: NDArray[Any], mode: Mode) -> tuple[NDArray[Any], int]:
    """28×28 of the image's type, and its treatment."""
    # scipy takes half a second to import, and training needs none of it.
    from mnist.evaluation.ink import find_digit

    floats = image.dtype != np.uint8
    if mode == "auto" and image.shape == IMAGE_SHAPE:
        inverse = 1 - image if floats else 255 - image
        like, inverted = look_like_mnist(np.stack([image, inverse]))
        if like or inverted:
            return (image, AS_THEY_ARE) if like else (inverse, INVERTED)
    pixels = _bytes(image)
    if pixels.max() == 1 and not floats:  # ink in bytes of 0 and 1
        pixels = pixels * np.uint8(255)
    if max(pixels.shape) > LONGEST:
        pixels = _thumbnail(pixels, LONGEST)
    digit = find_digit(pixels)
    if digit is None:
        return np.zeros(IMAGE_SHAPE, image.dtype), WITHOUT_DIGIT
    made = normalise_digits([digit.ink]).images[0]
    return made / np.float32(255) if floats else made, NORMALISED


def _bytes(image: NDArray[Any]) -> NDArray[np.uint8]:
    return image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)


def _thumbnail(image: NDArray[Any], most: int = 112) -> NDArray[np.uint8]:
    """The image in at most so many pixels of height and width."""
    from PIL import Image

    small = Image.fromarray(_bytes(image))
    small.thumbnail((most, most))
    return np.asarray(small)


def look_like_mnist(images: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of n×28×28 are light ink on a ground of 0, of MNIST's size and at MNIST's place.

    All of MNIST's own do.
    """
    ink = images.astype(np.float32)
    if images.dtype != np.uint8:
        ink *= 255
    inked = ink > _GROUND
    rows, columns = np.any(inked, 2), np.any(inked, 1)
    sides = [side.shape[1] - side[:, ::-1].argmax(1) - side.argmax(1) for side in (rows, columns)]
    longest = np.where(np.any(rows, 1), np.maximum(*sides), 0)
    places = np.arange(IMAGE_SHAPE[0]) + 0.5
    sums = np.maximum(ink.sum((1, 2)), 1)
    middles = np.stack([ink.sum(2) @ places, ink.sum(1) @ places]) / sums
    fits: NDArray[np.bool_] = (longest >= _LEAST_SIDE) & (longest <= INK_SIZE)
    fits &= (np.abs(middles - _MIDDLE) < _OFF).all(0)
    fits &= (ink.max((1, 2)) > 200) & (np.mean(inked, (1, 2)) < 0.55)
    return fits
