"""What an evaluation says: sums over images, the figures made of them, and the files they go to.

Plain NumPy: scoring is in scoring.py, the looks of the page in page.py.
"""

import dataclasses
import itertools
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
from mnist.evaluation.preparation import AS_THEY_ARE, SAMPLES, TREATMENTS, WITHOUT_DIGIT
from mnist.runs.reports import PREDICTIONS_COLUMNS
from mnist.system import flush_to_disk, write_file

DISPUTED_TEST_LABELS = (
    *(947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937),
    *(6651, 6783, 8527, 9679, 9729),
)
"""Images of MNIST's test set whose labels human raters did not confirm (Northcutt et al. 2021,
labelerrors.com)."""

_LEVELS = 180  # of confidence, 20 for each further 9 (0.9, 0.99, …): for the curve over coverage
_BINS = 15  # of the calibration error, as in Guo et al. 2017
_EXAMPLES = 24  # of the most confident mistakes, and of the least confident predictions


# ------------------------------------------------------------------------------ sums over images


class Tally:
    """Sums over the images scored so far, all in one vector that ranks can add up."""

    def __init__(self) -> None:
        parts = [10, 100, 3 * _BINS, 3, len(TREATMENTS), 10, 3, 2 * _LEVELS]
        self.sums = np.zeros(sum(parts))
        views = iter(np.split(self.sums, np.cumsum(parts)[:-1]))
        self.predicted = next(views)
        self.confusion = next(views).reshape(10, 10)  # label, prediction
        self.bins = next(views).reshape(_BINS, 3)  # images, correct, sum of confidences
        self.rest = next(views)  # cross-entropy; disputed images, and of these correct
        self.treatments = next(views)
        self.unseen = next(views)  # by label: images without a digit
        self.accepted = next(views)  # all; of these labelled; of these correct
        self.levels = next(views).reshape(_LEVELS, 2)  # labelled, correct; by rising confidence

    def add(
        self,
        labels: NDArray[np.int64],
        log_probabilities: NDArray[np.float32],
        disputed: NDArray[np.bool_],
        treatments: NDArray[np.int64] | None = None,
        threshold: float | None = None,
    ) -> None:
        """Count n images.

        Args:
            labels: n; -1 where unknown, which leaves only the prediction to count.
            log_probabilities: n×10.
            disputed: n; whether the label is a disputed one.
            treatments: n; by default the images are as they are. Those without a digit have no
                prediction, whatever the probabilities.
            threshold: the confidence from which on a prediction is accepted, if any is.
        """
        if treatments is None:
            treatments = np.full(len(labels), AS_THEY_ARE)
        self.treatments += np.bincount(treatments, minlength=len(TREATMENTS))
        found = treatments != WITHOUT_DIGIT
        if not found.all():
            unseen = labels[~found]
            self.unseen += np.bincount(unseen[unseen >= 0], minlength=10)
            self.rest[0] += np.log(10) * (unseen >= 0).sum()  # all digits are as likely
            labels, log_probabilities, disputed = (
                labels[found],
                log_probabilities[found],
                disputed[found],
            )
        predictions = log_probabilities.argmax(1)
        if threshold is not None:
            accepted = np.exp(log_probabilities.max(1)) >= threshold
            right = accepted & (labels == predictions)
            self.accepted += (accepted.sum(), (accepted & (labels >= 0)).sum(), right.sum())
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
        doubts = -np.log10(np.maximum(1 - confidences, 1e-9))  # 0.9 is 1, 0.99 is 2
        level = (doubts * (_LEVELS / 9)).astype(int).clip(0, _LEVELS - 1)
        for column, values in enumerate((None, correct)):
            self.levels[:, column] += np.bincount(level, values, minlength=_LEVELS)
        which = np.ceil(confidences * _BINS).astype(int).clip(1, _BINS) - 1
        for column, values in enumerate((None, correct, confidences)):
            self.bins[:, column] += np.bincount(which, values, minlength=_BINS)


def figures(tally: Tally) -> dict[str, Any]:
    """The figures of ``report.json`` that come from the sums: docs/evaluate.md lists its fields."""
    scored = int(tally.treatments.sum())
    labelled = int(tally.confusion.sum() + tally.unseen.sum())
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
    digits = _digits(tally.confusion if labelled else None, tally.predicted, tally.unseen)
    treated = dict(zip(TREATMENTS, tally.treatments.astype(int).tolist(), strict=True))
    prepared = {name.replace(" ", "_"): number for name, number in treated.items()}
    counts = {
        "scored": scored,
        "without_digit": prepared.pop("without_digit"),
        "labelled": labelled,
    }
    return counts | {"prepared": prepared} | known | {"digits": digits}


def acceptance(tally: Tally, threshold: float) -> dict[str, Any]:
    """How many predictions a model accepts, and how good they are: shares of nothing are None.

    The curve has accuracy over coverage: of the labelled images that are accepted from a confidence
    on. Those without a digit never are.
    """
    scored = tally.treatments.sum()
    accepted, known, right = tally.accepted.astype(int).tolist()
    labelled = tally.confusion.sum() + tally.unseen.sum()
    curve = []
    for level, (number, correct) in enumerate(tally.levels[::-1].cumsum(0)):
        if tally.levels[_LEVELS - 1 - level, 0]:
            confidence = 1 - 10 ** (-9 * (_LEVELS - 1 - level) / _LEVELS)
            row = {"confidence": confidence, "coverage": number / labelled}
            curve.append(row | {"accuracy": correct / number})
    return {
        "threshold": threshold,
        "accepted": accepted,
        "share": float(accepted / scored),
        "labelled": known,
        "correct": right,
        "accuracy": right / known if known else None,
        "accuracy_interval_95": wilson_interval(right, known) if known else None,
        "curve": curve,
    }


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


def _digits(
    confusion: NDArray[Any] | None, predicted: NDArray[Any], unseen: NDArray[Any]
) -> list[dict[str, Any]]:
    """Per digit; a share of nothing is None."""
    digits = []
    for digit in range(10):
        row: dict[str, Any] = {"digit": digit, "predicted": int(predicted[digit])}
        if confusion is None:
            row |= dict.fromkeys(("precision", "recall", "f1", "support"))
        else:
            right = confusion[digit, digit]
            claimed, support = confusion[:, digit].sum(), confusion[digit].sum() + unseen[digit]
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
    gaps = np.abs(correct - confidences).sum()
    error = float(gaps / numbers.sum()) if numbers.sum() else None  # no image shows a digit
    return {"expected_calibration_error": error, "bins": rows}


@dataclass(frozen=True)
class Example:
    """One image and what the model makes of it."""

    index: int
    file: str | None
    label: int | None
    prediction: int | None  # None without a digit
    confidence: float | None
    image: NDArray[np.uint8]  # 28×28, as the network gets it
    treatment: int = AS_THEY_ARE
    source: NDArray[np.uint8] | None = None  # a small copy of the image as it came, if kept

    def row(self) -> dict[str, Any]:
        """As ``report.json`` has it."""
        values = dataclasses.asdict(self)
        del values["image"], values["source"]
        values["treatment"] = TREATMENTS[self.treatment]
        if self.file is None:
            del values["file"]
        return values


class Examples:
    """The most confident mistakes and the least confident predictions so far, 24 of each; and the
    first images of each treatment, ``SAMPLES`` of each."""

    def __init__(self) -> None:
        self.mistakes: list[Example] = []
        self.least_confident: list[Example] = []
        self.prepared: list[Example] = []

    def add(
        self,
        mistakes: Iterable[Example],
        least_confident: Iterable[Example],
        prepared: Iterable[Example] = (),
    ) -> None:
        """Keep those of the given ones that belong here; the lower index first in a tie."""
        one, other = [*self.mistakes, *mistakes], [*self.least_confident, *least_confident]
        self.mistakes = sorted(one, key=lambda e: (-(e.confidence or 0), e.index))[:_EXAMPLES]
        self.least_confident = sorted(other, key=lambda e: (e.confidence or 0, e.index))[:_EXAMPLES]
        treated = sorted([*self.prepared, *prepared], key=lambda e: (-e.treatment, e.index))
        groups = itertools.groupby(treated, key=lambda e: e.treatment)
        self.prepared = [e for _, group in groups for e in itertools.islice(group, SAMPLES)]

    def all(self) -> list[Example]:
        """Whose pictures a page shows."""
        return self.mistakes + self.least_confident + self.prepared


def candidates(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], confidences: NDArray[Any]
) -> tuple[list[int], list[int]]:
    """Which of n images may be among the mistakes, and which among the least confident."""
    wrong = np.flatnonzero((labels >= 0) & (labels != predictions))
    most = wrong[np.argsort(-confidences[wrong], kind="stable")]
    least = np.argsort(confidences, kind="stable")
    return most[:_EXAMPLES].tolist(), least[:_EXAMPLES].tolist()


# ------------------------------------------------------------------------------------------ rows


def csv_header(with_files: bool, with_accepted: bool = False) -> str:
    """The first line of ``predictions.csv``."""
    more = ["accepted"] * with_accepted + ["file"] * with_files
    return ",".join([*PREDICTIONS_COLUMNS, *more]) + "\n"


def csv_rows(
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    files: Sequence[str] | None,
    found: NDArray[np.bool_] | None = None,
    threshold: float | None = None,
) -> bytes:
    """Lines of ``predictions.csv`` for n images; float32 values in the fewest digits that keep
    them. orjson writes 1,000,000 lines in 1.5 s; np.savetxt would take 50.

    Args:
        indices: n.
        labels: n; -1 where unknown.
        probabilities: n×10.
        files: n names, if the images have any.
        found: n; whether there is a digit. Without one, what depends on it is empty.
        threshold: the confidence from which on a prediction is ``accepted``, 1 or else 0; without
            one there is no such column.
    """
    predictions, confidences = probabilities.argmax(1).tolist(), probabilities.max(1)
    values = np.column_stack([confidences, probabilities])
    numbers = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].decode().split("],[")
    known = [str(label) if label >= 0 else "" for label in labels.tolist()]
    ends = [""] * len(known)
    if threshold is not None:
        ends = [",1" if accepted else ",0" for accepted in (confidences >= threshold).tolist()]
    for row in [] if found is None else np.flatnonzero(~found).tolist():
        predictions[row], numbers[row] = "", "," * 10
        ends[row] = ",0" if threshold is not None else ""
    if files is not None:
        ends = [f"{end},{_quoted(file)}" for end, file in zip(ends, files, strict=True)]
    columns = (indices.tolist(), known, predictions, numbers, ends)
    lines = [f"{i},{k},{p},{n}{e}\n" for i, k, p, n, e in zip(*columns, strict=True)]
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
