"""Layers that are convolutions for a while: matrices whose weights are the same at all places.

What a convolution computes is a product with a matrix, of which most is zero. Where the gradients
of what is the same are added up, and those of the zeros left out, a linear layer stays one; and as
long as it does, torch's convolutions compute the same in less time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from mnist.data import IMAGE_SHAPE, derived_seed
from mnist.model import MLP
from mnist.products import Product

_KERNEL, _STRIDE = 5, 2  # pixels; from 28×28 by 12×12 to 4×4


class Convolution(NamedTuple):
    """Of square maps, without padding; inputs and outputs are in the order of rows, columns, maps.

    A layer's weight is outputs×inputs, its bias of as many numbers as outputs. ``forward``,
    ``backward`` and ``gradient`` are a step's products of such a layer, and are called as they are.
    """

    maps: int
    """Of the input."""
    side: int
    """Pixels of these."""
    features: int
    """Maps of the output."""
    precision: torch.dtype = torch.float32
    """Of what is multiplied, whatever the tensors have."""

    @property
    def places(self) -> int:
        """Along a side of the output."""
        return (self.side - _KERNEL) // _STRIDE + 1

    def kernels(self, weight: Tensor) -> Tensor:
        """A view of the kernels in a weight: places×places×features×maps×5×5."""
        inputs = self.side**2 * self.maps
        row, column = self.side * self.maps, self.maps
        strides = (
            self.places * self.features * inputs + _STRIDE * row,
            self.features * inputs + _STRIDE * column,
            *(inputs, 1, row, column),
        )
        shape = (self.places, self.places, self.features, self.maps, _KERNEL, _KERNEL)
        return weight.as_strided(shape, strides, weight.storage_offset())

    def fill(self, weight: Tensor, bias: Tensor, kernels: Tensor, offsets: Tensor) -> None:
        """Make a layer the convolution with features×maps×5×5 kernels and as many offsets."""
        self._fill_weight(weight, kernels)
        bias.view(-1, self.features).copy_(offsets)

    def tie(self, bias: Tensor) -> None:
        """Replace the gradient of a layer's bias by that of a convolution, at every place."""
        bias.view(-1, self.features).copy_(bias.view(-1, self.features).sum(0))

    def forward(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``a @ b + bias``: n×outputs, of the layer's input, n×inputs, and its weight, turned."""
        offsets = None if bias is None else bias[: self.features].to(self.precision)
        maps = torch.conv2d(self._inputs(a), self._shared(b.t()), offsets, _STRIDE)
        return _flat(maps, a.dtype, out)

    def backward(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``a @ b``: n×inputs, of the derivative by the layer's output and the layer's weight."""
        shape = (len(a), self.maps, self.side, self.side)
        maps = conv2d_input(shape, self._shared(b), self._outputs(a), _STRIDE)
        return _flat(maps, a.dtype, out)

    def gradient(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """``a @ b``, tied: the gradient of the weight, of the derivative by the layer's output,
        turned, and its input."""
        out = a.new_empty(len(a), b.shape[1]) if out is None else out
        shape = (self.features, self.maps, _KERNEL, _KERNEL)
        self._fill_weight(out, conv2d_weight(self._inputs(b), shape, self._outputs(a.t()), _STRIDE))
        return out

    def _inputs(self, values: Tensor) -> Tensor:
        """Of a layer: n×maps×side×side."""
        return _maps(values.to(self.precision), self.side, self.maps)

    def _outputs(self, values: Tensor) -> Tensor:
        """Of a layer: n×features×places×places."""
        return _maps(values.to(self.precision), self.places, self.features)

    def _shared(self, weight: Tensor) -> Tensor:
        """A copy of the kernels at one place, which are those at all."""
        kernels = self.kernels(weight)[0, 0].to(self.precision)
        return kernels.contiguous(memory_format=torch.channels_last)

    def _fill_weight(self, weight: Tensor, kernels: Tensor) -> None:
        weight.zero_()
        self.kernels(weight).copy_(kernels)


def _maps(rows: Tensor, side: int, count: int) -> Tensor:
    """A view of rows as n×count×side×side."""
    return rows.view(len(rows), side, side, count).permute(0, 3, 1, 2)


def _flat(maps: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Maps as rows of a type, or in ``out``."""
    rows = maps.permute(0, 2, 3, 1).flatten(1)
    return rows.to(dtype) if out is None else out.copy_(rows)


class Products(NamedTuple):
    """Of each layer: of its output, of the derivative by its input, of that by its weight."""

    forward: list[Product]
    backward: list[Product]
    gradient: list[Product]


def tied_products(found: Sequence[Convolution], free: Sequence[Product]) -> Products:
    """Of a network whose first layers are convolutions, and whose others are free."""
    rest = free[len(found) :]
    return Products(
        [*(layer.forward for layer in found), *rest],
        [*(layer.backward for layer in found), *rest],
        [*(layer.gradient for layer in found), *rest],
    )


def convolutions(
    hidden_sizes: Sequence[int], precisions: Sequence[torch.dtype] = (torch.float32,) * 2
) -> list[Convolution]:
    """The first two layers of a network as convolutions, whose settings have checked the widths."""
    found: list[Convolution] = []
    maps, side = 1, IMAGE_SHAPE[0]
    for width, precision in zip(hidden_sizes[:2], precisions, strict=False):
        places = Convolution(maps, side, 0).places
        features, rest = divmod(width, places**2)
        assert features and not rest
        found.append(Convolution(maps, side, features, precision))
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
