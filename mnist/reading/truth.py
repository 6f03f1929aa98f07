"""What is really written, and how much of it was read: digits aligned by edit distance."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnist.cli import InputError
from mnist.evaluation.report import wilson_interval

_CURVE_POINTS = 200


def read_truth(path: Path) -> dict[str, str]:
    """By resolved path of the photo: its lines, parted by slashes, of numbers, parted by spaces.

    Raises:
        InputError: the file cannot be read, or is not such a table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            if not {"file", "truth"} <= set(table.fieldnames or ()):
                raise InputError(f"--truth {path}: expected the columns file and truth")
            found: dict[str, str] = {}
            for row in table:
                text = row["truth"] or ""
                if not set(text) <= set("0123456789 /"):
                    raise InputError(
                        f"--truth {path}, line {table.line_num}: expected digits, spaces and "
                        f"slashes, found {text!r}"
                    )
                found[os.path.realpath(path.parent / row["file"])] = text
            return found
    except OSError as error:
        raise InputError(f"--truth {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"--truth {path}: not a CSV file: {error}") from None


@dataclass(frozen=True)
class ReadDigit:
    """What is scored of a digit."""

    value: int
    confidence: float
    accepted: bool


@dataclass
class Score:
    """Counts over all photos whose truth is known."""

    photos: int = 0
    lines: int = 0
    lines_right: int = 0
    """Without regard to spaces."""
    lines_grouped_right: int = 0
    digits: int = 0
    """Of the truth."""
    digits_right: int = 0
    accepted: int = 0
    accepted_wrong: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    read: list[tuple[float, bool]] = field(default_factory=list)
    """Of every digit that was read, how sure, and whether it is right."""

    def add(self, truth: str, lines: Sequence[Sequence[Sequence[ReadDigit]]]) -> None:
        """Count one page: its truth, and its lines of numbers of digits."""
        self.photos += 1
        wanted = [line.split() for line in truth.split("/")] if truth.strip() else []
        found = [["".join(str(d.value) for d in number) for number in line] for line in lines]
        self.lines += len(wanted)
        joined = ["".join(line) for line in wanted], ["".join(line) for line in found]
        self.lines_right += _common(*joined)
        self.lines_grouped_right += _common(
            [" ".join(line) for line in wanted], [" ".join(line) for line in found]
        )
        digits = [digit for line in lines for number in line for digit in number]
        text = "".join(joined[0])
        self.digits += len(text)
        pairs = align(text, "".join(str(digit.value) for digit in digits))
        right = {there for here, there in pairs if _equal(here, there, text, digits)}
        self.digits_right += len(right)
        self.failures += failures(pairs, text, digits)
        for index, digit in enumerate(digits):
            self.read.append((digit.confidence, index in right))
            if digit.accepted:
                self.accepted += 1
                self.accepted_wrong += index not in right

    def report(self) -> dict[str, Any]:
        """What ``readings.json`` says of it."""

        def share(part: int, whole: int) -> dict[str, Any]:
            if not whole:
                return {"right": part, "of": whole, "share": None, "interval_95": None}
            interval = list(wilson_interval(part, whole))
            return {"right": part, "of": whole, "share": part / whole, "interval_95": interval}

        return {
            "photos": self.photos,
            "lines": share(self.lines_right, self.lines),
            "lines_with_grouping": share(self.lines_grouped_right, self.lines),
            "digits": share(self.digits_right, self.digits),
            "accepted": share(self.accepted - self.accepted_wrong, self.accepted),
            "accepted_of_truth": self.accepted / self.digits if self.digits else None,
            "failures": dict(self.failures),
            "curve": self._curve(),
        }

    def _curve(self) -> list[dict[str, float]]:
        """Accuracy of the surest digits, over how many they are, as a share of the truth."""
        ordered = sorted(self.read, key=lambda digit: -digit[0])
        points, right = [], 0
        step = max(1, len(ordered) // _CURVE_POINTS)
        for count, (confidence, good) in enumerate(ordered, 1):
            right += good
            if (count % step == 0 or count == len(ordered)) and self.digits:
                points.append(
                    {
                        "coverage": count / self.digits,
                        "accuracy": right / count,
                        "confidence": confidence,
                    }
                )
        return points


def _equal(here: int | None, there: int | None, text: str, digits: Sequence[ReadDigit]) -> bool:
    return here is not None and there is not None and int(text[here]) == digits[there].value


def align(truth: str, read: str) -> list[tuple[int | None, int | None]]:
    """Places in both texts side by side, with the fewest differences; None: nothing there."""
    rows = [list(range(len(read) + 1))]
    for here, wanted in enumerate(truth, 1):
        above, row = rows[-1], [here]
        for there, found in enumerate(read, 1):
            change = above[there - 1] + (wanted != found)
            row.append(min(change, above[there] + 1, row[there - 1] + 1))
        rows.append(row)
    pairs: list[tuple[int | None, int | None]] = []
    here, there = len(truth), len(read)
    while here or there:
        cost = rows[here][there]
        if (
            here
            and there
            and cost == rows[here - 1][there - 1] + (truth[here - 1] != read[there - 1])
        ):
            here, there = here - 1, there - 1
            pairs.append((here, there))
        elif here and cost == rows[here - 1][there] + 1:
            here -= 1
            pairs.append((here, None))
        else:
            there -= 1
            pairs.append((None, there))
    return pairs[::-1]


def failures(
    pairs: Sequence[tuple[int | None, int | None]], text: str, digits: Sequence[ReadDigit]
) -> Counter[str]:
    """How digits were lost or added: by stretches of the alignment that are not right."""
    counts: Counter[str] = Counter()
    wanted = found = 0
    for here, there in [*pairs, (None, None)]:
        over = here is None and there is None
        if over or _equal(here, there, text, digits):
            if wanted == found:
                counts["misread"] += wanted
            elif not found:
                counts["not found"] += wanted
            elif not wanted:
                counts["invented"] += found
            else:
                counts["cut wrongly"] += max(wanted, found)
            wanted = found = 0
        else:
            wanted += here is not None
            found += there is not None
    return +counts


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The most of both that can be paired, equal and in order."""
    row = [0] * (len(other) + 1)
    for wanted in one:
        above, row = row, [0]
        for there, found in enumerate(other, 1):
            both = above[there - 1] + 1 if wanted == found else 0
            row.append(max(both, above[there], row[there - 1]))
    return row[-1]
