"""From the ink of a page to lines of marks, cut into pieces that digits may be made of.

Sizes are in pixels, unless a name says share. A line is worked on at its own scale, at which its
digits are about ``DIGIT_HEIGHT`` high, or lower where the page has no more.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.signal import find_peaks

from mnist.reading.ink import Grey, Ink
from mnist.reading.rules import Mask

DIGIT_HEIGHT = 40

_EIGHT = np.ones((3, 3), bool)
_SPECK = 0.12  # of a digit's height: a mark of less, both ways, is left out
_HAIR = 0.5  # of the usual stroke's width: a line that is thinner is none of a digit
_THICK = 3.5  # times the usual stroke's width: a square of that is in no stroke
_FARTHEST = 4.5  # digit heights between neighbours of a line
_CUT_WIDTH = 0.5  # of a digit's height: what is wider may be several digits
_CUT_APART = 0.13  # of a digit's height: between cuts
_CUTS_PER_WIDTH = 4.0  # at most, for each digit height of a mark's width
_VALLEY = 0.06  # of a digit's height: shallower ones of an outline are none
_MOST_INK = 0.5  # of a digit's height: a cut through more is none, but between valleys
_SLANT_ROWS = 0.1  # of a digit's height: over so many rows the slant of strokes is seen
_SLANT_SHARE = 1.2  # of what is seen
_SIDEWAYS = 0.15  # ink that a step aside costs a cut


@dataclass(frozen=True)
class Line:
    """A line of marks, left to right, at its own scale and made upright."""

    ink: NDArray[np.uint8]
    """height×width: how much ink, full where strokes are."""
    pieces: NDArray[np.int32]
    """height×width: which piece, from 1, a pixel belongs to; 0 none."""
    boxes: NDArray[np.int64]
    """n×4: top, left, bottom and right of each piece."""
    cut_before: NDArray[np.int64]
    """n: through how many strokes a piece is cut off from the one before it; 0 if that is another
    mark."""
    digit_height: float
    at_border: NDArray[np.bool_]
    """n: whether a piece reaches the border of the page."""
    places: NDArray[np.float64]
    """n×4: top, left, bottom and right of each piece on the page, as it stands there."""


def find_lines(ink: Ink) -> list[Line]:
    """The lines of a page, from top to bottom."""
    marks, count = ndimage.label(ink.mask, _EIGHT)
    if not count:
        return []
    boxes = _boxes_of(marks)
    areas = np.bincount(marks.ravel(), minlength=count + 1)[1:]
    longest = (boxes[:, 2:] - boxes[:, :2]).max(1)
    drawn = (areas > _HAIR * ink.stroke * longest) & ~_blots(ink, marks, boxes)
    if not drawn.any():
        return []
    renumbered = np.zeros(count + 1, np.int32)
    renumbered[1:][drawn] = np.arange(1, np.count_nonzero(drawn) + 1)
    marks, boxes, areas = renumbered[marks], boxes[drawn], areas[drawn]
    lines = []
    for members in _group(boxes, areas, ink.mask.shape):
        line = _make_line(ink, marks, boxes, members)
        if line is not None:
            lines.append(line)
    return lines


def _blots(ink: Ink, marks: NDArray[np.int32], boxes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which marks reach the border and are much thicker than strokes: of a table, a thumb, a
    shadow."""
    cut_off = (boxes[:, :2] <= 0).any(1) | (boxes[:, 2:] >= ink.mask.shape).any(1)
    blots = np.zeros(len(boxes), bool)
    size = max(3, round(_THICK * ink.stroke))
    for index in np.flatnonzero(cut_off & ((boxes[:, 2:] - boxes[:, :2]).min(1) >= size)).tolist():
        top, left, bottom, right = boxes[index].tolist()
        own = marks[top:bottom, left:right] == index + 1
        blots[index] = ndimage.minimum_filter(own, size, mode="nearest").any()
    return blots


def _group(
    boxes: NDArray[np.int64], areas: NDArray[np.int64], shape: tuple[int, ...]
) -> list[NDArray[np.int64]]:
    """Marks by line of text."""
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    order = np.argsort(heights)
    weights = areas[order].cumsum()
    usual = heights[order][np.searchsorted(weights, 0.5 * weights[-1])]
    before, behind = boxes[:, :2] <= 0, boxes[:, 2:] >= shape
    cut_off = (before | behind).any(1)
    # Of what surrounds the page, or of its frame: no 1 that is cut off on one side.
    sides = before.sum(1) + behind.sum(1)
    thin = (heights > 4 * widths) | (areas < 0.2 * heights * widths)
    frame = thin & (((sides > 1) & (heights > 1.2 * usual)) | (cut_off & (heights > 2.5 * usual)))
    tall = np.flatnonzero((heights >= 0.4 * usual) & ~frame)
    lines: list[list[int]] = []
    for index in tall[np.argsort(boxes[tall, 1] + 0.25 * widths[tall])].tolist():
        best, most = None, 0.3
        for line in lines:
            last = line[-3:]
            top, bottom = boxes[last, 0].min(), boxes[last, 2].max()
            right, height = boxes[line, 3].max(), heights[last].max()
            if boxes[index, 1] - right > _FARTHEST * max(height, heights[index]):
                continue
            shared = min(bottom, boxes[index, 2]) - max(top, boxes[index, 0])
            share = shared / min(bottom - top, heights[index])
            if share > most:
                best, most = line, share
        if best is None:
            lines.append([index])
        else:
            best.append(index)
    small = np.flatnonzero((heights < 0.4 * usual) & ~(cut_off & (widths > heights)))
    for index in small.tolist():
        top, left, bottom, right = boxes[index].tolist()
        if max(bottom - top, right - left) < max(2, _SPECK * usual):
            continue
        best, least = None, 0.1 * usual
        for line in lines:
            near = (
                line
                if len(line) < 4
                else sorted(line, key=lambda i: max(boxes[i, 1] - right, left - boxes[i, 3]))[:3]
            )
            aside = max(boxes[near, 1].min() - right, left - boxes[near, 3].max(), 0)
            middle, flat = (top + bottom) / 2, right - left > 2.5 * (bottom - top)
            lowest = np.median(boxes[near, 2]) - 0.15 * usual if flat else boxes[near, 2].max()
            away = max(boxes[near, 0].min() - middle, middle - lowest, 0)
            if aside < 2 * usual and away < (0.02 * usual if flat else least):
                best, least = line, away
        if best is not None:
            best.append(index)
    lines.sort(key=lambda line: float(np.median(boxes[line, 0] + boxes[line, 2])))
    return [np.array(line) for line in lines]


def _make_line(
    ink: Ink, marks: NDArray[np.int32], boxes: NDArray[np.int64], members: NDArray[np.int64]
) -> Line | None:
    """Cut a line out of a page, bring it to its scale, and its marks into pieces."""
    own = boxes[members]
    heights = own[:, 2] - own[:, 0]
    digit_height = float(np.median(heights[heights >= 0.5 * heights.max()]))
    top, left = own[:, :2].min(0)
    bottom, right = own[:, 2:].max(0)
    whole = slice(max(0, top - 2), bottom + 2), slice(max(0, left - 2), right + 2)
    chosen = np.zeros(len(boxes) + 1, bool)
    chosen[members + 1] = True
    mask = chosen[marks[whole]]
    strength = ink.strength[whole]
    scale = max(1.0, digit_height / DIGIT_HEIGHT)
    if scale > 1.2:
        mask, strength = _smaller(mask.astype(np.float32), scale) > 0.4, _smaller(strength, scale)
        digit_height /= scale
    else:
        scale = 1.0
    if not mask.any():
        return None
    shifts = _uprighting(mask, digit_height)
    mask, strength = _shifted(mask, shifts), _shifted(strength, shifts)
    labels, cuts = _pieces(mask, digit_height)
    if not len(cuts):
        return None
    full = float(np.quantile(strength[mask], 0.75))
    low = 0.25 * full
    graded = ((strength - low) / (full - low)).clip(0, 1)
    grown = np.where(labels > 0, labels, ndimage.maximum_filter(labels, 3))
    pixels = np.rint(graded * 255 * (grown > 0)).astype(np.uint8)
    lying = _shifted(labels, -shifts)  # what was moved to the right is now twice as far inside
    inside = np.array([0, 2 * np.ptp(shifts)] * 2)
    origin = np.array([whole[0].start, whole[1].start] * 2)
    height, width = ink.mask.shape
    places = (_boxes_of(lying) - inside) * scale + origin
    places = places.clip(0, (height, width) * 2)  # by rounding, a pixel of the line may lie outside
    edge = max(1.5, scale)
    at_border = (
        (places[:, :2] < edge).any(1)
        | (places[:, 2] > height - edge)
        | (places[:, 3] > width - edge)
    )
    return Line(pixels, grown, _boxes_of(labels), cuts, digit_height, at_border, places)


def _boxes_of(labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """Top, left, bottom and right of every label, n×4."""
    found = ndimage.find_objects(labels)
    return np.array([[r.start, c.start, r.stop, c.stop] for r, c in found], np.int64)


def _uprighting(mask: Mask, digit_height: float) -> NDArray[np.int64]:
    """How far each row is to be moved to the right so that strokes that slant stand upright.

    By how far the edges of strokes are aside of themselves a few rows below, on average: strokes
    that lean both ways, as in zeros, leave a line as it is.
    """
    rows = max(2, round(_SLANT_ROWS * digit_height))
    inked = np.pad(mask, ((0, 0), (rows + 1, rows + 1)))
    moved = count = 0
    for edges in (inked[:, 1:] & ~inked[:, :-1], inked[:, :-1] & ~inked[:, 1:]):
        free, below = edges[:-rows].copy(), edges[rows:]
        for aside in sorted(range(-rows, rows + 1), key=abs):
            met = free & np.roll(below, -aside, 1)
            free &= ~met
            number = int(np.count_nonzero(met))
            moved += aside * number
            count += number
    slant = _SLANT_SHARE * moved / (rows * max(1, count))
    place = np.arange(len(mask)) - len(mask) / 2
    shifts: NDArray[np.int64] = np.rint(-slant * place).astype(np.int64)
    return shifts


def _shifted(values: NDArray[Any], shifts: NDArray[np.int64]) -> NDArray[Any]:
    """Rows moved to the right by so many pixels, on a wider ground."""
    most = int(np.ptp(shifts))
    if not most:
        return values
    height, width = values.shape
    result = np.zeros((height, width + 2 * most), values.dtype)
    columns = np.arange(width) + (most + shifts)[:, None]
    result[np.arange(height)[:, None], columns] = values
    return result


def _smaller(values: Grey, scale: float) -> Grey:
    """Averaged over ``scale`` pixels each way."""
    from PIL import Image

    height, width = (max(1, round(side / scale)) for side in values.shape)
    image = Image.fromarray(values)
    box = (0, 0, min(width * scale, values.shape[1]), min(height * scale, values.shape[0]))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX, box))


def _pieces(mask: Mask, digit_height: float) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Marks, those that are wide cut where the least ink is, from left to right.

    Returns:
        Which piece each pixel belongs to, from 1; and through how many strokes each is cut off from
        the one before it.
    """
    marks, _ = ndimage.label(mask, _EIGHT)
    parts: list[tuple[float, Mask, tuple[slice, slice], int]] = []
    for index, box in enumerate(ndimage.find_objects(marks)):
        own = marks[box] == index + 1
        height, width = own.shape
        if max(height, width) < _SPECK * digit_height:
            continue
        cuts: list[Cut] = []
        size = digit_height if height > 0.65 * digit_height else height  # zeros are often small
        if width > _CUT_WIDTH * size and height > 0.3 * digit_height:
            cuts = _cuts(own, size)
        where = np.zeros(own.shape, np.int64)
        place = np.arange(width)
        for _, path in cuts:
            where += place >= path[:, None]
        for part in range(len(cuts) + 1):
            piece = own & (where == part)
            if not piece.any():
                continue
            columns = piece.sum(0)
            middle = box[1].start + (columns @ place) / columns.sum()
            crossed = _strokes_across(own, cuts[part - 1][1]) if part else 0
            parts.append((middle, piece, box, crossed))
    labels = np.zeros(mask.shape, np.int32)
    parts.sort(key=lambda part: part[0])
    for number, (_, piece, box, _) in enumerate(parts, 1):
        labels[box][piece] = number
    return labels, np.array([part[3] for part in parts])


def _strokes_across(own: Mask, path: NDArray[np.int64]) -> int:
    """Through how many strokes a cut goes, at least one."""
    ink = own[np.arange(len(own)), path]
    return max(1, int(np.count_nonzero(ink[1:] & ~ink[:-1]) + ink[0]))


Cut = tuple[float, NDArray[np.int64]]
"""How many pixels of ink it goes through, and its column in every row."""


def _cuts(own: Mask, digit_height: float) -> list[Cut]:
    """Ways from the top of a mark to its bottom that may part digits, from left to right."""
    apart = max(1.5, _CUT_APART * digit_height) * len(own)
    most = max(2, round(_CUTS_PER_WIDTH * own.shape[1] / digit_height))
    chosen: list[Cut] = []
    paths = np.zeros((most, len(own)), np.int64)
    for find in (_between_valleys, _through_little_ink):
        for ink, path in find(own, digit_height) if len(chosen) < most else ():
            if (np.abs(paths[: len(chosen)] - path).sum(1) >= apart).all():
                paths[len(chosen)] = path
                chosen.append((ink, path))
            if len(chosen) == most:
                break
    return sorted(chosen, key=lambda cut: int(cut[1].sum()))


def _between_valleys(own: Mask, digit_height: float) -> list[Cut]:
    """Straight ways from where the upper outline is low to where the lower one is high: there
    strokes of two digits lie side by side. Those through the least ink come first."""
    height = len(own)
    upper = np.where(own.any(0), own.argmax(0), height)
    lower = np.where(own.any(0), height - 1 - own[::-1].argmax(0), -1)
    deep = max(1.5, _VALLEY * digit_height)
    tops, bottoms = (find_peaks(outline, prominence=deep)[0] for outline in (upper, -lower))
    pairs = []
    reach = 0.35 * digit_height
    for top in tops.tolist():
        partners = bottoms[np.abs(bottoms - top) <= reach]
        pairs += [(top, bottom) for bottom in partners.tolist()] or [(top, top)]
    pairs += [(low, low) for low in bottoms.tolist() if (np.abs(tops - low) > reach).all()]
    rows = np.arange(height)
    cuts = []
    for top, bottom in pairs:
        start, stop = upper[top], max(lower[bottom], upper[top] + 1)
        path = np.rint(np.interp(rows, (start, stop), (top, bottom))).astype(np.int64)
        cuts.append((float(own[rows, path].sum()), path))
    return sorted(cuts, key=lambda cut: cut[0])


def _through_little_ink(own: Mask, digit_height: float) -> list[Cut]:
    """Ways through the least ink, the least of all first."""
    height, width = own.shape
    middle = height // 2
    above, below = _cheapest(own[: middle + 1]), _cheapest(own[middle:][::-1])
    total = above[-1] + below[-1] - own[middle]
    margin = max(2, round(0.1 * digit_height))
    apart = max(2.0, _CUT_APART * digit_height)
    chosen: list[int] = []
    for x in (np.argsort(total[margin : width - margin], kind="stable") + margin).tolist():
        if total[x] > _MOST_INK * digit_height:
            break
        if all(abs(x - other) >= apart for other in chosen):
            chosen.append(x)
    if not chosen:
        return []
    ways = np.concatenate([_ways(above, chosen), _ways(below, chosen)[-2::-1]]).T
    return [(float(total[x]), path) for x, path in zip(chosen, ways, strict=True)]


def _cheapest(own: Mask) -> NDArray[np.float64]:
    """The least ink on a way from the first row to each pixel."""
    total = own.astype(np.float64)
    for above, row in pairwise(total):
        least = above.copy()
        np.minimum(least[1:], above[:-1] + _SIDEWAYS, out=least[1:])
        np.minimum(least[:-1], above[1:] + _SIDEWAYS, out=least[:-1])
        row += least
    return total


def _ways(total: NDArray[np.float64], last: list[int]) -> NDArray[np.int64]:
    """The columns, in each row, of the cheapest ways that end in these of the last one."""
    from_left, straight, from_right = options = np.full((3, *total.shape), np.inf)
    from_left[:, 1:] = total[:, :-1] + _SIDEWAYS
    straight[:] = total
    from_right[:, :-1] = total[:, 1:] + _SIDEWAYS
    steps = (options[:, -2::-1].argmin(0) - 1).tolist()
    ways = []
    for at in last:
        way = [at]
        for step in steps:
            at += step[at]
            way.append(at)
        ways.append(way[::-1])
    return np.array(ways).T
