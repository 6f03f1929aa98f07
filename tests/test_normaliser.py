"""MNIST's convention: against MNIST's own images, and against a computation pixel by pixel.

``nist.npz`` has 200 of the bitmaps that MNIST was made from (NIST Special Database 19, public
domain), 128×128 bits each, and which of MNIST's training images became of them.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist.data import load_mnist
from mnist.normaliser import normalise_digits


@pytest.fixture(scope="module")
def nist():
    with np.load(Path(__file__).parent / "nist.npz") as file:
        inks = np.unpackbits(file["ink_packed"], axis=1).reshape(-1, 128, 128) * np.uint8(255)
        return inks, file["mnist_train_index"]


def test_bitmaps_of_nist_become_the_images_of_mnist(nist, data_dir):
    inks, indices = nist
    made = normalise_digits(inks).images.astype(int)
    difference = np.abs(made - load_mnist(data_dir, "train").images.numpy()[indices]).max((1, 2))
    assert (difference <= 4).sum() >= 198 and (difference <= 1).mean() > 0.95


def by_loops(ink):
    """Each source pixel put down where it lies; for a digit in a square of its own."""
    while len(ink) < 20:
        ink = ink.repeat(2, 0).repeat(2, 1)
    side, small = len(ink), np.zeros((20, 20))
    scale = 20 / side

    def shares(pixel):
        """Which of the 20 a source pixel falls into, and with how much of their extent."""
        start, stop = pixel * scale, (pixel + 0.99) * scale
        first = math.floor(start + 1e-9)
        if stop <= first + 1 + 1e-9:
            return {first: scale}
        found = {cell: 1.0 for cell in range(first, math.ceil(stop - 1e-9))}
        found[first] = first + 1 - start
        found[max(found)] = stop - max(found)
        return found

    for y, x in np.argwhere(ink):
        for row, high in shares(y).items():
            for column, wide in shares(x).items():
                small[row, column] += ink[y, x] * high * wide
    small = np.floor(small * 255 / min(max(small.max(), 1), 255) + 0.5).clip(0, 255)
    places = np.arange(20) + 0.5
    down = int(15 - small.sum(1) @ places / small.sum())
    right = int(15 - small.sum(0) @ places / small.sum())
    whole = np.zeros((68, 68))  # 20 around what is shown
    whole[20 + down : 40 + down, 20 + right : 40 + right] = small
    return whole[20:48, 20:48]


@pytest.mark.parametrize("side", [10, 13, 19, 20, 21, 39, 40, 57, 131])
def test_images_are_those_of_the_definition(side):
    rng = np.random.default_rng(side)
    ink = (rng.integers(0, 256, (side, side)) * (rng.random((side, side)) < 0.4)).astype(np.uint8)
    ink[0, 0] = ink[-1, -1] = 255  # its box
    ink[: side // 2, side // 3 :] //= 8  # its barycentre is off the middle
    made = normalise_digits([ink]).images[0]
    assert np.abs(made - by_loops(ink)).max() <= 1


def test_barycentre_far_off_loses_what_lies_outside():
    ink = np.zeros((60, 60), np.uint8)
    ink[:12, :12] = 255
    ink[-1, :] = ink[:, -1] = 1  # hardly any ink, but its box
    made = normalise_digits([ink]).images[0]
    assert np.abs(made - by_loops(ink)).max() <= 1 and made.max() == 255


def test_ground_around_a_digit_changes_nothing(nist):
    inks = nist[0][:20]
    expected = normalise_digits(inks)
    crops, offsets = [], []
    for ink in inks:
        rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
        crops.append(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        offsets.append((rows[0], columns[0]))
    made = normalise_digits(crops)
    assert np.array_equal(made.images, expected.images)
    assert np.array_equal(made.origins + offsets, expected.origins)
    assert np.array_equal(made.scales, expected.scales)


def test_a_mask_hides_what_is_not_the_digit_s(nist):
    ink, other = nist[0][:2]
    both = np.hstack([ink, other])
    mask = np.zeros(both.shape, bool)
    mask[:, :128] = True
    expected = normalise_digits([ink]).images
    for some in ([both], both[None]):
        masks = [mask] if isinstance(some, list) else mask[None]
        assert np.array_equal(normalise_digits(some, masks).images, expected)


def test_without_ink_there_is_none():
    ink = np.zeros((2, 30, 20), np.uint8)
    ink[1, 3:20, 5:9] = 255
    made = normalise_digits(ink)
    assert not made.images[0].any() and made.images[1].any()
    assert len(normalise_digits([]).images) == 0


def test_pixels_are_found_again_in_their_source():
    ink = np.zeros((200, 300), np.uint8)
    ink[40:140, 150:190] = 255  # a bar: 100 high, 40 wide
    made = normalise_digits([ink])
    rows, columns = (np.flatnonzero(made.images[0].any(axis)) for axis in (1, 0))
    corners = np.array([(rows[0], columns[0]), (rows[-1] + 1, columns[-1] + 1)], float)
    assert np.abs(made.to_source(0, corners) - [(40, 150), (140, 190)]).max() <= made.scales[0]
    assert made.scales[0] == 5


@pytest.mark.parametrize("level", [1, 255])
def test_small_drawings_of_two_levels_are_smoothed(level):
    ink = np.zeros((16, 16), np.uint8)
    ink[2:15, [2, 3]] = ink[2:4, 4:15] = ink[[9, 13], 5:9] = 255
    # By Pillow: with ground around it, four times as large.
    image = Image.fromarray(np.pad(ink, 4)).resize((96, 96), Image.Resampling.BILINEAR)
    smooth = normalise_digits([np.asarray(image)])
    made = normalise_digits([ink // 255 * level])
    assert np.abs(made.images.astype(int) - smooth.images).max() <= 4
    corners = np.array([(3, 5), (20, 20)], float)
    assert np.allclose(made.to_source(0, corners), smooth.to_source(0, corners) / 4 - 4)
    grey = ink.copy()
    grey[5, 4] = 200  # more than two levels: as it is
    doubled = normalise_digits([grey.repeat(2, 0).repeat(2, 1)])
    assert np.array_equal(normalise_digits([grey]).images, doubled.images)


def test_what_mnist_has_stays_what_it_is(data_dir):
    images = load_mnist(data_dir, "train").images[:300].numpy()
    difference = np.abs(normalise_digits(images).images.astype(int) - images).max((1, 2))
    assert (
        difference <= 2
    ).mean() > 0.95  # others are a pixel off: their barycentre is on a border
