"""The reading job: which photos by which model, where the readings go, and the summary."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.distributed import World, connect
from mnist.evaluation.job import Weights, find_weights, refuse_missing
from mnist.model import MLP, Doubt, load_model
from mnist.pictures import decoders
from mnist.reading.config import ReadConfig
from mnist.reading.hocr import is_hocr, write_hocr
from mnist.reading.journal import (
    CHANGING,
    Index,
    Journal,
    Stat,
    files_digest,
    fingerprint,
    subject_of,
    writing,
)
from mnist.reading.page import Shown, render_page
from mnist.reading.photo import find_photos
from mnist.reading.place import FILES, HOCR, find_complete, find_place, hold_place, refuse_taken
from mnist.reading.readings import ACCEPTED, scored, write_rows
from mnist.reading.truth import Score, read_truth
from mnist.reading.work import read_share
from mnist.runs.environment import environment, versions
from mnist.runs.mirror import WandbSettings, open_mirror
from mnist.system import StopRequest, flush_to_disk, sha256, source_digest, write_file

_COUNTED = (
    "files", "files_read", "files_error", "files_without", "pages", "numbers", "accepted",
    "doubtful", "rejected", "digits", "digits_accepted",
)  # fmt: skip
_MOST_ERRORS = 1000  # that readings.json lists


@dataclass(frozen=True)
class _Start:
    """What rank 0 has found out at the beginning."""

    output: Path
    subject: str
    facts: str
    """The fingerprint of what the readings are made by."""
    complete: dict[str, Any] | None = None
    """The report, if an earlier start has finished and nothing has changed since."""
    journal: Path = Path()
    number: int = 0
    todo: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    shown: list[Shown] = field(default_factory=list)


def read(config: ReadConfig) -> None:
    """Do the whole job: read the photos, write the files, print the summary.

    Killed at any moment, the same call goes on from what has been read.

    Raises:
        InputError: the model or the folders do not allow it, or none of the photos can be read;
            nothing is changed.
        SystemExit: with 75: asked to stop; what has been read is kept.
    """
    refuse_missing(config)
    settings = WandbSettings.of(config)  # may refuse WANDB_MODE
    truth = read_truth(config.truth) if config.truth else None
    stop = StopRequest()
    world = connect(config, stop)
    began = time.perf_counter()
    with stop, ExitStack() as stack:
        weights = world.from_main(lambda: find_weights(config), prepares=True)
        models: list[MLP] = []
        world.from_all(lambda: models.append(load_model(weights.path)), prepares=True)
        model = models[0].to(world.device, world.precision)
        start = world.from_main(lambda: _begin(config, weights, truth, world, stack), prepares=True)
        report = start.complete
        if report is None:
            journal = Journal.join(start.journal)
            _read_rest(start, journal, model, world, stop)
            seconds = time.perf_counter() - began
            if world.is_main:
                with writing(start.output):
                    report = _finish(config, start, journal, weights, model, truth, world, seconds)
                journal.remove()
        elif world.is_main:
            print(f"{start.output} is complete; without it, the same command reads again")
    if report is None or not world.is_main:
        return
    _print_summary(report, start.output)
    if weights.run is not None and weights.step is None:
        mirror = open_mirror(settings)
        mirror.begin(weights.run)
        mirror.readings(start.output, config.wandb_photos)
        mirror.close()


def _begin(
    config: ReadConfig,
    weights: Weights,
    truth: dict[str, str] | None,
    world: World,
    stack: ExitStack,
) -> _Start:
    """Find the photos, the place of their readings, and what an earlier start has read."""
    photos = find_photos(config.photos, config.files_from)
    weights.say_unfinished("reads")
    subject = subject_of(photos)
    output = find_place(config, weights, photos, subject)
    identity = {
        "subject": subject,
        "model": sha256(weights.path),
        "precision": world.precision_name,
        "device": world.device.type,
        "decoders": decoders(),  # without one of them, files are errors that need not be
    }
    hold_place(output, subject, stack)
    made_by = fingerprint([source_digest(), versions()])
    named = [files_digest(photos), _title(config), str(weights.path)]
    facts = fingerprint([identity, made_by, named, truth])
    complete = find_complete(output, config.hocr, facts, photos)
    if complete is not None:
        Journal.begin(output, photos, identity).remove()  # of a start that was killed at its end
        return _Start(output, subject, facts, complete)
    journal = Journal.begin(output, photos, identity, made_by)
    if journal.made_by() != made_by:
        facts = "begun by another version of this program"  # to be read again
    with closing(journal.index()) as index:
        todo, shown = journal.remaining(index)
    if len(todo) < len(photos):
        read = len(photos) - len(todo)
        print(f"goes on: {read:,} of {len(photos):,} files have been read", flush=True)
    number = journal.starts() + 1
    return _Start(output, subject, facts, None, journal.folder, number, todo, shown)


def _read_rest(
    start: _Start, journal: Journal, model: MLP, world: World, stop: StopRequest
) -> None:
    """Read what is left; a SystemExit with 75 if asked to stop."""
    done, interrupted = read_share(
        model, journal, start.todo, start.shown, start.number, world, stop
    )
    if interrupted:
        if world.is_main:
            print(
                f"interrupted: {done:,} of {len(journal.photos):,} files are read; the same "
                "command again goes on",
                flush=True,
            )
        raise SystemExit(75)


def _finish(
    config: ReadConfig,
    start: _Start,
    journal: Journal,
    weights: Weights,
    model: MLP,
    truth: dict[str, str] | None,
    world: World,
    seconds: float,
) -> dict[str, Any]:
    """Write the files beside the journal, then move each to its place, whole.

    Returns:
        What ``readings.json`` says, but for the files' SHA-256.

    Raises:
        InputError: none of the photos could be read; then nothing is left.
    """
    aside, names = journal.folder, list(FILES)
    hocr = start.output / HOCR
    with closing(journal.index()) as index:
        try:
            found = _merge(aside, index, truth, model.doubt)
        except InputError:
            journal.remove()
            raise
        report = {
            "title": _title(config),
            "subject": start.subject,
            "model": _facts(weights, model),
            **found,
            "throughput": {
                "files": len(start.todo),
                "seconds": seconds,
                "files_per_second": len(start.todo) / seconds,
            },
            **environment(world),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        shown = journal.shown(index)
        records = {one.file: index.record(one.file) for one in shown}
        write_file(aside / "readings.html", render_page(report, records, shown))
        _write_report(aside / "readings.json", report, index, start.facts)
        if config.hocr:
            names.insert(0, HOCR)
            with (aside / HOCR).open("w", encoding="utf-8") as file:
                write_hocr(file, index.records())
    for name in names:
        flush_to_disk(aside / name)
    refuse_taken(start.output, start.subject)  # in the meantime
    if not config.hocr and is_hocr(hocr):
        hocr.unlink()  # of earlier readings
    (start.output / "readings.json").unlink(missing_ok=True)  # it vouches for the others
    for name in names:
        (aside / name).replace(start.output / name)
    return report


def _facts(weights: Weights, model: MLP) -> dict[str, Any]:
    return {
        "path": str(weights.path),
        "sha256": sha256(weights.path),
        "step": weights.step,
        "temperature": model.doubt.temperature if model.doubt else None,
        "threshold": model.doubt.threshold if model.doubt else None,
    }


def _title(config: ReadConfig) -> str:
    name = Path(config.photos[0] if config.photos else config.files_from or "").name
    more = f" and {len(config.photos) - 1} more" if len(config.photos) > 1 else ""
    return f"Readings of {name}{more}"


def _write_report(path: Path, report: dict[str, Any], index: Index, facts: str) -> None:
    """``readings.json``, with the SHA-256 of every file, of which there may be millions."""
    with path.open("w") as file:

        def written() -> Iterator[Stat | None]:
            for place, record in enumerate(index.records()):
                pair = f"{json.dumps(record['file'])}: {json.dumps(record['sha256'])}"
                file.write(f"{',' if place else ''}\n    {pair}")
                yield record["stat"]

        file.write(json.dumps(report, indent=2, allow_nan=False).removesuffix("\n}"))
        file.write(',\n  "files_sha256": {')
        made_from = fingerprint(facts, written())
        file.write(f'\n  }},\n  "made_from": "{made_from}"\n}}\n')


# ------------------------------------------------------------------------------------ the files


def _merge(
    aside: Path, index: Index, truth: dict[str, str] | None, doubt: Doubt | None
) -> dict[str, Any]:
    """Write ``readings.csv`` aside.

    Returns:
        What ``readings.json`` says of the photos.

    Raises:
        InputError: none of them could be read.
    """
    counts = Counter[str](dict.fromkeys(_COUNTED, 0))
    errors: list[dict[str, str]] = []
    score = Score()
    changing = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal changing
        for record in index.records():
            _count(record, counts)
            changing += record["stat"] == CHANGING
            if record["error"] is not None and len(errors) < _MOST_ERRORS:
                errors.append({"file": record["file"], "error": record["error"]})
            if truth is not None:
                wanted = truth.get(os.path.realpath(record["file"]))
                if wanted is not None:
                    score.add(wanted, [line for page in record["pages"] for line in scored(page)])
            yield record

    with (aside / "readings.csv").open(
        "w", encoding="utf-8", errors="surrogateescape", newline=""
    ) as table:
        write_rows(table, counted())
    if not counts["files_read"]:
        reason = f"{errors[0]['file']}: {errors[0]['error']}"
        raise InputError(
            reason
            if counts["files"] == 1
            else f"none of {counts['files']:,} files can be read: {reason}"
        )
    warnings = []
    if doubt is None:
        warnings.append(
            "the model has no temperature and no threshold, so that nothing is accepted; "
            "--recipe reader makes one that has"
        )
    if changing:
        warnings.append(
            f"{changing:,} files were changing or out of reach when they were read; the same "
            "command reads again"
        )
    if truth is not None and not score.photos:
        warnings.append("the truth names none of these files")
    return {
        "counts": dict(counts),
        "warnings": warnings,
        "errors": errors,
        "scores": score.report() if score.photos else None,
    }


def _count(record: dict[str, Any], counts: Counter[str]) -> None:
    numbers = [n for page in record["pages"] for line in page["lines"] for n in line]
    digits = [digit for number in numbers for digit in number["digits"]]
    counts["files"] += 1
    counts["files_read"] += bool(record["pages"])
    counts["files_error"] += record["error"] is not None
    counts["files_without"] += record["error"] is None and not numbers
    counts["pages"] += len(record["pages"])
    counts["numbers"] += len(numbers)
    counts["digits"] += len(digits)
    counts["digits_accepted"] += sum(digit["status"] == ACCEPTED for digit in digits)
    counts.update(number["status"] for number in numbers)


def _print_summary(report: dict[str, Any], output: Path) -> None:
    counts, speed = report["counts"], report["throughput"]
    last = "" if speed["files"] == counts["files"] else f"; {speed['files']:,} by the last start"
    lines = [
        f"read        {counts['files_read']:,} of {counts['files']:,} files{last}, in "
        f"{speed['seconds']:.1f} s, {speed['files_per_second']:,.1f} files/s",
        *(f"warning     {warning}" for warning in report["warnings"]),
        *(f"error       {error['file']}: {error['error']}" for error in report["errors"][:5]),
        *([f"{'':11} and {counts['files_error'] - 5:,} more"] if counts["files_error"] > 5 else []),
        f"numbers     {counts['numbers']:,}: {counts['accepted']:,} accepted, "
        f"{counts['doubtful']:,} doubtful, {counts['rejected']:,} rejected",
    ]
    if scores := report["scores"]:
        for name, what in (("digits", "digits"), ("lines", "lines"), ("accepted", "accepted")):
            part = scores[name]
            share = "–" if part["share"] is None else f"{part['share']:.2%}"
            lines.append(f"{what:11} {share} right, {part['right']:,} of {part['of']:,}")
    print(*lines, f"page        {output / 'readings.html'}", sep="\n", flush=True)
