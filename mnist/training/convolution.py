"""Layers that are convolutions for a while: matrices whose weights are the same at all places.

What a convolution computes is a product with a matrix, of which most is zero. As long as layers are
to stay convolutions, their kernels are trained in place of the matrices, which is far less work.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from mnist.data import IMAGE_SHAPE
from mnist.model import MLP
from mnist.products import Product

_KERNEL, _STRIDE = 5, 2  # pixels; from 28×28 by 12×12 to 4×4


class Convolution(NamedTuple):
    """Of square maps, without padding. Inputs, outputs and kernels are in the order of rows,
    columns, maps: n×inputs, n×outputs and features×(5·5·maps).

    ``forward``, ``backward``, ``gradient`` and ``offsets`` stand for what a step calls of a linear
    layer, and take the same.
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

    @property
    def kernel_size(self) -> int:
        """Weights of a kernel."""
        return _KERNEL**2 * self.maps

    def forward(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """A layer's output, of its input, its kernels, turned, and its bias of one number a map."""
        offsets = None if bias is None else bias.to(self.precision)
        maps = torch.conv2d(self._inputs(a), self._kernels(b.t()), offsets, _STRIDE)
        return _rows(maps, a.dtype, out)

    def backward(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The derivative by a layer's input, of that by its output, and its kernels."""
        shape = (len(a), self.maps, self.side, self.side)
        maps = conv2d_input(shape, self._kernels(b), self._outputs(a), _STRIDE)
        return _rows(maps, a.dtype, out)

    def gradient(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The derivative by a layer's kernels, of that by its output, turned, and its input."""
        shape = (self.features, self.maps, _KERNEL, _KERNEL)
        kernels = conv2d_weight(self._inputs(b), shape, self._outputs(a.t()), _STRIDE)
        return _rows(kernels, b.dtype, out)

    def offsets(self, delta: Tensor, dim: int, *, out: Tensor) -> Tensor:
        """The derivative by a layer's bias, of that by its output."""
        return torch.sum(delta.view(-1, self.features), dim, out=out)

    def matrix(self, kernels: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear layer that computes the same: outputs×inputs, outputs."""
        weight = kernels.new_zeros(self.places**2 * self.features, self.side**2 * self.maps)
        self._places_in(weight).copy_(kernels.view(self.features, _KERNEL, _KERNEL, self.maps))
        return weight, offsets.repeat(self.places**2)

    def of_matrix(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The kernels and offsets that a linear layer was made of."""
        return self._places_in(weight)[0, 0].flatten(1), bias[: self.features]

    def _places_in(self, weight: Tensor) -> Tensor:
        """A view of the kernels in a linear layer: places×places×features×5×5×maps."""
        inputs, row = self.side**2 * self.maps, self.side * self.maps
        down = self.places * self.features * inputs + _STRIDE * row
        right = self.features * inputs + _STRIDE * self.maps
        shape = (self.places, self.places, self.features, _KERNEL, _KERNEL, self.maps)
        return weight.as_strided(shape, (down, right, inputs, row, self.maps, 1))

    def _inputs(self, rows: Tensor) -> Tensor:
        return _maps(rows.to(self.precision), self.side, self.maps)

    def _outputs(self, rows: Tensor) -> Tensor:
        return _maps(rows.to(self.precision), self.places, self.features)

    def _kernels(self, rows: Tensor) -> Tensor:
        return _maps(rows.to(self.precision), _KERNEL, self.maps)


def _maps(rows: Tensor, side: int, count: int) -> Tensor:
    """A view of n rows as n×count×side×side."""
    return rows.view(len(rows), side, side, count).permute(0, 3, 1, 2)


def _rows(maps: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Maps as rows of a type, or in ``out``."""
    rows = maps.permute(0, 2, 3, 1).flatten(1)
    return rows.to(dtype) if out is None else out.copy_(rows)


_Change = Callable[[Convolution, Tensor, Tensor], tuple[Tensor, Tensor]]


class Kernels(MLP):
    """What stands for an MLP in training while its first two layers are convolutions: their weights
    are kernels, their biases one number for each map.

    Args:
        hidden_sizes: of the MLP, as the settings have checked them.
    """

    def __init__(self, hidden_sizes: Sequence[int]) -> None:
        super().__init__(hidden_sizes)
        self.convolutions = convolutions(hidden_sizes)
        kernels = [nn.Linear(found.kernel_size, found.features) for found in self.convolutions]
        self.layers = cast(Sequence[nn.Linear], nn.ModuleList([*kernels, *self.layers[2:]]))

    def freed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ``state_dict`` of the MLP that computes what one of these does."""
        return self._with(weights, Convolution.matrix)

    def tied(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ``state_dict`` of these that such an MLP's was made of."""
        return self._with(weights, Convolution.of_matrix)

    def _with(self, weights: Mapping[str, Tensor], change: _Change) -> dict[str, Tensor]:
        changed = dict(weights)
        for index, found in enumerate(self.convolutions):
            names = f"layers.{index}.weight", f"layers.{index}.bias"
            changed |= zip(names, change(found, *(weights[name] for name in names)), strict=True)
        return changed


class Products(NamedTuple):
    """What a step calls of each layer: for its output, and for the derivatives by its input, its
    weight and its bias."""

    forward: list[Product]
    backward: list[Product]
    gradient: list[Product]
    offsets: list[Callable[..., Tensor]]


def products_of(model: MLP, free: Sequence[Product], precisions: Sequence[torch.dtype]) -> Products:
    """Those of a model.

    Args:
        model: an MLP, or kernels.
        free: the product of each linear layer.
        precisions: in which each is multiplied.
    """
    layers = model.convolutions if isinstance(model, Kernels) else []
    found = [
        layer._replace(precision=precision)
        for layer, precision in zip(layers, precisions, strict=False)
    ]
    rest = free[len(found) :]
    return Products(
        [*(layer.forward for layer in found), *rest],
        [*(layer.backward for layer in found), *rest],
        [*(layer.gradient for layer in found), *rest],
        [*(layer.offsets for layer in found), *[torch.sum] * len(rest)],
    )


def convolutions(hidden_sizes: Sequence[int]) -> list[Convolution]:
    """The first two layers of a network as convolutions."""
    found: list[Convolution] = []
    maps, side = 1, IMAGE_SHAPE[0]
    for width in hidden_sizes[:2]:
        places = Convolution(maps, side, 0).places
        features, rest = divmod(width, places**2)
        assert features and not rest  # as the settings have checked
        found.append(Convolution(maps, side, features))
        maps, side = features, places
    return found
