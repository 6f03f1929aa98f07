"""What was read, as plain data: rows, statuses and texts. docs/reading.md lists the fields."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from mnist.model import Doubt
from mnist.reading.reader import Box, Digit, Number, Page
from mnist.reading.truth import ReadDigit

ACCEPTED, DOUBTFUL, REJECTED = "accepted", "doubtful", "rejected"
COLUMNS = (
    "file", "page", "line", "number", "text", "confidence", "status",
    "left", "top", "width", "height", "digits", "message",
)  # fmt: skip

_REJECTED = 0.4  # of confidence: what is less sure is hardly a digit
_MOSTLY = 0.5  # of the marks of a page: if more are no digits, nothing on it is accepted
_FEW_MARKS = 8


def describe(page: Page, doubt: Doubt | None) -> dict[str, Any]:
    """A page with the status of each digit and number.

    Args:
        page: what was read.
        doubt: from which confidence on a digit is accepted; None: from none on.
    """
    digits = page.digits
    no_digits = len(page.others) + sum(digit.confidence < _REJECTED for digit in digits)
    marks = len(page.others) + len(digits)
    foreign = marks >= _FEW_MARKS and no_digits > _MOSTLY * marks
    warnings = []
    if foreign:
        warnings.append(f"{no_digits} of {marks} marks are no digits")
    if page.turned:
        warnings.append(f"read turned by {90 * page.turned} degrees against the clock")
    threshold = math.inf if doubt is None or foreign else doubt.threshold
    return {
        "turned": 90 * page.turned,
        "inverted": page.inverted,
        "size": list(page.size),
        "warnings": warnings,
        "lines": [[_number(number, threshold) for number in line.numbers] for line in page.lines],
        "others": [_rounded(box) for box in page.others],
    }


def _number(number: Number, threshold: float) -> dict[str, Any]:
    described = [
        {
            "value": digit.value,
            "confidence": round(digit.confidence, 6),
            "status": _status(digit, threshold),
            "box": _rounded(digit.box),
        }
        for digit in number.digits
    ]
    statuses = {digit["status"] for digit in described}
    status = statuses.pop() if len(statuses) == 1 else DOUBTFUL
    return {
        "text": "".join(str(d["value"]) if d["status"] == ACCEPTED else "?" for d in described),
        "confidence": round(number.confidence, 6),
        "status": status,
        "box": _rounded(number.box),
        "digits": described,
    }


def _status(digit: Digit, threshold: float) -> str:
    if digit.confidence < _REJECTED:
        return REJECTED
    return ACCEPTED if digit.confidence >= threshold and not digit.cut_off else DOUBTFUL


def _rounded(box: Box) -> list[float]:
    return [round(float(side), 1) for side in box]


def scored(page: dict[str, Any]) -> list[list[list[ReadDigit]]]:
    """The lines of a described page, of numbers of digits, as scores take them."""
    return [
        [
            [
                ReadDigit(d["value"], d["confidence"], d["status"] == ACCEPTED)
                for d in number["digits"]
            ]
            for number in line
        ]
        for line in page["lines"]
    ]


def rows(file: str, pages: Sequence[dict[str, Any]], error: str | None) -> Iterable[list[Any]]:
    """The rows of one file in ``readings.csv``, as ``COLUMNS`` names them."""
    blank: list[Any] = [""] * 4
    found = False
    for page_number, page in enumerate(pages, 1):
        message = "; ".join(page["warnings"])
        for line_number, line in enumerate(page["lines"], 1):
            for number_number, number in enumerate(line, 1):
                found = True
                digits = [[d["value"], d["confidence"], *d["box"]] for d in number["digits"]]
                yield [
                    file, page_number, line_number, number_number, number["text"],
                    number["confidence"], number["status"], *number["box"],
                    json.dumps(digits, separators=(",", ":")), message,
                ]  # fmt: skip
    if error is not None:
        yield [file, len(pages) + 1, *blank, "error", *blank, "", error]
    elif not found:
        message = "; ".join(sorted({w for page in pages for w in page["warnings"]}))
        yield [file, "", *blank, "none", *blank, "", message]


def write_rows(target: IO[str], records: Iterable[dict[str, Any]]) -> None:
    """``readings.csv`` of all files, in order."""
    table = csv.writer(target, lineterminator="\n")
    table.writerow(COLUMNS)
    for record in records:
        table.writerows(rows(record["file"], record["pages"], record["error"]))


def is_ours(path: Path) -> bool:
    """Whether a file begins as ``readings.csv`` does."""
    begin = ",".join(COLUMNS).encode()
    try:
        with path.open("rb") as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False
