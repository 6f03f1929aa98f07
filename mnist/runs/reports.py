"""The reports that evaluations have left: reading them, whose they are, and what they replace.

How a report is made is the affair of ``evaluation``.
"""

import csv
import hashlib
import heapq
import json
import os
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.runs.checkpoint import enclosing_checkpoint
from mnist.system import move_aside, sha256

SPLITS: tuple[Literal["test", "validation", "train"], ...] = ("test", "validation", "train")
"""Of MNIST: the last two are what a run held out of the training images, and the rest."""

PREDICTIONS_COLUMNS = ("index", "label", "prediction", "confidence", *(f"p{d}" for d in range(10)))
"""Of ``predictions.csv``; with doubt there is ``accepted`` as well, of a folder ``file``."""


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


def lies_in_run(evaluation: Path, run_folder: Path) -> bool:
    """Whether a report's folder is where a run keeps its own."""
    return evaluation.resolve().parent == (run_folder / "evaluation").resolve()


def images_of_split(split: str) -> str:
    """What a report calls a split of MNIST."""
    return f"MNIST {split} images"


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers by which runs are compared, by name: of a ``report.json``, or a
    ``readings.json``."""
    if "counts" in report:
        return _headline_of_readings(report)
    named: dict[str, Any] = {"scored": report["scored"]}
    if report.get("without_digit"):  # reports of earlier versions lack it
        named["without_digit"] = report["without_digit"]
    if accepted := report.get("acceptance"):
        named["accepted"] = accepted["share"]
        if accepted["labelled"]:
            named["accuracy_of_accepted"] = accepted["accuracy"]
    if report["labelled"]:
        low, high = report["accuracy_interval_95"]
        named |= {"accuracy": report["accuracy"], "accuracy_low": low, "accuracy_high": high}
        named["loss"] = report["cross_entropy"]
        named["calibration_error"] = report["calibration"]["expected_calibration_error"]
        if report["without_disputed_labels"]:
            accuracy = report["without_disputed_labels"]["accuracy"]
            named["accuracy_without_disputed_labels"] = accuracy
    return named


def _headline_of_readings(report: dict[str, Any]) -> dict[str, Any]:
    """Counts, and scores where the truth is known."""
    named: dict[str, Any] = dict(report["counts"])
    for name in ("digits", "lines", "lines_with_grouping", "accepted"):
        score = (report["scores"] or {}).get(name)
        if score and score["share"] is not None:
            named[f"right/{name}"] = score["share"]
    return named


def telling_predictions(path: Path, number: int) -> list[dict[str, str]]:
    """Rows of a ``predictions.csv``: the most confident mistakes first, then the least confident of
    the others; those without a prediction come with the least confident."""

    def order(row: dict[str, str]) -> tuple[bool, float]:
        predicted = bool(row["prediction"])
        wrong = predicted and bool(row["label"]) and row["label"] != row["prediction"]
        confidence = float(row["confidence"] or 0)
        return not wrong, -confidence if wrong else confidence

    with path.open(newline="", errors="surrogateescape") as file:
        return heapq.nsmallest(number, csv.DictReader(file), key=order)


def mapped_images(path: Path) -> NDArray[np.uint8] | None:
    """The images of an IDX file that a report is on, n×28×28; None of any other."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        begin = file.read(16)
    if begin[:4] != b"\0\0\x08\x03" or begin[8:] != struct.pack(">2I", 28, 28):
        return None
    return np.memmap(path, np.uint8, "r", 16).reshape(-1, 28, 28)


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
            begin = ",".join(PREDICTIONS_COLUMNS).encode()
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
        "preparation": earlier.get("prepare", "as-is") != report["prepare"],
        "precision": earlier.get("precision") != report["precision"],
        "contents of the images": _hash_of(earlier, "images") != _hash_of(report, "images"),
        "labels": _hash_of(earlier, "labels") != _hash_of(report, "labels"),
    }
    return [name for name, changed in differs.items() if changed]


def _hash_of(report: dict[str, Any], part: str) -> str | None:
    digest: str | None = report["data"].get(f"{part}_sha256")
    return digest
