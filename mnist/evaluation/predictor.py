"""The way in from Python: a trained model, loaded, and its predictions by the evaluator's own code.

``mnist.load`` and what it returns. See docs/python.md.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE
from mnist.distributed import World
from mnist.evaluation.config import EvaluateConfig
from mnist.evaluation.folders import LONGEST, decode_image
from mnist.evaluation.inputs import Inputs, images_of, open_images
from mnist.evaluation.job import find_weights
from mnist.evaluation.preparation import TREATMENTS, WITHOUT_DIGIT, Mode, Prepared, prepare
from mnist.evaluation.scoring import predict
from mnist.model import CLASSES, MLP, load_model
from mnist.pictures import IMAGE_SUFFIXES, pixels_of

if TYPE_CHECKING:
    from PIL import Image

Images = Union["str | os.PathLike[str] | Image.Image | NDArray[Any] | Any", Iterable["Images"]]
"""What ``Predictor.predict`` takes; ``Any`` for tensors and whatever else is an array to NumPy."""

_AT_ONCE = 1024  # images, of arrays and for the network
_SHOWN = 32
_IN_MEMORY = Path("the array")  # in messages


@dataclass(frozen=True)
class Predictions:
    """What a model says of n images; a part of them by an index, a slice or a mask, as of arrays.

    Jupyter shows the first 32 as pictures.
    """

    digits: NDArray[np.int64]
    """n, 0 to 9; -1 where no digit was found in the image."""
    probabilities: NDArray[np.float32]
    """n×10; NaN where no digit was found."""
    accepted: NDArray[np.bool_] | None
    """n: whether the model is sure enough, by its own threshold; None if it has none."""
    images: NDArray[np.uint8]
    """n×28×28: what the network saw, ink high, ground 0."""
    treatments: NDArray[np.str_]
    """n: what was done to the image before: ``as they are``, ``inverted``, ``normalised``, or
    ``without digit``."""

    @property
    def confidences(self) -> NDArray[np.float32]:
        """n: the probabilities of ``digits``."""
        highest: NDArray[np.float32] = self.probabilities.max(1)
        return highest

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, part: Any) -> "Predictions":
        chosen = np.arange(len(self))[part].reshape(-1)
        return Predictions(
            self.digits[chosen],
            self.probabilities[chosen],
            None if self.accepted is None else self.accepted[chosen],
            self.images[chosen],
            self.treatments[chosen],
        )

    def grid(self, labels: Sequence[int] | NDArray[Any] | None = None) -> "Image.Image":
        """A picture of all these images, eight in a row, with digits and confidences.

        Args:
            labels: n digits; mistakes are framed in red.
        """
        from mnist.figures import compose_grid

        known = None if labels is None else np.asarray(labels, np.int64)
        return compose_grid(self.images, known, self.digits, self.confidences)

    def __repr__(self) -> str:
        few = ", ".join("-" if digit < 0 else str(digit) for digit in self.digits[:10])
        more = ", …" if len(self) > 10 else ""
        sure = "" if self.accepted is None else f", {np.count_nonzero(self.accepted)} accepted"
        return f"<{len(self):,} predictions: {few}{more}{sure}>"

    def _repr_png_(self) -> bytes | None:
        return self[:_SHOWN].grid()._repr_png_() if len(self) else None


class Predictor:
    """A trained model to predict with; ``load`` makes one."""

    network: MLP
    """Of torch, on the CPU, in float32; takes what ``mnist.data.normalise`` gives."""
    path: Path
    """Of its file."""
    step: int | None
    """The training step, of a checkpoint of a run that is not finished."""

    def __init__(self, network: MLP, path: Path, step: int | None = None) -> None:
        self.network, self.path, self.step = network.eval(), path, step

    @property
    def threshold(self) -> float | None:
        """The confidence from which on a prediction is accepted, if the model knows doubt."""
        return self.network.doubt.threshold if self.network.doubt else None

    def predict(self, images: Images, *, prepare: Mode = "auto") -> Predictions:
        """Digits and probabilities, as ``jobs/evaluate.py`` finds them, in the order of the images.

        Args:
            images: one of these, or a list or other iterable of them, one digit each, of any size
                and look: a file or a folder that the job takes as ``--images``, or an image file;
                an image of Pillow's; or an array (or tensor on the CPU) of height×width, N×height×
                width, N×1×height×width, or with 1, 3 or 4 channels last height×width×3 or N×height×
                width×3, uint8 of 0 to 255 or floats of 0 to 1. 3×height×width are three images.
            prepare: as the job's ``--prepare``: ``auto`` leaves what looks like MNIST's as it is,
                and makes the rest so; ``mnist`` makes all so; ``as-is`` takes 28×28 as they are.

        Raises:
            InputError: a file or an array is anything else.
        """
        if prepare not in get_args(Mode):
            raise InputError(f"prepare takes one of {', '.join(get_args(Mode))}, not {prepare!r}")
        parts = list(_prepared(images, prepare))
        count = sum(len(part.images) for part in parts)
        digits = np.full(count, -1)
        probabilities = np.full((count, CLASSES), np.nan, np.float32)
        seen = np.zeros((count, *IMAGE_SHAPE), np.uint8)
        treatments = np.concatenate([np.zeros(0, np.int64), *(part.treatments for part in parts)])
        start = 0
        for same in _of_one_type(parts):
            for first in range(0, len(same), _AT_ONCE):
                few = same[first : first + _AT_ONCE]
                part = slice(start, start := start + len(few))
                found = treatments[part] != WITHOUT_DIGIT
                seen[part] = few if few.dtype == np.uint8 else np.rint(few * 255)
                likely = np.exp(predict(self.network, few, World()))
                if not np.isfinite(likely).all():
                    raise InputError(f"{self.path}: the model's output is not finite")
                probabilities[part][found] = likely[found]
                digits[part][found] = likely[found].argmax(1)
        accepted = None
        if self.threshold is not None:
            accepted = (digits >= 0) & (probabilities.max(1, initial=0) >= self.threshold)
        return Predictions(digits, probabilities, accepted, seen, np.array(TREATMENTS)[treatments])

    def __repr__(self) -> str:
        layers = "-".join(map(str, [784, *self.network.hidden_sizes, CLASSES]))
        unfinished = "" if self.step is None else f", step {self.step:,} of an unfinished run"
        doubt = "" if self.threshold is None else f", accepts from {self.threshold:.1%} on"
        return f"<mnist model {self.path}: {layers}{unfinished}{doubt}>"


def load(path: str | os.PathLike[str]) -> Predictor:
    """A trained model, to predict with.

    Args:
        path: the folder of a run, of which the newest checkpoint is loaded if it is not finished;
            or the file of a model.

    Raises:
        InputError: it is neither.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(f"{found}: no such folder of a run, or file of a model")
    weights = find_weights(
        EvaluateConfig(run=found) if found.is_dir() else EvaluateConfig(model=found)
    )
    return Predictor(load_model(weights.path), weights.path, weights.step)


def _prepared(images: Images, mode: Mode) -> Iterator[Prepared]:
    """Images of any kind as the network gets them, in parts."""
    from PIL import Image

    if isinstance(images, str | os.PathLike):
        path = Path(images).expanduser()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
            yield _one(decode_image(path, mode != "as-is"), mode)
        else:
            yield from _in_parts(open_images(path, None, mode))
    elif isinstance(images, Image.Image):
        yield _one(pixels_of(images, LONGEST), mode)
    elif isinstance(images, Iterable) and not hasattr(images, "__array__"):
        for one in images:
            yield from _prepared(one, mode)
    else:
        try:
            array = np.asarray(images)
        except (RuntimeError, TypeError, ValueError) as error:  # tensors that NumPy cannot take
            raise InputError(f"{_IN_MEMORY}: {' '.join(str(error).split())}") from None
        yield from _of_array(array, mode)


def _one(pixels: NDArray[np.uint8], mode: Mode) -> Prepared:
    """Of height×width or ×3."""
    from PIL import Image

    if mode != "as-is":
        return prepare([pixels], 1, mode)
    grey = pixels if pixels.ndim == 2 else np.asarray(Image.fromarray(pixels).convert("L"))
    return next(_of_array(grey, mode))


def _of_array(array: NDArray[Any], mode: Mode) -> Iterator[Prepared]:
    from PIL import Image

    if array.ndim == 4 and array.shape[1] == 1:  # channels first, as torch has them
        array = array[:, 0]
    if array.ndim in (3, 4) and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2 and array.shape[1] == 784 and len(array) != 784:
        raise InputError(
            f"{_IN_MEMORY}: expected images, N×height×width, found {len(array)}×784: "
            "reshape(-1, 28, 28)"
        )
    if array.shape[-1:] in ((3,), (4,)) and array.ndim in (3, 4):  # no digit is so narrow
        colours = array if array.ndim == 4 else array[None]
        flat = images_of(colours.reshape(*colours.shape[:2], -1), _IN_MEMORY, None, "auto")
        for place in range(len(colours)):
            values = flat.images(place, place + 1).reshape(colours.shape[1:])
            if values.dtype != np.uint8:
                values = np.rint(values * 255).astype(np.uint8)
            yield from _prepared(Image.fromarray(values), mode)
        return
    if array.ndim == 3 and not len(array):
        return
    stack = array[None] if array.ndim == 2 else array
    yield from _in_parts(images_of(stack, _IN_MEMORY, None, mode))


def _in_parts(inputs: Inputs) -> Iterator[Prepared]:
    for start in range(0, len(inputs), _AT_ONCE):
        yield inputs.prepared(start, min(start + _AT_ONCE, len(inputs)))


def _of_one_type(parts: list[Prepared]) -> Iterator[NDArray[Any]]:
    """Neighbouring images together, n×28×28 each, of bytes or floats."""
    waiting: list[NDArray[Any]] = []
    for part in parts:
        if waiting and part.images.dtype != waiting[0].dtype:
            yield np.concatenate(waiting)
            waiting = []
        waiting.append(part.images)
    if waiting:
        yield np.concatenate(waiting)
