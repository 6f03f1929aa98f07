"""All that is drawn, from plain arrays, for files, pages and W&B alike.

Figures are drawn by Matplotlib, in a process of its own (``python -m mnist.figures``), so that its
import, 1.2 s, and the drawing cost training nothing. Grids and matrices are images of Pillow's,
which W&B takes as they are. Imports no torch.
"""

import atexit
import contextlib
import io
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mnist.system import StopRequest, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_TRAIN, _VALIDATION, _MISTAKE = "#7f9fc4", "#d1495b", "#c1121f"
_DPI = 110  # pixels per inch of a figure
_MODEL_KEY = "Model"  # of a PNG's metadata: the SHA-256 of the model's file


class Painter:
    """A process that imports Matplotlib at once, then draws what it is sent.

    It ends when its input does, so it cannot outlive the job.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-m", "mnist.figures"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def draw(self, function: Callable[..., None], *arguments: Any, model: str = "") -> None:
        """Have ``function`` of this module called there, without waiting for it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # close() says that it has failed
            pickle.dump((function.__name__, arguments, model), self._process.stdin)
            self._process.stdin.flush()

    def __enter__(self) -> "Painter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the figures, unless the job has failed: then leave the process to end alone."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if error is None and self._process.wait():
            print("warning: figures could not be drawn, see above; all else is", file=sys.stderr)


def _draw_what_arrives() -> bool:
    """Returns whether a figure could not be written."""
    for stop in StopRequest.SIGNALS:  # they are for the job, which then ends this
        signal.signal(stop, signal.SIG_IGN)
    # A kernel's backend, a home's fonts or LaTeX are for others: here all looks the same.
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home that is not writable
    figure = _new_figure(1, 1)
    figure.text(0, 0, "loads the fonts")
    figure.savefig(io.BytesIO())
    failed = False
    with contextlib.suppress(EOFError):
        while True:
            function, arguments, model = pickle.load(sys.stdin.buffer)
            try:
                globals()[function](*arguments, model=model)
            except OSError as error:
                print(f"{arguments[-1]}: {error.strerror}", file=sys.stderr, flush=True)
                failed = True
    return failed


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI)


def _save(figure: "Figure", path: Path, model: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = io.BytesIO()
    figure.savefig(contents, format="png", metadata={_MODEL_KEY: model})
    write_file(path, contents.getvalue())


def model_of_figure(path: Path) -> str | None:
    """The SHA-256 of the model that a figure was drawn of; "" if it does not say, as those of
    earlier versions, None if it is not there."""
    try:
        contents = path.read_bytes()
    except OSError:
        return None
    key = f"{_MODEL_KEY}\0".encode()  # in PNG's tEXt, as it is
    start = contents.find(key) + len(key)
    return contents[start : start + 64].decode("latin1") if start >= len(key) else ""


def draw_curves(rows: Sequence[dict[str, Any]], title: str, path: Path, model: str = "") -> None:
    """Loss and accuracy over the epochs, for training and validation, as a PNG.

    Args:
        rows: what ``metrics.jsonl`` holds.
        title: the run's name.
        path: the file to make.
        model: the SHA-256 of the model that they are of; see ``model_of_figure``.
    """
    figure = _new_figure(10, 4)
    figure.suptitle(title, fontsize=11)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.13, top=0.91, wspace=0.17)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        styles = {"train": {"color": _TRAIN}, "validation": {"color": _VALIDATION, "marker": "o"}}
        names = {"train": "training, while learning", "validation": "validation"}
        for part, style in styles.items():
            points = [(r["epoch"], r[key]) for r in rows if (key := f"{part}/{quantity}") in r]
            if points:
                axes.plot(*zip(*points, strict=True), label=names[part], markersize=3.5, **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel("cross-entropy" if quantity == "loss" else quantity)
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right" if quantity == "loss" else "lower right")
        if quantity == "loss":
            _scale_logarithmically(axes)
        else:  # the first rows are near chance; what matters happens near 1
            values = [value for row in rows for key, value in row.items() if key.endswith(quantity)]
            axes.set_ylim(min(0.9, float(np.quantile(values, 0.1))), 1.003)
    _save(figure, path, model)


def _scale_logarithmically(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_predictions(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    confidences: NDArray[Any],
    title: str,
    path: Path,
    model: str = "",
) -> None:
    """The grid of ``compose_grid`` under a title, as a PNG.

    Args:
        images: see there, as for all that follow.
        labels: n digits.
        predictions: n digits.
        confidences: n probabilities of the predictions, 0 to 1.
        title: above the grid.
        path: the file to make.
        model: the SHA-256 of the model that it is of; see ``model_of_figure``.
    """
    grid = np.asarray(compose_grid(images, labels, predictions, confidences))
    height, width, _ = grid.shape
    head = 40  # pixels
    figure = _new_figure(width / _DPI, (height + head) / _DPI)
    size = min(11.0, 11 * 88 / max(1, len(title)))  # a run's name may be long
    figure.suptitle(title, fontsize=size, y=1 - head / 2 / (height + head), va="center")
    figure.figimage(grid)  # pixel by pixel
    _save(figure, path, model)


def draw_distortions(images: NDArray[np.uint8], title: str, path: Path, model: str = "") -> None:
    """Images as they are, and below each several that training makes of it, as a PNG.

    Args:
        images: rows×columns×28×28, 0 to 255; the first row is as it is.
        title: above the grid.
        path: the file to make.
        model: the SHA-256 of the model that it is of; see ``model_of_figure``.
    """
    rows, columns = images.shape[:2]
    tile, gap = 30, 8  # pixels: of an image with its margin; between the first row and the others
    sheet = np.zeros((rows * tile + gap, columns * tile), np.uint8)
    for row in range(rows):
        top = row * tile + (gap if row else 0) + 1
        for column in range(columns):
            left = column * tile + 1
            sheet[top : top + 28, left : left + 28] = images[row, column]
    width, height, head = 0.8 * columns, 0.8 * sheet.shape[0] / tile, 0.4
    figure = _new_figure(width, height + head)
    figure.suptitle(title, fontsize=11)
    axes = figure.add_axes((0, 0, 1, height / (height + head)))
    axes.set_axis_off()
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=255, aspect="auto", interpolation="nearest")
    axes.axhline(tile + gap / 2 - 0.5, color=_TRAIN, linewidth=1)
    _save(figure, path, model)


def compose_grid(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    predictions: NDArray[np.int64],
    confidences: NDArray[Any],
) -> "Image":
    """Images with label, prediction and confidence, eight in a row, mistakes framed in red.

    Args:
        images: n×28×28, 0 to 255.
        labels: n digits, as far as known.
        predictions: n digits, negative where there is none.
        confidences: n probabilities of the predictions, 0 to 1.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns, width, height, side = 8, 104, 126, 84
    size = (columns * width, -(-len(images) // columns) * height)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(12)
    draw = ImageDraw.Draw(sheet)
    known = predictions if labels is None else labels
    for index, (image, label, prediction, confidence) in enumerate(
        zip(images, known, predictions, confidences, strict=True)
    ):
        left, top = width * (index % columns) + 10, height * (index // columns) + 5
        color = "black" if label == prediction else _MISTAKE
        picture = Image.fromarray(255 - image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        if label != prediction:
            draw.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), None, color, 2)
        says = f"says {prediction}, {confidence:.1%}" if prediction >= 0 else "no digit"
        text = says if labels is None else f"label {label}\n{says}"
        draw.multiline_text((left, top + side + 2), text, color, font, spacing=1)
    return sheet


def compose_confusion(counts: NDArray[np.int64]) -> "Image":
    """The confusion matrix, labels down, predictions across, 10×10 counts; it looks as that of
    ``report.html``: mistakes, a few in a thousand, have the scale of colours for themselves."""
    from PIL import Image, ImageDraw, ImageFont

    cell, margin = 46, 46
    side = margin + 10 * cell + 1
    sheet, font = Image.new("RGB", (side, side), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    for digit in range(10):
        middle = margin + (digit + 0.5) * cell
        draw.text((middle, margin / 2), str(digit), "black", font, "mm")
        draw.text((margin / 2, middle), str(digit), "black", font, "mm")
    most = (counts - np.diag(counts.diagonal())).max()
    for (label, prediction), count in np.ndenumerate(counts):
        fill = "#f3f5f7" if label == prediction else "white"
        if count and label != prediction:
            share = 0.1 + 0.6 * count / most
            mixed = 255 * (1 - share) + np.array([224, 83, 60]) * share
            fill = "#{:02x}{:02x}{:02x}".format(*mixed.astype(int))
        left, top = margin + prediction * cell, margin + label * cell
        draw.rectangle((left, top, left + cell, top + cell), fill, "#d5dae0")
        if count:
            draw.text((left + cell / 2, top + cell / 2), f"{count}", "black", font, "mm")
    return sheet


if __name__ == "__main__":
    code = int(_draw_what_arrives())
    atexit._run_exitfuncs()  # Matplotlib's, which remove its temporary folder
    os._exit(code)  # the rest of the teardown is 0.1 s that the job would wait for
