"""The MLP of five linear layers, its initial weights, and its file. Training lives elsewhere."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE, MEAN, STD, derived_seed
from mnist.products import row_stable_product
from mnist.system import write_file

CLASSES = 10
NO_DIGIT = CLASSES
"""The label of a training image that is no digit."""

_FORMAT = "mnist-mlp-1"
_INPUTS = IMAGE_SHAPE[0] * IMAGE_SHAPE[1]


class Doubt(NamedTuple):
    """How doubtful to be of a model's predictions, as found on validation images."""

    temperature: float
    """By which logits are divided before the softmax (Guo et al. 2017)."""
    threshold: float
    """The confidence from which on a prediction is accepted."""


class MLP(nn.Module):
    """Flatten, then five ``Linear`` layers with ReLU between them.

    Args:
        hidden_sizes: the widths of the four hidden layers.
    """

    layers: Sequence[nn.Linear]
    doubt: Doubt | None = None
    """None of a checkpoint, and of a model that was not taught what is no digit."""

    def __init__(self, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        if len(hidden_sizes) != 4:
            raise InputError(f"the model takes exactly four hidden widths, not {len(hidden_sizes)}")
        self.hidden_sizes = tuple(hidden_sizes)
        self.widths = (_INPUTS, *hidden_sizes, CLASSES)
        layers = [nn.Linear(*sizes) for sizes in itertools.pairwise(self.widths)]
        self.layers = cast(Sequence[nn.Linear], nn.ModuleList(layers))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N×10, of normalised images, N×784 or N×28×28."""
        hidden = images.flatten(1)
        if torch.is_grad_enabled():  # the other products have no derivative
            for layer in self.layers[:-1]:
                hidden = layer(hidden).relu_()
            logits: Tensor = self.layers[-1](hidden)
            return logits
        product = row_stable_product(hidden.dtype, hidden.device)
        for layer in self.layers[:-1]:
            hidden = product(hidden, layer.weight.t(), layer.bias).relu_()
        return product(hidden, self.layers[-1].weight.t(), self.layers[-1].bias)

    @torch.no_grad()
    def initialise(self, seed: int) -> "MLP":
        """Draw initial weights as ``nn.Linear`` does, uniform within 1/sqrt(inputs), from the seed
        alone: the same on every rank, and whatever else the process has drawn."""
        generator = torch.Generator().manual_seed(derived_seed(seed, "initial weights"))
        for layer in self.layers:
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
        return self


def save_model(model: MLP, path: Path) -> None:
    """Write float32 weights, and as metadata what is needed to rebuild and to feed the model.

    The file appears whole or not at all.
    """
    write_file(path, model_bytes(model.hidden_sizes, model.state_dict(), model.doubt))


def model_bytes(
    hidden_sizes: Sequence[int], weights: Mapping[str, Tensor], doubt: Doubt | None = None
) -> bytes:
    """The contents of a model's file, from its ``state_dict``."""
    metadata: dict[str, Any] = {
        "hidden_sizes": hidden_sizes,
        "input": f"{_INPUTS} pixels: (value / 255 - mean) / std, ink high, ground 0",
        "mean": MEAN,
        "std": STD,
    }
    if doubt is not None:
        metadata |= doubt._asdict()
    tensors = {name: weight.float().cpu().contiguous() for name, weight in weights.items()}
    # One entry: safetensors writes several in an order that changes from call to call.
    return save(tensors, {_FORMAT: json.dumps(metadata)})


def load_model(path: Path) -> MLP:
    """Rebuild a saved model on the CPU, in float32.

    Raises:
        InputError: the file is missing, damaged, or not such a model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get(_FORMAT)
            if description is None:
                raise InputError(f"{path}: not a model of this package (no {_FORMAT} metadata)")
            metadata = json.loads(description)
            if (metadata["mean"], metadata["std"]) != (MEAN, STD):
                raise InputError(f"{path}: made for another normalisation of its input")
            model = MLP(metadata["hidden_sizes"])
            if "threshold" in metadata:
                model.doubt = _doubt_of(metadata)
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return model
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or 'no such file'}") from None
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a usable model file: {reason}") from None


def _doubt_of(metadata: dict[str, Any]) -> Doubt:
    """What a file says.

    Raises:
        ValueError: that is impossible.
        KeyError: half of it is missing.
    """
    doubt = Doubt(float(metadata["temperature"]), float(metadata["threshold"]))
    if not (0 < doubt.temperature < math.inf and 0 <= doubt.threshold <= 1):
        raise ValueError(f"{doubt} is impossible")
    return doubt
