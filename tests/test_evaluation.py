"""Sums over images, and the interval of an accuracy."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from mnist import evaluation
from mnist.evaluation import predict, report, score, wilson_interval
from mnist.model import MLP


@pytest.mark.parametrize("size", [0, 1, 4, 5, 6, 11])
def test_chunks_change_nothing(monkeypatch, size):
    monkeypatch.setattr(evaluation, "_CHUNK_IMAGES", 5)
    model = MLP((20, 16, 12, 14)).initialise(0)
    images = torch.randn(size, 784, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(predict(model, images), model(images).detach())


def test_sums_as_numpy_computes_them():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 10)), generator.integers(0, 10, 50)
    expected = (np.log(np.exp(logits).sum(1)) - logits[np.arange(50), labels]).sum()
    sums = score(torch.tensor(logits), torch.tensor(labels))
    assert sums.tolist() == pytest.approx([expected, (logits.argmax(1) == labels).sum()])
    assert score(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)).tolist() == [0, 0]


@pytest.mark.parametrize(("correct", "number"), [(9816, 10_000), (10_000, 10_000), (0, 7), (1, 2)])
def test_interval_is_wilsons(correct, number):
    expected = binomtest(correct, number).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, number) == pytest.approx(
        (expected.low, expected.high), abs=1e-7
    )


def test_report_by_hand():
    logits = torch.tensor([[0.0] * 10, [0.0] * 9 + [1000.0]])
    found = report(logits, torch.tensor([0, 9]))
    assert (found["number"], found["correct"], found["accuracy"]) == (2, 2, 1.0)
    assert found["loss"] == pytest.approx(np.log(10) / 2)
