"""From pieces of a line to its digits: the best way through, and how sure each digit is.

Every run of neighbouring pieces may be a digit, every piece may be no digit. Ways through are
weighed by what the network says of each digit, and by size, cuts and gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist.data import IMAGE_SHAPE
from mnist.normaliser import normalise_digits
from mnist.reading.marks import Line

_MOST_PIECES = 12  # of a digit
_WIDEST = 1.6  # digit heights
_WIDEST_GAP = 0.5
_LOWEST = 0.43
_HIGHEST = 2.7
_USUALLY_LOWEST = 0.8
_DOT = 0.35  # digit heights: smaller marks may be dots
_OFF = 0.25  # digit heights


@dataclass(frozen=True)
class Weights:
    """What ways through a line cost, as logarithms of probabilities: chosen on development
    images."""

    cut: float = 0.216
    """Of a cut before a digit or after it."""
    loop: float = 0.412
    """More of a cut through two strokes or more, as through a loop."""
    gap: float = 12.1
    """Of a digit height of ground within a digit, from side to side."""
    dot: float = 0.738
    """Of a small mark of its own within a digit."""
    broad: float = 0.828
    """Digit heights that a digit may be wide for nothing."""
    wide: float = 2.34
    """Of each digit height more."""
    low: float = 1.49
    """Of each digit height that a digit is lower than 0.8."""
    aside: float = 9.94
    """Of each digit height by which its middle is above or below that of its neighbours, beyond
    a quarter."""
    each: float = 0.59
    """Of any digit."""
    none: float = 0.863
    """Of a piece that is no digit, however small."""
    none_size: float = 3.21
    """More of it, by height and width above a third of a digit's height, if it does not reach the
    border."""
    trust: float = 1.72
    """Of what the network says."""
    sharpness: float = 5.0
    """Of all of it, between ways: the higher, the less doubt."""


WEIGHTS = Weights()


@dataclass(frozen=True)
class Candidates:
    """Runs of pieces of a line that may be digits."""

    runs: NDArray[np.int64]
    """k×2: first piece, and the one after the last."""
    boxes: NDArray[np.int64]
    """k×4: top, left, bottom, right."""
    gaps: NDArray[np.float64]
    """k: ground between the pieces, from side to side, in digit heights."""
    images: NDArray[np.uint8]
    """k×28×28: what the network gets."""


@dataclass(frozen=True)
class Found:
    """A digit of a line, or a mark that is none."""

    first: int
    stop: int
    value: int
    """0 to 9; −1: no digit."""
    confidence: float
    seen: float
    """How sure the network is, of this run of pieces alone."""
    probabilities: NDArray[np.float64] | None
    image: NDArray[np.uint8] | None
    box: tuple[int, int, int, int]


def candidates(lines: Sequence[Line]) -> list[Candidates]:
    """Of each line all runs of pieces that are neither too wide nor too low."""
    crops: list[NDArray[np.uint8]] = []
    found = [_runs(line, crops) for line in lines]
    images = normalise_digits(crops).images if crops else np.zeros((0, *IMAGE_SHAPE), np.uint8)
    stops = np.cumsum([len(runs) for runs, _, _ in found]).tolist()
    return [
        Candidates(
            np.array(runs, np.int64).reshape(-1, 2),
            np.array(unions, np.int64).reshape(-1, 4),
            np.array(gaps),
            images[stop - len(runs) : stop],
        )
        for (runs, unions, gaps), stop in zip(found, stops, strict=True)
    ]


def _runs(
    line: Line, crops: list[NDArray[np.uint8]]
) -> tuple[list[tuple[int, int]], list[NDArray[np.int64]], list[float]]:
    """Runs of pieces, what surrounds each, and the ground within it; their ink is appended to
    ``crops``."""
    boxes, height = line.boxes, line.digit_height
    runs, unions, gaps = [], [], []
    count = len(boxes)
    for first in range(count):
        box, gap = boxes[first].copy(), 0.0
        for stop in range(first + 1, min(count, first + _MOST_PIECES) + 1):
            added = boxes[stop - 1]
            gap += max(0, added[1] - box[3])
            box[:2], box[2:] = np.minimum(box[:2], added[:2]), np.maximum(box[2:], added[2:])
            tall, wide = box[2] - box[0], box[3] - box[1]
            if stop - first > 1 and (wide > _WIDEST * height or gap > _WIDEST_GAP * height):
                break
            if not _LOWEST * height <= tall <= _HIGHEST * height:
                continue
            runs.append((first, stop))
            unions.append(box.copy())
            gaps.append(gap / height)
            part = slice(max(0, box[0] - 1), box[2] + 1), slice(max(0, box[1] - 1), box[3] + 1)
            pieces = line.pieces[part]
            crops.append(line.ink[part] * ((pieces > first) & (pieces <= stop)))
    return runs, unions, gaps


def _scores(
    line: Line, found: Candidates, logs: NDArray[np.floating[Any]], weights: Weights
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each run to be each digit, k×10, and of each piece to be none, n."""
    sizes = (line.boxes[:, 2:] - line.boxes[:, :2]) / line.digit_height
    size = np.maximum(sizes[:, 0], 0.6 * sizes[:, 1])
    none = weights.none + weights.none_size * np.maximum(0, size - 0.33) * ~line.at_border
    cut = weights.cut * (line.cut_before > 0) + weights.loop * (line.cut_before > 1)
    after = np.append(cut[1:], 0)
    tall, wide = ((found.boxes[:, 2:] - found.boxes[:, :2]) / line.digit_height).T
    cost = weights.each + weights.gap * found.gaps
    cost += weights.dot * dots_within(line, found.runs)
    cost += weights.aside * off_line(line, found.boxes)
    cost += weights.wide * np.maximum(0, wide - weights.broad)
    cost += weights.low * np.maximum(0, _USUALLY_LOWEST - tall)
    if len(found.runs):
        cost += 0.5 * (cut[found.runs[:, 0]] + after[found.runs[:, 1] - 1])
    digit = weights.sharpness * (weights.trust * logs - cost[:, None])
    return digit, -weights.sharpness * (none + 0.5 * (cut + after))


def off_line(line: Line, boxes: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far the middle of each run is from that of the line, in digit heights, less a quarter."""
    tall = line.boxes[:, 2] - line.boxes[:, 0] > 0.5 * line.digit_height
    if np.count_nonzero(tall) < 2:
        return np.zeros(len(boxes))
    marks = line.boxes[tall]
    middles, places = (marks[:, 0] + marks[:, 2]) / 2, (marks[:, 1] + marks[:, 3]) / 2
    own, where = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    # The median of those that are near, as lines may climb.
    near = np.argsort(np.abs(places[None] - where[:, None]), 1)[:, :7]
    off = np.abs(own - np.median(middles[near], 1)) / line.digit_height
    result: NDArray[np.float64] = np.maximum(0, off - _OFF)
    return result


def dots_within(line: Line, runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many small marks of their own, as dots and commas are, each run joins to others."""
    sizes = (line.boxes[:, 2:] - line.boxes[:, :2]).max(1) / line.digit_height
    own = (line.cut_before == 0) & (np.append(line.cut_before[1:], 0) == 0)
    dots = np.append(0, ((sizes < _DOT) & own).cumsum())
    joined = runs[:, 1] - runs[:, 0] > 1
    result: NDArray[np.int64] = (dots[runs[:, 1]] - dots[runs[:, 0]]) * joined
    return result


def decode(
    line: Line, found: Candidates, logs: NDArray[np.floating[Any]], weights: Weights = WEIGHTS
) -> list[Found]:
    """The best way through a line.

    Args:
        line: its pieces.
        found: runs of them.
        logs: k×10, logarithms of the network's probabilities of each.
        weights: how ways are weighed.
    """
    count = len(line.boxes)
    digit, none = _scores(line, found, logs, weights)
    total = np.logaddexp.reduce(digit, 1) if len(digit) else np.zeros(0)
    top = digit.max(1, initial=-np.inf)
    best, forward, backward = (np.full(count + 1, -np.inf) for _ in range(3))
    best[0] = forward[0] = backward[count] = 0
    back = [-1] * (count + 1)  # −1: no digit; else the run
    by_stop: list[list[int]] = [[] for _ in range(count + 1)]
    for index, stop in enumerate(found.runs[:, 1].tolist()):
        by_stop[stop].append(index)
    for stop in range(1, count + 1):
        best[stop] = best[stop - 1] + none[stop - 1]
        forward[stop] = forward[stop - 1] + none[stop - 1]
        for run in by_stop[stop]:
            first = found.runs[run, 0]
            if best[first] + top[run] > best[stop]:
                best[stop], back[stop] = best[first] + top[run], run
            forward[stop] = np.logaddexp(forward[stop], forward[first] + total[run])
    for stop in range(count, 0, -1):
        backward[stop - 1] = np.logaddexp(backward[stop - 1], backward[stop] + none[stop - 1])
        for run in by_stop[stop]:
            first = found.runs[run, 0]
            backward[first] = np.logaddexp(backward[first], backward[stop] + total[run])
    through = forward[found.runs[:, 0]] + backward[found.runs[:, 1]] - forward[count]
    # Between ways all counts, and is sharpened; which digit a run is, the network knows best.
    sure = np.exp((total + through)[:, None] + logs)
    areas = np.append(0, np.bincount(line.pieces.ravel(), minlength=count + 1)[1:].cumsum())
    result: list[Found] = []
    stop = count
    while stop:
        run = back[stop]
        first = stop - 1 if run < 0 else int(found.runs[run, 0])
        if run < 0:
            box = tuple(line.boxes[first].tolist())
            result.append(Found(first, stop, -1, 0.0, 0.0, None, None, box))
        else:
            value = int(digit[run].argmax())
            same = sure[_mostly_same(found.runs, (first, stop), areas)].sum(0)
            box = tuple(found.boxes[run].tolist())
            sure_of, seen = float(same[value]), float(np.exp(logs[run, value]))
            image = found.images[run]
            result.append(Found(first, stop, value, sure_of, seen, same, image, box))
        stop = first
    return result[::-1]


def _mostly_same(
    runs: NDArray[np.int64], run: tuple[int, int], areas: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which runs share more than half of all their ink with one: a way goes through one of them at
    most."""
    first, stop = np.maximum(runs[:, 0], run[0]), np.minimum(runs[:, 1], run[1])
    shared = areas[np.maximum(first, stop)] - areas[first]
    whole = areas[runs[:, 1]] - areas[runs[:, 0]] + areas[run[1]] - areas[run[0]] - shared
    result: NDArray[np.bool_] = shared > 0.5 * whole
    return result
