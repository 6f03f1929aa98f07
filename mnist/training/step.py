"""One training step, by hand: forward, backward, all-reduce, update, on flat buffers.

Weights, optimizer state and gradient are one buffer each, so that the all-reduce, the update and
the cast to half precision are few operations, always in the same layout. A step at batch 64 takes
half the time of autograd, and repeats bit for bit (DistributedDataParallel regroups its buckets
after the first step of a process). Results are written into buffers that are made once for each
size of a batch: memory that was used just before is in a cache, and new one is not.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from mnist.distributed import World, widest_float
from mnist.model import CLASSES, MLP, NO_DIGIT
from mnist.products import Kind, training_products
from mnist.training.allreduce import AllReduce, Reducer, sizes_of_layers
from mnist.training.config import TrainConfig
from mnist.training.convolution import Kernels, products_of
from mnist.training.optimizer import Chunk, optimise

# Layers after the last one of this many weights stay in float32, the logits among them: small
# products gain nothing in half precision (256×128 at batch 64 on a CPU: 64 us in bf16, 36 in fp32),
# unless images are many (at 1,024 this layer in bf16 makes a step 0.9 times as long).
_HALF_MIN_WEIGHTS = 2**16
_HALF_MIN_TERMS = 2**24  # weights times images, of a global batch: the same for worlds of any size

_SCALE_GROWTH_INTERVAL = 2000  # steps without overflow after which the fp16 loss scale doubles

_UNSCORED_IMAGES = 2**14  # whose logits may wait to be scored
_LOSS_STEPS = 2.0**24  # per nat, to which losses are rounded, so that their float64 sums are exact


class _Layer(NamedTuple):
    """Views of one layer into a flat buffer."""

    weight: Tensor  # outputs × inputs
    bias: Tensor  # outputs
    transposed: Tensor  # inputs × outputs


class _Buffers(NamedTuple):
    """For the steps of so many images: each layer's output, and the derivative of the loss by it;
    of all but the last layer, whose outputs stay until they are scored."""

    outputs: list[Tensor]
    deltas: list[Tensor]


_NONE = _Buffers([], [])


class Learner:
    """An MLP in training: its flat buffers and the step that changes them.

    ``model`` shares memory with ``average``, which is ``parameters`` itself unless the settings ask
    for an average of the weights: always current, always float32. Layers in half precision compute
    from a copy of ``parameters`` that each update renews, as autocast would make it, unless their
    products round what they read.

    Args:
        model: which is taken over.
        config: the settings.
        world: the processes that step together.
        products: whose matrix products to take on CPUs; by default the setting's, else torch's.
        reducer: what adds up the gradients; by default the backend's all-reduce.
    """

    def __init__(
        self,
        model: MLP,
        config: TrainConfig,
        world: World,
        products: Kind | None = None,
        reducer: Reducer | None = None,
    ) -> None:
        self.model, self.config, self.world = model, config, world
        self.reducer: Reducer = reducer or AllReduce(world, model)
        kind: Kind = products or ("onednn" if config.products == "onednn" else "torch")
        self.products = kind
        full, large_product, rounds = training_products(kind, world.precision, world.device)
        weights = [math.prod(pair) for pair in itertools.pairwise(model.widths)]
        least = min(_HALF_MIN_WEIGHTS, _HALF_MIN_TERMS / config.batch_size)
        large = [i for i, count in enumerate(weights[:-1]) if count >= least]
        large_layers = large[-1] + 1 if large and world.precision != torch.float32 else 0
        half_layers = 0 if rounds else large_layers
        flat = parameters_to_vector(model.parameters()).detach()
        small_layers = len(weights) - large_layers
        each = [large_product] * large_layers + [full] * small_layers
        precisions = [world.precision] * large_layers + [flat.dtype] * small_layers
        self._products = products_of(model, each, precisions)
        self._buffers: dict[int, _Buffers] = {}

        size, dtype, zeros = len(flat), flat.dtype, self.reducer.zeros
        self.parameters = zeros(size, dtype).copy_(flat)
        self.average = zeros(size, dtype).copy_(flat) if config.averaging else self.parameters
        self.momentum = zeros(size, dtype)
        self.squares = zeros(size if config.optimizer == "adamw" else 0, dtype)
        self.updates = torch.zeros((), device=world.device)  # as AdamW counts them
        # The gradient, and whether this rank is asked to stop.
        self.gradient, self._stop = self.reducer.message[:size], self.reducer.message[size:]
        # Sums of loss, correct answers and, if not all are, digits: over all ranks, of this alone.
        sums = 3 if config.non_digits else 2
        self.totals = torch.zeros(sums, dtype=widest_float(world.device), device=world.device)
        self._own_totals = torch.zeros_like(self.totals)
        self._unscored: list[tuple[Tensor, Tensor]] = []

        ends = itertools.accumulate(sizes_of_layers(model), initial=0)
        self._half_parts = [slice(*pair) for pair in itertools.pairwise(ends)][:half_layers]
        half_size = self._half_parts[-1].stop if half_layers else 0
        self._half = zeros(half_size, world.precision).copy_(flat[:half_size])
        self._half_gradient = torch.zeros_like(self._half)
        self._layers = self._views(self.parameters, self._half)
        self._gradients = self._views(self.gradient, self._half_gradient)
        for layer, views in zip(model.layers, self._views(self.average), strict=True):
            layer.weight.data, layer.bias.data = views.weight, views.bias
        states = (self.parameters, self.momentum, self.squares, self.average, self._half)
        self._chunks = [Chunk(*(state[part] for state in states)) for part in self.reducer.chunks]

        self._targets = torch.eye(NO_DIGIT + 1, CLASSES, device=world.device)
        self._targets += config.label_smoothing * (1 / CLASSES - self._targets)
        self._targets[NO_DIGIT] = 1 / CLASSES
        self._negative_shares = self._targets, 0  # of a batch size
        # The gradients of fp16 underflow unless the loss is scaled up; other precisions need none.
        scaled = world.precision == torch.float16
        self.loss_scale = torch.tensor(2.0**16, device=world.device) if scaled else None
        self.steps_without_overflow = torch.zeros((), device=world.device)

    def _views(self, flat: Tensor, half: Tensor | None = None) -> list[_Layer]:
        """The layers in a flat buffer, or the first of them in its copy in half precision."""
        layers: list[_Layer] = []
        start = 0
        for layer in self.model.layers:
            middle = start + layer.weight.numel()
            stop = middle + layer.bias.numel()
            buffer = half if half is not None and stop <= len(half) else flat
            weight = buffer[start:middle].view(layer.weight.shape)
            layers.append(_Layer(weight, buffer[middle:stop], weight.t()))
            start = stop
        return layers

    @torch.no_grad()
    def step(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        learning_rate: float,
        averaging: float = 0.0,
        stop: bool = False,
    ) -> None:
        """Learn from one global batch.

        Args:
            images: this rank's slice of it, n×784, normalised, of ``input_dtype``; n may be 0.
            labels: int64, n.
            batch_size: images in the global batch, over all ranks: the divisor of the loss.
            learning_rate: of this step.
            averaging: the weight of the new weights in their average.
            stop: whether this rank is asked to stop; all learn of it by ``asked_to_stop``.
        """
        self.reducer.begin()
        inputs, deltas = self._differentiate(images, labels, batch_size)
        self._stop.fill_(stop)
        for number, layers in enumerate(self.reducer.parts):
            self._sum(inputs, deltas, layers)
            self.reducer.send(number)
        self._update(learning_rate, averaging)
        self.reducer.settle()

    def sum_up(self) -> None:
        """Let ``totals`` have all steps, on every rank: each has to be here."""
        self._score()
        self.world.all_reduce(self._own_totals)
        self.totals += self._own_totals
        self._own_totals.zero_()

    def take_totals(self) -> Tensor:
        """Sums of loss and correct predictions over all ranks since the last call."""
        self.sum_up()
        totals = self.totals.clone()
        self.totals.zero_()
        return totals

    def asked_to_stop(self) -> bool:
        """Whether any rank was, at the last step: the same answer on all (it waits for a GPU)."""
        return bool(self.reducer.stops)

    def state(self) -> dict[str, Tensor]:
        """A copy of all that a checkpoint needs beside ``weights``, by name; after ``sum_up``."""
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's ``state_dict``; of kernels, of the MLP that they stand for."""
        copy = self.average.clone()
        parts = copy.split([p.numel() for p in self.model.parameters()])
        shapes = {name: p.shape for name, p in self.model.state_dict().items()}
        found = {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        return self.model.freed(found) if isinstance(self.model, Kernels) else found

    def mlp(self) -> MLP:
        """The model, or the MLP that it stands for."""
        if not isinstance(self.model, Kernels):
            return self.model
        model = MLP(self.model.hidden_sizes).to(self.average.device, self.average.dtype)
        model.load_state_dict(self.weights())
        return model

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Go on from copies made by ``weights`` and ``state``, in a world of any size."""
        if isinstance(self.model, Kernels):
            weights = self.model.tied(weights)
        self.model.load_state_dict(weights)
        for name, tensor in self._state().items():
            tensor.copy_(state[name])
        # Not of the parameters: where memory is shared, others may still write initial weights.
        flat = parameters_to_vector([weights[name] for name in self.model.state_dict()])
        self._half.copy_(state.get("parameters", flat)[: len(self._half)])
        self._unscored.clear()
        self._own_totals.zero_()

    def _state(self) -> dict[str, Tensor]:
        names = "momentum squares updates totals steps_without_overflow".split()
        if self.average is not self.parameters:
            names.append("parameters")
        state: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        return state if self.loss_scale is None else state | {"loss_scale": self.loss_scale}

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the images, as the first layer takes them."""
        return self._layers[0].weight.dtype

    def logits(self, images: Tensor) -> Tensor:
        """Logits, n×10 float32, of normalised images, n×784, of ``input_dtype``: those of
        ``model``."""
        if self.average is self.parameters:
            return self._forward(images, self._layers)[1]
        half = self.average[: len(self._half)].to(self._half.dtype)
        return self._forward(images, self._views(self.average, half))[1]

    def gradient_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """A copy of the gradient that a step of these images alone would have; nothing is changed
        but the gradient."""
        unscored, totals = self._unscored, self._own_totals.clone()
        self._unscored = []
        inputs, deltas = self._differentiate(images, labels, max(1, len(images)))
        self._sum(inputs, deltas, range(len(inputs)))
        self._unscored = unscored
        self._own_totals.copy_(totals)
        return self.gradient.clone()

    def _buffers_for(self, count: int) -> _Buffers:
        if count not in self._buffers:
            outputs = [
                layer.bias.new_empty(count, width)
                for layer, width in zip(self._layers, self.model.hidden_sizes, strict=False)
            ]
            self._buffers[count] = _Buffers(outputs, list(map(torch.empty_like, outputs)))
        return self._buffers[count]

    def _forward(
        self, images: Tensor, layers: Sequence[_Layer], buffers: _Buffers = _NONE
    ) -> tuple[list[Tensor], Tensor]:
        """The input of each layer, in its precision, and the logits."""
        inputs: list[Tensor] = []
        hidden = images
        for index, (weight, bias, transposed) in enumerate(layers):
            if index:
                hidden = hidden.relu_()
            if hidden.dtype is not weight.dtype:
                hidden = hidden.to(weight.dtype)
            inputs.append(hidden)
            out = buffers.outputs[index] if index < len(buffers.outputs) else None
            hidden = self._products.forward[index](hidden, transposed, bias, out)
        return inputs, hidden.to(self.parameters.dtype)

    def _differentiate(
        self, images: Tensor, labels: Tensor, batch_size: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For n images: the input of each layer, and the derivative of the loss by its output."""
        buffers = self._buffers_for(len(images))
        inputs, logits = self._forward(images, self._layers, buffers)
        self._unscored.append((logits, labels))
        if len(self._unscored) * len(images) > _UNSCORED_IMAGES:
            self._score()
        # Of cross-entropy over softmax, by the logits; then backwards by each layer's output.
        if self._negative_shares[1] != batch_size:
            self._negative_shares = self._targets / -batch_size, batch_size
        negative = self._negative_shares[0].index_select(0, labels)
        delta = negative.add_(logits.softmax(1), alpha=1 / batch_size)
        if self.loss_scale is not None:
            delta *= self.loss_scale
        deltas: list[Tensor] = []
        for index in reversed(range(len(inputs))):
            weight, layer_input = self._layers[index].weight, inputs[index]
            if delta.dtype is not weight.dtype:
                delta = delta.to(weight.dtype)
            deltas.append(delta)
            if index:
                buffer = buffers.deltas[index - 1]
                out = buffer if buffer.dtype is weight.dtype else None
                delta = self._products.backward[index](delta, weight, None, out)
                torch.ops.aten.threshold_backward.grad_input(
                    delta, layer_input, 0, grad_input=delta
                )
        return inputs, deltas[::-1]

    def _score(self) -> None:
        """Add up the losses and correct answers of the steps since this was last done.

        Many at once, since it is a few operations for each call. The sums are exact, and so the
        same in whatever portions and by however many ranks they are made.
        """
        if not self._unscored:
            return
        logits, labels = (torch.cat(parts) for parts in zip(*self._unscored, strict=True))
        self._unscored.clear()
        # Of the labels as they are: comparable with validation whatever the label smoothing.
        losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=NO_DIGIT)
        losses = losses.to(self.totals.dtype).mul_(_LOSS_STEPS).round_()
        self._own_totals[0] += losses.sum() / _LOSS_STEPS
        self._own_totals[1] += (logits.argmax(1) == labels).sum()
        self._own_totals[2:] += (labels != NO_DIGIT).sum()

    def _sum(self, inputs: list[Tensor], deltas: list[Tensor], layers: Sequence[int]) -> None:
        """Fill the gradient of these layers with the sum over images."""
        for index in layers:
            weight, bias, _ = self._gradients[index]
            delta, layer_input = deltas[index], inputs[index]
            self._products.offsets[index](delta, 0, out=bias)
            self._products.gradient[index](delta.t(), layer_input, None, weight)
        half = self._half_parts[layers[0] : layers[-1] + 1]
        if half:
            part = slice(half[0].start, half[-1].stop)
            self.gradient[part].copy_(self._half_gradient[part])

    def _update(self, learning_rate: float, averaging: float) -> None:
        """Change the weights by the gradient, unless it overflowed in fp16."""
        counts = self.config.optimizer == "adamw"
        if counts:
            self.updates += 1
        for chunk, gradient in zip(self._chunks, self.reducer.sums(), strict=True):
            overflow = None
            if self.loss_scale is not None:  # on a GPU, where there is one chunk
                overflow = (~gradient.isfinite().all()).float()
                if counts:
                    self.updates -= overflow
            scaling = self.loss_scale, overflow
            optimise(chunk, gradient, self.config, learning_rate, self.updates, scaling)
            if self.loss_scale is not None and overflow is not None:
                self._adapt_loss_scale(self.loss_scale, overflow)
            if len(chunk.half):
                chunk.half.copy_(chunk.parameters[: len(chunk.half)])
            if averaging and self.average is not self.parameters:
                chunk.average.lerp_(chunk.parameters, averaging)

    def _adapt_loss_scale(self, scale: Tensor, overflow: Tensor) -> None:
        """Halve the scale after an overflow, double it after a long time without one."""
        self.steps_without_overflow += 1
        self.steps_without_overflow *= 1 - overflow
        grow = self.steps_without_overflow == _SCALE_GROWTH_INTERVAL
        scale *= torch.where(overflow > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self.steps_without_overflow *= ~grow
