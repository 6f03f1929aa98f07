"""What is suspicious about images: dark ink, blanks, values of another range."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist.evaluation.inputs import Inputs

_RING = np.flatnonzero(np.pad(np.zeros((26, 26)), 1, constant_values=1))  # the outermost pixels


class Suspicions:
    """Counts of images that are probably not what the model expects, part after part.

    ``counts`` (images of dark ink on a light ground, blank images, images with a pixel above the
    lowest two byte values; int64) add up over parts and processes. ``first_dark`` is the position
    of the first image of dark ink, ``NONE`` if there is none; over processes its minimum counts.
    """

    NONE = 2**62

    def __init__(self) -> None:
        self.counts = np.zeros(3, np.int64)
        self.first_dark = self.NONE

    def look(self, images: NDArray[Any], start: int) -> None:
        """Count images n x 28 x 28, as ``Inputs.images`` gives them, from position ``start`` on."""
        pixels = images.reshape(len(images), -1)
        full = 255 if images.dtype == np.uint8 else 1
        highest = pixels.max(1)
        blank = pixels.min(1) == highest
        # In MNIST the ring's mean is 3.4% of full scale at most, 96.6% at least when inverted.
        ring = pixels.take(_RING, 1).sum(1, dtype=np.float32)
        dark = (ring > full / 2 * len(_RING)) & ~blank
        above_one = highest > 1 if full == 255 else highest > 0
        self.counts += [np.count_nonzero(mask) for mask in (dark, blank, above_one)]
        if dark.any():
            self.first_dark = min(self.first_dark, start + int(dark.argmax()))


def suspicion_warnings(counts: NDArray[np.int64], first_dark: int, inputs: Inputs) -> list[str]:
    """What to tell the user of counts over all images, a line each."""
    dark, blank, above_one = counts.tolist()
    total, lines = len(inputs), []
    if dark:
        number = inputs.indices(first_dark, first_dark + 1)[0]
        first = f"file {inputs.files[number]}" if inputs.files else f"number {number}"
        lines.append(
            f"{dark} of {total} images look like dark ink on a light ground (the first is {first});"
            " the model expects light ink (255) on a dark ground (0): invert them"
        )
    if not above_one and blank < total:
        lines.append("values are 0 to 1 in unsigned bytes; expected 0 to 255")
    if blank:
        lines.append(f"{blank} of {total} images are blank (all pixels are alike)")
    return lines
