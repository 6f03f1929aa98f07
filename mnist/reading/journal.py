"""What a reading has done so far, kept in its folder: one that was killed goes on from there.

OUTPUT/.unfinished-IDENTITY/
    identity.json        what is read by what; another list, model or setting is another reading
    made_by              the program of the first start
    files                the paths, each ended by a NUL byte
    00003-00001.records  of the third start, by its rank 1: a line for each file that is read
    00003-00001.shown    pictures of the pages that were the most urgent so far

Lines are appended, pictures before the record of their file, and nothing is changed in place. So
a kill costs no more than what was being read; a line that was cut short is no line. The last record
of a file counts; that of a long one may be of its first pages.
"""

import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.reading.page import MOST_SHOWN, Shown, most_urgent, rank_of
from mnist.system import write_file

_PREFIX = ".unfinished-"
_MOST_OPEN = 200  # files, of as many as starts and processes have made
Stat = list[int]
CHANGING: Stat = [-1]
"""Of a file that is to be read again."""
Record = dict[str, Any]
"""Of a file: its path (``file``), ``sha256`` and ``stat``, its ``pages`` as ``describe`` has them,
how urgent each is (``urgencies``), the ``error`` if it could not be read to its end, and whether
more of it is still to be read (``unfinished``)."""


class Journal:
    """The folder, as one process sees it."""

    def __init__(self, folder: Path, photos: Sequence[str]) -> None:
        self.folder, self.photos = folder, photos

    @classmethod
    def begin(
        cls, output: Path, photos: Sequence[str], identity: dict[str, Any], made_by: str = ""
    ) -> "Journal":
        """Make it, or find what an earlier start of the same reading has left, perhaps of another
        version of this program (``made_by``).

        Raises:
            InputError: it cannot be written.
        """
        text = json.dumps({**identity, "files": files_digest(photos)}, sort_keys=True)
        folder = output / (_PREFIX + hashlib.sha256(text.encode()).hexdigest()[:12])
        with writing(folder):
            if not (folder / "identity.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_file(folder / "files", _spelled(photos))
                write_file(folder / "made_by", made_by)
                write_file(folder / "identity.json", text)
        return cls(folder, photos)

    @classmethod
    def join(cls, folder: Path) -> "Journal":
        """As another process has begun it."""
        with writing(folder):
            listed = (folder / "files").read_bytes().split(b"\0")[:-1]
        return cls(folder, [os.fsdecode(photo) for photo in listed])

    def made_by(self) -> str:
        """Which program has begun it."""
        return (self.folder / "made_by").read_text()

    def starts(self) -> int:
        """How many there were."""
        return max((int(part.name[:5]) for part in self.folder.glob("*.records")), default=0)

    def index(self) -> "Index":
        """Where the last record of each file is."""
        return Index(self.folder, len(self.photos))

    def remaining(self, index: "Index") -> tuple[NDArray[np.int64], list[Shown]]:
        """Which files are still to be read, ascending, and the most urgent pages of what has been.

        To be read are those without a record or with one that is unfinished, those that may have
        changed since, and those with a page that has become one of the most urgent, as another has
        changed, and has no picture.
        """
        todo: set[int] = set()
        changed: set[int] = set()
        ranks: list[tuple[float, int, int]] = []
        for place, photo in enumerate(self.photos):
            record = index.record(place) if index.has(place) else None
            if record is None or record["unfinished"]:
                todo.add(place)
            if record is None:
                continue
            if record["stat"] != stat_of(photo):
                changed.add(place)
                continue
            ranks += [rank_of(urgent, place, n) for n, urgent in enumerate(record["urgencies"])]
            if len(ranks) > 100 * MOST_SHOWN:
                ranks = heapq.nsmallest(MOST_SHOWN, ranks)
        shown = self.shown(index, changed)
        pictured = {one.rank for one in shown}
        lost = {rank[1] for rank in heapq.nsmallest(MOST_SHOWN, ranks) if rank not in pictured}
        return np.array(sorted(todo | changed | lost), np.int64), shown

    def shown(self, index: "Index", without: Collection[int] = ()) -> list[Shown]:
        """The most urgent pages, of files as they were read last.

        Args:
            index: of this journal.
            without: places of files whose pages do not count.
        """
        found: dict[tuple[int, int], Shown] = {}
        for part in sorted(self.folder.glob("*.shown")):
            for line in _lines(part):
                one = Shown(**json.loads(line))
                if one.file in without or not index.has(one.file):
                    continue
                record = index.record(one.file)
                if record["sha256"] == one.sha256 and one.page < len(record["pages"]):
                    found[one.file, one.page] = one
                if len(found) > 2 * MOST_SHOWN:
                    found = {(one.file, one.page): one for one in most_urgent(found.values())}
        return most_urgent(found.values())

    def remove(self) -> None:
        """The reading is complete."""
        (self.folder / "identity.json").unlink(missing_ok=True)  # first: the rest is nothing then
        shutil.rmtree(self.folder, ignore_errors=True)


class Index:
    """By place among all files, where its last record is; 12 bytes each, as there may be
    millions."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._parts = sorted(folder.glob("*.records"))
        self._part, self._start = np.full(count, -1, np.int32), np.zeros(count, np.int64)
        self._open: dict[int, IO[bytes]] = {}
        for number, part in enumerate(self._parts):
            start = 0
            for line in _lines(part):
                place = int(line.partition(b"\t")[0])
                self._part[place], self._start[place] = number, start
                start += len(line)

    def close(self) -> None:
        """The files that are open; they are opened again when they are needed."""
        for part in self._open.values():
            part.close()
        self._open.clear()

    def has(self, place: int) -> bool:
        """Whether a file has a record."""
        return bool(self._part[place] >= 0)

    def record(self, place: int) -> Record:
        """What was read of a file."""
        number = int(self._part[place])
        if number < 0:
            raise RuntimeError(f"{self._folder} has no record of file {place}")
        part = self._open.get(number)
        if part is None:
            if len(self._open) == _MOST_OPEN:
                self.close()
            part = self._open[number] = self._parts[number].open("rb")
        part.seek(int(self._start[place]))
        record: Record = json.loads(part.readline().partition(b"\t")[2])
        return record

    def records(self) -> Iterator[Record]:
        """Of all files, in their order."""
        return (self.record(place) for place in range(len(self._part)))


class Writer:
    """One process's part of one start."""

    def __init__(self, folder: Path, start: int, rank: int) -> None:
        self._stem = folder / f"{start:05d}-{rank:05d}"
        with writing(self._stem):
            self._shown = self._stem.with_suffix(".shown").open("ab")
            self._records = self._stem.with_suffix(".records").open("ab")

    def close(self) -> None:
        """Nothing is left to be written."""
        with suppress(OSError):
            self._shown.close()
            self._records.close()

    def add(self, records: Mapping[int, Record], shown: Sequence[Shown]) -> None:
        """What was read of some files, by place, and what of it may be shown.

        Raises:
            InputError: the disk is full.
        """
        with writing(self._stem):
            for one in shown:
                self._shown.write(json.dumps(one.__dict__).encode() + b"\n")
            self._shown.flush()
            for place, record in records.items():
                self._records.write(b"%d\t%b\n" % (place, json.dumps(record).encode()))
            self._records.flush()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes there: what the system refuses is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; what was read before is kept; --output-dir takes storage "
            "with enough space that all processes share"
        ) from None


def subject_of(photos: Sequence[str]) -> str:
    """What tells these photos from others: their paths."""
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(os.fsencode(os.path.realpath(photo)) + b"\0")
    return digest.hexdigest()


def files_digest(photos: Sequence[str]) -> str:
    """The same with regard to how they are spelled, which is how they are named in the files: a
    relative path is another one in another folder."""
    return hashlib.sha256(_spelled(photos)).hexdigest()


def _spelled(photos: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(photo) + b"\0" for photo in photos)


def unfinished(output: Path) -> list[dict[str, Any]]:
    """The identities of the readings that a folder has begun."""
    found = []
    for path in sorted(output.glob(f"{_PREFIX}*/identity.json")):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_bytes()))
    return found


def fingerprint(facts: object, stats: Iterable[Stat | None] = ()) -> str:
    """What tells complete readings from others: by what they are made, as JSON takes it, and the
    stats of the files."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for found in stats:
        digest.update(f"{found}\n".encode())
    return digest.hexdigest()


def stat_of(photo: str) -> Stat | None:
    """Size and times of a file, by which a change is noticed."""
    try:
        found = os.stat(photo)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _lines(part: Path) -> Iterator[bytes]:
    """Whole ones."""
    with part.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line
