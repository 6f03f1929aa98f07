"""The page on which a person checks readings: one HTML file that asks for nothing else.

``readings.html`` beside this module is its template. Imports no torch and no Matplotlib.
"""

import base64
import heapq
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist.evaluation.page import render
from mnist.pictures import Frame
from mnist.reading.reader import Page

MOST_SHOWN = 100
"""Pages with their pictures."""
MOST_BYTES = 19_000_000
"""Of the whole page."""

_LONGEST = 900  # pixels of a picture
_QUALITY = 72
_MOST_DIGITS = 400  # whose 28×28 are shown, of a page
_MOST_ERRORS = 200  # files that could not be read, by name


@dataclass(frozen=True)
class Shown:
    """A page that a person may want to look at."""

    file: int
    """Which of all files, from 0."""
    page: int
    """Which page of that file, from 0."""
    urgency: float
    sha256: str | None
    """Of the file that it was read from, if that could be read whole."""
    picture: str
    """Of the page, as a data URI: encoded anew, without what a camera writes into a file."""
    digits: list[str]
    """What the network saw, as data URIs, in reading order."""

    @property
    def rank(self) -> tuple[float, int, int]:
        """By which pages are sorted; no two are equal."""
        return rank_of(self.urgency, self.file, self.page)


def rank_of(urgent: float, file: int, page: int) -> tuple[float, int, int]:
    """The more urgent a page, the lower; then by its place."""
    return -urgent, file, page


def urgency(page: Page, described: dict[str, Any]) -> float:
    """How much a page needs a look: the doubt of its most doubtful digit, and 1 more for a warning.

    Args:
        page: what was read.
        described: the same as in ``readings.json``.
    """
    doubt = max((1 - digit.confidence for digit in page.digits), default=0.5)
    return doubt + bool(described["warnings"])


def show(
    page: Page, frame: Frame, urgent: float, place: tuple[int, int], sha256: str | None
) -> Shown:
    """What the page needs of a page that was read.

    Args:
        page: what was read.
        frame: its pixels.
        urgent: its urgency.
        place: which file, and which page of it.
        sha256: of the file.
    """
    images = [_data_uri(255 - digit.image, "PNG") for digit in page.digits[:_MOST_DIGITS]]
    pixels = np.rot90(frame.pixels, page.turned)
    picture = _data_uri(_reduced(pixels), "JPEG")
    return Shown(*place, urgent, sha256, picture, images)


def most_urgent(shown: Iterable[Shown]) -> list[Shown]:
    """As many as a page shows, those first that need a look most."""
    return heapq.nsmallest(MOST_SHOWN, shown, key=lambda one: one.rank)


def render_page(
    report: dict[str, Any], records: dict[int, dict[str, Any]], shown: list[Shown]
) -> str:
    """The whole page, self-contained, without scripts, of at most ``MOST_BYTES``: what does not fit
    is left out from the end.

    Args:
        report: what ``readings.json`` holds.
        records: by place among all files, what was read of those that are shown.
        shown: in the order in which they are shown.
    """
    pages = [
        {
            "name": records[one.file]["file"],
            "number": one.page + 1 if len(records[one.file]["pages"]) > 1 else None,
            "picture": one.picture,
            "images": iter(one.digits),
            **records[one.file]["pages"][one.page],
        }
        for one in shown
    ]
    page = render(
        Path(__file__).with_name("readings.html"),
        {
            "percent": lambda share: "–" if share is None else f"{share:.1%}",
            "next_or_none": lambda images: next(images, None),
        },
        report=report,
        pages=pages,
        most_errors=_MOST_ERRORS,
    )
    if len(page.encode()) > MOST_BYTES and shown:
        return render_page(report, records, shown[: len(shown) * 3 // 4])
    return page


def _reduced(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_LONGEST, _LONGEST))
    return np.asarray(image)


def _data_uri(pixels: NDArray[np.uint8], kind: str) -> str:
    from PIL import Image

    contents = io.BytesIO()
    Image.fromarray(pixels).save(contents, format=kind, optimize=True, quality=_QUALITY)
    code = base64.b64encode(contents.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{code}"
