"""Labels of a folder's images from a file of their own: a CSV that names them, or their order."""

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from mnist.arrays import reading
from mnist.cli import InputError
from mnist.evaluation.folders import DIGITS

EXPECTED_LABELS = (
    "labels as an IDX file (also .gz) or a .npy of N whole numbers, or for a folder of images as a "
    "CSV (UTF-8) with the columns file and label"
)
"""For a person to read, where a file is none of these."""

_LONGEST_LINE = 1 << 20  # of a CSV, in characters
MOST_NAMED = 3  # of the names that an error has to tell of


def is_table(path: Path) -> bool:
    """Whether this is a file of something, but neither IDX, plain or packed, nor ``.npy``."""
    with reading(path):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            begin = file.read(6)
    return bool(begin) and not begin.startswith((b"\0\0", b"\x1f\x8b", b"\x93NUMPY"))


def read_table(path: Path, folder: Path, files: Sequence[str]) -> NDArray[np.uint8]:
    """The labels of ``files`` from a CSV with the columns ``file`` and ``label``, in any order.

    Raises:
        InputError: it is no such CSV, or has not exactly one row for each image.
    """
    number_of = _finder(files)
    labels, lines = np.zeros(len(files), np.uint8), [0] * len(files)
    unknown, named = 0, []
    with (
        reading(path),
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        rows = _table_rows(path, text)
        _, header = next(rows, (0, []))
        if header.count("file") != 1 or header.count("label") != 1:
            raise InputError(
                f"{path}: expected {EXPECTED_LABELS}, each once in its first line and "
                f"separated by commas, found {_brief(','.join(header))}"
            )
        name_column, label_column = header.index("file"), header.index("label")
        for line, row in rows:
            if len(row) != len(header):
                raise InputError(
                    f"{path}: line {line}: expected {len(header)} columns separated by commas, "
                    f"found {len(row)}: {_brief(','.join(row))}"
                )
            name, label = row[name_column], row[label_column]
            if label not in DIGITS:
                raise InputError(
                    f"{path}: line {line}: expected a label from 0 to 9, found {_brief(label)}"
                )
            number = number_of(name)
            if number is None:
                unknown += 1
                if unknown <= MOST_NAMED:
                    named.append(f"{_brief(name)} in line {line}")
            elif lines[number]:
                raise InputError(
                    f"{path}: {_brief(files[number])} is given twice, in lines {lines[number]} "
                    f"and {line}"
                )
            else:
                labels[number], lines[number] = int(label), line
    wrong = []
    if unknown:
        wrong.append(f"{unknown} row(s) name no image of {folder}: {_some(named, unknown)}")
    missing = [file for file, line in zip(files, lines, strict=True) if not line]
    if missing:
        named = [_brief(file) for file in missing[:MOST_NAMED]]
        wrong.append(
            f"{len(missing)} of {len(files)} images of {folder} have no row: "
            f"{_some(named, len(missing))}"
        )
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
    return labels


def _finder(files: Sequence[str]) -> Callable[[str], int | None]:
    """Which of ``files`` a name means: itself, or the only one that looks the same."""
    numbers = {file: number for number, file in enumerate(files)}
    composed: dict[str, int | None] = {}  # made once a name needs it

    def number_of(name: str) -> int | None:
        name = name.removeprefix("./")
        if name in numbers:
            return numbers[name]
        if not composed:  # Macs and some archives write ü as u and two dots
            for number, file in enumerate(files):
                form = unicodedata.normalize("NFC", file)
                composed[form] = None if form in composed else number
        return composed.get(unicodedata.normalize("NFC", name))

    return number_of


def _table_rows(path: Path, text: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV that are not blank, each with the number of its first line."""

    def lines() -> Iterator[str]:
        while line := text.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise csv.Error(f"longer than {_LONGEST_LINE - 1:,} characters")
            yield line

    reader = csv.reader(lines(), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {line}: cannot be read as CSV: {error}") from None


def _brief(text: str) -> str:
    """On one line, whatever it is."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _some(named: Sequence[str], number: int) -> str:
    return ", ".join(named) + ", …" * (number > len(named))


def check_order(path: Path, folder: Path, files: Sequence[str]) -> None:
    """Refuse labels without names where the images' order depends on who lists them.

    Raises:
        InputError: two names come in another order, or in none, elsewhere.
    """
    for order, key in _ORDERS.items():
        for (name, first), (other, second) in pairwise((file, key(file)) for file in files):
            if not first < second:
                raise InputError(
                    f"{path}: which label is whose is not certain: as text {_brief(name)} of "
                    f"{folder} comes before {_brief(other)}, but not {order}; give --labels a CSV "
                    "with the columns file and label, or pad the numbers in the names with zeros"
                )


_NUMBER = re.compile(r"(^-?\d+|\d+)")  # of any script, as int() takes them
_PART = re.compile(r"\d+|[^\W\d_]+|[\W_]")


def _by_numbers(name: str) -> list[Any]:
    """``2.png`` before ``10.png``."""
    parts: list[Any] = _NUMBER.split(name)
    parts[1::2] = map(int, parts[1::2])
    return parts


def _as_shown(name: str) -> list[tuple[int, int | str]]:
    """As file managers and ``ls`` do: without suffix and accents, numbers by value, and signs, also
    _, before digits before letters, small or capital.
    """
    plain = os.path.splitext(name)[0].casefold()
    if not plain.isascii():
        letters = unicodedata.normalize("NFD", plain)
        plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return [
        (1, int(part)) if part.isdecimal() else (2 if part.isalnum() else 0, part)
        for part in _PART.findall(plain)
    ]


_ORDERS: dict[str, Callable[[str], Any]] = {
    "by the numbers in the names": _by_numbers,
    "regardless of small and capital letters": str.casefold,
    "as file managers show them": _as_shown,
}
