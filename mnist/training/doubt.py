"""How doubtful to be of a trained model: found on the validation images, stored in its file."""

import numpy as np
from numpy.typing import NDArray

from mnist.model import Doubt

ACCEPTED = 0.98
"""Share of the validation digits that a model accepts, right or wrong."""


def find_doubt(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Doubt:
    """The temperature with the lowest cross-entropy (Guo et al. 2017), and the confidence that
    ``ACCEPTED`` of the digits have with it.

    Args:
        logits: n×10, of validation digits.
        labels: theirs, n.
    """
    values = logits.astype(np.float64)

    def cross_entropy(log_temperature: float) -> float:
        log_probabilities = _log_softmax(values / np.exp(log_temperature))
        return float(-np.take_along_axis(log_probabilities, labels[:, None], 1).mean())

    low, high = np.log(0.05), np.log(20.0)
    for _ in range(60):  # golden-section search: the cross-entropy has one minimum over 1/T
        ends = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
        if cross_entropy(ends[0]) < cross_entropy(ends[1]):
            high = ends[1]
        else:
            low = ends[0]
    temperature = round(float(np.exp((low + high) / 2)), 4)
    confidences = np.sort(np.exp(_log_softmax(values / temperature).max(1)))
    threshold = confidences[int((1 - ACCEPTED) * len(confidences))]
    # Rounded down: the evaluator computes in float32.
    return Doubt(temperature, float(np.floor(threshold * 1e6) / 1e6))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result
