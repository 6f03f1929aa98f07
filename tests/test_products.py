"""Whose matrix products: what is computed, and what its bits depend on."""

import os
import subprocess
import sys

import pytest
import torch

from mnist import products
from mnist.products import (
    onednn_product,
    rounding_product,
    row_stable_product,
    torch_product,
    training_products,
)

CPU = torch.device("cpu")
BF16 = [torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
ROW_STABLE = {
    kind: row_stable_product(torch.float32, CPU, kind) for kind in (None, "torch", "onednn")
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [0, 1, 2, 64])
@pytest.mark.parametrize("outputs", [30, 32])
@pytest.mark.parametrize(
    ("product", "dtype"),
    [(product, torch.float32) for product in {torch_product, onednn_product, *ROW_STABLE.values()}]
    + [(product, dtype) for product in (torch_product, onednn_product) for dtype in BF16],
)
def test_product_is_that_of_float64(product, dtype, rows, outputs):
    a, b, bias = (
        normal(*shape, seed=rows).to(dtype) for shape in ((rows, 50), (50, outputs), (outputs,))
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    expected = a.double() @ b.double()
    torch.testing.assert_close(product(a, b), expected.to(dtype), **tolerance)
    out = torch.full((rows, outputs), 7, dtype=dtype)
    assert product(a, b, bias, out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, (expected + bias).to(dtype), **tolerance)
    # As the gradient uses it: of transposed views, with nothing to sum over in an empty slice.
    gradient = product(a.t(), torch.ones(rows, 7, dtype=dtype))
    expected = a.double().sum(0)[:, None].expand(-1, 7)
    torch.testing.assert_close(gradient, expected.to(dtype), **tolerance)


@pytest.mark.skipif(not products.onednn_rounds(), reason="not on this CPU")
def test_rounding_product_rounds_what_it_reads_and_nothing_else():
    a, b, bias = normal(64, 784), normal(512, 784), normal(512)
    expected = a.bfloat16().double() @ b.bfloat16().double().t() + bias
    found = rounding_product(a, b.t(), bias)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch_product(a, b.t(), bias), torch_product(a.clone(), b.t(), bias))
    error = (torch_product(a, b.t(), bias).double() - (a.double() @ b.double().t() + bias)).abs()
    assert error.max() < 1e-3  # in full precision again


@pytest.mark.parametrize("kind", list(ROW_STABLE))
@pytest.mark.parametrize(("outputs", "inputs"), [(512, 784), (64, 128), (10, 64), (33, 48)])
def test_rows_of_a_product_depend_on_nothing_else(kind, outputs, inputs):
    # Of MKL as it is they depend on the threads for some sizes, and on their number for few rows.
    product = ROW_STABLE[kind]
    a, b, bias, deltas = (
        normal(*shape) for shape in ((4096, inputs), (outputs, inputs), (outputs,), (4096, outputs))
    )
    threads = torch.get_num_threads()
    expected = product(a, b.t(), bias)
    sums = {n: product(deltas[:n].t(), a[:n]) for n in (9, 64, 500, 1024, 4096)}
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for rows in (*range(1, 24), 33, 50, 64, 250, 500, 1024, 4096):
                found = product(a[-rows:].clone(), b.t(), bias)
                assert torch.equal(found, expected[-rows:]), (count, rows)
            for images, gradient in sums.items():
                out = torch.empty_like(gradient)
                product(deltas[:images].t(), a[:images], None, out)
                assert torch.equal(out, gradient), (count, images)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not products.onednn_rounds(), reason="not on this CPU")
@pytest.mark.parametrize("batch", [64, 256])
def test_rounding_product_s_bits_do_not_depend_on_the_threads(batch):
    images, weight, delta = normal(batch, 784), normal(512, 784), normal(batch, 512)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results = [
                rounding_product(images, weight.t()),
                rounding_product(delta, weight),
                rounding_product(delta.t(), images),
            ]
            found.append(torch.cat([result.flatten() for result in results]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_product_keeps_what_is_not_a_number():
    a = torch.ones(4, 8)
    a[2, 3] = float("nan")
    for product in {torch_product, onednn_product, *ROW_STABLE.values()}:
        assert product(a, torch.ones(8, 5)).isnan().all(1).tolist() == [False, False, True, False]


def test_products_of_training_by_kind_and_precision():
    full = row_stable_product(torch.float32, CPU, "torch")
    assert training_products("torch", torch.float32, CPU) == (full, full, False)
    onednn = row_stable_product(torch.float32, CPU, "onednn")
    assert training_products("onednn", torch.float32, CPU) == (onednn, onednn, False)
    explicit = (torch_product, torch_product, False)
    assert training_products("torch", torch.bfloat16, CPU) == explicit
    assert training_products("onednn", torch.bfloat16, torch.device("meta")) == explicit
    rounding = training_products("onednn", torch.bfloat16, CPU)
    assert rounding[2] == products.onednn_rounds()


def test_mkl_s_mode_is_the_user_s_where_he_has_one():
    code = "import os, mnist.products; print(os.environ.get('MKL_CBWR'))"

    def mode(**more):
        environment = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"} | more
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, env=environment, text=True).strip()

    assert mode(MKL_CBWR="COMPATIBLE") == "COMPATIBLE"
    assert mode() == ("AUTO,STRICT" if products._is_intel() else "None")


def test_canary_torch_has_onednn_s_product_on_this_cpu():
    # Without it everything works, but slower on most CPUs, and worlds differ in their last bits.
    if torch.backends.mkldnn.is_available():
        assert all(products._onednn_has(dtype) for dtype in (torch.float32, *BF16))


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("amx_bf16"), reason="no AMX")
def test_canary_onednn_rounds_where_there_is_amx():
    assert products.onednn_rounds()


@pytest.mark.skipif(
    not (products._is_intel() and torch.cpu.get_capabilities().get("avx512_f")),
    reason="of Intel's processors with AVX-512",
)
def test_canary_mkl_is_row_stable_in_its_strict_mode():
    assert products._torch_row_multiple() == 1
