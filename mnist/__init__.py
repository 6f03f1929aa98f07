"""Recognise handwritten digits by an MLP of five linear layers, trained on MNIST as a batch job.

>>> import mnist
>>> model = mnist.load("runs/NAME")  # the folder of a run, or the file of a model
>>> found = model.predict("digits/")  # files, folders, arrays, tensors, images of Pillow's
>>> found.digits
array([7, 2, 1, 0, 4])
>>> found.probabilities.shape
(5, 10)
>>> mnist.read("photo.png", model)[0].text  # all numbers on a photo, by a run of recipe reader
'7 2104'

Importing this takes no time: torch is imported by what needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist.cli import InputError as InputError
    from mnist.evaluation.predictor import Predictions as Predictions
    from mnist.evaluation.predictor import Predictor as Predictor
    from mnist.evaluation.predictor import load as load
    from mnist.reading.reader import read as read

_HOMES = {
    "InputError": "mnist.cli",
    "Predictions": "mnist.evaluation.predictor",
    "Predictor": "mnist.evaluation.predictor",
    "load": "mnist.evaluation.predictor",
    "read": "mnist.reading.reader",
}
__all__ = ["InputError", "Predictions", "Predictor", "load", "read"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
