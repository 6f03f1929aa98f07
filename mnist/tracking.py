"""Where a run's rows go: metrics.jsonl, and the progress display of rank 0."""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mnist.config import InputError


class Tracker:
    """Takes the rows of one run: writes each to ``metrics.jsonl`` and shows how far it is.

    A terminal gets a bar, and like every other output one line per epoch.
    """

    def __init__(self, path: Path, steps: int, epochs: int) -> None:
        self._file = path.open("w")
        self._epochs = epochs
        self._images = 0
        self._epoch = _nothing()
        self._bar = tqdm(total=steps, unit="step", disable=not sys.stderr.isatty(), leave=False)

    def log(self, row: dict[str, Any]) -> None:
        """Record a row; see ``training.fit`` for its keys."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(f"loss {row['train/loss']:.4f}", refresh=False)
        self._bar.update(row["step"] - self._bar.n)
        images, self._images = row["images"] - self._images, row["images"]
        self._epoch["images"] += images
        self._epoch["seconds"] += images / row["images_per_second"]
        for key in ("train/loss", "train/accuracy"):
            self._epoch[key] += images * row[key]
        if row["epoch"] == int(row["epoch"]):
            self._say_epoch(row)
            self._epoch = _nothing()

    def _say_epoch(self, row: dict[str, Any]) -> None:
        """One line: means over the epoch just ended, and the validation after it."""
        images = self._epoch["images"]
        parts = [
            f"epoch {row['epoch']:{len(str(self._epochs))}.0f}/{self._epochs}",
            f"training loss {self._epoch['train/loss'] / images:.4f}, "
            f"accuracy {self._epoch['train/accuracy'] / images:.2%}",
        ]
        if "validation/loss" in row:
            loss, accuracy = row["validation/loss"], row["validation/accuracy"]
            parts.append(f"validation loss {loss:.4f}, accuracy {accuracy:.2%}")
        parts.append(f"{images / self._epoch['seconds']:,.0f} images/s")
        with tqdm.external_write_mode(file=sys.stdout):
            print("   ".join(parts), flush=True)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()


class NoTracker(Tracker):
    """What every other rank has instead."""

    def __init__(self) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def __exit__(self, *_: object) -> None:
        pass


def _nothing() -> dict[str, float]:
    return {"images": 0, "seconds": 0.0, "train/loss": 0.0, "train/accuracy": 0.0}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``.

    Raises:
        InputError: the file is missing, empty or damaged.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path} is damaged: not one JSON object per line") from None
    if not rows:
        raise InputError(f"{path} is damaged: it has no rows")
    return rows
