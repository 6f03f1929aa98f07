"""How a model doubts, and how fast digits are normalised: parts of scripts/bench."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist.cli import InputError
from mnist.data import load_mnist
from mnist.distributed import World
from mnist.evaluation.ink import find_digit
from mnist.evaluation.scoring import predict
from mnist.model import load_model
from mnist.normaliser import normalise_digits
from mnist.training.synthesis import SCORED, TAUGHT, non_digits

PER_KIND = 2000
_NIST = Path(__file__).parents[1] / "tests/nist.npz"


def doubt(model_file: Path, data_dir: Path) -> dict[str, Any]:
    """Shares, at the model's own threshold: of MNIST's test digits that it accepts, and of marks
    that are no digits, made from these with a fixed seed, that it rejects, by kind.

    Raises:
        InputError: the model has no threshold.
    """
    model, test = load_model(model_file), load_mnist(data_dir, "test")
    if model.doubt is None:
        raise InputError(f"{model_file}: has no threshold; --recipe reader makes one")
    digits = test.images.numpy(), test.labels.numpy()

    def accepted(images: Any) -> float:
        confidences = np.exp(predict(model, images, World()).max(1))
        return float((confidences >= model.doubt.threshold).mean())

    kinds = dict.fromkeys(TAUGHT)
    made = {kind: non_digits(*digits, PER_KIND, 0, (kind,)) for kind in kinds}
    rejected = {kind.__name__: 1 - accepted(images) for kind, images in made.items()}
    mean = statistics.mean(rejected[kind.__name__] for kind in SCORED)
    return {"accepted": accepted(digits[0]), "rejected": mean, "by kind": rejected}


def normalising(rounds: int) -> dict[str, float]:
    """Digits a second on one core, medians: NIST's bitmaps of 128×128 normalised, and found in such
    an image as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.load(_NIST) as file:
        inks = np.unpackbits(file["ink_packed"], axis=1).reshape(-1, 128, 128) * np.uint8(255)
    many = inks.repeat(10, 0)
    speeds: dict[str, list[float]] = {"normalised": [], "found in 128×128": []}
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        normalise_digits(many)
        speeds["normalised"].append(len(many) / (time.perf_counter() - begin))
        begin = time.perf_counter()
        for ink in inks:
            find_digit(ink)
        speeds["found in 128×128"].append(len(inks) / (time.perf_counter() - begin))
    torch.set_num_threads(threads)
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}
