"""Where a run's rows go: metrics.jsonl, and the progress display of rank 0."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Tracker:
    """Takes the rows of one run: writes each to ``metrics.jsonl`` and shows how far it is.

    A terminal gets a bar, and like every other output one line per epoch.
    """

    def __init__(self, path: Path, steps: int, epochs: int) -> None:
        self._file = path.open("w")
        self._epochs = epochs
        self._epoch_start = {"images": 0, "seconds": 0.0}
        self._bar = tqdm(total=steps, unit="step", disable=not sys.stderr.isatty(), leave=False)

    def log(self, row: dict[str, Any]) -> None:
        """Record a row; see ``training.train`` for its keys."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(f"loss {row['train/loss']:.4f}", refresh=False)
        self._bar.update(row["step"] - self._bar.n)
        if row["epoch"] == int(row["epoch"]):
            width = len(str(self._epochs))
            since = {key: row[key] - value for key, value in self._epoch_start.items()}
            parts = [
                f"epoch {row['epoch']:{width}.0f}/{self._epochs}",
                _shown("training", row, "train"),
            ]
            if "validation/loss" in row:
                parts.append(_shown("validation", row, "validation"))
            parts.append(f"{since['images'] / since['seconds']:,.0f} images/s")
            self._epoch_start = {key: row[key] for key in since}
            with tqdm.external_write_mode(file=sys.stdout):
                print("   ".join(parts), flush=True)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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


def _shown(name: str, row: dict[str, Any], part: str) -> str:
    return f"{name} loss {row[f'{part}/loss']:.4f}, accuracy {row[f'{part}/accuracy']:.2%}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]
