"""One training step, by hand: forward, backward, all-reduce, update, on flat buffers.

Weights, optimizer state and gradient are one buffer each, so that the all-reduce, the update and
the cast to half precision are one operation each, always in the same layout. A step at batch 64
takes half the time of autograd with autocast, and repeats bit for bit (DistributedDataParallel
regroups its buckets after the first step of a process).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from mnist.data import rank_slice
from mnist.distributed import World, widest_float
from mnist.model import CLASSES, MLP, find_product
from mnist.training.config import TrainConfig

# Layers after the last one of this many weights stay in float32, the logits among them: small
# products gain nothing in half precision (64×64 at batch 64 on a CPU: 61 us in bf16, 12 in fp32).
_HALF_PRECISION_MIN_WEIGHTS = 2**15

_SCALE_GROWTH_INTERVAL = 2000  # steps without overflow after which the fp16 loss scale doubles

_UNSCORED_IMAGES = 2**14  # whose logits may wait to be scored
_LOSS_STEPS = 2.0**24  # per nat, to which losses are rounded, so that their float64 sums are exact


class _Layer(NamedTuple):
    """Views of one layer into a flat buffer."""

    weight: Tensor  # outputs × inputs
    bias: Tensor  # outputs


class Learner:
    """An MLP in training: its flat buffers and the step that changes them.

    ``model`` shares memory with ``average``, which is ``parameters`` itself unless the settings ask
    for an average of the weights: always current, always float32. Layers in half precision compute
    from a copy of ``parameters`` that each update renews, as autocast would make it.
    """

    def __init__(self, model: MLP, config: TrainConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        weights = [layer.weight.numel() for layer in model.layers]
        large = [i for i, count in enumerate(weights) if count >= _HALF_PRECISION_MIN_WEIGHTS]
        half_layers = large[-1] + 1 if large and world.precision != torch.float32 else 0

        self.parameters = parameters_to_vector(model.parameters()).detach().to(world.device)
        self.average = self.parameters.clone() if config.averaging else self.parameters
        size = self.parameters.numel()
        self.momentum = torch.zeros_like(self.parameters)
        self.squares = torch.zeros(size if config.optimizer == "adamw" else 0, device=world.device)
        self.updates = torch.zeros((), device=world.device)  # as AdamW counts them
        # All that one all-reduce carries: the gradient, and how many ranks are asked to stop.
        self.reduced = torch.zeros(size + 1, device=world.device)
        self.gradient, self._stop = self.reduced.split([size, 1])
        # Sums of loss and correct answers: over all ranks, and of this one alone.
        self.totals = torch.zeros(2, dtype=widest_float(world.device), device=world.device)
        self._own_totals = torch.zeros_like(self.totals)
        self._unscored: list[tuple[Tensor, Tensor]] = []
        # On GPUs a row's result depends on its batch, so that nothing is gained there.
        exact = world.precision == torch.float32 and world.device.type == "cpu"
        self._gathers = exact and config.exact_sums and world.size > 1

        half_size = sum(
            p.numel() for layer in model.layers[:half_layers] for p in layer.parameters()
        )
        self._half = self.parameters[:half_size].to(world.precision)
        self._half_gradient = torch.zeros_like(self._half)
        self._product = find_product(world.device, world.precision)
        # In half precision oneDNN's overhead of 10 us is more than small products take.
        self._product_layers = len(model.layers) if exact else half_layers
        self._layers = self._views(self.parameters, self._half)
        self._gradients = self._views(self.gradient, self._half_gradient)
        for layer, (weight, bias) in zip(model.layers, self._views(self.average), strict=True):
            layer.weight.data, layer.bias.data = weight, bias

        self._targets = torch.eye(CLASSES, device=world.device)
        self._targets += config.label_smoothing * (1 / CLASSES - self._targets)
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
            layers.append(_Layer(weight, buffer[middle:stop]))
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
            images: this rank's slice of it, n×784, normalised, in the training precision; n may
                be 0.
            labels: int64, n.
            batch_size: images in the global batch, over all ranks: the divisor of the loss.
            learning_rate: of this step.
            averaging: the weight of the new weights in their average.
            stop: whether this rank is asked to stop; all learn of it by ``asked_to_stop``.
        """
        inputs, deltas = self._differentiate(images, labels, batch_size)
        if self._gathers:
            stops, *columns = self._gather([*inputs, *deltas], batch_size, stop)
            inputs, deltas = columns[: len(inputs)], columns[len(inputs) :]
            self._sum(inputs, deltas)
            self._stop.fill_(stops)
        else:
            self._sum(inputs, deltas)
            self._stop.fill_(stop)
            self.world.all_reduce(self.reduced)
        self._update(learning_rate)
        if averaging and self.average is not self.parameters:
            self.average.lerp_(self.parameters, averaging)

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
        return bool(self._stop)

    def state(self) -> dict[str, Tensor]:
        """A copy of all that a checkpoint needs beside ``weights``, by name; after ``sum_up``."""
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's ``state_dict``."""
        copy = self.average.clone()
        parts = copy.split([p.numel() for p in self.model.parameters()])
        shapes = {name: p.shape for name, p in self.model.state_dict().items()}
        return {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Go on from copies made by ``weights`` and ``state``, in a world of any size."""
        self.model.load_state_dict(weights)
        for name, tensor in self._state().items():
            tensor.copy_(state[name])
        self._half.copy_(self.parameters[: len(self._half)])
        self._unscored.clear()
        self._own_totals.zero_()

    def _state(self) -> dict[str, Tensor]:
        names = "momentum squares updates totals steps_without_overflow".split()
        if self.average is not self.parameters:
            names.append("parameters")
        state: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        return state if self.loss_scale is None else state | {"loss_scale": self.loss_scale}

    def logits(self, images: Tensor) -> Tensor:
        """Logits, n×10 float32, of normalised images, n×784, in the training precision: those of
        ``model``."""
        if self.average is self.parameters:
            return self._forward(images, self._layers)[1]
        half = self.average[: len(self._half)].to(self._half.dtype)
        return self._forward(images, self._views(self.average, half))[1]

    def _forward(self, images: Tensor, layers: Sequence[_Layer]) -> tuple[list[Tensor], Tensor]:
        """The input of each layer, in its precision, and the logits."""
        inputs: list[Tensor] = []
        hidden = images
        for index, (weight, bias) in enumerate(layers):
            if index:
                hidden = hidden.relu_()
            if hidden.dtype is not weight.dtype:
                hidden = hidden.to(weight.dtype)
            inputs.append(hidden)
            if index < self._product_layers:
                hidden = self._product(hidden, weight, bias)
            else:
                hidden = torch.addmm(bias, hidden, weight.t())
        return inputs, hidden.float()

    def _differentiate(
        self, images: Tensor, labels: Tensor, batch_size: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For n images: the input of each layer, and the derivative of the loss by its output."""
        inputs, logits = self._forward(images, self._layers)
        self._unscored.append((logits, labels))
        if len(self._unscored) * len(images) > _UNSCORED_IMAGES:
            self._score()
        # Of cross-entropy over softmax, by the logits; then backwards by each layer's output.
        delta = logits.softmax(1).sub_(self._targets[labels]).div_(batch_size)
        if self.loss_scale is not None:
            delta *= self.loss_scale
        deltas: list[Tensor] = []
        for index in reversed(range(len(inputs))):
            weight, layer_input = self._layers[index].weight, inputs[index]
            if delta.dtype is not weight.dtype:
                delta = delta.to(weight.dtype)
            deltas.append(delta)
            if index:
                by_product = index < self._product_layers
                delta = self._product(delta, weight.t()) if by_product else delta @ weight
                delta = torch.ops.aten.threshold_backward(delta, layer_input, 0)
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
        losses = functional.cross_entropy(logits, labels, reduction="none").to(self.totals.dtype)
        self._own_totals[0] += losses.mul_(_LOSS_STEPS).round_().sum() / _LOSS_STEPS
        self._own_totals[1] += (logits.argmax(1) == labels).sum()

    def _sum(self, inputs: list[Tensor], deltas: list[Tensor]) -> None:
        """Fill the gradient with the sum over images."""
        for index, (weight, bias) in enumerate(self._gradients):
            delta, layer_input = deltas[index], inputs[index]
            torch.sum(delta, 0, out=bias)
            if weight.dtype is torch.float32 and index < self._product_layers:
                self._product(delta.t(), layer_input.t(), out=weight)
            else:
                torch.mm(delta.t(), layer_input, out=weight)
        self.gradient[: len(self._half)].copy_(self._half_gradient)

    def _gather(self, columns: list[Tensor], batch_size: int, stop: bool) -> list[Tensor]:
        """The rows of the global batch, from those that this rank has.

        So every rank adds up the same numbers in the same order, and worlds of any size end with
        the same weights. Sums of sums differ in their last bits, and a hidden value that is zero
        but for rounding then falls on either side of the ReLU.

        Args:
            columns: tensors of n rows.
            batch_size: rows in the global batch.
            stop: whether this rank is asked to stop.

        Returns:
            How many ranks are asked to stop, then tensors of ``batch_size`` rows.
        """
        world = self.world
        slices = [rank_slice(batch_size, rank, world.size) for rank in range(world.size)]
        counts = [part.stop - part.start for part in slices]
        rows = torch.cat(columns, 1)
        width = rows.shape[1]
        block = rows.new_zeros(1 + max(counts) * width)
        block[0] = stop
        block[1 : 1 + rows.numel()] = rows.flatten()
        blocks = world.gather(block)
        parts = [
            block[1 : 1 + count * width].view(count, width)
            for block, count in zip(blocks, counts, strict=True)
        ]
        gathered = torch.cat(parts).split([column.shape[1] for column in columns], 1)
        return [blocks[:, 0].sum(), *(column.contiguous() for column in gathered)]

    def _update(self, learning_rate: float) -> None:
        """Change the weights by the gradient, unless it overflowed in fp16."""
        overflow = None
        if self.loss_scale is not None:
            overflow = (~self.gradient.isfinite().all()).float()
        # What torch.optim's functions call, which have 15 us of checks.
        if self.config.optimizer == "sgd":
            torch._fused_sgd_(
                [self.parameters],
                [self.gradient],
                [self.momentum] if self.config.momentum else [],
                lr=learning_rate,
                momentum=self.config.momentum,
                dampening=0.0,
                nesterov=self.config.nesterov,
                weight_decay=self.config.weight_decay,
                maximize=False,
                is_first_step=False,
                grad_scale=self.loss_scale,
                found_inf=overflow,
            )
        else:
            self.updates += 1 if overflow is None else 1 - overflow
            torch._fused_adamw_(
                [self.parameters],
                [self.gradient],
                [self.momentum],
                [self.squares],
                [],
                [self.updates],
                lr=learning_rate,
                beta1=self.config.momentum,
                beta2=0.999,
                eps=1e-8,
                amsgrad=False,
                weight_decay=self.config.weight_decay,
                maximize=False,
                grad_scale=self.loss_scale,
                found_inf=overflow,
            )
        if self.loss_scale is not None and overflow is not None:
            self._adapt_loss_scale(self.loss_scale, overflow)
        self._half.copy_(self.parameters[: len(self._half)])

    def _adapt_loss_scale(self, scale: Tensor, overflow: Tensor) -> None:
        """Halve the scale after an overflow, double it after a long time without one."""
        self.steps_without_overflow += 1
        self.steps_without_overflow *= 1 - overflow
        grow = self.steps_without_overflow == _SCALE_GROWTH_INTERVAL
        scale *= torch.where(overflow > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self.steps_without_overflow *= ~grow
