"""Where readings go: a folder that has none of other photos, held while they are made."""

import hashlib
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from mnist.cli import InputError
from mnist.evaluation.job import Weights
from mnist.reading.config import ReadConfig
from mnist.reading.hocr import is_hocr
from mnist.reading.journal import fingerprint, stat_of, unfinished, writing
from mnist.reading.readings import is_ours
from mnist.runs.checkpoint import enclosing_checkpoint
from mnist.runs.folder import hold

FILES = ("readings.csv", "readings.html", "readings.json")
HOCR = "readings.hocr"
"""With ``--hocr``."""


def hold_place(output: Path, subject: str, stack: ExitStack) -> None:
    """Make the folder of these readings and lock it until ``stack`` is closed.

    Raises:
        InputError: it cannot be made, is in use, or has got readings of other photos.
    """
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        stack.callback(_remove_if_empty, output)
        lock = output / ".lock"
        hold(output, stack, "take another --output-dir", lock)
        stack.callback(lock.unlink, missing_ok=True)  # it has no use in a folder of readings
    refuse_taken(output, subject)  # by who held the lock


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def find_complete(output: Path, hocr: bool, facts: str, photos: list[str]) -> dict[str, Any] | None:
    """The report of readings that are complete, if the same would come about again.

    Args:
        output: their folder.
        hocr: whether there is to be a ``readings.hocr``.
        facts: the fingerprint of what they would be made by.
        photos: the paths of what is to be read.
    """
    names = [*FILES, HOCR] if hocr else FILES
    if not all((output / name).is_file() for name in names):
        return None
    try:
        report: dict[str, Any] = json.loads((output / "readings.json").read_bytes())
        del report["files_sha256"]  # there may be millions
        made_from = report["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if made_from == fingerprint(facts, map(stat_of, photos)) else None


def find_place(config: ReadConfig, weights: Weights, photos: list[str], subject: str) -> Path:
    """The folder of these readings, which earlier ones of the same photos may have.

    Raises:
        InputError: it holds what is not ours, or is a checkpoint.
    """
    if config.output_dir is not None:
        folder = config.output_dir
        inside = enclosing_checkpoint(folder)
        if inside is not None:
            raise InputError(f"--output-dir {folder} is inside the checkpoint {inside}")
        refuse_taken(folder, subject)
        return folder
    name = _name_of(config, photos)
    folder = weights.home / "readings" / name
    if taken := _taken(folder, subject, begun=True):
        other = folder.with_name(f"{name}-{hashlib.sha256(subject.encode()).hexdigest()[:6]}")
        print(f"{folder} has {taken}, which stays: these go to {other}", flush=True)
        folder = other
        refuse_taken(folder, subject)
    return folder


def _name_of(config: ReadConfig, photos: list[str]) -> str:
    """After the photo or the folder that is named, or that the first of several lies in."""
    if len(config.photos) == 1 and config.files_from is None:
        named = Path(os.path.realpath(config.photos[0]))
        if os.path.exists(named):
            return named.name if named.is_dir() else named.stem
    if not config.photos and config.files_from is not None:
        return config.files_from.stem or "photos"
    return Path(os.path.realpath(photos[0])).parent.name or "photos"


def refuse_taken(folder: Path, subject: str) -> None:
    """Raise an InputError if readings of these photos must not go to a folder."""
    if taken := _taken(folder, subject):
        raise InputError(f"{folder} has {taken}; take another --output-dir, or move it away")


def _taken(folder: Path, subject: str, *, begun: bool = False) -> str:
    """What is in a folder that must not be replaced by readings of these photos, or "".

    Args:
        folder: of readings.
        subject: of these.
        begun: count readings that are not finished.

    Raises:
        InputError: it is no folder.
    """
    if os.path.exists(folder) and not folder.is_dir():
        raise InputError(f"{folder} is not a folder; take another --output-dir")
    if os.path.exists(folder / HOCR) and not is_hocr(folder / HOCR):
        return f"a {HOCR} of other origin"
    try:
        report = json.loads((folder / "readings.json").read_bytes())
        return "" if report["subject"] == subject else "the readings of other photos"
    except (OSError, ValueError, KeyError, TypeError):
        if os.path.lexists(folder / "readings.json"):
            return "a readings.json of other origin"
    if begun and any(one.get("subject") != subject for one in unfinished(folder)):
        return "unfinished readings of other photos"
    if os.path.lexists(folder / "readings.csv"):
        return "" if is_ours(folder / "readings.csv") else "a readings.csv of other origin"
    return "a readings.html of other origin" if os.path.lexists(folder / "readings.html") else ""
