"""What an evaluation says: sums over images, the figures made of them, and the files they go to.

Plain NumPy: scoring is in evaluation.py, the looks of the page in page.py.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import psutil
from numpy.typing import NDArray

from mnist.checkpoint import enclosing_checkpoint
from mnist.config import InputError
from mnist.system import flush_to_disk, move_aside, write_file

DISPUTED_TEST_LABELS = (
    *(947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937),
    *(6651, 6783, 8527, 9679, 9729),
)
"""Images of MNIST's test set whose labels human raters did not confirm (Northcutt et al. 2021,
labelerrors.com)."""

_BINS = 15  # of the calibration error, as in Guo et al. 2017
_EXAMPLES = 24  # of the most confident mistakes, and of the least confident predictions
_COLUMNS = ["index", "label", "prediction", "confidence", *(f"p{digit}" for digit in range(10))]

SPLITS: tuple[Literal["test", "validation", "train"], ...] = ("test", "validation", "train")
"""Of MNIST: the last two are what a run held out of the training images, and the rest."""


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
    """The figures of ``report.json`` that come from the sums: see the README for its fields."""
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
    return ",".join(_COLUMNS + ["file"] * with_files) + "\n"


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


# --------------------------------------------------------------------------- whose report is whose


def read_report(folder: Path) -> dict[str, Any] | None:
    """The ``report.json`` of a folder; None if there is none, or what there is is none of ours."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
        model, data = report["model"]["sha256"], report["data"]
        if not isinstance(model, str) or not {"description", "images"} <= data.keys():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    assert isinstance(report, dict)
    return report


def report_of_run(run: Path, split: str) -> dict[str, Any] | None:
    """A run's report on a split of MNIST, if it is whole and speaks of the run's final model.

    Another may be there: of a checkpoint that somebody has looked at, or half replaced.
    """
    folder, model = run / "evaluation" / split, run / "model.safetensors"
    report = read_report(folder)
    try:
        if (
            report is None
            or _subject(report) != images_of_split(split)
            or report["model"]["sha256"] != sha256(model)
            or report["predictions_sha256"] != sha256(folder / "predictions.csv")
            or not (folder / "report.html").exists()
        ):
            return None
    except (OSError, KeyError):
        return None
    return report


def images_of_split(split: str) -> str:
    """What a report calls a split of MNIST."""
    return f"MNIST {split} images"


def _subject(report: dict[str, Any]) -> str:
    """What a report's images are: a split of MNIST, wherever it lies, or a path."""
    data = report["data"]
    if data["description"] in map(images_of_split, SPLITS):
        return str(data["description"])
    return str(Path(data["images"]).resolve())


def find_place(folder: Path, images: Path, split: str | None, *, named: bool) -> Path:
    """The folder for a report on these images: ``folder``, or another where it is taken.

    The same images, of whatever model, have their earlier report replaced. One on other images
    stays, and so does everything that no evaluation has made.

    Args:
        folder: the place that they have by their name, or by the user's wish.
        images: where they come from.
        split: of MNIST, if they are its own.
        named: whether the user has named this folder, so that no other will do.

    Raises:
        InputError: the folder is another's, and there is no other; or a checkpoint.
    """
    subject = images_of_split(split) if split else str(images.resolve())
    checkpoint = enclosing_checkpoint(folder)
    if checkpoint is not None:
        raise InputError(
            f"--output-dir {folder} is inside the checkpoint {checkpoint}: take another"
        )
    other = _other_owner(folder, subject)
    if other and not named:
        digest = hashlib.sha256(os.fsencode(subject)).hexdigest()[:6]
        taken, folder = folder, folder.with_name(f"{folder.name}-{digest}")
        print(f"{taken} has {other}, which stays: this one goes to {folder}", flush=True)
        other = _other_owner(folder, subject)
    if other:
        raise InputError(f"{folder} has {other}; take another --output-dir, or move it away")
    return folder


def make_room(folder: Path, split: str) -> None:
    """Move a report on other images, or files of other origin, out of a folder of the run's own."""
    if _other_owner(folder, images_of_split(split)):
        move_aside(folder)


def _other_owner(folder: Path, subject: str) -> str:
    """What is there that must not be replaced by a report on ``subject``, or ""."""
    report = read_report(folder)
    if report is not None:
        found = _subject(report)
        return "" if found == subject else f"the report on other images ({found})"
    predictions = folder / "predictions.csv"
    try:
        with predictions.open("rb") as file:
            begin = ",".join(_COLUMNS).encode()
            if file.read(len(begin)) == begin:  # of an evaluation that was killed, or damaged
                return ""
        return f"a {predictions.name} of other origin"
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{predictions}: {error.strerror}; see --output-dir") from None
    found = next((name for name in ("report.json", "report.html") if (folder / name).exists()), "")
    return f"a {found} of other origin" if found else ""


def changes(earlier: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """In what a report on the same images differs from the one that it replaces."""
    differs = {
        "model": earlier["model"]["sha256"] != report["model"]["sha256"],
        "precision": earlier.get("precision") != report["precision"],
        "contents of the images": _hash_of(earlier, "images") != _hash_of(report, "images"),
        "labels": _hash_of(earlier, "labels") != _hash_of(report, "labels"),
    }
    return [name for name, changed in differs.items() if changed]


def _hash_of(report: dict[str, Any], part: str) -> str | None:
    digest: str | None = report["data"].get(f"{part}_sha256")
    return digest


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


def sha256(path: Path) -> str:
    """Of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
