"""What is made from MNIST's digits: of the kinds and labels asked for, by the seed alone."""

import numpy as np
import pytest
import torch

from mnist.data import load_mnist
from mnist.model import NO_DIGIT
from mnist.training.config import TrainConfig
from mnist.training.drawing import Originals
from mnist.training.hands import (
    HANDS,
    barred_zeros,
    ones_with_upstroke,
    other_hands,
    tailed_zeros,
)
from mnist.training.synthesis import (
    SCORED,
    TAUGHT,
    crosses,
    dashes,
    joined_halves,
    non_digits,
    squeezed_pairs,
    synthesise,
    turned,
)
from mnist.training.synthesis import commas as the_commas


@pytest.fixture(scope="module")
def mnist(data_dir):
    digits = load_mnist(data_dir, "train")
    return digits.images[:3000].numpy(), digits.labels[:3000].numpy()


@pytest.fixture(scope="module")
def digits(mnist):
    return Originals(*mnist)


def box(image):
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    return len(range(rows[0], rows[-1] + 1)), len(range(columns[0], columns[-1] + 1))


def test_the_same_seed_makes_the_same_and_another_does_not(mnist):
    for make in (non_digits, lambda *arguments: other_hands(*arguments)[0]):
        one, again, other = (make(*mnist, 90, seed) for seed in (0, 0, 1))
        assert np.array_equal(one, again) and not np.array_equal(one, other)


@pytest.mark.parametrize(
    "maker",
    [*dict.fromkeys([*TAUGHT, *(maker for maker, _ in HANDS)])],
    ids=lambda maker: maker.__name__,
)
def test_every_kind_has_ink_and_varies(digits, maker):
    ink = maker(digits, np.random.default_rng(0), 50)
    assert ink.shape[0] == 50 and ink.min() >= 0 and ink.max() <= 1
    # Each has some ink; a window now and then shows the ground alone.
    assert (ink.max((1, 2)) > 0.5).sum() >= 48
    assert len(np.unique(ink.reshape(50, -1), axis=0)) >= 45


def test_hands_are_labelled_as_the_digits_that_they_are_made_from(mnist):
    images, labels = other_hands(*mnist, 400, 0)
    assert images.shape == (400, 28, 28) and images.dtype == np.uint8
    assert sorted(set(labels.tolist())) == sorted({label for _, label in HANDS})
    # Nearest neighbours among the digits themselves agree for most, though strokes were added.
    flat = mnist[0].reshape(3000, -1).astype(float)
    nearest = [mnist[1][np.square(flat - image.ravel()).sum(1).argmin()] for image in images]
    assert (np.array(nearest) == labels).mean() > 0.5


def test_a_one_gets_a_stroke_to_the_left_of_its_top(digits):
    ones = digits.draw(np.random.default_rng(0), np.full(100, 1))
    made = ones_with_upstroke(digits, np.random.default_rng(0), 100)
    assert (made >= ones - 1e-6).all()
    places = np.arange(28)
    left_of = [
        ((m - o) * (places < 14)).sum() / max((m - o).sum(), 1e-6)
        for m, o in zip(made, ones, strict=True)
    ]
    assert np.median(left_of) > 0.6 and ((made - ones).sum((1, 2)) > 3).mean() > 0.9


def test_joined_halves_are_of_two_digits_that_differ_there(digits):
    made = joined_halves(digits, np.random.default_rng(0), 40)
    known = {image.tobytes() for image in (digits.images / np.float32(255)).astype(np.float32)}
    assert not any(image.astype(np.float32).tobytes() in known for image in made)


def test_pairs_are_wider_and_turned_digits_lie(digits):
    rng = np.random.default_rng(0)
    pairs = [box(image) for image in squeezed_pairs(digits, rng, 100)]
    assert np.median([width / height for height, width in pairs]) > 0.8
    lying = turned(digits, np.random.default_rng(1), 100)
    heights, widths = np.array([box(image) for image in lying]).T
    assert (widths >= heights).mean() > 0.7


def test_signs_are_drawn_around_the_middle(digits):
    for maker in (crosses, dashes):
        ink = maker(digits, np.random.default_rng(0), 50)
        places = np.arange(28) + 0.5
        middles = np.stack([ink.sum(2) @ places, ink.sum(1) @ places]) / ink.sum((1, 2))
        assert np.abs(middles - 14).max() < 2.5


def test_kinds_come_in_turn(mnist):
    made = non_digits(*mnist, 50, 3, SCORED)
    commas = made[SCORED.index(the_commas) :: len(SCORED)]
    assert len(commas) == 10
    # Nothing else is as solid: in the box of its ink hardly a pixel is free.
    filled = [image[image.any(1)][:, image.any(0)].mean() / 255 for image in made]
    solid = np.argsort(filled)[-10:] % len(SCORED)
    assert (solid == SCORED.index(the_commas)).mean() > 0.8


@pytest.mark.parametrize("count", [1, 5])
def test_few_can_be_made(mnist, count):
    assert len(non_digits(*mnist, count, 0)) == len(other_hands(*mnist, count, 0)[0]) == count


def test_training_images_come_first_then_what_is_added():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (200, 28, 28), np.uint8))
    labels = torch.arange(200) % 10
    config = TrainConfig(other_hands=0.5, non_digits=0.25)
    all_images, all_labels = synthesise(images, labels, config)
    assert len(all_images) == len(all_labels) == 200 + 100 + 50
    assert torch.equal(all_images[:200], images) and torch.equal(all_labels[:200], labels)
    assert set(all_labels[200:300].tolist()) == {label for _, label in HANDS}
    assert all_labels[300:].tolist() == [NO_DIGIT] * 50
    unchanged = synthesise(images, labels, TrainConfig())
    assert torch.equal(unchanged[0], images) and torch.equal(unchanged[1], labels)


def test_a_zero_gets_a_tail_to_its_right_or_a_bar_through_it(digits):
    zeros = digits.draw(np.random.default_rng(0), np.zeros(100, int))
    tailed = tailed_zeros(digits, np.random.default_rng(0), 100)
    heights = [np.count_nonzero(ink.max(2) > 0.5, 1).mean() for ink in (zeros, tailed)]
    assert heights[1] < 0.9 * heights[0]  # many are low

    def reach(ink):
        return 28 - np.argmax(ink.max(1)[:, ::-1] > 0.5, 1)

    assert (reach(tailed) >= reach(zeros)).all() and (reach(tailed) > reach(zeros)).mean() > 0.7
    barred = barred_zeros(digits, np.random.default_rng(0), 100)
    assert (barred >= zeros - 1e-6).all()
    middle = (slice(None), slice(11, 17), slice(11, 17))
    assert (barred[middle].sum((1, 2)) > zeros[middle].sum((1, 2)) + 3).mean() > 0.9
