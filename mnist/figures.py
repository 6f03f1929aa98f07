"""Matplotlib figures from plain arrays: loss and accuracy curves, grids of predictions.

They are drawn in a process of their own (``python -m mnist.figures``), so that Matplotlib's import,
1.2 s, and the drawing cost training nothing. Imports no torch.
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

from mnist.system import StopRequest, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VALIDATION, _MISTAKE = "#7f9fc4", "#d1495b", "#c1121f"
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

    return Figure(figsize=(width, height), dpi=110)


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
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    confidences: np.ndarray,
    title: str,
    path: Path,
    model: str = "",
) -> None:
    """A grid of images with label, prediction and confidence, mistakes in red, as a PNG.

    Args:
        images: n×28×28, 0 to 255.
        labels: n digits.
        predictions: n digits.
        confidences: n probabilities of the predictions, 0 to 1.
        title: above the grid.
        path: the file to make.
        model: the SHA-256 of the model that it is of; see ``model_of_figure``.
    """
    columns = 8
    rows = -(-len(images) // columns)
    # One image of all the images, on a grid with room for two lines of text above each: 32 axes
    # take five times as long to draw.
    width, height, text = 42, 46, 16
    sheet = np.zeros((rows * height, columns * width), np.uint8)
    figure = _new_figure(1.2 * columns, 1.31 * rows + 0.4)
    figure.suptitle(title, fontsize=11)
    axes = figure.add_axes((0, 0, 1, 1.31 * rows / (1.31 * rows + 0.4)))
    axes.set_axis_off()
    for index, (image, label, prediction, confidence) in enumerate(
        zip(images, labels, predictions, confidences, strict=True)
    ):
        top, left = height * (index // columns), width * (index % columns)
        sheet[top + text : top + text + 28, left + 7 : left + 35] = image
        axes.text(
            left + width / 2,
            top + text - 1,
            f"label {label}\npredicted {prediction}, {confidence:.1%}",
            ha="center",
            fontsize=8,
            color="black" if label == prediction else _MISTAKE,
        )
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=255, aspect="auto", interpolation="nearest")
    _save(figure, path, model)


def draw_distortions(images: np.ndarray, title: str, path: Path, model: str = "") -> None:
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


if __name__ == "__main__":
    code = int(_draw_what_arrives())
    atexit._run_exitfuncs()  # Matplotlib's, which remove its temporary folder
    os._exit(code)  # the rest of the teardown is 0.1 s that the job would wait for
