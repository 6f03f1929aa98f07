"""Reading: every photo exactly once, by any number of processes, each as fast as it can.

Photos are handed out a few at a time by a counter that the processes share, so that none waits for
another. What is read goes into the journal at once, of a long file what is read of it so far.
"""

import errno
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE
from mnist.distributed import World
from mnist.evaluation.scoring import predict, progress
from mnist.meeting import shared_counter
from mnist.model import CLASSES, MLP, Doubt
from mnist.pictures import Frame
from mnist.reading.journal import CHANGING, Index, Journal, Record, Writer, stat_of
from mnist.reading.page import MOST_SHOWN, Shown, most_urgent, rank_of, show, urgency
from mnist.reading.photo import load_pages
from mnist.reading.reader import Scorer, read_pages
from mnist.reading.readings import describe
from mnist.system import StopRequest, sha256

_AT_ONCE = 32  # files that a process takes at most
_TOGETHER = 4_000_000  # pixels of pages that are read in one batch: one large photo, or many crops
_BLOCK = 512  # images that the network sees at once
_SECONDS_AT_STAKE = 30  # of the reading of one file
_LASTING = {errno.EINVAL, errno.EACCES, errno.EPERM}  # what ends them changes a file's times
_PATIENCE_SECONDS = 30  # with the others, once asked to stop
_ENDED = 1 << 40  # of the counter: more than there are files


def read_share(
    model: MLP,
    journal: Journal,
    todo: NDArray[np.int64],
    shown: list[Shown],
    start: int,
    world: World,
    stop: StopRequest,
) -> tuple[int, bool]:
    """Read photos until none is left, or this process is asked to stop.

    Args:
        model: on the world's device, in its precision.
        journal: where the readings go.
        todo: places of the files to read; the same on every rank.
        shown: the most urgent pages of what was read before.
        start: the number of this start.
        world: the processes that share the work.
        stop: which any of them may hear.

    Returns:
        How many files have been read, by all processes, and whether any was asked to stop.

    Raises:
        InputError: the journal cannot be written, by any of them.
    """
    parts = list(portions(len(todo), world.size))
    claim, done, over = (
        shared_counter(f"{start} {name}", world.meeting) for name in ("claim", "done", "over")
    )
    count = len(journal.photos)
    before = count - len(todo)
    failed: InputError | None = None

    def ended() -> bool:
        if failed is not None:
            raise failed
        return stop.requested

    with progress(count, "files", "read", begun=before, shown=world.is_main) as show_done:
        try:
            with ExitStack() as stack:
                index = stack.enter_context(closing(journal.index()))
                writer = stack.enter_context(closing(Writer(journal.folder, start, world.rank)))
                reader = _Reader(model, world, journal.photos, index, shown)
                while (turn := claim(1) - 1) < len(parts):
                    for records in reader.read(todo[parts[turn]].tolist(), stop):
                        writer.add(records, reader.fresh())
                        whole = sum(not record["unfinished"] for record in records.values())
                        show_done(before + done(whole))
                    if stop.requested:
                        claim(_ENDED)  # for all
        except InputError as error:
            failed = error
            claim(_ENDED)
        over(1)
        _wait(lambda: over(0) == world.size, lambda: show_done(before + done(0)), stop)
    interrupted = any(world.from_all(ended))
    return before + done(0), interrupted


def _wait(condition: Callable[[], bool], meanwhile: Callable[[], None], stop: StopRequest) -> None:
    """Not in a collective: another's last photo may take longer than that would wait. Whether it is
    still there its launcher knows, which ends the others if not."""
    asked = math.inf
    while not condition():
        if stop.requested:
            asked = min(asked, time.monotonic())
        if time.monotonic() - asked > _PATIENCE_SECONDS:
            raise SystemExit(75)
        meanwhile()
        time.sleep(0.05)


def _sha256(photo: str) -> str:
    """Of a file; an OSError of what cannot be one, such as a pipe, for which one would wait."""
    found = os.stat(photo)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a file")
    if not found.st_size:
        raise OSError(errno.EINVAL, "it is empty")
    return sha256(Path(photo))


def portions(count: int, size: int) -> Iterator[slice]:
    """Which of so many files are taken at once; fewer towards the end, so that all processes end
    together."""
    start = 0
    while start < count:
        stop = start + min(_AT_ONCE, max(1, (count - start) // (4 * size)))
        yield slice(start, stop)
        start = stop


def in_blocks(model: MLP, images: NDArray[np.uint8], world: World) -> NDArray[Any]:
    """``predict``, always of as many images: for every other number of them oneDNN makes code, and
    malloc new places, of which thousands of files would fill gigabytes."""
    found = [np.zeros((0, CLASSES), np.float32)]
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK]
        filled = np.zeros((_BLOCK, *IMAGE_SHAPE), np.uint8)
        filled[: len(block)] = block
        found.append(predict(model, filled, world)[: len(block)])
    return np.concatenate(found)


class _Reader:
    """Reads files, and keeps pictures of the pages that need a look most."""

    def __init__(
        self, model: MLP, world: World, photos: Sequence[str], index: Index, shown: list[Shown]
    ) -> None:
        self._doubt: Doubt | None = model.doubt
        self._score: Scorer = lambda images: in_blocks(model, images, world)
        # Where the bits of a prediction depend on what else is predicted, pages stay alone.
        steady = world.precision == torch.float32 and world.device.type == "cpu"
        self._together = _TOGETHER if steady else 0
        self._photos, self._index = photos, index
        self._kept, self._fresh = shown, list[Shown]()

    def fresh(self) -> list[Shown]:
        """Pages that may be shown, since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def read(self, places: Sequence[int], stop: StopRequest) -> Iterator[dict[int, Record]]:
        """The records of some files, or of the first few if asked to stop, when they may be
        written: of a long file also while it is read.

        Args:
            places: of the files among all.
            stop: the request.
        """
        records: dict[int, Record] = {}
        waiting: list[tuple[int, Frame]] = []
        pixels, written = 0, time.monotonic()
        for place in places:
            if stop.requested:
                break
            try:
                record = records[place] = self._begin(place)
                for frame in self._frames(record):
                    waiting.append((place, frame))
                    pixels += math.prod(frame.pixels.shape[:2])
                    if pixels > self._together:
                        self._read(waiting, records)
                        pixels = 0
                    if stop.requested:
                        break
                    if not waiting and time.monotonic() - written > _SECONDS_AT_STAKE:
                        yield _settled(records)
                        records, written = {place: record}, time.monotonic()
                else:
                    record["unfinished"] = False
            except InputError as damaged:
                record["error"] = str(damaged).removeprefix(f"{record['file']}: ")
                record["unfinished"] = False
        self._read(waiting, records)
        yield _settled(records)

    def _begin(self, place: int) -> Record:
        """The record of a file before it is read, with what an earlier start has read of it."""
        photo = self._photos[place]
        record: Record = {"file": photo, "pages": [], "urgencies": [], "error": None}
        record |= {"sha256": None, "stat": stat_of(photo), "unfinished": True}
        try:
            record["sha256"] = _sha256(photo)
        except OSError as error:
            record["error"] = f"cannot be read as an image: {error.strerror}"
            record["unfinished"] = False
            if error.errno not in _LASTING and record["stat"]:
                record["stat"] = CHANGING  # it may be there, and whole, the next time
        if not self._index.has(place):
            return record
        known = self._index.record(place)
        same = record["sha256"] is not None and record["sha256"] == known["sha256"]
        if same and self._has_pictures(known, place):
            return known | {"stat": record["stat"]}
        self._kept = [one for one in self._kept if one.file != place]
        return record

    def _has_pictures(self, known: Record, place: int) -> bool:
        """Whether there are pictures of all pages of a file that would be kept, were it read now;
        what was read while the file changed counts for nothing."""
        pictured = {(one.rank, one.sha256) for one in self._kept}
        ranks = [rank_of(urgent, place, n) for n, urgent in enumerate(known["urgencies"])]
        return known["stat"] != CHANGING and all(
            (rank, known["sha256"]) in pictured or not self._keeps(rank) for rank in ranks
        )

    def _frames(self, record: Record) -> Iterator[Frame]:
        """The pages of a file that are still to be read."""
        if record["unfinished"]:
            yield from load_pages(Path(record["file"]), len(record["pages"]))

    def _keeps(self, rank: tuple[float, int, int]) -> bool:
        return len(self._kept) < MOST_SHOWN or rank < self._kept[-1].rank

    def _read(self, waiting: list[tuple[int, Frame]], records: dict[int, Record]) -> None:
        pages = read_pages([frame for _, frame in waiting], self._score)
        for (file, frame), page in zip(waiting, pages, strict=True):
            record = records[file]
            described = describe(page, self._doubt)
            urgent, place = urgency(page, described), (file, len(record["pages"]))
            record["pages"].append(described)
            record["urgencies"].append(urgent)
            if self._keeps(rank_of(urgent, *place)):
                one = show(page, frame, urgent, place, record["sha256"])
                self._kept = most_urgent([*self._kept, one])
                self._fresh.append(one)
        waiting.clear()


def _settled(records: dict[int, Record]) -> dict[int, Record]:
    """With a mark at those of files that have changed while they were read."""
    for record in records.values():
        if record["stat"] != stat_of(record["file"]):
            record["stat"] = CHANGING
    return records
