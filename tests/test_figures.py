"""Figures, and the process that draws them."""

import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from mnist.figures import Painter, compose_grid, draw_curves, draw_distortions, draw_predictions

ROWS = [
    {"epoch": 0.5, "train/loss": 2.0, "train/accuracy": 0.3},
    {
        "epoch": 1.0,
        "train/loss": 0.5,
        "train/accuracy": 0.9,
        "validation/loss": 0.4,
        "validation/accuracy": 0.92,
    },
]
NO_VALIDATION = [{k: v for k, v in row.items() if "validation" not in k} for row in ROWS]


def red_pixels(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int(((pixels[..., 0] > 150) & (pixels[..., 1] < 80) & (pixels[..., 2] < 100)).sum())


def sample(count, wrong=0):
    labels = np.arange(count) % 10
    predictions = labels.copy()
    predictions[:wrong] += 1
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return images, labels, predictions, np.linspace(0.5, 1, count)


def test_mistakes_are_red(tmp_path):
    draw_predictions(*sample(12), "right", tmp_path / "right.png")
    draw_predictions(*sample(12, wrong=2), "wrong", tmp_path / "wrong.png")
    assert red_pixels(tmp_path / "right.png") == 0
    assert red_pixels(tmp_path / "wrong.png") > 50


@pytest.mark.parametrize("count", [1, 8, 9])
def test_grid_grows_with_the_sample(tmp_path, count):
    draw_predictions(*sample(count), "title", tmp_path / "deep" / "grid.png")
    image = Image.open(tmp_path / "deep" / "grid.png")
    rows = -(-count // 8)
    assert image.size == pytest.approx((8 * 104, 126 * rows + 40), abs=1)
    # Below the title it is, pixel by pixel, what W&B gets.
    grid = compose_grid(*sample(count))
    shown = np.asarray(image.convert("RGB"))[-grid.height :, : grid.width]
    assert np.array_equal(shown, np.asarray(grid))


def test_distortions_lie_below_their_images(tmp_path):
    images = np.zeros((3, 5, 28, 28), np.uint8)
    images[2, 4] = 255  # the last in the last row
    draw_distortions(images, "title", tmp_path / "distortions.png")
    pixels = np.asarray(Image.open(tmp_path / "distortions.png").convert("L"))
    head = int(0.4 * 110) + 1
    dark = np.argwhere(pixels[head:] < 50)
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    height, width = pixels[head:].shape
    assert top > 0.6 * height and bottom > 0.97 * height
    assert left > 0.75 * width and right > 0.97 * width


@pytest.mark.parametrize("rows", [ROWS, NO_VALIDATION, ROWS[:1]])
def test_curves_with_and_without_validation(tmp_path, rows):
    draw_curves(rows, "title", tmp_path / "curves.png")
    has_validation = any("validation/loss" in row for row in rows)
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    red = (abs(pixels - [0xD1, 0x49, 0x5B]).sum(2) < 30).sum()
    assert (red > 20) == has_validation
    assert pixels.shape == (440, 1100, 3)


def test_painter_draws_in_its_own_process(tmp_path):
    with Painter() as painter:
        painter.draw(draw_curves, ROWS, "title", tmp_path / "curves.png")
        painter.draw(draw_predictions, *sample(8), "title", tmp_path / "grid.png")
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "grid.png"}
    assert painter._process.returncode == 0


def test_settings_of_a_kernel_or_a_home_change_no_figure(tmp_path, monkeypatch, capfd):
    with Painter() as painter:
        painter.draw(draw_curves, ROWS, "title", tmp_path / "plain.png")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 30\nnonsense: 1\n")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    monkeypatch.setenv("MPLBACKEND", "module://of_a_kernel.that_is_not_here")
    with Painter() as painter:
        painter.draw(draw_curves, ROWS, "title", tmp_path / "curves.png")
    assert capfd.readouterr().err == ""
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_figures_that_fail_are_a_warning(tmp_path, capfd):
    with Painter() as painter:
        painter.draw(draw_curves, [{"nonsense": 1}], "title", tmp_path / "curves.png")
    assert "warning: figures could not be drawn" in capfd.readouterr().err


def test_failing_job_does_not_wait_for_figures():
    started = time.monotonic()
    with pytest.raises(RuntimeError), Painter() as painter:
        raise RuntimeError
    assert time.monotonic() - started < 1
    assert painter._process.wait(timeout=10) == 0


def test_painter_dies_with_its_job():
    code = (
        "import os, sys; from mnist.figures import Painter; p = Painter();"
        "print(p._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    pid = int(job.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie":
        assert time.monotonic() < deadline, "the painter lives on"
        time.sleep(0.1)
