"""From a page to its ink: ground levelled, paper's noise, rules and grids left out.

Sizes are in pixels of the page, unless a name says share; ink is from 0, none, to 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mnist.evaluation.ink import otsu
from mnist.reading.photo import LONGEST
from mnist.reading.rules import Mask, grown, widths_of, without_rules

Grey = NDArray[np.floating[Any]]
"""height×width, 0 to 1."""

_FINE = 3  # pixels of a stroke's width: such are enlarged
_TILE = 40  # pixels of the reduced page
_COARSE = 320  # pixels of the longer side on which the ground is looked for
_ROUGH = 160  # the same, on which the scale of its shadows is chosen
_SCALES = (0.06, 0.15, 0.35, 0.8)  # of the shorter side: what is narrower and darker is ink
_LEAST_SCALE = 17  # pixels of the page
_LEAST_CONTRAST = 0.08  # of ink to its ground, as a share of the ground's light
_BROADEST = 0.2  # of the shorter side: a stroke is narrower
_LOST = 0.1  # of the ink: if a wider scale finds that much more, strokes were taken for ground
_EIGHT = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Ink:
    """What is written or printed on a page."""

    strength: Grey
    """height×width, float32: how much darker than its ground each pixel is, as a share of that."""
    mask: Mask
    """height×width: where there is ink of marks."""
    rules: Mask
    """height×width: what was left out of the mask as lines of the paper or of a form."""
    stroke: float
    """About how wide strokes are."""
    inverted: bool
    """Whether the ink is lighter than the ground."""


def find_ink(page: NDArray[np.uint8]) -> Ink:
    """The ink of a page, which is twice as high and wide as one whose strokes are fine.

    Args:
        page: height×width, or height×width×3.
    """
    from PIL import Image

    ink = _ink_of(page)
    if not 0 < ink.stroke <= _FINE or 2 * max(page.shape) > LONGEST:
        return ink
    size = 2 * page.shape[1], 2 * page.shape[0]
    return _ink_of(np.asarray(Image.fromarray(page).resize(size, Image.Resampling.BICUBIC)))


def _ink_of(page: NDArray[np.uint8]) -> Ink:
    planes = [page] if page.ndim == 2 else np.moveaxis(page, 2, 0)
    channels = [plane.astype(np.float32) / 255 for plane in planes]
    inverted = not _is_ink_dark(channels)
    if inverted:
        channels = [1 - channel for channel in channels]
    strength = _strength(channels)
    mask = _mask(strength)
    mask, rules = without_rules(mask)
    if fine := _finest_stroke(strength, mask):
        mask = ndimage.binary_opening(mask, np.ones((fine, fine), bool))
    widths = widths_of(mask)[mask]
    stroke = float(np.median(widths)) if len(widths) else 0.0
    return Ink(strength, mask, rules, stroke, inverted)


# --------------------------------------------------------------------------- ground and polarity


def _is_ink_dark(channels: list[Grey]) -> bool:
    """Whether what is rare is darker than what surrounds it, in most places."""
    small = np.mean([_reduced(channel, _COARSE) for channel in channels], 0)
    tile = min(_TILE, *small.shape)
    rows, columns = (side // tile for side in small.shape)
    tiles = small[: rows * tile, : columns * tile].reshape(rows, tile, columns, tile)
    low, middle, high = np.quantile(tiles, (0.02, 0.5, 0.98), (1, 3))
    return bool(np.square(middle - low).sum() >= np.square(high - middle).sum())


def _reduced(values: Grey, longest: int) -> Grey:
    """By a whole factor, averaged, so that its longer side has at most about so many pixels."""
    factor = max(1, min(round(max(values.shape) / longest), *values.shape))
    if factor == 1:
        return values
    height, width = (side // factor * factor for side in values.shape)
    blocks = values[:height, :width].reshape(height // factor, factor, width // factor, factor)
    result: Grey = blocks.mean((1, 3))
    return result


def _strength(channels: list[Grey]) -> Grey:
    """How much darker than the ground around it each pixel is, of one channel or three."""
    shape = channels[0].shape
    coarse = [_reduced(channel, _COARSE) for channel in channels]
    rough = _reduced(np.min(coarse, 0), _ROUGH)
    size = _odd(_scale(rough, shape), shape, coarse[0])
    inks = []
    for channel, small in zip(channels, coarse, strict=True):
        ink = np.maximum(_enlarged(_ground(small, size), shape), 0.02)
        np.divide(channel, ink, out=ink)
        np.subtract(1, ink, out=ink)
        inks.append(ink.clip(0, 1, out=ink))
    if len(inks) == 1:
        return inks[0]
    shown = [_strongest(ink) / (_noise_of(ink)[1] + 0.02) for ink in inks]
    order = np.argsort(shown)
    best: Grey = inks[order[-1]]
    # A pen of another colour shows in another channel.
    for index in order[:-1]:
        if shown[index] > 0.4 * shown[order[-1]]:
            best = np.maximum(best, inks[index])
    return best


def _ground(small: Grey, size: int) -> Grey:
    """The ground of a reduced page: what a closing of that size leaves of it, smoothed."""
    # As np.pad(mode="edge"), which takes as long as the rest on small pages.
    rows, columns = (np.arange(-size, side + size).clip(0, side - 1) for side in small.shape)
    ground = ndimage.grey_closing(small[rows[:, None], columns], (size, size))
    ground = ndimage.uniform_filter(ground, max(1, size // 2))
    result: Grey = ground[size:-size, size:-size]
    return result


def _odd(size: float, shape: tuple[int, ...], small: Grey) -> int:
    """A size on a page of that shape in pixels of the reduced one: an odd number of them."""
    result: int = max(3, round(size * max(small.shape) / max(shape)) | 1)
    return result


def _scale(small: Grey, shape: tuple[int, ...]) -> float:
    """The size of a closing, in pixels of the page, that takes no stroke for ground.

    The narrowest at which no wider one finds more ink, in marks that are no shadows: those lie
    inside the page, and are of strokes.
    """
    wanted = sorted({max(share * min(shape), _LEAST_SCALE) for share in _SCALES})
    grounds = [_ground(small, _odd(size, shape, small)) for size in wanted]
    inks = [(1 - small / np.maximum(ground, 0.02)).clip(0, 1) for ground in grounds]
    masks = [_mask(ink) for ink in inks]
    broadest = max(3, round(_BROADEST * min(small.shape)))
    for index, (size, mask) in enumerate(zip(wanted, masks, strict=True)):
        least = max(4, _LOST * np.count_nonzero(mask))
        for wider in masks[index + 1 :]:
            wider = wider & ~_at_frame(wider)
            blots, _ = ndimage.label(wider, _EIGHT)
            broad = ndimage.minimum_filter(wider, broadest, mode="constant")
            kept = np.ones(blots.max() + 1, bool)
            kept[blots[broad]] = kept[0] = False
            if np.count_nonzero(kept[blots] & ~mask) > least:
                break
        else:
            return size
    return wanted[-1]


def _at_frame(mask: Mask) -> Mask:
    """The marks that reach the border of the page."""
    marks, _ = ndimage.label(mask, _EIGHT)
    at_border = np.unique(np.concatenate([marks[0], marks[-1], marks[:, 0], marks[:, -1]]))
    return np.isin(marks, at_border[at_border > 0])


def _enlarged(small: Grey, shape: tuple[int, ...]) -> Grey:
    """To the size of the page, smoothly."""
    from PIL import Image

    if small.shape == shape:
        return small
    image = Image.fromarray(small.astype(np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _strongest(ink: Grey) -> float:
    """How much ink the most inked have, one pixel of 2,000 and at least three."""
    some = ink[:: max(1, ink.shape[0] // 512), :: max(1, ink.shape[1] // 512)]
    index = max(0, some.size - max(3, some.size // 2000))
    return float(np.partition(some, index, axis=None)[index])


def _noise_of(ink: Grey) -> tuple[float, float]:
    """The median of what is no ink, and its standard deviation."""
    some = ink[:: max(1, ink.shape[0] // 512), :: max(1, ink.shape[1] // 512)]
    ground = some[some <= otsu(some)]
    middle = float(np.median(ground))
    return middle, float(1.4826 * np.median(np.abs(ground - middle)))


def _mask(ink: Grey) -> Mask:
    """Where there is ink: above a threshold of the page's own, and what is joined to that."""
    ground, noise = _noise_of(ink)
    strongest = _strongest(ink)
    threshold = max(
        min(otsu(ink), 0.6 * strongest), 0.35 * strongest, ground + 3 * noise, _LEAST_CONTRAST
    )
    strong = ink > threshold
    if not strong.any() or ink[strong].mean() - ground < max(1.5 * _LEAST_CONTRAST, 4 * noise):
        return np.zeros(ink.shape, bool)
    weak = ink > max(0.7 * threshold, ground + 2.5 * noise)
    marks, count = ndimage.label(weak, _EIGHT)
    kept = np.zeros(count + 1, bool)
    kept[marks[strong]] = True
    kept[0] = False
    mask: Mask = kept[marks]
    return mask


def _finest_stroke(ink: Grey, mask: Mask) -> int:
    """How wide strokes are at least where some of what is inked is a fine pattern of the paper;
    else 0.

    Lines of a pattern are weaker than strokes, and narrower; weaker are also the edges of strokes,
    but those lie beside them.
    """
    if not mask.any():
        return 0
    strokes = mask & (ink > otsu(ink[mask]))
    pattern = mask & ~grown(strokes, 2, 2)
    if np.count_nonzero(pattern) < 0.04 * np.count_nonzero(mask) or not strokes.any():
        return 0
    widths = widths_of(mask)
    usual = float(np.mean(widths[strokes]))
    return max(2, round(0.4 * usual)) if np.mean(widths[pattern]) < 0.45 * usual else 0
