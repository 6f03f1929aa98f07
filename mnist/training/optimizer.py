"""What a gradient does to the weights: SGD or AdamW, as torch.optim has them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist.training.config import TrainConfig


class Chunk(NamedTuple):
    """Views of what is updated together."""

    parameters: Tensor
    momentum: Tensor
    squares: Tensor
    average: Tensor
    half: Tensor  # of the first of the parameters, in half precision


def optimise(
    chunk: Chunk,
    gradient: Tensor,
    config: TrainConfig,
    learning_rate: float,
    updates: Tensor,
    scaling: tuple[Tensor | None, Tensor | None],
) -> None:
    """Change parameters, momentum and squares, by what torch.optim's functions call, which have
    15 us of checks.

    Args:
        chunk: to change.
        gradient: of its parameters.
        config: the settings.
        learning_rate: of this step.
        updates: so far, this one included.
        scaling: the scale of the gradient and whether it has overflowed, in fp16.
    """
    shared: dict[str, Any] = {
        "lr": learning_rate,
        "weight_decay": config.weight_decay,
        "maximize": False,
        "grad_scale": scaling[0],
        "found_inf": scaling[1],
    }
    if config.optimizer == "sgd":
        torch._fused_sgd_(
            [chunk.parameters],
            [gradient],
            [chunk.momentum] if config.momentum else [],
            momentum=config.momentum,
            dampening=0.0,
            nesterov=config.nesterov,
            is_first_step=False,
            **shared,
        )
    else:
        torch._fused_adamw_(
            [chunk.parameters],
            [gradient],
            [chunk.momentum],
            [chunk.squares],
            [],
            [updates],
            beta1=config.momentum,
            beta2=0.999,
            eps=1e-8,
            amsgrad=False,
            **shared,
        )
