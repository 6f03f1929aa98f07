"""Where a run's rows go: metrics.jsonl, and the progress display of rank 0."""

import json
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mnist.cli import InputError
from mnist.system import shows_bars, warn

KEYS = frozenset("step epoch images train/loss train/accuracy images_per_second".split())
"""What every row has; see ``training.fit``."""


class Tracker:
    """Takes the rows of one run: writes each to ``metrics.jsonl`` and shows how far it is.

    A terminal gets a bar, and like every other output one line per epoch.

    Args:
        path: of ``metrics.jsonl``.
        epochs: of the whole run.
        steps: of the whole run.
        step: steps done before.
        kept: bytes of the file that stay, by which a run goes on; what follows them is dropped.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, epochs: int, steps: int, step: int = 0, kept: int = 0) -> None:
        try:
            self._file = path.open("a+b")
            self._file.seek(0)
            before = self._file.read(kept)
            lost = len(before) < kept
            if lost:
                before = before[: before.rfind(b"\n") + 1]
            self._file.truncate(len(before))
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}: make it a file that can be written, or move it away; "
                "the run goes on without its earlier rows"
            ) from None
        rows = parse_rows(before)
        if lost or len(rows) < len(before.splitlines()):
            warn(f"{path} has lost rows")
        self._epochs = epochs
        self._images = 0
        self._epoch = _nothing()
        for row in rows:
            self._count(row)
        hidden = not shows_bars()
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=hidden, leave=False)

    @property
    def bytes(self) -> int:
        """The length of ``metrics.jsonl``."""
        return self._file.tell()

    def log(self, row: dict[str, Any]) -> None:
        """Record a row; see ``training.fit`` for its keys.

        Raises:
            InputError: the disk is full.
        """
        try:
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self._file.name}: {error.strerror}; with that solved, the same command goes on "
                "from the newest checkpoint"
            ) from None
        self._bar.set_postfix_str(f"loss {row['train/loss']:.4f}", refresh=False)
        self._bar.update(row["step"] - self._bar.n)
        epoch = self._count(row)
        if epoch is not None:
            self._say_epoch(row, epoch)

    def _count(self, row: dict[str, Any]) -> dict[str, float] | None:
        """Add a row to the sums of its epoch; return them where that ends."""
        images, self._images = row["images"] - self._images, row["images"]
        self._epoch["images"] += images
        self._epoch["seconds"] += images / row["images_per_second"]
        for key in ("train/loss", "train/accuracy"):
            self._epoch[key] += images * row[key]
        if row["epoch"] != int(row["epoch"]):
            return None
        epoch, self._epoch = self._epoch, _nothing()
        return epoch

    def _say_epoch(self, row: dict[str, Any], sums: dict[str, float]) -> None:
        """One line of at most 80 columns: loss and accuracy over the epoch just ended, and of
        the validation after it."""
        images = sums["images"]
        parts = [
            f"epoch {row['epoch']:{len(str(self._epochs))}.0f}/{self._epochs}",
            f"train {sums['train/loss'] / images:.4f} {sums['train/accuracy'] / images:.2%}",
        ]
        if "validation/loss" in row:
            loss, accuracy = row["validation/loss"], row["validation/accuracy"]
            parts.append(f"validation {loss:.4f} {accuracy:.2%}")
        speed = images / sums["seconds"]
        shown = f"{speed:,.0f}" if speed < 100_000 else f"{speed / 1000:,.0f}k"
        parts.append(f"{shown} images/s")
        with tqdm.external_write_mode(file=sys.stdout):
            print("  ".join(parts), flush=True)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        with suppress(OSError):  # of a full disk, said before
            self._file.close()


class NoTracker(Tracker):
    """What every other rank has instead."""

    def __init__(self) -> None:
        pass

    @property
    def bytes(self) -> int:
        """Nothing."""
        return 0

    def log(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def __exit__(self, *_: object) -> None:
        pass


def _nothing() -> dict[str, float]:
    return {"images": 0, "seconds": 0.0, "train/loss": 0.0, "train/accuracy": 0.0}


def read_metrics(path: Path, keys: Collection[str] = KEYS) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` that have these keys.

    They are for people to look at: where some are damaged, or all are gone, a warning says so.
    """
    try:
        contents = path.read_bytes()
    except OSError as error:
        warn(f"{path}: {error.strerror}: no curves without its rows")
        return []
    rows = parse_rows(contents, keys)
    lines = len(contents.splitlines())
    if len(rows) < lines:
        warn(f"{path} is damaged: {len(rows)} of its {lines} lines are rows")
    return rows


def parse_rows(contents: bytes, keys: Collection[str] = KEYS) -> list[dict[str, Any]]:
    """What are rows, with numbers under these keys, of the lines of a ``metrics.jsonl``."""
    rows = []
    for line in contents.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), int | float) for key in keys):
            rows.append(row)
    return rows
