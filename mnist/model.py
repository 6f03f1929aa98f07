"""The MLP of five linear layers, its initial weights, and its file. Training lives elsewhere."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE, MEAN, STD, derived_seed
from mnist.system import write_file

CLASSES = 10
_FORMAT = "mnist-mlp-1"
_INPUTS = IMAGE_SHAPE[0] * IMAGE_SHAPE[1]


# oneDNN's product of ``torch.compile``, if this torch has it.
_onednn: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether it is what we take it for, and knows the type on this CPU (bf16: from AVX-512 on)."""
    if _onednn is None:
        return False
    a, b = torch.linspace(-1, 1, 51).view(3, 17), torch.linspace(-2, 1, 85).view(5, 17)
    a, b, bias = a.to(dtype), b.to(dtype), torch.ones(5, dtype=dtype)
    try:
        found = _onednn(a, b, bias, "none", [], "")
    except RuntimeError:
        return False
    expected = a.float() @ b.float().t() + bias.float()
    return torch.allclose(found.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


_CPU = torch.cpu.get_capabilities()
# Where MKL is the faster for fp32, and what ``_mkl_product`` relies on was measured (Zen 3).
_MKL_IS_BETTER = bool(
    torch.backends.mkl.is_available()
    and "AMD" in str(_CPU.get("cpu_name"))
    and _CPU.get("avx2")
    and not _CPU.get("avx512_f")
)
_ONEDNN_TYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if _onednn_has(dtype)]


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``a @ b.t() + bias``, m×n, of m×k, n×k and n, all of one dtype.

    On CPUs a row's bits depend neither on how many there are nor on the threads. For fp32 torch
    takes MKL, which keeps to that for some sizes only; on AMD's CPUs it is a quarter faster than
    oneDNN with AVX2, and half as fast with AVX-512 (64×784 by 512×784: 260 us against 130).
    """
    return find_product(a.device, a.dtype)(a, b, bias, out)


def find_product(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """``product``, as it is made of tensors of this kind."""
    if device.type != "cpu" or dtype not in _ONEDNN_TYPES:
        return _torch_product
    return _mkl_product if dtype == torch.float32 and _MKL_IS_BETTER else _onednn_product


def _onednn_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    if len(a) == 1:  # a single row would be summed in another order
        result = _onednn_product(a.expand(2, -1), b, bias)[:1]
    elif len(a) and a.shape[1]:
        assert _onednn is not None
        result = _onednn(a, b, bias, "none", [], "")  # its own ReLU would turn NaN to 0
    else:
        result = _torch_product(a, b, bias)
    return result if out is None else out.copy_(result)


def _mkl_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    # A row's bits depend neither on the number of rows nor on the threads if m and n are multiples
    # of 16.
    if len(b) % 16:
        return _onednn_product(a, b, bias, out)
    missing = -len(a) % 16
    if not missing:
        return _torch_product(a, b, bias, out)
    result = _torch_product(functional.pad(a, (0, 0, 0, missing)), b, bias)[:-missing]
    return result if out is None else out.copy_(result)


def _torch_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    if bias is None:
        return torch.mm(a, b.t(), out=out)
    return torch.addmm(bias, a, b.t(), out=out)


class MLP(nn.Module):
    """Flatten, then five ``Linear`` layers with ReLU between them.

    Args:
        hidden_sizes: the widths of the four hidden layers.
    """

    layers: Sequence[nn.Linear]

    def __init__(self, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        if len(hidden_sizes) != 4:
            raise InputError(f"the model takes exactly four hidden widths, not {len(hidden_sizes)}")
        self.hidden_sizes = tuple(hidden_sizes)
        widths = (_INPUTS, *hidden_sizes, CLASSES)
        layers = [nn.Linear(*sizes) for sizes in itertools.pairwise(widths)]
        self.layers = cast(Sequence[nn.Linear], nn.ModuleList(layers))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N×10, of normalised images, N×784 or N×28×28."""
        hidden = images.flatten(1)
        if torch.is_grad_enabled():  # ``product`` has no derivative
            for layer in self.layers[:-1]:
                hidden = layer(hidden).relu_()
            logits: Tensor = self.layers[-1](hidden)
            return logits
        for layer in self.layers[:-1]:
            hidden = product(hidden, layer.weight, layer.bias).relu_()
        return product(hidden, self.layers[-1].weight, self.layers[-1].bias)

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
    write_file(path, model_bytes(model.hidden_sizes, model.state_dict()))


def model_bytes(hidden_sizes: Sequence[int], weights: Mapping[str, Tensor]) -> bytes:
    """The contents of a model's file, from its ``state_dict``."""
    metadata = {
        "hidden_sizes": hidden_sizes,
        "input": f"{_INPUTS} pixels: (value / 255 - mean) / std, ink high, ground 0",
        "mean": MEAN,
        "std": STD,
    }
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
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return model
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or 'no such file'}") from None
    except (SafetensorError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a usable model file: {reason}") from None
