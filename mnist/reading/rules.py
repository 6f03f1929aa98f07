"""Lines of paper and of forms: found in the ink of a page, and taken out of it.

Sizes are in pixels of the page, unless a name says share.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
"""height×width."""

_SMALL = 640  # pixels of the page's width
_STEEPEST = 0.04  # how much a line across a small page rises, as a share of its width
_COVERED = 0.85  # how much of such a line is inked
_BENT = 0.0025  # of its length: straighter lines are no chains of strokes
_THIN = 0.62  # of a stroke's width: nor are thinner ones
_EIGHT = np.ones((3, 3), bool)


def without_rules(mask: Mask) -> tuple[Mask, Mask]:
    """The mask without the lines of paper or form, and these."""
    rules = np.zeros_like(mask)
    if not mask.any():
        return mask, rules
    size = _digit_size(mask)
    runs = runs_of(mask), runs_of(mask.T)
    widths = np.minimum(runs[0], runs[1].T)  # as widths_of, which would count them again
    thickness = max(2, int(np.quantile(widths[mask], 0.8) * 1.5))  # what is thicker is no rule
    across = _find_rules(mask, runs[0], thickness, size)
    down = _find_rules(mask.T, runs[1], thickness, size)
    if across or down:
        for turned, found in ((rules, across), (rules.T, down)):
            for rule in found:
                turned[rule.pixels(len(turned), 2)] = True
        others = widths[mask & ~rules]
        stroke = float(np.median(others)) if len(others) else np.inf
        across, down = (
            [rule for rule in found if rule.is_rule(stroke)] for found in (across, down)
        )
        rules = _paint(mask & (runs[0] <= thickness), runs[0], across)
        rules |= _paint(mask.T & (runs[1] <= thickness), runs[1], down).T
    if not rules.any():
        return mask, rules
    rest = mask & ~rules
    marks, count = ndimage.label(rest, _EIGHT)
    near = grown(rules, 2, 2) & rest
    areas, touching = (np.bincount(marks[part], minlength=count + 1) for part in (rest, near))
    kept = touching <= 0.6 * areas  # the rest are crossings, and edges of rules
    kept[0] = False
    return kept[marks], rules


def runs_of(mask: Mask) -> NDArray[np.int32]:
    """For each inked pixel how long its run is, up and down; 0 elsewhere."""
    height, width = mask.shape
    columns = np.ascontiguousarray(mask.T)
    padded = np.zeros((width, height + 2), np.int8)
    padded[:, 1:-1] = columns
    steps = np.diff(padded.ravel())
    lengths = np.flatnonzero(steps == -1) - np.flatnonzero(steps == 1)
    runs = np.zeros((width, height), np.int32)
    runs[columns] = np.repeat(lengths, lengths)
    return runs.T


def widths_of(mask: Mask) -> NDArray[np.int32]:
    """About how wide the stroke is that each inked pixel lies in: its shorter run."""
    result: NDArray[np.int32] = np.minimum(runs_of(mask), runs_of(mask.T).T)
    return result


def grown(mask: Mask, down: int, aside: int) -> Mask:
    """The mask, so many pixels larger up and down, and to both sides: faster than
    ``binary_dilation``."""
    mask = mask.copy()
    for turned, pixels in ((mask, down), (mask.T, aside)):
        for _ in range(pixels):
            before = turned.copy()
            turned[1:] |= before[:-1]
            turned[:-1] |= before[1:]
    return mask


def _digit_size(mask: Mask) -> float:
    """About how high the digits of a page are, though rules may join them."""
    marks, count = ndimage.label(mask, _EIGHT)
    if not count:
        return 0.0
    boxes = np.array([[p.stop - p.start for p in box] for box in ndimage.find_objects(marks)])
    areas = np.bincount(marks.ravel(), minlength=count + 1)[1:]
    sides = boxes.min(1)
    order = np.argsort(sides)
    middle = sides[order][np.searchsorted(areas[order].cumsum(), 0.5 * areas.sum())]
    return float(min(middle, 0.18 * max(mask.shape)))


@dataclass(frozen=True)
class _Rule:
    """What may be a line of paper or form, from left to right."""

    columns: NDArray[np.int64]
    heights: NDArray[np.float64]
    """In each of these columns."""
    thickness: float
    bent: float
    """How far it is from a parabola: the root of the mean square; infinite: strokes may be as
    straight."""
    whole: bool
    """Whether it goes across all of the page."""

    def is_rule(self, stroke: float) -> bool:
        """Whether it is no chain of strokes, such as the feet of zeros that are joined.

        Those are as thick as strokes, end before the page does, and are not quite straight.
        """
        straight = self.bent < _BENT * len(self.columns)
        return self.whole or straight or self.thickness < _THIN * stroke

    def pixels(self, height: int, aside: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of what lies on it, and so many pixels above it and below it, on a page
        of that height."""
        aside_of = np.arange(-aside, aside + 1)[:, None]
        rows = np.rint(self.heights + aside_of).astype(np.int64)
        columns = np.broadcast_to(self.columns, rows.shape)
        inside = (rows >= 0) & (rows < height)
        return rows[inside], columns[inside]


def _find_rules(mask: Mask, runs: NDArray[np.int32], thickness: int, digit: float) -> list[_Rule]:
    """Thin lines that go across much of the page, nearly straight and level.

    Args:
        mask: where there is ink.
        runs: of it, up and down.
        thickness: of the thickest line that may be one.
        digit: about how high digits are.
    """
    width = mask.shape[1]
    rules = []
    thin = mask & (runs <= thickness)
    for chain in _chains(_segments(thin, thickness), thickness, digit):
        left, right = chain[0][0], chain[-1][1]
        whole = left <= 1 and right >= width - 1
        if not whole and right - left < max(0.45 * width, 2.5 * digit):
            continue
        if sum(stop - start for start, stop, _, _ in chain) < 0.4 * (right - left):
            continue
        xs = np.array([x for start, stop, _, _ in chain for x in (start, stop - 1)])
        ys = np.array([y for _, _, first, last in chain for y in (first, last)])
        place = np.arange(left, right)
        middle = np.interp(place, xs, ys)
        if np.mean(_most_near(mask, place, middle)) < 0.85:
            continue  # feet of digits that stand in a line
        row = np.rint(middle).astype(int).clip(0, len(mask) - 1)
        own = float(np.median(runs[row, place][thin[row, place]]))
        curve = np.polyval(np.polyfit(xs, ys, 2 if len(xs) > 4 else 1), xs)
        bent = float(np.square(curve - ys).mean() ** 0.5)
        place, middle = _extended(mask, xs, ys)
        whole = place[0] <= 0.03 * width and place[-1] >= 0.97 * width - 1
        rules.append(_Rule(place, middle, own, bent, whole))
    if width <= _SMALL:
        rules += _straight_across(mask, runs, thickness)
    return rules


def _straight_across(mask: Mask, runs: NDArray[np.int32], thickness: int) -> list[_Rule]:
    """Straight lines from one side of a small page to the other: digits that stand close together
    on one leave too little of it between them for a chain."""
    height, width = mask.shape
    near = grown(mask, 1, 0)
    steps = math.floor(_STEEPEST * width)
    padded = np.pad(near, ((steps, steps), (0, 0)))
    place = np.arange(width)
    rows = np.arange(height)
    shares = np.zeros((2 * steps + 1, height))
    for index in range(2 * steps + 1):
        shift = np.rint((index - steps) * (place / width - 0.5)).astype(int) + steps
        few = slice(0, None, 4)
        hopeful = padded[rows[:, None] + shift[few], place[few]].mean(1) > _COVERED - 0.2
        shares[index, hopeful] = padded[rows[hopeful, None] + shift, place].mean(1)
    rules: list[_Rule] = []
    while shares.max() >= _COVERED:
        slope, top = np.unravel_index(shares.argmax(), shares.shape)
        heights = top + (slope - steps) * (place / width - 0.5)
        own = float(np.quantile(_most_near(runs, place, heights), 0.4))
        if own <= thickness:
            rules.append(_Rule(place, heights, own, math.inf, False))
        aside = math.ceil(own) + 2
        shares[:, max(0, top - aside) : top + aside + 1] = 0
    return rules


def _most_near(
    values: NDArray[Any], columns: NDArray[np.int64], heights: NDArray[np.float64]
) -> NDArray[Any]:
    """Along a line, the highest value on it, a pixel above it or one below."""
    rows = [np.rint(heights + aside).astype(int).clip(0, len(values) - 1) for aside in (-1, 0, 1)]
    result: NDArray[Any] = np.maximum.reduce([values[row, columns] for row in rows])
    return result


def _paint(thin: Mask, runs: NDArray[np.int32], rules: list[_Rule]) -> Mask:
    """What of the thin ink belongs to rules and to no stroke that crosses them."""
    lines = np.zeros_like(thin)
    if not rules:
        return lines
    for rule in rules:
        at = rule.pixels(len(thin), math.ceil(rule.thickness / 2) + 1)
        lines[at] |= thin[at] & (runs[at] <= rule.thickness + 1)
    widest = max(rule.thickness for rule in rules)
    whole = np.ones((3, 1), bool)
    grown: Mask = ndimage.binary_propagation(lines, whole, thin & (runs <= widest + 1))
    return grown


def _extended(
    mask: Mask, xs: NDArray[np.int64], ys: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The columns of a line and its height in each, as far as there is ink where it would go on."""
    width = mask.shape[1]
    place = np.arange(width)
    middle = np.interp(place, xs, ys)
    few = max(2, len(xs) // 4)
    for outside, ends in ((place < xs[0], slice(0, few)), (place > xs[-1], slice(-few, None))):
        slope = np.polyfit(xs[ends], ys[ends], 1)[0]
        at = xs[0] if ends.start == 0 else xs[-1]
        middle[outside] = middle[at] + slope * (place[outside] - at)
    inked = _most_near(mask, place, middle)
    gaps = np.flatnonzero(~inked & ((place < xs[0]) | (place > xs[-1])))
    left = gaps[gaps < xs[0]].max(initial=-1) + 1
    right = gaps[gaps > xs[-1]].min(initial=width)
    return place[left:right], middle[left:right]


Segment = tuple[int, int, float, float]
"""Left, right, and the height at both."""


def _segments(thin: Mask, thickness: int) -> list[Segment]:
    """Straight bits of thin lines, from left to right, each at most a block wide."""
    block = max(12, 3 * thickness)
    flat = grown(thin, 1, 0)
    level = runs_of(flat.T).T
    flat = thin & (level >= block)
    flat[:, ::block] = False
    pieces, _ = ndimage.label(flat, _EIGHT)
    segments = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(pieces)):
        length = columns.stop - columns.start
        if length < 0.6 * block or rows.stop - rows.start > thickness + 0.3 * length:
            continue
        own = pieces[rows, columns] == index + 1
        xs = np.flatnonzero(own.any(0))
        ys = (own * np.arange(own.shape[0])[:, None]).sum(0)[xs] / own.sum(0)[xs]
        slope, start = np.polyfit(xs, ys, 1)
        if np.square(ys - start - slope * xs).mean() ** 0.5 > 0.4 + 0.06 * thickness:
            continue
        first = rows.start + start
        segments.append((columns.start, columns.stop, first, first + slope * (length - 1)))
    return sorted(segments)


def _chains(segments: list[Segment], thickness: int, digit: float) -> list[list[Segment]]:
    """Segments that continue one another."""
    chains: list[list[Segment]] = []
    most = max(10 * thickness, 2 * digit)
    for segment in segments:
        best, least = None, np.inf
        for chain in chains:
            start, stop, first, last = chain[-1]
            gap = segment[0] - stop
            if not -2 <= gap <= most:
                continue
            slope = (last - first) / (stop - start)
            off = min(abs(last + share * slope * gap - segment[2]) for share in (0, 0.5, 1))
            if off <= 1 + 0.3 * thickness + 0.03 * gap and off + 0.02 * gap < least:
                best, least = chain, off + 0.02 * gap
        if best is None:
            chains.append([segment])
        else:
            best.append(segment)
    return chains
