"""What is done to images before they are scored, and how the reports bear it."""

import csv
import json

import numpy as np
import pytest
from fork_worlds import in_worlds
from PIL import Image

from mnist.cli import InputError
from mnist.data import load_mnist
from mnist.evaluation.config import parse_evaluate_config
from mnist.evaluation.inputs import open_images
from mnist.evaluation.job import evaluate, summary
from mnist.evaluation.preparation import TREATMENTS, look_like_mnist, prepare
from mnist.model import MLP, Doubt, save_model
from mnist.runs.reports import headline, mapped_images, telling_predictions

AS_THEY_ARE, INVERTED, NORMALISED, WITHOUT_DIGIT = range(4)


@pytest.fixture(scope="module")
def images(data_dir):
    return load_mnist(data_dir, "test").images[:40].numpy()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    model = MLP((32, 24, 16, 12)).initialise(0)
    model.doubt = Doubt(0.5, 0.14)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(model, path)
    return path


def treat(images, mode="auto"):
    return prepare(images, len(images), mode)


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_of_mnist_looks_like_mnist_and_none_of_it_does_inverted(data_dir, split):
    pixels = load_mnist(data_dir, split).images.numpy()
    assert look_like_mnist(pixels).all() and not look_like_mnist(255 - pixels).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_what_looks_like_mnist_stays_to_the_bit(tmp_path, images, dtype):
    values = images if dtype == np.uint8 else (images / 255).astype(dtype)
    np.save(tmp_path / "images.npy", values)
    made = open_images(tmp_path / "images.npy", None).prepared(0, 40)
    assert (made.treatments == AS_THEY_ARE).all() and not made.sources
    assert np.array_equal(made.images, values.astype(np.float32) if dtype != np.uint8 else values)
    whole = treat(list(made.images))
    assert np.array_equal(whole.images, made.images) and (whole.treatments == AS_THEY_ARE).all()


def test_inverted_images_are_only_inverted(images):
    for made in (treat(255 - images).images, treat(1 - images / np.float32(255)).images * 255):
        assert np.abs(made - images.astype(float)).max() < 1e-3
    assert (treat(255 - images).treatments == INVERTED).all()


def moved(images):
    return np.roll(images, 3, 2)


CHANGES = {
    "moved": moved,
    "smaller": lambda images: np.pad(images[:, ::2, ::2], ((0, 0), (7, 7), (7, 7))),
    "on grey": lambda images: np.maximum(images, 100),
    "in a wide margin": lambda images: np.pad(
        255 - images, ((0, 0), (20, 9), (5, 40)), constant_values=255
    ),
    "enlarged": lambda images: images.repeat(4, 1).repeat(4, 2),
    "bytes of 0 and 1": lambda images: (moved(images) > 127).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_others_are_normalised_to_nearly_what_they_were(images, change):
    made = treat(CHANGES[change](images))
    assert (made.treatments == NORMALISED).all()
    best = [
        max(
            np.corrcoef(np.roll(one, (y, x), (0, 1)).ravel(), other.ravel())[0, 1]
            for y in (-1, 0, 1)
            for x in (-1, 0, 1)
        )
        for one, other in zip(made.images.astype(float), images, strict=True)
    ]
    assert np.median(best) > (0.8 if change == "smaller" else 0.9)
    assert look_like_mnist(made.images).all()


def test_mnist_makes_all_anew_and_keeps_the_first_of_them(images):
    made = treat(images, "mnist")
    assert (made.treatments == NORMALISED).all() and sorted(made.sources) == list(range(8))
    assert np.abs(made.images.astype(int) - images).mean() < 3


def folder_of(path, images):
    """Ten ways in which a digit may come, and an empty page."""
    path.mkdir()
    ink = images[:11].repeat(4, 1).repeat(4, 2)
    Image.fromarray(images[0]).save(path / "00.png")
    Image.fromarray(255 - images[1]).save(path / "01.png")
    Image.fromarray(255 - ink[2]).save(path / "02.jpg", quality=80)
    blue = np.stack([255 - ink[3], 255 - ink[3] // 2, np.full_like(ink[3], 255)], 2)
    Image.fromarray(blue).save(path / "03.png")
    turned = Image.fromarray(np.rot90(255 - ink[4]))
    exif = turned.getexif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees to the right
    turned.save(path / "04.jpg", exif=exif, quality=95)
    alpha = np.zeros((112, 112, 4), np.uint8)
    alpha[..., 3] = ink[5]
    Image.fromarray(alpha).save(path / "05.png")
    Image.fromarray((255 - ink[6].astype(np.uint16)) * 257).save(path / "06.png")
    Image.fromarray(255 - ink[7]).convert("CMYK").save(path / "07.jpg", quality=95)
    Image.fromarray(255 - ink[8]).convert("P").save(path / "08.gif")
    Image.fromarray(ink[9] > 127).save(path / "09.tif")
    Image.new("RGB", (300, 200), (200, 190, 150)).save(path / "10.png")
    return path


def test_a_phone_s_jpeg_with_a_second_picture_is_its_first(tmp_path, images):
    page = Image.fromarray(255 - images[0].repeat(4, 0).repeat(4, 1))
    page.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("L", (56, 56))])
    made = open_images(tmp_path, None).prepared(0, 1)
    assert made.treatments.tolist() == [NORMALISED]


def test_files_of_any_kind(tmp_path, images):
    found = open_images(folder_of(tmp_path / "digits", images), None)
    made = found.prepared(0, 11)
    expected = [AS_THEY_ARE, INVERTED, *[NORMALISED] * 8, WITHOUT_DIGIT]
    assert made.treatments.tolist() == expected
    clean = treat(images[:10].repeat(4, 1).repeat(4, 2)).images
    for number in range(2, 10):
        alike = np.corrcoef(made.images[number].ravel(), clean[number].ravel())[0, 1]
        assert alike > 0.9, number
    assert not made.images[10].any()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "transparent.png", "packed.npy"])
def test_large_photos_are_reduced(tmp_path, name):
    """3,000×2,000 pixels, a stroke of 1,500 of them."""
    page = np.full((2000, 3000), 220, np.uint8)
    page[300:1800, 1400:1600] = 40
    place = tmp_path / "digits"
    if name == "packed.npy":
        np.save(place := tmp_path / name, page[None])
    else:
        place.mkdir()
        image = Image.fromarray(page)
        if name == "transparent.png":
            image = Image.merge("LA", (image, Image.fromarray(255 - page // 2)))
        image.save(place / name)
    made = open_images(place, None).prepared(0, 1)
    assert max(made.sources[0].shape) == 112
    assert made.treatments.tolist() == [NORMALISED]
    assert 19 <= np.count_nonzero(made.images[0].any(1)) <= 21


def run(*options):
    evaluate(parse_evaluate_config([*map(str, options), "--threads", "1"]))


def read(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def reported(tmp_path_factory, model_file, images):
    folder = tmp_path_factory.mktemp("reported")
    labels = np.array([7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 3])
    np.save(folder / "labels.npy", labels)
    names = folder_of(folder / "digits", images)
    run(
        "--model",
        model_file,
        "--images",
        names,
        "--labels",
        folder / "labels.npy",
        "--output-dir",
        folder / "out",
    )
    return folder / "out"


def test_an_image_without_a_digit_has_no_prediction_and_counts_as_wrong(reported):
    rows, report = read(reported)
    assert list(rows[0])[-2:] == ["accepted", "file"]
    empty = rows[10]
    assert (empty["label"], empty["prediction"], empty["confidence"]) == ("3", "", "")
    assert (empty["p0"], empty["p9"], empty["accepted"]) == ("", "", "0")
    assert all(row["prediction"] for row in rows[:10])
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert (report["scored"], report["labelled"], report["without_digit"]) == (11, 11, 1)
    assert (report["correct"], report["accuracy"]) == (right, right / 11)
    assert sum(map(sum, report["confusion_matrix"])) == 10
    assert report["digits"][3]["support"] == 1 and report["digits"][3]["recall"] == 0
    losses = [-np.log(float(row[f"p{row['label']}"])) for row in rows[:10]] + [np.log(10)]
    assert report["cross_entropy"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert report["prepared"] == {"as_they_are": 1, "inverted": 1, "normalised": 8}
    assert any("no digit was found in 1 of 11 images" in line for line in report["warnings"])
    treatments = {row["index"]: row["treatment"] for row in report["prepared_examples"]}
    assert treatments[10] == "without digit" and treatments[1] == "inverted" and 0 not in treatments


def test_doubt_is_what_the_rows_say(reported, model_file):
    rows, report = read(reported)
    confidences = np.array([float(row["confidence"] or 0) for row in rows])
    accepted = np.array([row["accepted"] == "1" for row in rows])
    right = np.array([row["label"] == row["prediction"] for row in rows])
    assert np.array_equal(accepted, confidences >= 0.14) and 0 < accepted.sum() < 10
    found = report["acceptance"]
    assert (found["threshold"], report["model"]["temperature"]) == (0.14, 0.5)
    assert (found["accepted"], found["share"]) == (accepted.sum(), accepted.mean())
    assert (found["labelled"], found["correct"]) == (accepted.sum(), (accepted & right).sum())
    assert found["accuracy"] == (accepted & right).sum() / accepted.sum()
    order = np.argsort(-confidences[:10])
    for row in found["curve"]:
        number = round(row["coverage"] * 11)
        assert row["accuracy"] == pytest.approx(right[order[:number]].mean())
        assert confidences[order[number - 1]] >= row["confidence"] - 1e-9
    assert found["curve"][-1]["coverage"] == pytest.approx(10 / 11)  # one is never accepted
    # Before temperature: the logits halved have the square roots of these probabilities.
    probabilities = np.array([[float(row[f"p{d}"]) for d in range(10)] for row in rows[:1]])
    plain = np.sqrt(probabilities) / np.sqrt(probabilities).sum(1, keepdims=True)
    assert plain.max() < probabilities.max()


def test_a_model_without_doubt_says_nothing_of_it(tmp_path, images):
    save_model(MLP((32, 24, 16, 12)).initialise(0), tmp_path / "model.safetensors")
    np.save(tmp_path / "images.npy", images)
    run(
        "--model",
        tmp_path / "model.safetensors",
        "--images",
        tmp_path / "images.npy",
        "--output-dir",
        tmp_path / "out",
    )
    rows, report = read(tmp_path / "out")
    assert "accepted" not in rows[0]
    assert report["acceptance"] is None and report["without_digit"] == 0
    assert report["model"]["temperature"] is None


def test_labelled_images_without_any_digit_are_a_report_too(tmp_path, model_file):
    np.save(tmp_path / "blank.npy", np.zeros((3, 50, 40), np.uint8))
    np.save(tmp_path / "labels.npy", np.array([1, 2, 2]))
    options = (
        "--model",
        model_file,
        "--images",
        tmp_path / "blank.npy",
        "--output-dir",
        tmp_path / "out",
    )
    run(*options, "--labels", tmp_path / "labels.npy")
    rows, report = read(tmp_path / "out")
    assert [row["prediction"] for row in rows] == ["", "", ""]
    assert (report["accuracy"], report["without_digit"], report["acceptance"]["share"]) == (0, 3, 0)
    assert report["calibration"]["expected_calibration_error"] is None
    assert report["acceptance"]["accuracy"] is None and report["acceptance"]["curve"] == []
    assert headline(report)["without_digit"] == 3


def test_another_preparation_is_said_to_have_changed(tmp_path, model_file, images, capsys):
    np.save(tmp_path / "images.npy", images)
    for mode in ("auto", "mnist"):
        run(
            "--model",
            model_file,
            "--images",
            tmp_path / "images.npy",
            "--output-dir",
            tmp_path / "out",
            "--prepare",
            mode,
        )
    assert (
        "replaced the report of" in (said := capsys.readouterr().out) and "by preparation" in said
    )


def test_a_report_of_an_earlier_version_is_summed_up(reported):
    _, report = read(reported)
    assert any("accepted" in line for line in summary(report, "test"))
    for name in ("acceptance", "prepared", "prepare", "without_digit", "prepared_examples"):
        del report[name]
    assert not any("accepted" in line for line in summary(report, "test"))
    assert "accepted" not in headline(report)


def test_the_page_shows_what_was_done(reported):
    page = (reported / "report.html").read_text()
    for text in (
        "1 as they are, 1 inverted, 8 normalised",
        "no digit found",
        "Accepted",
        "Accuracy over coverage",
    ):
        assert text in page
    assert page.count('class="before"') == 10


def test_w_and_b_bears_rows_without_a_prediction(reported, tmp_path, images):
    rows = telling_predictions(reported / "predictions.csv", 11)
    assert len(rows) == 11 and sum(not row["prediction"] for row in rows) == 1
    numbers = headline(read(reported)[1])
    assert numbers["without_digit"] == 1 and 0 < numbers["accepted"] <= 1
    header = bytes([0, 0, 8, 3]) + np.array([40, 28, 28], ">u4").tobytes()
    (tmp_path / "ours").write_bytes(header + images.tobytes())
    assert np.array_equal(mapped_images(tmp_path / "ours"), images)
    header = bytes([0, 0, 8, 3]) + np.array([40, 14, 56], ">u4").tobytes()
    (tmp_path / "ours").write_bytes(header + images.tobytes())
    assert mapped_images(tmp_path / "ours") is None


def test_any_world_prepares_the_same(tmp_path, model_file, images):
    folder = tmp_path / "digits"
    folder.mkdir()
    for number, image in enumerate(np.concatenate([images, 255 - moved(images)])):
        Image.fromarray(image if number % 9 else np.zeros_like(image)).save(
            folder / f"{number:03}.png"
        )
    jobs = []
    for world in (1, 2, 3):
        options = (
            f"--model {model_file} --images {folder} --output-dir {tmp_path}/{world} --threads 1"
        )
        jobs.append((world, "evaluate", [options.split()]))
    in_worlds(jobs)
    (rows, one), *others = (read(tmp_path / f"{world}") for world in (1, 2, 3))
    assert len(rows) == 80 and one["without_digit"] == 9
    for other_rows, other in others:
        assert other_rows == rows
        for name in ("prepared", "without_digit", "acceptance", "prepared_examples", "warnings"):
            assert other[name] == one[name]


def test_prepare_is_of_images_alone(model_file):
    with pytest.raises(InputError, match="--prepare takes --images"):
        run("--model", model_file, "--prepare", "mnist")
    with pytest.raises(InputError, match="--prepare"):
        run("--model", model_file, "--prepare", "sometimes")


def test_treatments_have_names():
    assert TREATMENTS == ("as they are", "inverted", "normalised", "without digit")
