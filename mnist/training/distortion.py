"""Random distortions of whole batches, on the device: of strokes, then affine and elastic ones.

Where a distorted image takes each of its pixels from is a sum of few fixed maps (x, y, 1 and the
smooth fields of an elastic distortion) with random weights, so that the maps of a whole batch are
one matrix product; one bilinear sampling follows. All random numbers are a pure function of the
seed and the step, and those of an image of its position in the global batch: processes of any
number see the same images.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from mnist.data import IMAGE_SHAPE, MEAN, STD, derived_seed
from mnist.products import row_stable_product
from mnist.training.config import TrainConfig

_GROUND = -MEAN / STD  # a pixel without ink, as the network gets it
_FULL = 1 / STD  # what full ink has more
ELASTIC_SMOOTHNESS = 5.0
"""Pixels over which an elastic distortion changes: the sigma of Simard's Gaussian."""

_LEFT_OUT = 1e-3  # share of an elastic field's variance that is not worth its cost


def elastic_modes(smoothness: float) -> Tensor:
    """Random fields, smooth along one axis, as a product with independent normal numbers.

    White noise smoothed by a Gaussian of ``smoothness`` pixels (Simard et al. 2003), scaled to a
    variance of 1, has the covariance exp(-d²/4s²) at a distance of d pixels. Its principal
    components are few: 6 of 28 for 5 pixels.

    Returns:
        28×k, float32: ``modes @ z``, of k standard normal numbers z, is such a field, and
        ``modes @ z @ modes.T``, of k×k, one over an image.
    """
    place = torch.arange(IMAGE_SHAPE[0], dtype=torch.float64)
    covariance = torch.exp(-((place[:, None] - place) ** 2) / (4 * smoothness**2))
    variances, axes = torch.linalg.eigh(covariance)
    kept = variances.flip(0).cumsum(0) < (1 - _LEFT_OUT) * variances.sum()
    count = int(kept.sum()) + 1
    modes: Tensor = axes * variances.clamp(min=0).sqrt()
    return modes.flip(1)[:, :count].float()


def _dilate(images: Tensor) -> Tensor:
    """The highest of each pixel and its eight neighbours, of n×28×28; 0 beyond the border.

    (``max_pool2d`` takes 29 us an image on a CPU core, this 1.)
    """
    padded = functional.pad(images, (1, 1, 1, 1))
    for axis in (1, 2):
        first, second, third = (padded.narrow(axis, start, 28) for start in range(3))
        padded = torch.maximum(torch.maximum(first, second), third)
    return padded


def _redraw(ink: Tensor, thicker: Tensor) -> Tensor:
    """Thicken or thin the strokes of n×28×28, by n pixels."""
    thicker = thicker[:, None, None]
    signed = ink * thicker.sign()  # thinner is a thicker ground
    return ink + thicker * (_dilate(signed) - signed)


def _focus(ink: Tensor, sharper: Tensor) -> Tensor:
    """Blur n×28×28 over 3×3 pixels or sharpen their edges, by n shares from -1 to 1."""
    sharper = sharper[:, None, None]
    padded = functional.pad(ink, (1, 1, 1, 1))
    for axis in (1, 2):
        first, second, third = (padded.narrow(axis, start, 28) for start in range(3))
        padded = (first + second).add_(third)
    blurred = torch.lerp(ink, padded / 9, (-sharper).clamp(min=0))
    middle = _FULL / 2
    return (blurred - middle).mul_(1 + 3 * sharper.clamp(min=0)).add_(middle).clamp_(0, _FULL)


class Distortion:
    """Distorts batches as the settings of a run say; see ``TrainConfig`` for what they mean."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config = config
        size = IMAGE_SHAPE[0]
        along = torch.arange(size) - (size - 1) / 2  # pixels from the centre
        y, x = torch.meshgrid(along, along, indexing="ij")
        maps = [x, y, torch.ones(IMAGE_SHAPE)]
        modes = elastic_modes(ELASTIC_SMOOTHNESS)
        self._modes = modes.shape[1] ** 2 if config.elastic else 0
        if config.elastic:
            maps.extend(config.elastic * torch.einsum("yi,xj->ijyx", modes, modes).flatten(0, 1))
        # grid_sample counts from -1 to 1 over the width of an image
        self._maps = (torch.stack(maps).flatten(1).t() * (2 / size)).contiguous().to(device)

    def __call__(self, images: Tensor, step: int, batch_size: int, rows: slice) -> Tensor:
        """Distort a slice of a global batch.

        Args:
            images: n×784, normalised.
            step: of the training, which decides with the seed what is drawn.
            batch_size: images in the global batch.
            rows: the n places of the images in it.

        Returns:
            n×784, normalised, of the same dtype.
        """
        count = len(images)
        weights = self.weights(step, batch_size)[rows].to(images.device).flatten(0, 1)
        product = row_stable_product(weights.dtype, weights.device)
        grid = product(weights, self._maps.t()).view(count, 2, *IMAGE_SHAPE).permute(0, 2, 3, 1)
        ink = (images.float() - _GROUND).view(count, *IMAGE_SHAPE)
        if self._config.thickness:
            ink = _redraw(ink, self.strokes(step, batch_size)[rows].to(images.device))
        moved = functional.grid_sample(ink[:, None], grid, align_corners=False)[:, 0]
        if self._config.sharpness:
            moved = _focus(moved, self.sharpnesses(step, batch_size)[rows].to(images.device))
        return moved.flatten(1).add_(_GROUND).to(images.dtype)

    def weights(self, step: int, batch_size: int) -> Tensor:
        """The weight of each map in where pixels come from: ``batch_size``×2×maps.

        The two are those of the horizontal and the vertical place of the source; the first three
        maps are x, y and 1.
        """
        config = self._config
        generator = self._generator("distortion", step)
        elastic = torch.randn(batch_size, 2, self._modes, generator=generator)
        # Six numbers from -1 to 1 for each image.
        uniform = torch.rand(6, batch_size, generator=generator).mul_(2).sub_(1)
        angle = uniform[0] * math.radians(config.rotation)
        shear = uniform[1] * config.shear
        horizontal, vertical = 1 + uniform[2:4] * config.scaling
        shift = uniform[4:] * config.shift
        cosine, sine = angle.cos(), angle.sin()
        # rotation · shear · scaling
        affine = torch.stack(
            [
                *(cosine * horizontal, (cosine * shear - sine) * vertical, shift[0]),
                *(sine * horizontal, (sine * shear + cosine) * vertical, shift[1]),
            ],
            1,
        )
        return torch.cat([affine.view(batch_size, 2, 3), elastic], 2)

    def strokes(self, step: int, batch_size: int) -> Tensor:
        """Pixels by which the strokes of each image are thicker on either side, ``batch_size``."""
        uniform = torch.rand(batch_size, generator=self._generator("strokes", step))
        return (2 * uniform - 1) * self._config.thickness

    def sharpnesses(self, step: int, batch_size: int) -> Tensor:
        """How much sharper than it is each image gets, ``batch_size``; below 0 it is blurred."""
        uniform = torch.rand(batch_size, generator=self._generator("sharpness", step))
        return (2 * uniform - 1) * self._config.sharpness

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self._config.seed, purpose, step))
