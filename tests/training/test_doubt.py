"""Temperature and threshold: against a distribution that is known, and scipy's search."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from mnist.training.doubt import find_doubt


def drawn(scale, count=20_000):
    """Logits ``scale`` times those of the distribution that the labels are drawn from."""
    rng = np.random.default_rng(0)
    true = 3 * rng.normal(size=(count, 10))
    labels = np.array([rng.choice(10, p=np.exp(row)) for row in log_softmax(true, 1)])
    return (scale * true).astype(np.float32), labels


@pytest.fixture(scope="module")
def draws():
    return {scale: drawn(scale) for scale in (0.5, 1.0, 2.5)}


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_temperature_takes_out_what_was_put_in(draws, scale):
    assert find_doubt(*draws[scale]).temperature == pytest.approx(scale, rel=0.03)


def test_temperature_is_scipy_s(draws):
    logits, labels = draws[2.5]

    def cross_entropy(temperature):
        return -log_softmax(logits / temperature, 1)[np.arange(len(labels)), labels].mean()

    expected = minimize_scalar(cross_entropy, bounds=(0.1, 10), method="bounded").x
    assert find_doubt(logits, labels).temperature == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("count", [1, 10, 49, 50, 51, 20_000])
def test_threshold_accepts_98_of_100_and_no_more(draws, count):
    logits, labels = (part[:count] for part in draws[1.0])
    doubt = find_doubt(logits, labels)
    confidences = np.exp(log_softmax(logits / doubt.temperature, 1).max(1))
    accepted = (confidences >= doubt.threshold).sum()
    assert accepted == count - int(0.02 * count)


def test_a_perfect_model_has_a_bounded_temperature():
    logits = np.eye(10, dtype=np.float32).repeat(10, 0) * 50
    doubt = find_doubt(logits, np.arange(10).repeat(10))
    assert doubt.temperature > 0 and 0 < doubt.threshold <= 1
