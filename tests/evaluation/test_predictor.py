"""The way in from Python: the evaluator's answers for every kind of image, and no torch unasked."""

import csv
import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mnist
from mnist.data import load_mnist
from mnist.evaluation.config import parse_evaluate_config
from mnist.evaluation.job import evaluate
from mnist.model import MLP, save_model


@pytest.fixture(scope="module")
def images(data_dir):
    return load_mnist(data_dir, "test").images[:40].numpy()


@pytest.fixture(scope="module")
def model(with_doubt):
    """With a doubt that some predictions do not pass."""
    return mnist.load(with_doubt(temperature=0.7, threshold=0.95))


def evaluated(model, images, folder, *options):
    """The rows of an evaluation, with numbers as numbers."""
    words = ["--model", model.path, "--images", images, "--output-dir", folder, *options]
    threads = torch.get_num_threads()
    evaluate(parse_evaluate_config([*map(str, words), "--threads", "1"]))
    torch.set_num_threads(threads)
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(found, expected):
    assert found.digits.tolist() == expected.digits.tolist()
    assert (found.images == expected.images).all()
    assert np.array_equal(found.probabilities, expected.probabilities, equal_nan=True)
    assert found.accepted.tolist() == expected.accepted.tolist()
    assert found.treatments.tolist() == expected.treatments.tolist()


# ------------------------------------------------------------------------------------- importing


def test_importing_takes_nothing_along():
    code = (
        "import sys, mnist; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)), dir(mnist))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and "'load'" in done.stdout
    with pytest.raises(AttributeError, match="module 'mnist' has no attribute 'none'"):
        _ = mnist.none
    assert all(getattr(mnist, name).__name__ == name for name in mnist.__all__)
    assert (Path(mnist.__file__).parent / "py.typed").exists()


def test_the_documentation_runs(fast_run, images, tmp_path, monkeypatch):
    shutil.copytree(fast_run, tmp_path / "runs" / "NAME")
    (tmp_path / "digits").mkdir()
    photo = np.full((120, 330), 230, np.uint8)
    for number, image in enumerate(images[:5]):
        Image.fromarray(255 - image).resize((100, 100)).save(tmp_path / f"digits/{number}.png")
        left = 20 + 50 * number + (60 if number else 0)
        pixels = np.asarray(Image.fromarray(image).resize((42, 42)))
        photo[40:82, left : left + 42] -= (0.8 * pixels).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (found,) = finder.find(mnist, "mnist", globs={})
    said = []
    result = runner.run(found, out=said.append)
    assert result.attempted == 6 and not result.failed, "".join(said)


# ------------------------------------------------------------------------------------- answers


def test_answers_are_the_evaluators(model, images, tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    for number, image in enumerate(images):
        picture = Image.fromarray(image if number % 3 == 0 else 255 - image)
        side = 28 if number % 2 else 90
        picture.convert("RGB" if number % 5 else "L").resize((side, side)).save(
            folder / f"{number:02}.png"
        )
    Image.new("L", (60, 60), 200).save(folder / "99.png")  # without a digit
    rows = evaluated(model, folder, tmp_path / "report")
    found = model.predict(folder)
    assert len(found) == len(rows) == 41 and found.digits[-1] == -1
    for row, digit, probabilities, accepted in zip(
        rows, found.digits, found.probabilities, found.accepted, strict=True
    ):
        columns = [row[f"p{d}"] for d in range(10)]
        if digit < 0:
            assert row["prediction"] == "" == "".join(columns) and np.isnan(probabilities).all()
            assert not accepted
        else:
            assert int(row["prediction"]) == digit
            assert np.array_equal(np.array(columns, np.float32), probabilities)
            assert int(row["accepted"]) == accepted
    assert set(found.treatments) == {"as they are", "inverted", "normalised", "without digit"}
    assert 0 < found.accepted.sum() < 40
    files = sorted(folder.iterdir())
    for form in (files, [str(file) for file in files], iter(files), map(Image.open, files)):
        same(model.predict(form), found)
    monochrome = [np.asarray(Image.open(file)) for file in files]
    same(model.predict(monochrome), found)


def test_arrays_of_every_kind(model, images, tmp_path):
    found = model.predict(images)
    floats = (images / 255).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    forms = [
        list(images),
        torch.from_numpy(images),
        images[:, None],
        tmp_path / "images.npy",
        str(tmp_path / "images.npy"),
        [images[:7], [*images[7:20]], images[20:]],
        (Image.fromarray(image) for image in images),
    ]
    for form in forms:
        same(model.predict(form), found)
    for form in (floats, floats.astype(np.float64), torch.from_numpy(floats), list(floats)):
        near = model.predict(form)
        assert near.digits.tolist() == found.digits.tolist()
        assert np.abs(near.probabilities - found.probabilities).max() < 1e-5
        assert (near.images == found.images).all()
    mixed = model.predict([images[0], floats[1], images[2]])
    assert np.abs(mixed.probabilities - found.probabilities[:3]).max() < 1e-5
    colours = np.stack([images] * 3, -1)
    grey = model.predict(list(images), prepare="mnist")
    same(model.predict(colours, prepare="mnist"), grey)
    near = model.predict(np.stack([floats] * 3, -1), prepare="mnist")
    assert near.digits.tolist() == grey.digits.tolist()
    same(model.predict(colours[3], prepare="mnist"), grey[3])
    same(model.predict(colours, prepare="as-is"), model.predict(images, prepare="as-is"))
    dark = model.predict(255 - images, prepare="as-is")
    assert (dark.images == 255 - images).all() and set(dark.treatments) == {"as they are"}
    for channels in (1, 4):  # opaque, as plt.imread has PNGs
        last = np.concatenate([colours, np.full_like(colours[..., :1], 255)], -1)[..., :channels]
        same(model.predict(last, prepare="mnist"), grey)
        same(model.predict(last[3], prepare="mnist"), grey[3])
        near = model.predict((last[3] / 255).astype(np.float32), prepare="mnist")
        assert near.digits.tolist() == grey[3].digits.tolist()
    large = np.kron(255 - images[4], np.ones((5, 5), np.uint8))
    assert model.predict(large).digits.tolist() == [found.digits[4]]
    for nothing in ([], np.zeros((0, 28, 28), np.uint8)):
        empty = model.predict(nothing)
        assert len(empty) == 0 and empty.probabilities.shape == (0, 10)
        assert empty._repr_png_() is None


def test_many_batches_are_one(model, data_dir):
    images = load_mnist(data_dir, "test").images.numpy()
    found = model.predict(images)
    apart = [model.predict(images[start : start + 777]) for start in range(0, len(images), 777)]
    assert np.array_equal(found.probabilities, np.concatenate([a.probabilities for a in apart]))
    labels = load_mnist(data_dir, "test").labels.numpy()
    assert (found.digits == labels).mean() > 0.97


def test_the_callers_image_stays_as_it_is(model, tmp_path):
    picture = Image.fromarray(np.full((1500, 900), 255, np.uint8))
    picture.paste(0, (400, 300, 460, 1100))
    turned = picture.copy()
    turned.getexif()[0x0112] = 6
    before = turned.tobytes()
    found = model.predict([picture, turned])
    assert picture.size == turned.size == (900, 1500) and turned.tobytes() == before
    assert (found.images[0] != found.images[1]).any()  # it lies on its side
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    same(model.predict(tmp_path / "turned.png"), found[1])
    half = (tmp_path / "turned.png").read_bytes()[:300]
    (tmp_path / "half.png").write_bytes(half)
    with pytest.raises(mnist.InputError, match="the image cannot be read"):
        model.predict(Image.open(tmp_path / "half.png"))


def test_parts_and_pictures(model, images, data_dir):
    labels = load_mnist(data_dir, "test").labels[:40].numpy()
    found = model.predict(images)
    assert found[3].digits.tolist() == [found.digits[3]]
    same(found[labels == 1], model.predict(images[labels == 1]))
    assert len(found[:5]) == 5 and len(found[[1, 2]]) == 2
    assert repr(found).startswith("<40 predictions: 7, 2, 1, 0, 4, 1, 4, 9, ")
    assert repr(found).endswith(f", …, {found.accepted.sum()} accepted>")
    blank = model.predict(np.zeros((50, 50), np.uint8))
    assert repr(blank) == "<1 predictions: -, 0 accepted>"
    assert found._repr_png_().startswith(b"\x89PNG")
    assert found.grid(labels).size == (8 * 104, 5 * 126)
    red = [
        (np.asarray(found.grid(known)) == (193, 18, 31)).all(2).any()
        for known in ((labels + 1) % 10, found.digits)
    ]
    assert red == [True, False]
    assert blank.grid().size == (8 * 104, 126)


# ------------------------------------------------------------------------------------- loading


def test_what_can_be_loaded(fast_run, model, images, tmp_path):
    whole = mnist.load(str(fast_run))
    assert whole.step is None and whole.threshold is None
    assert repr(whole) == f"<mnist model {fast_run}/model.safetensors: 784-512-256-128-64-10>"
    assert whole.predict(images).accepted is None
    assert repr(model).endswith(", accepts from 95.0% on>")
    shutil.copytree(fast_run, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    unfinished = mnist.load(tmp_path / "run")
    assert f"step {unfinished.step} of an unfinished run" in repr(unfinished)
    assert unfinished.predict(images).digits.tolist() == whole.predict(images).digits.tolist()
    (checkpoint, *_) = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    assert mnist.load(checkpoint / "model.safetensors").step == unfinished.step
    with pytest.raises(mnist.InputError, match="is in a checkpoint; name its model, "):
        mnist.load(checkpoint)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "none: no such folder of a run, or file of a model"),
        ("empty", "empty: has no weights: neither model.safetensors nor checkpoints"),
        ("text", "text: not a usable model file: "),
    ],
)
def test_what_cannot_be_loaded(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no model")
    with pytest.raises(mnist.InputError, match=re.escape(message)):
        mnist.load(path)
    if path == "none":
        with pytest.raises(mnist.InputError, match=re.escape(message)):
            mnist.read("photo.png", path)


@pytest.mark.parametrize(
    ("images", "message"),
    {
        "range": (np.full((2, 28, 28), 9.0), "the array: expected floats from 0 to 1, found 9.0"),
        "type": (np.zeros((2, 28, 28), np.int64), "the array: expected images of uint8"),
        "flat": (np.zeros((3, 784), np.uint8), "found 3×784: reshape(-1, 28, 28)"),
        "dimensions": (np.zeros((2, 2, 5, 28, 28), np.uint8), "the array: expected images, N×"),
        "channels": (np.zeros((2, 7, 28, 28), np.uint8), "the array: expected images, N×"),
        "labels": (np.zeros(5, np.uint8), "are these labels?"),
        "a number": (7, "the array: expected images, N×"),
        "words": ("none.png", "none.png: "),
        "a folder": ("none", "none: "),
        "nothing": (None, "the array: expected images"),
        "a gradient": (torch.zeros(1, 28, 28, requires_grad=True), "the array: "),
        "no pixels": (Image.new("L", (0, 0)), "the image cannot be read: "),
        "a rare mode": (Image.new("La", (30, 30)), "the image cannot be read: "),
        "32 bits": (Image.new("F", (30, 30)), "expected 8 or 16 bits per pixel, found 32"),
        "in a list": ([np.zeros((28, 28), np.uint8), "none.jpg"], "none.jpg: "),
        "colours out of range": (np.full((9, 9, 3), 2.0), "expected floats from 0 to 1, found 2.0"),
    }.values(),
)
def test_what_cannot_be_predicted(model, images, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mnist.InputError, match=re.escape(message)):
        model.predict(images)


def test_a_mistyped_mode_is_no_mode(model, images):
    with pytest.raises(mnist.InputError, match="prepare takes one of auto, as-is, mnist, not 'as'"):
        model.predict(images, prepare="as")


def test_pillows_limit_is_the_callers(model, tmp_path, monkeypatch):
    Image.new("L", (60, 60)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert len(model.predict(tmp_path / "a.png")) == 1
    assert Image.MAX_IMAGE_PIXELS == 100


def test_as_is_takes_28_by_28_alone(model, tmp_path):
    Image.new("L", (30, 30)).save(tmp_path / "large.png")
    for image in (np.zeros((1, 30, 30)), Image.new("L", (30, 30)), tmp_path / "large.png"):
        with pytest.raises(mnist.InputError, match="30×30"):
            model.predict(image, prepare="as-is")


def test_a_model_that_says_nothing(tmp_path, images):
    network = MLP((32, 24, 16, 12)).initialise(0)
    network.layers[4].bias.data[0] = torch.nan
    save_model(network, tmp_path / "model")
    with pytest.raises(mnist.InputError, match=r"model: the model's output is not finite"):
        mnist.load(tmp_path / "model").predict(images)
