"""How well and how fast numbers are read: a part of scripts/bench.

The folder of photos has a truth.csv with the columns file, truth and kind: single (left out here),
string or negative. Photos are grouped by the first folder of their names.
"""

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mnist.cli import InputError
from mnist.distributed import World
from mnist.model import MLP, load_model
from mnist.reading.ink import find_ink
from mnist.reading.photo import load_pages
from mnist.reading.reader import Page, read, read_pages
from mnist.reading.readings import describe, scored
from mnist.reading.truth import ReadDigit, Score, align
from mnist.reading.work import in_blocks

COVERAGES = (0.8, 0.9)
_TOGETHER = 16  # files
_ORIENTATION = 0x0112


def groups(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    """Photos and their truth, by group; negatives have none."""
    found: dict[str, list[tuple[Path, str]]] = {}
    try:
        with (folder / "truth.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row["kind"] != "single":
                    group = row["file"].split("/")[0]
                    found.setdefault(group, []).append((folder / row["file"], row["truth"]))
    except (OSError, KeyError) as error:
        reason = f"no truth.csv of file, truth and kind: {error}"
        raise InputError(f"--photos {folder}: {reason}") from None
    return found


class Reader:
    """Reads files by a model, and says what a user would get."""

    def __init__(self, model_file: Path) -> None:
        self.model: MLP = load_model(model_file)

    def pages(self, photo: Path) -> list[Page]:
        """What is on the pages of a file."""
        return read(photo, self.model)

    def batches(self, photos: list[Path]) -> Iterator[list[Page]]:
        """What is on the pages of each file, several files read together as the job does."""
        for start in range(0, len(photos), _TOGETHER):
            frames = [list(load_pages(photo)) for photo in photos[start : start + _TOGETHER]]
            pages = iter(
                read_pages(
                    [frame for of_file in frames for frame in of_file],
                    lambda images: in_blocks(self.model, images, World()),
                )
            )
            yield from ([next(pages) for _ in of_file] for of_file in frames)

    def lines(self, pages: list[Page]) -> list[list[list[ReadDigit]]]:
        """Lines of numbers of digits, as scores take them."""
        return [line for page in pages for line in scored(describe(page, self.model.doubt))]

    def text(self, pages: list[Page]) -> str:
        """Lines, parted by slashes, without spaces."""
        return "/".join(
            "".join(str(d.value) for number in line for d in number) for line in self.lines(pages)
        )


def scores(reader: Reader, folder: Path) -> dict[str, Any]:
    """By group: exact, digits and lines right, errors among the surest."""
    found: dict[str, Any] = {}
    for group, photos in groups(folder).items():
        score, exact, with_accepted = Score(), 0, 0
        begin = time.perf_counter()
        read_files = reader.batches([photo for photo, _ in photos])
        for (_, truth), pages in zip(photos, read_files, strict=True):
            lines = reader.lines(pages)
            score.add(truth, lines)
            text = "/".join("".join(str(d.value) for n in line for d in n) for line in lines)
            exact += text == truth.replace(" ", "")
            with_accepted += any(
                all(digit.accepted for digit in number) for line in lines for number in line
            )
        seconds = time.perf_counter() - begin
        report = score.report()
        found[group] = {
            "files": len(photos),
            "exact": exact / len(photos),
            "digits": report["digits"]["share"],
            "lines": report["lines"]["share"],
            "with accepted numbers": with_accepted,
            "accepted of truth": report["accepted_of_truth"],
            "wrong of accepted": 1 - report["accepted"]["share"] if score.accepted else None,
            "failures": report["failures"],
            "curve": report["curve"],
            "files a second": len(photos) / seconds,
            **{f"wrong of the surest {c:.0%}": _wrong(score, c) for c in COVERAGES},
        }
    return found


def _wrong(score: Score, coverage: float) -> float | None:
    """The share of errors among so many of the surest digits as are that share of the truth."""
    count = round(coverage * score.digits)
    surest = sorted(score.read, key=lambda digit: -digit[0])[:count]
    return 1 - sum(right for _, right in surest) / count if count and len(surest) == count else None


def draw_coverage(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """How right the surest digits are, over how many of them are taken, by group, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=110)
    axes = figure.subplots()
    for group, curve in curves.items():
        shares = [[point[name] for point in curve] for name in ("coverage", "accuracy")]
        axes.plot(*shares, label=group)
    axes.set_xlabel("digits taken, the surest first, as a share of those that are written")
    axes.set_ylabel("right of these")
    axes.set_xlim(0, 1)
    axes.set_ylim(0.9, 1.003)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path)


def changes(reader: Reader, folder: Path, group: str) -> dict[str, float]:
    """The share of digits that differ once photos are inverted, turned by EXIF, or resized."""
    ways: dict[str, Callable[[Image.Image], Image.Image]] = {
        "inverted": lambda image: Image.eval(image, lambda value: 255 - value),
        "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
        "double the size": lambda image: image.resize((image.width * 2, image.height * 2)),
    }
    differ, total = dict.fromkeys([*ways, "orientations"], 0), 0
    with tempfile.TemporaryDirectory() as aside:
        for photo, _ in groups(folder)[group]:
            with Image.open(photo) as image:
                plain = image.convert("RGB")
            original = reader.text(reader.pages(_saved(plain, aside)))
            total += len(original.replace("/", ""))
            for name, change in ways.items():
                text = reader.text(reader.pages(_saved(change(plain), aside)))
                differ[name] += _distance(original, text)
            for orientation in range(2, 9):
                changed = _saved(plain, aside, orientation)
                differ["orientations"] += _distance(original, reader.text(reader.pages(changed)))
    return {name: count / max(1, total) for name, count in differ.items()}


def _saved(image: Image.Image, folder: str, orientation: int = 1) -> Path:
    """A file whose EXIF says that it is turned, and which is."""
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of PIL's transpositions
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    stored = image if orientation == 1 else image.transpose(inverse[orientation])
    path = Path(folder) / "changed.png"
    stored.save(path, exif=exif, compress_level=1)
    return path


def _distance(one: str, other: str) -> int:
    """The edit distance of digits alone."""
    one, other = one.replace("/", ""), other.replace("/", "")
    return sum(
        here is None or there is None or one[here] != other[there]
        for here, there in align(one, other)
    )


def speeds(model_file: Path, photo: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of reading one photo at 12 and 48 megapixels, on one thread, each in
    a process of its own; what its imports and the model take is told apart."""
    found = {}
    with tempfile.TemporaryDirectory() as aside:
        for name, width in (("12 MP", 4000), ("48 MP", 8000)):
            path = Path(aside) / "large.jpg"
            with Image.open(photo) as image:
                image.convert("RGB").resize((width, width * 3 // 4)).save(path, quality=92)
            command = [sys.executable, __file__, str(model_file), str(path)]
            runs = []
            for _ in range(rounds):
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append([float(word) for word in done.stdout.split()])
            seconds, before, most = map(statistics.median, zip(*runs, strict=True))
            found[name] = {"seconds": seconds, "MB": most - before, "MB of imports": before}
    return found


def _read_one(model_file: Path, photo: Path) -> None:
    """Print how long it takes, and the most memory before and after, in MB."""
    torch.set_num_threads(1)
    reader = Reader(model_file)
    find_ink(np.full((40, 60), 255, np.uint8))  # what is imported when it is first needed
    before = _most_memory()
    begin = time.perf_counter()
    reader.pages(photo)
    print(time.perf_counter() - begin, before, _most_memory())


def _most_memory() -> float:
    """Linux's high water mark: getrusage has the parent's of before the process was its own."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    _read_one(Path(sys.argv[1]), Path(sys.argv[2]))
