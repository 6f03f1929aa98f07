"""From the image of one digit, of any size and look, to its ink: ground levelled, digit found.

What MNIST's makers did with the ink is in normaliser.py. Sizes are in pixels of the image, unless
a name says share; ink is from 0, none, to 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Grey = NDArray[np.floating[Any]]
"""height×width, 0 to 1."""

_LEAST_CONTRAST = 0.08  # of ink to its ground, as shares of the ground's light
_LEAST_SIZE = 5  # pixels of the longer side of a digit, and in large images as a share of theirs:
_LEAST_SHARE = 0.025
_SCALES = (0.3, 0.6, 1.2)  # of the shorter side: what is darker over less is ink, else shadow
_STROKES = (0.15, 0.3)  # of the shorter side: widths of strokes, by which the polarity is seen
_WIDEST = 0.2  # of an image: strokes along the whole of a side are narrower
_BLOT = 0.5  # of a digit's size: a square of that is in no digit
_EDGE = 0.06  # of a digit's size: over more a stroke does not fade into the ground
_EIGHT = np.ones((3, 3), bool)  # neighbours
_MIDDLES = (np.arange(64) + 0.5) / 64  # of a histogram's bins


@dataclass(frozen=True)
class Digit:
    """The ink of a digit that was found."""

    ink: NDArray[np.uint8]
    """height×width of the image without its margin; 0 wherever it is not the digit's."""
    inverted: bool
    """Whether the image has dark ink on a light ground."""


def find_digit(image: NDArray[np.uint8]) -> Digit | None:
    """The one digit of an image, or None if it shows nothing that could be one.

    Args:
        image: height×width, or height×width×3, of any ground: darker or lighter than the ink, grey,
            coloured, shadowed.
    """
    image = _without_margin(image)
    values = image.astype(np.float32) / 255
    grey = values if values.ndim == 2 else values.mean(2)
    if min(grey.shape) < 3 or np.ptp(grey) < _LEAST_CONTRAST / 2:
        return None
    dark = is_ink_dark(grey)
    for find_ink in (_ink_on_even_ground, _ink):
        ink = find_ink(values if dark else 1 - values)
        mask = None if ink is None else _mask(ink)
        if ink is None or mask is None:
            continue
        mask = _digit_of(mask, ink)
        if mask is not None and _is_drawn(mask, ink):
            return Digit(_graded(ink, mask), dark)
    return None


# --------------------------------------------------------------------------- ground and polarity


def _without_margin(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a frame of another ground surrounds, as a black square with a light digit on white
    paper; else the image itself."""
    grey = image if image.ndim == 2 else image.mean(2)
    ring = _ring(grey)
    margin = np.median(ring)
    if np.abs(ring - margin).max() > 32:
        return image
    other = np.abs(grey - margin) > 96
    if not other.any():
        return image
    box = ndimage.find_objects(other.astype(np.int8))[0]
    inside = other[box]
    edge = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    enough = inside.mean() > 0.5 and np.count_nonzero(~inside) >= 8  # of square and of ink
    if min(inside.shape) < 10 or edge.mean() < 0.98 or not enough:
        return image
    around = max(1, min(inside.shape) // 50)  # soft edges
    return image[
        box[0].start + around : box[0].stop - around, box[1].start + around : box[1].stop - around
    ]


def _ring(grey: NDArray[Any]) -> NDArray[Any]:
    """The outermost pixels, each once."""
    return np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])


def is_ink_dark(grey: Grey) -> bool:
    """Whether strokes are darker than their ground.

    Along the border of an image there is mostly ground. Where that is half light, half dark (a
    digit that fills its image, a shadow): strokes are narrower than the ground between them, so
    that a closing over little more than their width fills what is dark ink and an opening removes
    what is light ink.
    """
    low, high = np.quantile(grey, (0.02, 0.98))
    if high - low < _LEAST_CONTRAST:
        low, high = grey.min(), grey.max()
    ring = _ring(grey)
    border = float(((ring - low) / (high - low)).clip(0, 1).mean())  # 1: light
    if abs(border - 0.5) > 0.35:
        return border > 0.5
    padded = np.pad(grey, 2, mode="edge")
    strokes = 0.0
    for share in _STROKES:
        size = max(3, round(share * min(grey.shape))) | 1
        dark = np.square(ndimage.grey_closing(padded, (size, size)) - padded).sum()
        light = np.square(padded - ndimage.grey_opening(padded, (size, size))).sum()
        strokes += float((dark - light) / (dark + light + 1e-6))
    return strokes + 3 * (border - 0.5) > 0


def _ink(values: Grey) -> Grey:
    """How much darker than the ground around it each pixel is, of height×width or ×3, as a share of
    the ground's light; of three colours that which shows the ink best."""
    if values.ndim == 2:
        return _level(values)
    step = max(1, min(values.shape[:2]) // 96)  # enough to choose by
    inks = [_level(values[::step, ::step, channel]) for channel in range(3)]
    shown = [_strongest(ink) / (_ground_of(ink)[1] + 0.02) for ink in inks]
    return _level(values[..., int(np.argmax(shown))])


def _ink_on_even_ground(values: Grey) -> Grey | None:
    """The same where a third of the image or more is of one value, the lightest, and hardly any
    is nearly as light: drawn by a program, or cut out by one. None of others."""
    if values.ndim == 3:
        return None
    ground = float(values.max())
    ink = 1 - values / ground
    marks = ink > otsu(ink)
    even, nearly = (ink < 1.5 / 255).mean(), ((ink > 0.02) & (ink < 0.2)).mean()
    if even < 0.35 or nearly > 0.2 or marks.mean() > 0.6 or _is_shadow(marks):
        return None
    return ink


def _level(values: Grey) -> Grey:
    """Ink by the narrowest of the scales at which whatever is darkest counts as ink.

    Over a narrow scale a shadow is ground; but so is the inside of a thick stroke.
    """
    side = min(values.shape)
    around = max(2, side // 2)
    inside = slice(around, -around), slice(around, -around)
    values = _surrounded(values, around)
    low, high = 1 - _strongest(1 - values), np.quantile(values, 0.9)
    darkest = values <= low + 0.25 * (high - low)
    ink = np.zeros_like(values[inside])
    for share in _SCALES:
        size = max(3, round(share * side)) | 1
        ground = ndimage.grey_closing(values, (size, size), mode="nearest")
        more = (1 - values / np.maximum(ground, 0.02)).clip(0, 1)
        threshold = max(otsu(more), 0.35 * _strongest(more))
        marks = more > threshold
        if _is_shadow(marks[inside]):
            break
        ink = more[inside]
        if marks[darkest].mean() > 0.8 and threshold > _LEAST_CONTRAST:
            break
    return ink


def _is_shadow(marks: NDArray[np.bool_]) -> bool:
    """Whether what is dark covers a side of the image, wider than a stroke."""
    for turned in (marks, marks.T):
        depth = max(2, round(_WIDEST * len(turned)))
        if max(turned[:depth].mean(), turned[-depth:].mean()) > 0.95:
            return True
    return False


def _surrounded(values: Grey, around: int) -> Grey:
    """With so many pixels more on each side, as light as the ground is there: what the border has,
    less the ink that reaches it."""
    bordered = values.copy()
    for turned in (bordered, bordered.T):
        for row in (turned[0], turned[-1]):
            size = max(3, round(0.5 * len(row))) | 1
            closed = ndimage.grey_closing(row, size, mode="nearest")
            row[:] = np.maximum(closed, 0.6 * np.quantile(values, 0.9))
    padded = np.pad(bordered, around, mode="edge")
    padded[around:-around, around:-around] = values
    return padded


def _strongest(ink: Grey) -> float:
    """How much ink the most inked have, one pixel of 2,000 and at least three."""
    index = ink.size - max(3, ink.size // 2000)
    return float(np.partition(ink, index, axis=None)[index])


def _ground_of(ink: Grey) -> tuple[float, float]:
    """The median of what is no ink, and its standard deviation."""
    ground = ink[ink <= otsu(ink)]
    middle = float(np.median(ground))
    return middle, float(1.4826 * np.median(np.abs(ground - middle)))


def otsu(ink: Grey) -> float:
    """The threshold that separates two classes best (Otsu, 1979); 1 if there is but one."""
    counts = np.bincount(np.minimum(ink.ravel() * 64, 63).astype(np.uint8), minlength=64)
    below, sums = counts.cumsum(), (counts * _MIDDLES).cumsum()
    above = below[-1] - below
    with np.errstate(all="ignore"):
        gap = sums / below - (sums[-1] - sums) / above
        between = below * above * np.square(gap)
    between = np.nan_to_num(between[:-1])
    return float(between.argmax() + 1) / 64 if between.any() else 1.0


def _mask(ink: Grey) -> NDArray[np.bool_] | None:
    """Where there is ink, or None if there is but ground and its noise."""
    ground, noise = _ground_of(ink)
    threshold = max(otsu(ink), 0.35 * _strongest(ink), ground + 4 * noise, _LEAST_CONTRAST)
    strong = ink > threshold
    if not strong.any() or ink[strong].mean() - ground < max(1.5 * _LEAST_CONTRAST, 5 * noise):
        return None
    weak = ink > max(threshold / 2, ground + 3 * noise)
    marks, _ = ndimage.label(weak, _EIGHT)
    kept = np.unique(marks[strong])
    return np.isin(marks, kept[kept > 0])


# --------------------------------------------------------------------------------- which marks


def _digit_of(mask: NDArray[np.bool_], ink: Grey) -> NDArray[np.bool_] | None:
    """Of all ink that of the digit: the largest mark, and those that are as if they were its."""
    mask = _without_lines(mask)
    marks, count = ndimage.label(mask, _EIGHT)
    if not count:
        return None
    boxes = ndimage.find_objects(marks)
    height, width = mask.shape
    areas = np.bincount(marks.ravel())[1:].astype(float)
    weights, at_edge = areas.copy(), np.zeros(count, bool)
    for index, (rows, columns) in enumerate(boxes):
        at_edge[index] = (
            rows.start == 0 or columns.start == 0 or rows.stop == height or columns.stop == width
        )
        middle = (rows.start + rows.stop) / 2 / height, (columns.start + columns.stop) / 2 / width
        off = max(abs(middle[0] - 0.5), abs(middle[1] - 0.5))
        weights[index] *= (0.3 if at_edge[index] and count > 1 else 1) * (1.2 - off)
    main = int(weights.argmax())
    rows, columns = boxes[main]
    size = max(rows.stop - rows.start, columns.stop - columns.start)
    if size < max(_LEAST_SIZE, _LEAST_SHARE * max(mask.shape)):
        return None
    kept, box = {main}, np.array([[part.start, part.stop] for part in boxes[main]])
    largest = np.argsort(-areas)[:100].tolist()  # a digit is of fewer, a halftone of thousands
    others = [i for i in largest if i != main and areas[i] >= 0.01 * areas[main]]
    grown = True
    while grown:
        grown = False
        for index in others:
            part = np.array([[side.start, side.stop] for side in boxes[index]])
            gap = np.maximum(part[:, 0] - box[:, 1], box[:, 0] - part[:, 1]).max()
            foreign = at_edge[index] and not at_edge[main]  # cut off, unlike the digit
            if index not in kept and gap <= (0.05 if foreign else 0.2) * size:
                kept.add(index)
                box = np.stack([np.minimum(box, part)[:, 0], np.maximum(box, part)[:, 1]], 1)
                grown = True
    return np.isin(marks, np.array(sorted(kept)) + 1)


def _without_lines(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without straight lines from border to border, as a form's box leaves them in a crop; but the
    bar of a 2 that fills its image is none."""
    result = mask.copy()
    for turned in (result, result.T):  # lines downwards, then across
        height, width = turned.shape
        zone, end = max(1, round(0.15 * width)), max(1, height // 50)
        whole = (turned.mean(0) > 0.7) & turned[:end].any(0) & turned[-end:].any(0)
        for columns in (range(zone), range(width - 1, width - 1 - zone, -1)):
            lines = [column for column in columns if whole[column]]
            if not lines:
                continue
            inner, step = lines[-1], columns.step
            line = slice(0, inner + 2) if step > 0 else slice(max(0, inner - 1), width)
            rest = turned.copy()
            rest[:, line] = False
            fills = rest[:, -1 if step > 0 else 0].any()  # the other ink reaches the other side
            alone = not rest.any() and len(lines) < 0.05 * width
            if alone or (rest.any() and not fills):
                turned[:, line] = False
    return result


def _is_drawn(mask: NDArray[np.bool_], ink: Grey) -> bool:
    """Whether the ink is of strokes, no blot, and ends where the mask does, unlike a shadow."""
    rows, columns = ndimage.find_objects(mask.astype(np.int8))[0]
    size = max(rows.stop - rows.start, columns.stop - columns.start)
    if ndimage.minimum_filter(mask, max(2, round(_BLOT * size)), mode="constant").any():
        return False
    steps = max(1, round(_EDGE * size))
    inner = mask & ~ndimage.binary_erosion(mask, _EIGHT, steps, border_value=True)
    outer = ndimage.binary_dilation(mask, _EIGHT, steps) & ~mask
    if not (inner.any() and outer.any()):
        return False
    return bool(ink[inner].mean() - ink[outer].mean() > 0.3 * np.quantile(ink[mask], 0.75))


def _graded(ink: Grey, mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The ink of a mask and of its soft edge, full where strokes are."""
    full, (ground, noise) = np.quantile(ink[mask], 0.75), _ground_of(ink)
    grown = ndimage.binary_dilation(mask, _EIGHT)
    low = ground + 2 * noise + 0.05 * full
    graded = ((ink - low) / (full - low)).clip(0, 1) * grown
    digit: NDArray[np.uint8] = np.rint(graded * 255).astype(np.uint8)
    return digit
