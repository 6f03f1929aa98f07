"""What an evaluation says: sums over images, the figures made of them, and the files they go to.

Plain NumPy: scoring is in scoring.py, the looks of the page in page.py.
"""

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.runs.reports import PREDICTIONS_COLUMNS
from mnist.system import flush_to_disk, write_file

DISPUTED_TEST_LABELS = (
    *(947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937),
    *(6651, 6783, 8527, 9679, 9729),
)
"""Images of MNIST's test set whose labels human raters did not confirm (Northcutt et al. 2021,
labelerrors.com)."""

_BINS = 15  # of the calibration error, as in Guo et al. 2017
_EXAMPLES = 24  # of the most confident mistakes, and of the least confident predictions


# ------------------------------------------------------------------------------ sums over images


class Tally:
    """Sums over the images scored so far, all in one vector that ranks can add up."""

    def __init__(self) -> None:
        self.sums = np.zeros(10 + 100 + 3 * _BINS + 3)
        cuts = np.cumsum([10, 100, 3 * _BINS])
        self.predicted, confusion, bins, rest = np.split(self.sums, cuts)  # views
        self.confusion = confusion.reshape(10, 10)  # label, prediction
        self.bins = bins.reshape(_BINS, 3)  # images, correct, sum of confidences
        self.rest = rest  # cross-entropy; disputed images, and of these correct

    def add(
        self,
        labels: NDArray[np.int64],
        log_probabilities: NDArray[np.float32],
        disputed: NDArray[np.bool_],
    ) -> None:
        """Count n images.

        Args:
            labels: n; -1 where unknown, which leaves only the prediction to count.
            log_probabilities: n×10.
            disputed: n; whether the label is a disputed one.
        """
        predictions = log_probabilities.argmax(1)
        self.predicted += np.bincount(predictions, minlength=10)
        known = labels >= 0
        if not known.all():
            labels, predictions, disputed = labels[known], predictions[known], disputed[known]
            log_probabilities = log_probabilities[known]
        pairs = np.bincount(10 * labels + predictions, minlength=100)
        self.confusion += pairs.reshape(10, 10)
        of_labels = np.take_along_axis(log_probabilities, labels[:, None], 1)
        correct = labels == predictions
        loss = -of_labels.sum(dtype=np.float64)
        self.rest += (loss, disputed.sum(), correct[disputed].sum())

        confidences = np.exp(log_probabilities.max(1)).astype(np.float64)
        which = np.ceil(confidences * _BINS).astype(int).clip(1, _BINS) - 1
        for column, values in enumerate((None, correct, confidences)):
            self.bins[:, column] += np.bincount(which, values, minlength=_BINS)


def figures(tally: Tally) -> dict[str, Any]:
    """The figures of ``report.json`` that come from the sums: docs/evaluate.md lists its fields."""
    scored, labelled = int(tally.predicted.sum()), int(tally.confusion.sum())
    known: dict[str, Any] = dict.fromkeys(
        "correct accuracy accuracy_interval_95 cross_entropy without_disputed_labels "
        "confusion_matrix calibration confusions".split()
    )
    if labelled:
        confusion = tally.confusion.astype(int)
        cross_entropy, disputed, disputed_correct = tally.rest.tolist()
        correct = int(confusion.trace())
        known |= _accuracy(correct, labelled)
        known["cross_entropy"] = cross_entropy / labelled
        if disputed:
            number = labelled - int(disputed)
            known["without_disputed_labels"] = {"number": number} | _accuracy(
                correct - int(disputed_correct), number
            )
            known["without_disputed_labels"]["disputed_labels"] = list(DISPUTED_TEST_LABELS)
        known["confusion_matrix"] = confusion.tolist()
        known["calibration"] = _calibration(tally.bins)
        pairs = [(i, j) for i in range(10) for j in range(10) if i != j and confusion[i, j]]
        pairs.sort(key=lambda pair: -confusion[pair])
        known["confusions"] = [
            {"label": i, "prediction": j, "number": int(confusion[i, j])} for i, j in pairs[:10]
        ]
    digits = _digits(tally.confusion if labelled else None, tally.predicted)
    return {"scored": scored, "labelled": labelled} | known | {"digits": digits}


def _accuracy(correct: int, number: int) -> dict[str, Any]:
    return {
        "correct": correct,
        "accuracy": correct / number,
        "accuracy_interval_95": wilson_interval(correct, number),
    }


def wilson_interval(correct: int, number: int) -> tuple[float, float]:
    """The 95% interval of an accuracy (Wilson, 1927)."""
    z = 1.959964
    center = correct + z**2 / 2
    spread = z * (correct * (number - correct) / number + z**2 / 4) ** 0.5
    return (center - spread) / (number + z**2), (center + spread) / (number + z**2)


def _digits(confusion: NDArray[Any] | None, predicted: NDArray[Any]) -> list[dict[str, Any]]:
    """Per digit; a share of nothing is None."""
    digits = []
    for digit in range(10):
        row: dict[str, Any] = {"digit": digit, "predicted": int(predicted[digit])}
        if confusion is None:
            row |= dict.fromkeys(("precision", "recall", "f1", "support"))
        else:
            right = confusion[digit, digit]
            claimed, support = confusion[:, digit].sum(), confusion[digit].sum()
            row["precision"] = float(right / claimed) if claimed else None
            row["recall"] = float(right / support) if support else None
            row["f1"] = float(2 * right / (claimed + support)) if claimed + support else None
            row["support"] = int(support)
        digits.append(row)
    return digits


def _calibration(bins: NDArray[np.float64]) -> dict[str, Any]:
    """Expected calibration error (Guo et al. 2017) over bins of confidence, (from, to]."""
    numbers, correct, confidences = bins.T
    rows = [
        {
            "from": index / _BINS,
            "to": (index + 1) / _BINS,
            "number": int(number),
            "confidence": float(confidence / number) if number else None,
            "accuracy": float(right / number) if number else None,
        }
        for index, (number, right, confidence) in enumerate(bins)
    ]
    error = float(np.abs(correct - confidences).sum() / numbers.sum())
    return {"expected_calibration_error": error, "bins": rows}


@dataclass(frozen=True)
class Example:
    """One image and what the model makes of it."""

    index: int
    file: str | None
    label: int | None
    prediction: int
    confidence: float
    image: NDArray[np.uint8]  # 28×28

    def row(self) -> dict[str, Any]:
        """As ``report.json`` has it."""
        values = dataclasses.asdict(self)
        del values["image"]
        if self.file is None:
            del values["file"]
        return values


class Examples:
    """The most confident mistakes and the least confident predictions so far, 24 of each."""

    def __init__(self) -> None:
        self.mistakes: list[Example] = []
        self.least_confident: list[Example] = []

    def add(self, mistakes: Iterable[Example], least_confident: Iterable[Example]) -> None:
        """Keep those of the given ones that belong here; the lower index first in a tie."""
        one, other = [*self.mistakes, *mistakes], [*self.least_confident, *least_confident]
        self.mistakes = sorted(one, key=lambda e: (-e.confidence, e.index))[:_EXAMPLES]
        self.least_confident = sorted(other, key=lambda e: (e.confidence, e.index))[:_EXAMPLES]


def candidates(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], confidences: NDArray[Any]
) -> tuple[list[int], list[int]]:
    """Which of n images may be among the mistakes, and which among the least confident."""
    wrong = np.flatnonzero((labels >= 0) & (labels != predictions))
    most = wrong[np.argsort(-confidences[wrong], kind="stable")]
    least = np.argsort(confidences, kind="stable")
    return most[:_EXAMPLES].tolist(), least[:_EXAMPLES].tolist()


# ------------------------------------------------------------------------------------------ rows


def csv_header(with_files: bool) -> str:
    """The first line of ``predictions.csv``."""
    return ",".join([*PREDICTIONS_COLUMNS] + ["file"] * with_files) + "\n"


def csv_rows(
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    files: Sequence[str] | None,
) -> bytes:
    """Lines of ``predictions.csv`` for n images; float32 values in the fewest digits that keep
    them. orjson writes 1,000,000 lines in 1.5 s; np.savetxt would take 50.

    Args:
        indices: n.
        labels: n; -1 where unknown.
        probabilities: n×10.
        files: n names, if the images have any.
    """
    predictions = probabilities.argmax(1)
    values = np.column_stack([probabilities.max(1), probabilities])
    numbers = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].decode().split("],[")
    known = [str(label) if label >= 0 else "" for label in labels.tolist()]
    columns = (indices.tolist(), known, predictions.tolist(), numbers)
    if files is None:
        lines = [f"{i},{k},{p},{n}\n" for i, k, p, n in zip(*columns, strict=True)]
    else:
        lines = [
            f"{i},{k},{p},{n},{_quoted(f)}\n" for i, k, p, n, f in zip(*columns, files, strict=True)
        ]
    return "".join(lines).encode(errors="surrogateescape")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text


# ----------------------------------------------------------------------------------------- files


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A folder inside ``output`` for files that are not whole yet; what is left in it is removed.

    Raises:
        InputError: the folder cannot be written; then nothing of it remains.
    """
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    aside = output / f".unfinished-{socket.gethostname()}-{os.getpid()}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        aside.mkdir()
        yield aside
    except OSError as error:
        raise InputError(
            f"{output}: {error.strerror}; nothing was changed there; see --output-dir"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # not empty: all went well
                break


def _remove_abandoned(output: Path) -> None:
    """What killed evaluations of this machine left."""
    for left in output.glob(f".unfinished-{socket.gethostname()}-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)


def publish(aside: Path, output: Path, report: dict[str, Any], page: str) -> None:
    """Move ``aside/predictions.csv`` to ``output`` with ``report.html`` and ``report.json``.

    Each replaces its predecessor whole, and only once all three are safe on the disk.
    """
    flush_to_disk(aside / "predictions.csv")
    write_file(aside / "report.html", page)
    write_file(aside / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    for name in ("predictions.csv", "report.html", "report.json"):
        (aside / name).replace(output / name)
