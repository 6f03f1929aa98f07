"""One training step, by hand: forward, backward, all-reduce, update, on flat buffers.

Weights, optimizer state and gradient are one buffer each, so that the all-reduce, the update and
the cast to half precision are one operation each, always in the same layout. A step at batch 64
takes 0.55 of the time of autograd with autocast, and repeats bit for bit (DistributedDataParallel
regroups its buckets after the first step of a process).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from mnist.config import TrainConfig
from mnist.distributed import World, widest_float
from mnist.model import CLASSES, MLP

# Layers after the last one of this many weights stay in float32, the logits among them: small
# products gain nothing in half precision (64×64 at batch 64 on a CPU: 61 us in bf16, 12 in fp32).
_HALF_PRECISION_MIN_WEIGHTS = 2**15

_SCALE_GROWTH_INTERVAL = 2000  # steps without overflow after which the fp16 loss scale doubles


class _Layer(NamedTuple):
    """Views of one layer into the flat buffers, in the precision it computes in."""

    weight: Tensor  # outputs × inputs
    bias: Tensor  # outputs
    weight_gradient: Tensor  # in the precision that its sum over images is made in
    bias_gradient: Tensor


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
        # On GPUs float64 can be 64 times slower, and a row's result depends on its batch anyway.
        exact = (
            config.exact_sums and world.precision == torch.float32 and world.device.type == "cpu"
        )
        sum_dtype = torch.float64 if exact else torch.float32
        self.reduced = torch.zeros(size + 3, dtype=sum_dtype, device=world.device)
        self._reduced_gradient, self.sums, self._stop = self.reduced.split([size, 2, 1])
        self.gradient = self._reduced_gradient.float()  # itself, where it is float32
        self.totals = torch.zeros(2, dtype=widest_float(world.device), device=world.device)

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
            flat_gradient = self._half_gradient if half else self._reduced_gradient
            self._layers.append(
                _Layer(
                    weight=flat[start:middle].view(layer.weight.shape),
                    bias=flat[middle:stop],
                    weight_gradient=flat_gradient[start:middle].view(layer.weight.shape),
                    bias_gradient=flat_gradient[middle:stop],
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
        self._backward(images, labels, batch_size)
        self._stop.fill_(stop)
        self._reduce()
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
            hidden = torch.addmm(layer.bias, inputs[-1], layer.weight.t())
        return inputs, hidden.float()

    def _backward(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        """Fill the gradient and the sums with this rank's share of the global batch."""
        inputs, logits = self._forward(images)
        log_probabilities = logits.log_softmax(1)
        targets = self._targets[labels]
        # Of the labels as they are: comparable with validation whatever the label smoothing.
        self.sums[0] = -log_probabilities.gather(1, labels[:, None]).sum(dtype=self.sums.dtype)
        self.sums[1] = (logits.argmax(1) == labels).sum()
        # Of cross-entropy over softmax, by the logits; then backwards by each layer's output.
        delta = log_probabilities.exp_().sub_(targets).div_(batch_size)
        if self.loss_scale is not None:
            delta *= self.loss_scale
        for layer, layer_input in zip(reversed(self._layers), reversed(inputs), strict=True):
            delta = delta.to(layer.weight.dtype)
            terms = delta.to(layer.weight_gradient.dtype)
            torch.sum(terms, 0, out=layer.bias_gradient)
            torch.mm(terms.t(), layer_input.to(terms.dtype), out=layer.weight_gradient)
            if layer_input is not inputs[0]:
                delta = torch.ops.aten.threshold_backward(delta @ layer.weight, layer_input, 0)
        self._reduced_gradient[: len(self._half)].copy_(self._half_gradient)

    def _reduce(self) -> None:
        """Make gradient and sums those of the global batch, on every rank."""
        self.world.all_reduce(self.reduced)
        self.gradient.copy_(self._reduced_gradient)
        self.totals += self.sums

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
