"""The reading job: which photos by which model, where the readings go, and the summary."""

import hashlib
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mnist.cli import InputError
from mnist.distributed import World, connect
from mnist.evaluation.job import Weights, find_weights, refuse_missing
from mnist.evaluation.report import staging
from mnist.evaluation.scoring import predict
from mnist.model import MLP, Doubt, load_model
from mnist.pictures import Frame
from mnist.reading.config import ReadConfig
from mnist.reading.page import MOST_SHOWN, Shown, most_urgent, render_page, show, urgency
from mnist.reading.photo import find_photos, load_pages
from mnist.reading.reader import Scorer, read_pages
from mnist.reading.readings import ACCEPTED, describe, is_ours, scored, write_rows
from mnist.reading.truth import Score, read_truth
from mnist.runs.checkpoint import enclosing_checkpoint
from mnist.runs.environment import environment
from mnist.system import flush_to_disk, sha256, shows_bars, write_file

_ROUND = 16  # files that a process reads between two words with the others
_TOGETHER = 4_000_000  # pixels of pages that are read in one batch: one large photo, or many crops
_COUNTED = (
    "files", "files_read", "files_error", "files_without", "pages", "numbers", "accepted",
    "doubtful", "rejected", "digits", "digits_accepted",
)  # fmt: skip
_FILES = ("readings.csv", "readings.html", "readings.json")


def read(config: ReadConfig) -> None:
    """Do the whole job: read the photos, write the three files, print the summary.

    Raises:
        InputError: the model or the folders do not allow it, or none of the photos can be read;
            nothing is changed.
    """
    refuse_missing(config)
    photos = find_photos(config.photos)
    truth = read_truth(config.truth) if config.truth else None
    world = connect(config)
    weights = world.from_main(lambda: find_weights(config), prepares=True)
    models: list[MLP] = []
    world.from_all(lambda: models.append(load_model(weights.path)), prepares=True)
    model = models[0].to(world.device, world.precision)
    if world.is_main and weights.run is not None and weights.step is not None:
        print(f"{weights.run} is not finished: its checkpoint of step {weights.step:,} reads")
    output = world.from_main(lambda: _find_place(config, weights, photos), prepares=True)
    started = time.perf_counter()
    with ExitStack() as stack:
        aside = world.from_main(lambda: stack.enter_context(staging(output)), prepares=True)
        _read_share(model, photos, world, aside)
        if not world.is_main:
            return
        seconds = time.perf_counter() - started
        report = {
            "title": f"Readings of {config.photos[0].name}"
            + (f" and {len(config.photos) - 1} more" if len(config.photos) > 1 else ""),
            "subject": _subject(photos),
            "model": {
                "path": str(weights.path),
                "sha256": sha256(weights.path),
                "step": weights.step,
                "temperature": model.doubt.temperature if model.doubt else None,
                "threshold": model.doubt.threshold if model.doubt else None,
            },
            **_merge(aside, world, truth, model.doubt),
            "throughput": {"seconds": seconds, "files_per_second": len(photos) / seconds},
            **environment(world),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _publish(aside, output, report, world)
    _print_summary(report, output)


def _find_place(config: ReadConfig, weights: Weights, photos: list[Path]) -> Path:
    """The folder of these readings, which earlier ones of the same photos may have.

    Raises:
        InputError: it holds what is not ours, or is a checkpoint.
    """
    subject = _subject(photos)
    if config.output_dir is not None:
        folder = config.output_dir
        inside = enclosing_checkpoint(folder)
        if inside is not None:
            raise InputError(f"--output-dir {folder} is inside the checkpoint {inside}")
        if taken := _taken(folder, subject):
            raise InputError(f"{folder} has {taken}; take another --output-dir, or move it away")
        return folder
    named = config.photos[0].resolve()
    name = named.name if named.is_dir() else named.stem
    if len(config.photos) > 1:
        name = named.parent.name or "photos"
    checkpoint = enclosing_checkpoint(weights.path) if weights.run is None else None
    base = checkpoint.parents[1] if checkpoint else weights.run or weights.path.parent
    folder = base / "readings" / name
    if taken := _taken(folder, subject):
        other = folder.with_name(f"{name}-{hashlib.sha256(subject.encode()).hexdigest()[:6]}")
        print(f"{folder} has {taken}, which stays: these go to {other}", flush=True)
        folder = other
        if taken := _taken(folder, subject):
            raise InputError(f"{folder} has {taken}; take an --output-dir, or move it away")
    return folder


def _subject(photos: list[Path]) -> str:
    """What tells these photos from others: their paths."""
    paths = "\0".join(str(photo.resolve()) for photo in photos)
    return hashlib.sha256(os.fsencode(paths)).hexdigest()


def _taken(folder: Path, subject: str) -> str:
    """What is in a folder that must not be replaced by readings of these photos, or ""."""
    try:
        report = json.loads((folder / "readings.json").read_bytes())
        return "" if report["subject"] == subject else "the readings of other photos"
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        return "a readings.json of other origin"
    with suppress(FileNotFoundError):
        return "" if is_ours(folder / "readings.csv") else "a readings.csv of other origin"
    return "a readings.html of other origin" if (folder / "readings.html").exists() else ""


# ------------------------------------------------------------------------------------ reading


def _read_share(model: MLP, photos: list[Path], world: World, aside: Path) -> None:
    """Read every n-th photo; of all, as many as are shown keep a picture in ``aside``."""
    own = range(world.rank, len(photos), world.size)
    kept: list[Shown] = []

    def score(images: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
        return predict(model, images, world)

    with (aside / f"part-{world.rank:05d}").open("w") as part, _progress(len(photos), world) as bar:
        for start in range(0, len(photos), _ROUND * world.size):
            ours = [index for index in own if start <= index < start + _ROUND * world.size]

            def read_some(indices: list[int] = ours) -> int:
                for record in _read_some(photos, indices, model.doubt, score, kept):
                    part.write(json.dumps(record) + "\n")
                return len(indices)

            bar.update(sum(world.from_all(read_some, prepares=True)))
    (aside / f"shown-{world.rank:05d}").write_text(json.dumps([s.__dict__ for s in kept]))
    world.from_all(lambda: None, prepares=True)


def _read_some(
    photos: list[Path], indices: list[int], doubt: Doubt | None, score: Scorer, kept: list[Shown]
) -> list[dict[str, Any]]:
    """The record of each of these files; pages that need a look more than those that are kept to be
    shown take their place."""
    records: list[dict[str, Any]] = [
        {"file": os.fsdecode(photos[index]), "pages": [], "error": None} for index in indices
    ]
    waiting: list[tuple[int, Frame]] = []

    def read_waiting() -> None:
        pages = read_pages([frame for _, frame in waiting], score)
        for (which, frame), page in zip(waiting, pages, strict=True):
            described = describe(page, doubt)
            place = indices[which], len(records[which]["pages"])
            records[which]["pages"].append(described)
            urgent = urgency(page, described)
            if len(kept) < MOST_SHOWN or urgent > kept[-1].urgency:
                kept[:] = most_urgent([*kept, show(page, frame, urgent, place)])
        waiting.clear()

    pixels = 0
    for which, index in enumerate(indices):
        record = records[which]
        try:
            for frame in load_pages(photos[index]):
                waiting.append((which, frame))
                pixels += math.prod(frame.pixels.shape[:2])
                if pixels > _TOGETHER:
                    read_waiting()
                    pixels = 0
        except InputError as damaged:
            record["error"] = str(damaged).removeprefix(f"{photos[index]}: ")
        record["sha256"] = sha256(photos[index]) if record["error"] is None else None
    read_waiting()
    return records


def _progress(total: int, world: World) -> "tqdm[Any]":
    shown = world.is_main and shows_bars()
    return tqdm(total=total, unit=" files", disable=not shown, leave=False)


# ------------------------------------------------------------------------------------ the files


def _records(aside: Path, world_size: int) -> Iterator[dict[str, Any]]:
    """What all processes have read, in the order of the photos."""
    with ExitStack() as stack:
        parts = [
            stack.enter_context((aside / f"part-{rank:05d}").open()) for rank in range(world_size)
        ]
        for place in itertools.count():
            line = parts[place % world_size].readline()
            if not line:
                return
            yield json.loads(line)


def _merge(
    aside: Path, world: World, truth: dict[Path, str] | None, doubt: Doubt | None
) -> dict[str, Any]:
    """Write ``readings.csv`` and ``readings.html`` aside.

    Returns:
        What ``readings.json`` says of the photos.

    Raises:
        InputError: none of them could be read.
    """
    counts = Counter[str](dict.fromkeys(_COUNTED, 0))
    errors: list[dict[str, str]] = []
    files: dict[str, str | None] = {}
    score = Score()

    def counted() -> Iterator[dict[str, Any]]:
        for record in _records(aside, world.size):
            _count(record, counts)
            files[record["file"]] = record["sha256"]
            if record["error"] is not None:
                errors.append({"file": record["file"], "error": record["error"]})
            if truth is not None:
                wanted = truth.get(Path(record["file"]).resolve())
                if wanted is not None:
                    score.add(wanted, [line for page in record["pages"] for line in scored(page)])
            yield record

    with (aside / "readings.csv").open("w", newline="", errors="surrogateescape") as table:
        write_rows(table, counted())
    if not counts["files_read"]:
        reason = f"{errors[0]['file']}: {errors[0]['error']}"
        raise InputError(
            reason if len(errors) == 1 else f"none of {len(errors)} files can be read: {reason}"
        )
    warnings = []
    if doubt is None:
        warnings.append(
            "the model has no temperature and no threshold, so that nothing is accepted; "
            "--recipe reader makes one that has"
        )
    if truth is not None and not score.photos:
        warnings.append("the truth names none of these files")
    return {
        "counts": dict(counts),
        "warnings": warnings,
        "errors": errors,
        "files_sha256": files,
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


def _publish(aside: Path, output: Path, report: dict[str, Any], world: World) -> None:
    """Move the three files to their place, each whole, once all are safe on the disk."""
    shown = []
    for rank in range(world.size):
        shown += [Shown(**one) for one in json.loads((aside / f"shown-{rank:05d}").read_text())]
    shown = most_urgent(shown)
    wanted = {one.file for one in shown}
    records = {
        place: record for place, record in enumerate(_records(aside, world.size)) if place in wanted
    }
    write_file(aside / "readings.html", render_page(report, records, shown))
    write_file(aside / "readings.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    flush_to_disk(aside / "readings.csv")
    for name in _FILES:
        (aside / name).replace(output / name)


def _print_summary(report: dict[str, Any], output: Path) -> None:
    counts, speed = report["counts"], report["throughput"]
    lines = [
        f"read        {counts['files_read']:,} of {counts['files']:,} files in "
        f"{speed['seconds']:.1f} s, {speed['files_per_second']:,.1f} files/s",
        *(f"warning     {warning}" for warning in report["warnings"]),
        *(f"error       {error['file']}: {error['error']}" for error in report["errors"][:5]),
        f"numbers     {counts['numbers']:,}: {counts['accepted']:,} accepted, "
        f"{counts['doubtful']:,} doubtful, {counts['rejected']:,} rejected",
    ]
    if scores := report["scores"]:
        for name, what in (("digits", "digits"), ("lines", "lines"), ("accepted", "accepted")):
            part = scores[name]
            share = "–" if part["share"] is None else f"{part['share']:.2%}"
            lines.append(f"{what:11} {share} right, {part['right']:,} of {part['of']:,}")
    print(*lines, f"page        {output / 'readings.html'}", sep="\n", flush=True)
