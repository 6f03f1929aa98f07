"""From the ink of pages to the numbers on them: lines, numbers and digits inside one another."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnist.distributed import World
from mnist.evaluation.predictor import Predictor, load
from mnist.evaluation.scoring import predict
from mnist.model import MLP
from mnist.pictures import Frame
from mnist.reading.decode import Found, candidates, decode
from mnist.reading.ink import Ink, find_ink
from mnist.reading.marks import Line, find_lines
from mnist.reading.photo import load_pages

Scorer = Callable[[NDArray[np.uint8]], NDArray[np.floating[Any]]]
"""From n×28×28 to the logarithms of ten probabilities each, n×10."""
Box = tuple[float, float, float, float]
"""Left, top, width and height, in pixels of the upright page."""

_TURNS = (1, 3, 2)  # quarters, against the clock, that a page may lie on its side by
_CLEARLY = 0.5  # of the doubtful marks: if no more are left when a page is turned, it is
_FEW_MARKS = 4
_LINE_LENGTH = 2.5  # digits, of a page that is turned: single ones lie below one another as well
_GOOD = 0.95  # of all marks: if so many are digits, a page is upright
_DOUBTFUL, _DOUBTFUL_SHARE = 2.0, 0.07  # digits of a line, by their confidence, and their share
_COMPANY = 6  # the power of the share of others, by which digits of such a line are less sure
_TALL, _FLAT = 0.45, 0.3  # digit heights: marks that are higher or wider part numbers, as dashes do
_APART = 1.5  # digit heights, and
_APART_AS_USUAL = 2.5  # times the line's median gap: wider ones part numbers


@dataclass(frozen=True)
class Digit:
    """A digit that was read."""

    value: int
    confidence: float
    probabilities: NDArray[np.float64]
    """10: how likely each digit is here; the rest to 1 is that there is none, or another cut."""
    seen: float
    """How sure the network is, were there no other way to cut the line."""
    box: Box
    image: NDArray[np.uint8]
    """28×28, as the network got it."""
    cut_off: bool
    """Whether it reaches the border of the page."""

    @property
    def text(self) -> str:
        """The digit."""
        return str(self.value)


@dataclass(frozen=True)
class Number:
    """Digits that stand together."""

    digits: tuple[Digit, ...]
    box: Box

    @property
    def text(self) -> str:
        """Its digits."""
        return "".join(digit.text for digit in self.digits)

    @property
    def confidence(self) -> float:
        """That all digits are right: the product of theirs."""
        return math.prod(digit.confidence for digit in self.digits)


@dataclass(frozen=True)
class TextLine:
    """Numbers from left to right."""

    numbers: tuple[Number, ...]

    @property
    def text(self) -> str:
        """Its numbers, parted by spaces."""
        return " ".join(number.text for number in self.numbers)

    @property
    def confidence(self) -> float:
        """That all numbers are right."""
        return math.prod(number.confidence for number in self.numbers)

    @property
    def box(self) -> Box:
        """What surrounds its numbers."""
        return _around([number.box for number in self.numbers])


@dataclass(frozen=True)
class Page:
    """What was read on a page."""

    lines: tuple[TextLine, ...]
    others: tuple[Box, ...]
    """Marks that are no digits."""
    turned: int
    """Quarters against the clock by which it was turned to be upright."""
    inverted: bool
    size: tuple[int, int]
    """Width and height, once it is upright; boxes are in these."""

    @property
    def digits(self) -> list[Digit]:
        """All of them, in reading order."""
        return [d for line in self.lines for number in line.numbers for d in number.digits]

    @property
    def text(self) -> str:
        """Its lines."""
        return "\n".join(line.text for line in self.lines)


def read(
    photo: str | os.PathLike[str], model: Predictor | MLP | str | os.PathLike[str]
) -> list[Page]:
    """What is written on a photo or scan: pages, lines, numbers and digits inside one another, each
    with its text, confidence and box. This is ``mnist.read``.

    Args:
        photo: an image file; every frame of a TIFF is a page.
        model: what ``mnist.load`` gives, or what it takes.

    Raises:
        InputError: the photo or the model cannot be read.
    """
    if not isinstance(model, MLP | Predictor):
        model = load(model)
    network = model if isinstance(model, MLP) else model.network
    frames = list(load_pages(Path(photo).expanduser()))
    return read_pages(frames, lambda images: predict(network, images, World()))


def read_pages(frames: Sequence[Frame], score: Scorer) -> list[Page]:
    """The numbers on pages."""
    inks = [find_ink(frame.pixels) for frame in frames]
    zooms = [max(frame.size) / max(ink.mask.shape) for frame, ink in zip(frames, inks, strict=True)]
    readings = _read(inks, zooms, score)
    for index, (ink, zoom) in enumerate(zip(inks, zooms, strict=True)):
        upright = _success(readings[index])
        of_one_line = (
            len(readings[index].lines) <= 1 and frames[index].size[0] > frames[index].size[1]
        )
        if of_one_line or upright.marks < _FEW_MARKS or upright.sure > _GOOD:
            continue
        turned = _read([_turned(ink, turns) for turns in _TURNS], [zoom] * len(_TURNS), score)
        found = [_success(page) for page in turned]
        left = [
            after.doubtful(turns) / max(1.0, upright.doubtful(turns))
            for after, turns in zip(found, _TURNS, strict=True)
        ]
        best = int(np.argmin(left))
        enough = found[best].marks >= _FEW_MARKS and found[best].line_length >= _LINE_LENGTH
        if left[best] <= _CLEARLY and upright.doubtful(_TURNS[best]) >= 1 and enough:
            readings[index] = replace(turned[best], turned=_TURNS[best])
    return readings


def _turned(ink: Ink, quarters: int) -> Ink:
    return Ink(
        np.rot90(ink.strength, quarters),
        np.rot90(ink.mask, quarters),
        np.rot90(ink.rules, quarters),
        ink.stroke,
        ink.inverted,
    )


class _Success(NamedTuple):
    """How well a page could be read, but for what reaches its border."""

    marks: int
    share: float
    """Of the marks: digits, each counted by how sure the network is, a 1 by half of that."""
    sure: float
    """The same, a 1 counted as all others."""
    line_length: float
    """Digits."""

    def doubtful(self, turns: int) -> float:
        """How many marks are no digits, to be compared with a page that is turned by so many
        quarters: by two of them, a 1 is still one."""
        return self.marks * (1 - (self.share if turns % 2 else self.sure))


def _success(page: Page) -> _Success:
    digits = [digit for digit in page.digits if not digit.cut_off]
    width, height = page.size
    others = sum(
        left > 0 and top > 0 and left + wide < width and top + tall < height
        for left, top, wide, tall in page.others
    )
    marks = max(1, len(digits) + others)
    # Strokes look like a 1 whichever way they lie.
    seen = sum(digit.seen * (0.5 if digit.value == 1 else 1) for digit in digits)
    sure = sum(digit.seen for digit in digits)
    return _Success(marks, seen / marks, sure / marks, len(digits) / max(1, len(page.lines)))


def _read(inks: Sequence[Ink], zooms: Sequence[float], score: Scorer) -> list[Page]:
    lines = [find_lines(ink) for ink in inks]
    found = candidates([line for of_page in lines for line in of_page])
    images = [runs.images for runs in found]
    logs = score(np.concatenate(images)) if images else np.zeros((0, 10))
    of_lines = iter(
        zip(found, np.split(logs, np.cumsum([len(one) for one in images])), strict=False)
    )
    pages = []
    for ink, zoom, of_page in zip(inks, zooms, lines, strict=True):
        texts, others = [], []
        for line in of_page:
            runs, own = next(of_lines)
            numbers, marks = _numbers(line, decode(line, runs, own), zoom)
            others += marks
            if numbers:
                texts.append(TextLine(numbers))
        height, width = (round(zoom * side) for side in ink.mask.shape)
        pages.append(Page(tuple(texts), tuple(others), 0, ink.inverted, (width, height)))
    return pages


def _numbers(line: Line, found: list[Found], zoom: float) -> tuple[tuple[Number, ...], list[Box]]:
    """Digits by number, and large marks that are no digits."""
    height = line.digit_height
    digits = [one for one in found if one.value >= 0]
    gaps = [after.box[1] - before.box[3] for before, after in pairwise(digits)]
    most = max(_APART * height, _APART_AS_USUAL * float(np.median(gaps)) if gaps else 0)
    trust = _trust([one.confidence for one in digits])
    numbers: list[list[Found]] = []
    others: list[Box] = []
    parted = True
    for one in found:
        top, left, bottom, right = one.box
        if one.value < 0:
            tall, wide = (bottom - top) / height, (right - left) / height
            parted |= tall > _TALL or wide > _FLAT  # no dot, no comma
            if tall > _TALL:
                others.append(_on_page(line, one.first, one.stop, zoom))
            continue
        if parted or left - numbers[-1][-1].box[3] > most:
            numbers.append([])
        numbers[-1].append(one)
        parted = False
    return tuple(_number(line, number, zoom, trust) for number in numbers), others


def _trust(confidences: Sequence[float]) -> float:
    """By what the digits of a line are less sure for the company they are in: print and words are
    long lines of marks some of which look like digits."""
    doubtful = len(confidences) - sum(confidences)
    many = doubtful >= _DOUBTFUL and doubtful > _DOUBTFUL_SHARE * len(confidences)
    return (1 - doubtful / len(confidences)) ** _COMPANY if many else 1.0


def _number(line: Line, found: list[Found], zoom: float, trust: float) -> Number:
    digits = []
    for one in found:
        assert one.image is not None and one.probabilities is not None
        cut_off = bool(line.at_border[one.first : one.stop].any())
        box, shares = _on_page(line, one.first, one.stop, zoom), trust * one.probabilities
        confidence = trust * one.confidence
        digits.append(Digit(one.value, confidence, shares, one.seen, box, one.image, cut_off))
    return Number(tuple(digits), _around([digit.box for digit in digits]))


def _on_page(line: Line, first: int, stop: int, zoom: float) -> Box:
    """What surrounds pieces of a line."""
    places = zoom * line.places[first:stop]
    top, left = places[:, :2].min(0).tolist()
    bottom, right = places[:, 2:].max(0).tolist()
    return left, top, right - left, bottom - top


def _around(boxes: Sequence[Box]) -> Box:
    """What surrounds them all."""
    found = np.array(boxes)
    left, top = found[:, :2].min(0).tolist()
    right, bottom = (found[:, :2] + found[:, 2:]).max(0).tolist()
    return left, top, right - left, bottom - top
