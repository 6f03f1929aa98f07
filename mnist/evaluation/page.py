"""The page on which a reviewer judges an evaluation: one HTML file that asks for nothing else.

``report.html`` beside this module is its template. Imports no torch and no Matplotlib.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

MOST_POINTS = 400
"""Of one curve: a long run has thousands of rows, and a plot is hardly wider in pixels."""

_NOTHING = "–"
_ONE_TWO_FIVE = [factor * 10.0**power for power in range(-10, 16) for factor in (1, 2, 5)]


def render_page(
    report: dict[str, Any],
    pictures: dict[int, NDArray[np.uint8]],
    rows: Sequence[dict[str, Any]],
    sources: dict[int, NDArray[np.uint8]] | None = None,
) -> str:
    """The whole page, self-contained, without scripts.

    Args:
        report: what ``report.json`` holds.
        pictures: by index, 28×28, ink high: all of the report's mistakes and least confident.
        rows: what the run's ``metrics.jsonl`` holds; none leaves the curves out.
        sources: by index, how images looked before they were prepared, height×width or ×3.

    Raises:
        KeyError: a picture is missing.
        jinja2.UndefinedError, TypeError: so is a field of the report.
    """
    prepared = report["prepared_examples"]
    shown = [*(report["mistakes"] or []), *report["least_confident"], *prepared]
    curves = [_curves(rows, quantity) for quantity in ("loss", "accuracy")]
    return render(
        Path(__file__).with_name("report.html"),
        {"count": _count, "percent": _percent, "decimal": _decimal},
        report=report,
        pictures={image["index"]: _data_uri(255 - pictures[image["index"]]) for image in shown},
        sources={index: _data_uri(image) for index, image in (sources or {}).items()},
        coverage=_coverage(report),
        curves=[curve for curve in curves if curve],
    )


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A template filled; what it is given is escaped, what it lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    page = environment.get_template(template.name).render(**values)
    return page.encode(errors="replace").decode()  # a file's name need not be valid Unicode


def _count(number: float | None) -> str:
    return _NOTHING if number is None else f"{number:,.0f}"


def _decimal(number: float | None) -> str:
    return _NOTHING if number is None else f"{number:,.4f}"


def _percent(share: float | None) -> str:
    if share is None:
        return _NOTHING
    text = f"{share:.2%}"
    return ">99.99%" if text == "100.00%" and share < 1 else text  # 100% is a claim of its own


def _data_uri(image: NDArray[np.uint8]) -> str:
    """A PNG of an image, height×width or ×3."""
    from PIL import Image

    contents = io.BytesIO()
    Image.fromarray(image).save(contents, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(contents.getvalue()).decode()


# ----------------------------------------------------------------------------------- curves


def _curves(rows: Sequence[dict[str, Any]], quantity: str) -> dict[str, Any] | None:
    """What the template needs to plot the loss (logarithmically) or the accuracy over the epochs.

    Positions are shares of the plot's width and height, from its lower left corner. None where no
    row has the quantity.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for part in ("train", "validation"):
        values = [(row["epoch"], row.get(f"{part}/{quantity}")) for row in rows]
        points = [(x, y) for x, y in values if y is not None and math.isfinite(y)]
        if points:
            series[part] = points
    if not series:
        return None

    heights = [y for points in series.values() for _, y in points]
    epochs = math.ceil(max(x for points in series.values() for x, _ in points)) or 1
    if quantity == "loss":
        # A loss can round to 0, which has no logarithm.
        least, most = np.clip([min(heights), max(heights)], 1e-9, 1e14)
        low = max(tick for tick in _ONE_TWO_FIVE if tick < least)
        high = min(tick for tick in _ONE_TWO_FIVE if tick > most)
        grids = [_ONE_TWO_FIVE, _ONE_TWO_FIVE[::3], _ONE_TWO_FIVE[::6], _ONE_TWO_FIVE[::12]]
    else:  # the first rows are near chance; what matters happens near 1
        low, high = min(0.9, math.floor(20 * np.quantile(heights, 0.1)) / 20), 1.0
        grids = [[n * step / 100 for n in range(101)] for step in (1, 2, 5, 10, 20)]

    def height(y: float) -> float:
        if quantity == "loss":
            return math.log(max(y, low) / low) / math.log(high / low)
        return (y - low) / (high - low)

    ticks = _first_short([[y for y in grid if low <= y <= high] for grid in grids])
    every = (step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power))
    return {
        "quantity": quantity,
        "epochs": _first_short(range(0, epochs + 1, step) for step in every),
        "last_epoch": epochs,
        "ticks": [(height(y), f"{y:g}" if quantity == "loss" else f"{y:.0%}") for y in ticks],
        "series": {
            part: [(x / epochs, height(y)) for x, y in _thin(points)]
            for part, points in series.items()
        },
        "number": max(len(points) for points in series.values()),
    }


def _coverage(report: dict[str, Any]) -> dict[str, Any] | None:
    """What the template needs to plot accuracy over coverage; None without labels or threshold."""
    acceptance = report["acceptance"]
    if acceptance is None or not acceptance["curve"]:
        return None
    points = [(row["coverage"], row["accuracy"]) for row in acceptance["curve"]]
    low = math.floor(20 * min(y for x, y in points if x >= 0.1 or x == points[-1][0])) / 20
    low = min(low, 0.95)
    grids = [[n / 100 for n in range(0, 101, step)] for step in (1, 2, 5, 10, 20)]
    ticks = _first_short([[y for y in grid if low <= y] for grid in grids])
    return {
        "ticks": [((y - low) / (1 - low), f"{y:.0%}") for y in ticks],
        "points": [(x, (max(y, low) - low) / (1 - low)) for x, y in points],
        "accepted": acceptance["labelled"] / report["labelled"],
    }


def _first_short(grids: Iterable[Sequence[float]]) -> Sequence[float]:
    return next(grid for grid in grids if len(grid) <= 7)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``MOST_POINTS`` of them, evenly spread, the first and the last included."""
    kept = np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).round().astype(int)
    return [points[index] for index in kept]
