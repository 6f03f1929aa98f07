"""Finding the ink of one digit: what surrounds it and how it looks changes nothing."""

import numpy as np
import pytest
from scipy import ndimage

from mnist.data import load_mnist
from mnist.evaluation.ink import find_digit
from mnist.normaliser import normalise_digits

SIDE = 140  # pixels of a digit's image, five for each of MNIST's


@pytest.fixture(scope="module")
def digits(data_dir):
    """Thirty digits, light on dark, SIDE×SIDE, with soft edges."""
    images = load_mnist(data_dir, "train").images[:30].numpy().astype(float)
    return np.clip(ndimage.zoom(images, (1, 5, 5), order=1), 0, 255)


def pages(digits):
    return (255 - digits).round().astype(np.uint8)


def test_ink_of_a_clean_page_is_the_digit(digits):
    found = normalise_digits([find_digit(page).ink for page in pages(digits)]).images
    clean = normalise_digits(digits.round().astype(np.uint8)).images
    alike = [
        np.corrcoef(*pair)[0, 1]
        for pair in zip(found.reshape(30, -1), clean.reshape(30, -1), strict=True)
    ]
    assert np.median(alike) > 0.95  # the last digit has a speck, which is left out


def shadow(value):
    """As light as paper is under a shadow with a soft edge, across the image."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    return 1 - value / (1 + np.exp(-12 * (x + 0.4 * y - 0.7)))


def paper(ink, light=235.0):
    return light * (1 - 0.8 * ink / 255)


def coloured(ink):
    """Blue ink on yellow paper."""
    grounds, inks = np.array([230, 215, 150.0]), np.array([40, 60, 170.0])
    share = ink[..., None] / 255
    return grounds * (1 - share) + inks * share


def with_margin(image, value):
    return np.pad(image, 30, constant_values=value)


def with_rule(ink):
    image = paper(ink)
    image[:, -4:-1] = 30
    return image


LOOKS = {
    "light on dark": lambda ink: ink,
    "dark on light": lambda ink: 255 - ink,
    "grey ground": lambda ink: 100 + ink * 155 / 255,
    "grey ground that hides the edges": lambda ink: np.maximum(ink, 100),
    "faint": lambda ink: 200 - ink * 0.25,
    "white margin": lambda ink: with_margin(255 - ink, 255),
    "a black square in a white margin": lambda ink: with_margin(ink, 255),
    "a small digit in such a square": lambda ink: with_margin(np.pad(ink, 150), 255),
    "shadow": lambda ink: paper(ink) * shadow(0.5),
    "hard shadow": lambda ink: paper(ink) * np.where(np.arange(SIDE) < 60, 1, 0.55),
    "light falling off": lambda ink: paper(ink) * np.linspace(1, 0.4, SIDE)[:, None],
    "blue on yellow": coloured,
    "light chalk on a dark colour": lambda ink: 255 - coloured(ink)[..., ::-1],
    "a form's rule at its edge": with_rule,
    "noise": lambda ink: paper(ink) + np.random.default_rng(0).normal(0, 8, ink.shape),
    "a speck": lambda ink: np.where(
        np.add.outer(np.arange(SIDE), np.arange(SIDE)) < 5, 0, 255 - ink
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_looks_change_nothing(digits, look):
    clean, found = normalise_digits([find_digit(page).ink for page in pages(digits)]).images, []
    for ink in digits:
        image = LOOKS[look](ink).round().clip(0, 255).astype(np.uint8)
        digit = find_digit(image)
        assert digit is not None
        found.append(normalise_digits([digit.ink]).images[0])
    # Shifted by a pixel at most, and by shape the same: as correlation over the best shift.
    best = [
        max(
            np.corrcoef(np.roll(one, (y, x), (0, 1)).ravel(), other.ravel())[0, 1]
            for y in (-1, 0, 1)
            for x in (-1, 0, 1)
        )
        for one, other in zip(found, clean, strict=True)
    ]
    assert np.median(best) > 0.96 and min(best) > 0.85


@pytest.mark.parametrize("look", ["light on dark", "dark on light"])
def test_it_is_said_whether_ink_was_dark(digits, look):
    image = LOOKS[look](digits[0]).round().astype(np.uint8)
    assert find_digit(image).inverted == (look == "dark on light")


@pytest.mark.parametrize("margin", [0, 1, 40])
def test_a_digit_may_fill_its_image(digits, margin):
    for ink in digits[:10].round().astype(np.uint8):
        rows, columns = (np.flatnonzero((ink > 60).any(axis)) for axis in (1, 0))
        cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        digit = find_digit(255 - np.pad(cut, margin))
        assert digit is not None
        made, clean = (normalise_digits([i]).images[0].ravel() for i in (digit.ink, cut))
        assert np.corrcoef(made, clean)[0, 1] > 0.85


def gradient(height, width):
    return np.linspace(120, 230, width)[None, :].repeat(height, 0)


EMPTY = {
    "black": np.zeros((50, 50)),
    "white": np.full((300, 200), 255),
    "one pixel": np.full((1, 1), 200),
    "a line of pixels": np.arange(100)[None],
    "light falling off": gradient(200, 300),
    "noise": np.random.default_rng(0).integers(0, 256, (60, 60)),
    "grainy paper": np.random.default_rng(0).normal(200, 6, (200, 200)),
    "a speck": np.pad(np.zeros((2, 2)), 100, constant_values=240),
    "a rule": np.pad(np.full((2, 200), 60), ((20, 180), (0, 0)), constant_values=240),
    "a blot": 240 - 200 * (np.hypot(*np.mgrid[-50:50, -60:40]) < 20),
    "a corner in the shade": 230 - 120 * np.tri(150, k=-60),
    "a soft shadow": 230 * shadow(0.5),
    "a hard shadow": 230 * np.where(np.arange(SIDE) < 60, 1, 0.55)[None].repeat(SIDE, 0),
}


@pytest.mark.parametrize("what", EMPTY)
def test_nothing_is_invented(what):
    assert find_digit(EMPTY[what].round().clip(0, 255).astype(np.uint8)) is None


def test_broken_strokes_stay_together(digits):
    """As scans have them: a line of pixels is missing here and there."""
    ink = digits[0].round().astype(np.uint8)
    broken = ink.copy()
    broken[::23] = 0
    whole, digit = find_digit(255 - ink).ink > 0, find_digit(255 - broken).ink > 0
    assert (whole & digit).sum() > 0.9 * whole.sum()


def test_a_neighbour_is_left_out(digits):
    page = np.zeros((SIDE, 2 * SIDE), np.uint8)
    page[:, :SIDE] = digits[0]
    page[40:80, 2 * SIDE - 8 :] = 255  # cut off by the border
    digit = find_digit(page)
    assert digit.ink[:, :SIDE].any() and not digit.ink[:, 2 * SIDE - 20 :].any()
