"""Pages that tests make from MNIST's digits, on synthetic paper."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from mnist.data import load_mnist


@cache
def digits_of(data_dir: Path) -> list[np.ndarray]:
    """Ten arrays of MNIST's training images, n×28×28, by label."""
    data = load_mnist(data_dir, "train")
    images, labels = data.images.numpy(), data.labels.numpy()
    return [images[labels == digit][:200] for digit in range(10)]


def ink_of(
    data_dir: Path,
    lines: list[str],
    *,
    height: int = 56,
    gap: float = 0.25,
    leading: float = 1.9,
    slope: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Lines of digits as ink of 0 to 1, height×width; a space is as wide as two digits.

    Args:
        data_dir: where MNIST lies.
        lines: what is written.
        height: of the 28 pixels of an image, of which digits fill 20.
        gap: between the ink of neighbours, in digit heights; below 0 they overlap.
        leading: from line to line, in digit heights.
        slope: how much lines climb.
        seed: chooses the images.
    """
    rng = np.random.default_rng(seed)
    tall = height * 20 / 28
    width = int(max(len(line) for line in lines) * (1 + max(gap, 0)) * tall * 1.4 + 3 * tall)
    page = np.zeros((int((len(lines) + 1) * leading * tall + slope * width + 2 * tall), width))
    for number, line in enumerate(lines):
        x = 1.2 * tall
        for character in line:
            if character == " ":
                x += 2 * tall
                continue
            images = digits_of(data_dir)[int(character)]
            image = Image.fromarray(images[rng.integers(len(images))])
            ink = np.asarray(image.resize((height, height), Image.Resampling.BICUBIC)) / 255
            columns = np.flatnonzero((ink > 0.3).any(0))
            ink = ink[:, columns[0] : columns[-1] + 1]
            y = int((number + 0.6) * leading * tall + slope * (width - x))
            left = int(x)
            place = page[y : y + height, left : left + ink.shape[1]]
            np.maximum(place, ink, out=place)
            x += ink.shape[1] + gap * tall
    return page


def on_paper(ink: np.ndarray, *, ground: float = 0.85, pen: float = 0.2, noise: float = 0.01,
             seed: int = 0) -> np.ndarray:  # fmt: skip
    """The ink on a ground, uint8 height×width."""
    values = ground + (pen - ground) * ink
    values = values + np.random.default_rng(seed).normal(0, noise, ink.shape)
    return (values.clip(0, 1) * 255).round().astype(np.uint8)
