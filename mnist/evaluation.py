"""Inference over many images: probabilities, and sums of loss and correct predictions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mnist.distributed import widest_float

# Large enough for full speed, small enough that activations stay in megabytes.
_CHUNK_IMAGES = 4096


@torch.inference_mode()
def predict(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits, N×10 float32, of normalised images, N×784, with ``model`` applied in chunks."""
    chunks = [model(chunk).float() for chunk in images.split(_CHUNK_IMAGES)]
    return torch.cat(chunks)


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over images: [cross-entropy, correct predictions].

    Args:
        logits: N×10; N may be 0.
        labels: int64, N.
    """
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(1) == labels).sum()
    wide = widest_float(logits.device)
    return torch.stack([loss.to(wide), correct.to(wide)])


def report(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """What ``report.json`` says of N×10 logits and N labels."""
    loss, correct = score(logits, labels).tolist()
    return {
        "number": len(labels),
        "correct": int(correct),
        "accuracy": correct / len(labels),
        "accuracy_interval_95": wilson_interval(int(correct), len(labels)),
        "loss": loss / len(labels),
    }


def wilson_interval(correct: int, number: int) -> tuple[float, float]:
    """The 95% interval of an accuracy (Wilson, 1927)."""
    z = 1.959964
    center = correct + z**2 / 2
    spread = z * (correct * (number - correct) / number + z**2 / 4) ** 0.5
    return (center - spread) / (number + z**2), (center + spread) / (number + z**2)
