"""Distortions against loops over pixels, and against noise smoothed by a Gaussian."""

import math

import numpy as np
import pytest
import torch

from mnist.data import MEAN, STD, load_mnist, normalise, rank_slice
from mnist.training.config import TrainConfig
from mnist.training.distortion import Distortion, elastic_modes

CPU = torch.device("cpu")
ALL = {"rotation": 12.0, "scaling": 0.15, "shear": 0.1, "shift": 2.0, "elastic": 1.2}
STROKES = {"thickness": 0.8}


@pytest.fixture(scope="module")
def images(data_dir):
    return normalise(load_mnist(data_dir, "train").images[:256], torch.float32)


def distortion(**settings):
    return Distortion(TrainConfig(**settings), CPU)


def redrawn_by_loops(ink, thicker):
    """Strokes as they are defined: towards the highest or lowest of nine pixels."""
    padded = np.pad(ink, 1)
    result = np.zeros((28, 28))
    for row in range(28):
        for column in range(28):
            near = padded[row : row + 3, column : column + 3]
            end = near.max() if thicker > 0 else near.min()
            result[row, column] = (1 - abs(thicker)) * ink[row, column] + abs(thicker) * end
    return result


def by_loops(image, weights, smoothness, elastic, strokes=None):
    """The definition, pixel by pixel: a weighted sum of x, y, 1 and smooth fields says where each
    pixel comes from; what lies between pixels is interpolated; outside there is no ink."""
    ink = (image.numpy().astype(np.float64) * STD + MEAN).reshape(28, 28)
    if strokes is not None:
        ink = redrawn_by_loops(ink, float(strokes))
    modes = elastic_modes(smoothness).double().numpy()
    weights = weights.double().numpy()
    count = modes.shape[1]
    fields = [elastic * modes @ w[3:].reshape(count, count) @ modes.T for w in weights]
    result = np.zeros((28, 28))
    for row in range(28):
        for column in range(28):
            x, y = column - 13.5, row - 13.5
            place = [
                w[:3] @ (x, y, 1) + f[row, column] for w, f in zip(weights, fields, strict=True)
            ]
            source_x, source_y = (value + 13.5 for value in place)
            for i in (math.floor(source_y), math.floor(source_y) + 1):
                for j in (math.floor(source_x), math.floor(source_x) + 1):
                    if 0 <= i < 28 and 0 <= j < 28:
                        share = (1 - abs(source_y - i)) * (1 - abs(source_x - j))
                        result[row, column] += share * ink[i, j]
    return (result.ravel() - MEAN) / STD


@pytest.mark.parametrize("more", [{}, STROKES])
def test_images_are_those_of_the_definition(images, more):
    distort = distortion(**ALL, **more)
    found = distort(images[:6], step=3, batch_size=6, rows=slice(0, 6))
    weights = distort.weights(step=3, batch_size=6)
    strokes = distort.strokes(step=3, batch_size=6) if more else [None] * 6
    for image, weight, stroke, ours in zip(images, weights, strokes, found, strict=False):
        expected = by_loops(image, weight, 5.0, ALL["elastic"], stroke)
        np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)
    assert (found - images[:6]).abs().max() > 1


def test_affine_weights_are_rotation_shear_and_scaling_within_their_bounds():
    weights = distortion(**ALL | {"elastic": 0.0}).weights(step=1, batch_size=5000).double()
    assert weights.shape == (5000, 2, 3)
    affine, shift = weights[:, :, :2].numpy(), weights[:, :, 2]
    angles = np.arctan2(affine[:, 1, 0], affine[:, 0, 0])
    back = np.stack([np.cos(angles), np.sin(angles), -np.sin(angles), np.cos(angles)], 1)
    rest = back.reshape(-1, 2, 2) @ affine  # shear and scaling
    assert np.abs(rest[:, 1, 0]).max() < 1e-6
    found = {
        "rotation": np.degrees(angles),
        "scaling": np.stack([rest[:, 0, 0], rest[:, 1, 1]]) - 1,
        "shear": rest[:, 0, 1] / rest[:, 1, 1],
        "shift": shift.numpy(),
    }
    for name, values in found.items():
        assert np.abs(values).max() <= ALL[name] * (1 + 1e-5), name
        # Uniform: so far the extremes reach, and so wide they spread.
        assert np.abs(values).max() > 0.99 * ALL[name], name
        assert values.std() == pytest.approx(ALL[name] / math.sqrt(3), rel=0.05), name
        assert abs(values.mean()) < 0.05 * ALL[name], name


def test_strokes_are_drawn_within_their_bounds():
    thicker = distortion(**STROKES).strokes(step=1, batch_size=5000)
    assert -0.8 <= thicker.min() < -0.784 and 0.784 < thicker.max() <= 0.8
    assert abs(thicker.mean()) < 0.02


@pytest.mark.parametrize("smoothness", [1.0, 5.0, 8.0])
def test_elastic_fields_vary_as_smoothed_noise_does(smoothness):
    # Simard's: white noise, smoothed by a Gaussian; away from borders, scaled to a variance of 1.
    generator = np.random.default_rng(0)
    reach = math.ceil(5 * smoothness)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * smoothness**2))
    kernel /= np.sqrt((kernel**2).sum())
    noise = generator.standard_normal((20_000, 28 + 2 * reach))
    smooth = np.stack([np.convolve(row, kernel, "valid") for row in noise])
    modes = elastic_modes(smoothness).double().numpy()
    np.testing.assert_allclose(modes @ modes.T, np.cov(smooth.T), atol=0.05)


def test_elastic_fields_move_pixels_as_far_as_the_setting_says():
    distort = distortion(elastic=1.5)
    weights = distort.weights(step=1, batch_size=4000)
    moved = (weights.flatten(0, 1)[:, 3:] @ distort._maps[:, 3:].t()) * 14
    assert moved.square().mean().sqrt().item() == pytest.approx(1.5, rel=0.03)


def test_nothing_asked_for_changes_nothing(images):
    assert not TrainConfig().distorts and TrainConfig(shift=1).distorts
    same = distortion()(images, step=1, batch_size=256, rows=slice(0, 256))
    torch.testing.assert_close(same, images, rtol=0, atol=1e-4)


def test_ground_stays_ground(images):
    blank = normalise(torch.zeros(9, 28, 28, dtype=torch.uint8), torch.float32)
    found = distortion(**ALL, **STROKES)(blank, step=1, batch_size=9, rows=slice(0, 9))
    torch.testing.assert_close(found, blank, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [256, 50, 7, 2])
def test_processes_see_what_one_would_see(images, size, count):
    distort = distortion(**ALL, **STROKES)
    whole = distort(images[:count], step=9, batch_size=count, rows=slice(0, count))
    parts = [rank_slice(count, rank, size) for rank in range(size)]
    found = torch.cat([distort(images[part], 9, count, part) for part in parts])
    if torch.cpu.get_capabilities().get("avx512_f"):  # elsewhere a row may depend on others
        assert torch.equal(found, whole)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_what_is_drawn_depends_on_seed_step_and_place_alone(images):
    same = images[:1].expand(50, -1)

    def drawn(seed, step):
        return distortion(**ALL, **STROKES, seed=seed)(same, step, 50, slice(0, 50))

    one = drawn(0, 1)
    torch.manual_seed(5)
    assert torch.equal(drawn(0, 1), one)
    assert len(one.unique(dim=0)) == 50
    for other in (drawn(1, 1), drawn(0, 2)):
        assert not (other == one).all(1).any()


def test_half_precision_is_the_same_image_rounded(images):
    distort = distortion(**ALL, **STROKES)
    full = distort(images, step=1, batch_size=256, rows=slice(0, 256))
    half = distort(images.bfloat16(), step=1, batch_size=256, rows=slice(0, 256))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=2**-7, atol=2**-7)
