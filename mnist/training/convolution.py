"""Layers that are convolutions for a while: matrices whose weights are the same at all places.

What a convolution computes is a product with a matrix, of which most is zero. Where the gradients
of what is the same are added up, and those of the zeros left out, a linear layer stays one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnist.data import IMAGE_SHAPE, derived_seed
from mnist.model import MLP

_KERNEL, _STRIDE = 5, 2  # pixels; from 28×28 by 12×12 to 4×4


class Convolution(NamedTuple):
    """Of square maps, without padding; inputs and outputs are in the order of maps, rows, columns.

    A layer's weight is outputs×inputs, its bias of as many numbers as outputs.
    """

    maps: int
    """Of the input."""
    side: int
    """Pixels of these."""
    features: int
    """Maps of the output."""

    @property
    def places(self) -> int:
        """Along a side of the output."""
        return (self.side - _KERNEL) // _STRIDE + 1

    def kernels(self, weight: Tensor) -> Tensor:
        """A view of the kernels in a weight: features×places×places×maps×5×5."""
        inputs = self.maps * self.side**2
        along = (_STRIDE * self.side, _STRIDE)  # by which the source moves with the place
        strides = (
            self.places**2 * inputs,
            *(self.places * inputs + along[0], inputs + along[1]),
            *(self.side**2, self.side, 1),
        )
        shape = (self.features, self.places, self.places, self.maps, _KERNEL, _KERNEL)
        return weight.as_strided(shape, strides, weight.storage_offset())

    def fill(self, weight: Tensor, bias: Tensor, kernels: Tensor, offsets: Tensor) -> None:
        """Make a layer the convolution with features×maps×5×5 kernels and as many offsets."""
        weight.zero_()
        self.kernels(weight).copy_(kernels[:, None, None].expand_as(self.kernels(weight)))
        bias.view(self.features, -1).copy_(offsets[:, None].expand(-1, self.places**2))

    def tie(self, weight: Tensor, bias: Tensor) -> None:
        """Replace a layer's gradient by that of a convolution, at every place."""
        sums = self.kernels(weight).sum((1, 2)), bias.view(self.features, -1).sum(1)
        self.fill(weight, bias, *sums)


def convolutions(hidden_sizes: Sequence[int]) -> list[Convolution]:
    """The first two layers of a network as convolutions, whose settings have checked the widths."""
    found: list[Convolution] = []
    maps, side = 1, IMAGE_SHAPE[0]
    for width in hidden_sizes[:2]:
        places = Convolution(maps, side, 0).places
        features, rest = divmod(width, places**2)
        assert features and not rest
        found.append(Convolution(maps, side, features))
        maps, side = features, places
    return found


@torch.no_grad()
def begin_as_convolutions(model: MLP, seed: int) -> None:
    """Draw kernels for the first two layers as ``nn.Conv2d`` does, uniform within 1/sqrt(inputs),
    from the seed alone."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "initial kernels"))
    for layer, found in zip(model.layers, convolutions(model.hidden_sizes), strict=False):
        shape = (found.features, found.maps, _KERNEL, _KERNEL)
        bound = math.prod(shape[1:]) ** -0.5
        kernels = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        offsets = torch.empty(found.features).uniform_(-bound, bound, generator=generator)
        found.fill(layer.weight, layer.bias, kernels, offsets)
