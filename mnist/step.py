"""One training step, by hand: forward, backward, all-reduce, update, on flat buffers.

Weights, optimizer state and gradient are one buffer each, so that the all-reduce, the update and
the cast to half precision are one operation each, always in the same layout. A step at batch 64
takes 0.70 of the time of autograd with autocast, and repeats bit for bit (DistributedDataParallel
regroups its buckets after the first step of a process).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from mnist.config import TrainConfig
from mnist.data import rank_slice
from mnist.distributed import World, widest_float
from mnist.model import CLASSES, MLP, product

# Layers after the last one of this many weights stay in float32, the logits among them: small
# products gain nothing in half precision (64×64 at batch 64 on a CPU: 61 us in bf16, 12 in fp32).
_HALF_PRECISION_MIN_WEIGHTS = 2**15

_SCALE_GROWTH_INTERVAL = 2000  # steps without overflow after which the fp16 loss scale doubles


class _Layer(NamedTuple):
    """Views of one layer into the flat buffers, in the precision it computes in."""

    weight: Tensor  # outputs × inputs
    bias: Tensor  # outputs
    weight_gradient: Tensor
    bias_gradient: Tensor
    onednn: bool  # whether its products are ``model.product``'s


class Learner:
    """An MLP in training: its flat buffers and the step that changes them.

    ``model`` shares memory with ``parameters``: always current, always float32. Layers in half
    precision compute from a copy that each update renews, as autocast would make it.
    """

    def __init__(self, model: MLP, config: TrainConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        weights = [layer.weight.numel() for layer in model.layers]
        large = [i for i, count in enumerate(weights) if count >= _HALF_PRECISION_MIN_WEIGHTS]
        half_layers = large[-1] + 1 if large and world.precision != torch.float32 else 0

        self.parameters = parameters_to_vector(model.parameters()).detach().to(world.device)
        size = self.parameters.numel()
        self.momentum = torch.zeros_like(self.parameters)
        self.squares = torch.zeros(size if config.optimizer == "adamw" else 0, device=world.device)
        self.updates = torch.zeros((), device=world.device)  # as AdamW counts them
        # All that one all-reduce carries: the gradient, the sums of loss and correct answers, and
        # how many ranks are asked to stop.
        self.reduced = torch.zeros(size + 3, device=world.device)
        self.gradient, self.sums, self._stop = self.reduced.split([size, 2, 1])
        self.totals = torch.zeros(2, dtype=widest_float(world.device), device=world.device)
        # On GPUs a row's result depends on its batch, so that nothing is gained there.
        exact = world.precision == torch.float32 and world.device.type == "cpu"
        self._gathers = exact and config.exact_sums and world.size > 1

        half_size = sum(
            p.numel() for layer in model.layers[:half_layers] for p in layer.parameters()
        )
        self._half = self.parameters[:half_size].to(world.precision)
        self._half_gradient = torch.zeros_like(self._half)
        self._layers: list[_Layer] = []
        start = 0
        for index, layer in enumerate(model.layers):
            middle = start + layer.weight.numel()
            stop = middle + layer.bias.numel()
            half = index < half_layers
            flat = self._half if half else self.parameters
            flat_gradient = self._half_gradient if half else self.gradient
            self._layers.append(
                _Layer(
                    weight=flat[start:middle].view(layer.weight.shape),
                    bias=flat[middle:stop],
                    weight_gradient=flat_gradient[start:middle].view(layer.weight.shape),
                    bias_gradient=flat_gradient[middle:stop],
                    # Its overhead of 10 us is more than small products take.
                    onednn=exact or half,
                )
            )
            layer.weight.data = self.parameters[start:middle].view(layer.weight.shape)
            layer.bias.data = self.parameters[middle:stop]
            start = stop

        self._targets = torch.eye(CLASSES, device=world.device)
        self._targets += config.label_smoothing * (1 / CLASSES - self._targets)
        # The gradients of fp16 underflow unless the loss is scaled up; other precisions need none.
        scaled = world.precision == torch.float16
        self.loss_scale = torch.tensor(2.0**16, device=world.device) if scaled else None
        self.steps_without_overflow = torch.zeros((), device=world.device)

    @torch.no_grad()
    def step(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        learning_rate: float,
        stop: bool = False,
    ) -> None:
        """Learn from one global batch.

        Args:
            images: this rank's slice of it, n×784, normalised, in the training precision; n may
                be 0.
            labels: int64, n.
            batch_size: images in the global batch, over all ranks: the divisor of the loss.
            learning_rate: of this step.
            stop: whether this rank is asked to stop; all learn of it by ``asked_to_stop``.
        """
        inputs, deltas, scores = self._differentiate(images, labels, batch_size)
        if self._gathers:
            stops, *columns = self._gather([*inputs, *deltas, scores], batch_size, stop)
            inputs, deltas = columns[: len(inputs)], columns[len(inputs) : -1]
            self._sum(inputs, deltas, columns[-1])
            self._stop.fill_(stops)
        else:
            self._sum(inputs, deltas, scores)
            self._stop.fill_(stop)
            self.world.all_reduce(self.reduced)
        self.totals += self.sums
        self._update(learning_rate)

    def take_totals(self) -> Tensor:
        """Sums of loss and correct predictions over all ranks since the last call."""
        totals = self.totals.clone()
        self.totals.zero_()
        return totals

    def asked_to_stop(self) -> bool:
        """Whether any rank was, at the last step: the same answer on all (it waits for a GPU)."""
        return bool(self._stop)

    def state(self) -> dict[str, Tensor]:
        """A copy of all that a checkpoint needs beside ``weights``, by name."""
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's ``state_dict``."""
        copy = self.parameters.clone()
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
        self._half.copy_(self.parameters[: len(self._half)])
        for name, tensor in self._state().items():
            tensor.copy_(state[name])

    def _state(self) -> dict[str, Tensor]:
        names = "momentum squares updates totals steps_without_overflow".split()
        state: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        return state if self.loss_scale is None else state | {"loss_scale": self.loss_scale}

    def logits(self, images: Tensor) -> Tensor:
        """Logits, n×10 float32, of normalised images, n×784, in the training precision."""
        return self._forward(images)[1]

    def _forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The input of each layer, in its precision, and the logits."""
        inputs: list[Tensor] = []
        hidden = images
        for layer in self._layers:
            if inputs:
                hidden = hidden.relu_()
            inputs.append(hidden.to(layer.weight.dtype))
            if layer.onednn:
                hidden = product(inputs[-1], layer.weight, layer.bias)
            else:
                hidden = torch.addmm(layer.bias, inputs[-1], layer.weight.t())
        return inputs, hidden.float()

    def _differentiate(
        self, images: Tensor, labels: Tensor, batch_size: int
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """For n images: the input of each layer; the derivative of the loss by each layer's output;
        and, n×2, what they add to the sums: loss, and whether the answer is correct."""
        inputs, logits = self._forward(images)
        log_probabilities = logits.log_softmax(1)
        # Of the labels as they are: comparable with validation whatever the label smoothing.
        losses = log_probabilities.gather(1, labels[:, None]).neg_()
        correct = (logits.argmax(1) == labels)[:, None]
        scores = torch.cat([losses, correct], 1)
        # Of cross-entropy over softmax, by the logits; then backwards by each layer's output.
        delta = log_probabilities.exp_().sub_(self._targets[labels]).div_(batch_size)
        if self.loss_scale is not None:
            delta *= self.loss_scale
        deltas: list[Tensor] = []
        for layer, layer_input in zip(reversed(self._layers), reversed(inputs), strict=True):
            delta = delta.to(layer.weight.dtype)
            deltas.insert(0, delta)
            if layer_input is not inputs[0]:
                weight = layer.weight
                delta = product(delta, weight.t()) if layer.onednn else delta @ weight
                delta = torch.ops.aten.threshold_backward(delta, layer_input, 0)
        return inputs, deltas, scores

    def _sum(self, inputs: list[Tensor], deltas: list[Tensor], scores: Tensor) -> None:
        """Fill the gradient and the sums with those over images."""
        torch.sum(scores, 0, out=self.sums)
        for layer, layer_input, delta in zip(self._layers, inputs, deltas, strict=True):
            torch.sum(delta, 0, out=layer.bias_gradient)
            if layer.weight.dtype == torch.float32 and layer.onednn:
                layer.weight_gradient.copy_(product(delta.t(), layer_input.t()))
            else:
                torch.mm(delta.t(), layer_input, out=layer.weight_gradient)
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
        if self.config.optimizer == "sgd":
            sgd(
                [self.parameters],
                [self.gradient],
                [self.momentum],
                lr=learning_rate,
                momentum=self.config.momentum,
                dampening=0.0,
                nesterov=self.config.nesterov,
                weight_decay=self.config.weight_decay,
                maximize=False,
                fused=True,
                grad_scale=self.loss_scale,
                found_inf=overflow,
            )
        else:
            adamw(
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
                fused=True,
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
