"""Matrix products of CPUs: torch's own, which for fp32 are MKL's, and oneDNN's.

Which of the two is faster depends on processor, shapes and precision, so that a run measures it
(``training.trial.faster_products``). What they guarantee differs as well. A product here is
row-stable if the bits of a row depend neither on how many rows there are nor on the threads: then
predictions do not depend on the number of processes, and threads may change while a run trains.
"""

import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["torch", "onednn"]


class Product(Protocol):
    """``a @ b + bias``, m×n, of m×k, k×n and n, all of one dtype; written to ``out`` if given."""

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor: ...


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# MKL's products are row-stable in this mode, which it reads at its first product, and as fast on
# AVX-512. On others' processors the mode takes the slowest of its ways.
if _is_intel():
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# oneDNN's product of ``torch.compile``, if this torch has it.
_onednn: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def torch_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """As torch makes it, on any device."""
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def onednn_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """oneDNN's; row-stable in fp32."""
    if len(a) == 1:  # a single row would be summed in another order
        result = onednn_product(a.expand(2, -1), b, bias)[:1]
    elif len(a) and a.shape[1]:
        assert _onednn is not None
        result = _onednn(a, b.t(), bias, "none", [], "")  # its own ReLU would turn NaN to 0
    else:
        return torch_product(a, b, bias, out)
    return result if out is None else out.copy_(result)


def rounding_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Of fp32 tensors, which oneDNN rounds to bf16 as it reads them; sums are in fp32.

    No copies in bf16 are needed, and the bits do not depend on the threads: those of its products
    of bf16 tensors do, for some sizes.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        return torch_product(a, b, bias, out)
    finally:
        settings.fp32_precision = before


def _padded_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """torch's, row-stable where it is that for multiples of 16 rows and columns."""
    if b.shape[1] % 16:
        return onednn_product(a, b, bias, out)
    missing = -len(a) % 16
    if not missing:
        return torch_product(a, b, bias, out)
    result = torch_product(functional.pad(a, (0, 0, 0, missing)), b, bias)[:-missing]
    return result if out is None else out.copy_(result)


def row_stable_product(
    dtype: torch.dtype, device: torch.device, kind: Kind | None = None
) -> Product:
    """torch's where that is row-stable, else oneDNN's where there is one; on GPUs torch's.

    Args:
        dtype: of the tensors; only products of fp32 are row-stable in all sizes.
        device: of the tensors.
        kind: whose, if it can be; without it those that are usually the faster ones here, without
            a measurement: the same on each call and in each process.
    """
    if device.type != "cpu":
        return torch_product
    kind = kind or _usual_kind()
    if kind == "torch" and dtype == torch.float32 and _torch_row_multiple() is not None:
        return torch_product if _torch_row_multiple() == 1 else _padded_product
    return onednn_product if _onednn_has(dtype) else torch_product


def training_products(
    kind: Kind, precision: torch.dtype, device: torch.device
) -> tuple[Product, Product, bool]:
    """What a step is made of.

    Returns:
        The product of layers in full precision; that of large layers, in the training precision;
        and whether this takes fp32 tensors, which it rounds by itself.
    """
    if precision == torch.float32:
        product = row_stable_product(precision, device, kind)
        return product, product, False
    if kind == "torch" or device.type != "cpu":
        return torch_product, torch_product, False
    if onednn_rounds():
        return torch_product, rounding_product, True
    return torch_product, onednn_product, False


@cache
def _usual_kind() -> Kind:
    # 64x784 by 784x512: with AVX-512 oneDNN takes half as long as MKL on AMD's processors, and a
    # tenth longer on Intel's; with AVX2 a quarter longer.
    strict = "STRICT" in os.environ.get("MKL_CBWR", "")
    faster = strict or not torch.cpu.get_capabilities().get("avx512_f")
    return "torch" if faster and _torch_row_multiple() is not None else "onednn"


@cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN's is what we take it for, and knows the type on this CPU (bf16: from AVX-512
    on)."""
    if _onednn is None:
        return False
    a, b = torch.linspace(-1, 1, 51).view(3, 17), torch.linspace(-2, 1, 85).view(5, 17)
    a, b, bias = a.to(dtype), b.to(dtype), torch.ones(5, dtype=dtype)
    try:
        found = onednn_product(a, b.t(), bias)
    except RuntimeError:
        return False
    expected = a.float() @ b.float().t() + bias.float()
    return torch.allclose(found.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@cache
def onednn_rounds() -> bool:
    """Whether ``rounding_product`` computes in bf16 here, instead of in fp32 as without it."""
    a, b = (1 + torch.arange(256 * 64).view(256, 64) % 97 / 256 for _ in range(2))
    rounded = (a.bfloat16().double() @ b.bfloat16().double().t()).float()
    try:
        found = rounding_product(a, b.t())
    except (AttributeError, RuntimeError):  # another version of torch; not on this CPU
        return False
    return torch.allclose(found, rounded, rtol=1e-5)


@cache
def _torch_row_multiple() -> int | None:
    """The number of which rows and columns are to be multiples for torch's fp32 product to be
    row-stable, 1 or 16, or None: of MKL it depends on its mode and on the processor."""
    threads = torch.get_num_threads()

    def is_stable(rows: int, inner: int, columns: int, parts: tuple[int, ...]) -> bool:
        a, b, bias = (
            torch.arange(1.0, 1 + math.prod(shape)).sin_().view(shape)
            for shape in ((rows, inner), (columns, inner), (columns,))
        )
        whole = torch_product(a, b.t(), bias)
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            alone = torch_product(a, b.t(), bias)
        finally:
            torch.set_num_threads(threads)
        return torch.equal(whole, alone) and all(
            torch.equal(torch_product(a[-part:].clone(), b.t(), bias), whole[-part:])
            for part in parts
        )

    for multiple, columns, parts in ((1, 10, (1, 5, 21, 50)), (16, 32, (16, 48))):
        shapes = ((96, 784, 512), (64, 1024, 1024), (256, 512, 256), (4096, 64, columns))
        if all(is_stable(*shape, parts) for shape in shapes):
            return multiple
    return None
