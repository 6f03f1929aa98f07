"""The evaluator: every image once in any world, figures that follow from its own predictions."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_worlds import in_worlds
from safetensors.numpy import load_file

from mnist.cli import InputError
from mnist.data import MEAN, STD, load_mnist, split_validation
from mnist.distributed import World
from mnist.evaluation import job, scoring
from mnist.evaluation.config import EvaluateConfig, parse_evaluate_config
from mnist.evaluation.inputs import open_images
from mnist.evaluation.job import Weights, evaluate, write_evaluation
from mnist.evaluation.report import DISPUTED_TEST_LABELS
from mnist.evaluation.scoring import score
from mnist.model import MLP, save_model
from mnist.runs.checkpoint import write_checkpoint
from mnist.training.config import TrainConfig, to_yaml

FILES = {"predictions.csv", "report.html", "report.json"}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(MLP((32, 24, 16, 12)).initialise(0), path)
    return path


@pytest.fixture(autouse=True, scope="module")
def as_before():
    """Jobs settle the number of threads for their process: this one has other tests to run."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS", None)
    if variable is not None:
        os.environ["OMP_NUM_THREADS"] = variable


@pytest.fixture(scope="module")
def images(data_dir):
    return load_mnist(data_dir, "test").images[:200].numpy()


def run(*options):
    evaluate(parse_evaluate_config([*map(str, options), "--threads", "1"]))


def table(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def numpy_logits(path, images):
    """The network in NumPy alone, from the file's weights."""
    weights = load_file(path)
    hidden = (images.reshape(len(images), 784) / 255.0 - MEAN) / STD
    for layer in range(5):
        hidden = hidden @ weights[f"layers.{layer}.weight"].T.astype(float)
        hidden += weights[f"layers.{layer}.bias"]
        if layer < 4:
            hidden = np.maximum(hidden, 0)
    return hidden


@pytest.fixture(scope="module")
def mnist_test(tmp_path_factory, model_file, data_dir):
    folder = tmp_path_factory.mktemp("test")
    run("--model", model_file, "--output-dir", folder, "--data-dir", data_dir)
    return folder


def test_predictions_are_those_of_a_network_in_numpy(mnist_test, model_file, data_dir):
    digits = load_mnist(data_dir, "test")
    logits = numpy_logits(model_file, digits.images.numpy())
    rows = table(mnist_test)
    assert [int(row["index"]) for row in rows] == list(range(10_000))
    assert [int(row["label"]) for row in rows] == digits.labels.tolist()
    assert [int(row["prediction"]) for row in rows] == logits.argmax(1).tolist()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = np.array([[float(row[f"p{digit}"]) for digit in range(10)] for row in rows])
    np.testing.assert_allclose(found, probabilities, rtol=1e-5)
    assert [float(row["confidence"]) for row in rows] == found.max(1).tolist()


def test_report_follows_from_predictions(mnist_test):
    rows, report = table(mnist_test), report_of(mnist_test)
    labels, predictions = (
        np.array([int(row[name]) for row in rows]) for name in ("label", "prediction")
    )
    right = labels == predictions
    confidences = np.array([float(row["confidence"]) for row in rows])
    assert report["scored"] == report["expected"] == report["labelled"] == 10_000
    assert (report["correct"], report["accuracy"]) == (right.sum(), right.mean())
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, predictions), 1)
    assert report["confusion_matrix"] == confusion.tolist()
    of_labels = [float(row[f"p{row['label']}"]) for row in rows]
    assert report["cross_entropy"] == pytest.approx(-np.log(of_labels).mean(), rel=1e-6)
    bins = np.ceil(confidences * 15)
    error = sum(abs(right[bins == b].sum() - confidences[bins == b].sum()) for b in range(1, 16))
    assert report["calibration"]["expected_calibration_error"] == pytest.approx(error / 10_000)
    undisputed = np.delete(right, DISPUTED_TEST_LABELS)
    assert report["without_disputed_labels"]["accuracy"] == undisputed.mean()
    wrong = sorted(np.flatnonzero(~right), key=lambda i: (-confidences[i], i))[:24]
    assert [row["index"] for row in report["mistakes"]] == wrong
    assert {path.name for path in mnist_test.iterdir()} == FILES


@pytest.mark.parametrize("size", [1, 4, 15, 16, 17, 33])
def test_batches_change_nothing(tmp_path, model_file, images, size):
    np.save(tmp_path / "images.npy", images[:size])
    options = ("--model", model_file, "--images", tmp_path / "images.npy", "--output-dir")
    run(*options, tmp_path / "whole")
    run(*options, tmp_path / "parts", "--batch-size", 16)
    whole, parts = table(tmp_path / "whole"), table(tmp_path / "parts")
    assert len(whole) == len(parts) == size
    for one, other in zip(whole, parts, strict=True):
        assert (one["index"], one["prediction"]) == (other["index"], other["prediction"])
        assert float(one["confidence"]) == pytest.approx(float(other["confidence"]), abs=1e-6)


def test_any_world_writes_the_same_predictions(tmp_path, model_file, images):
    # Sizes around a batch, and around the worlds; 7 processes of 1 image leave 6 without any.
    sizes = (1, 2, 15, 16, 17, 100)
    labels = np.random.default_rng(1).integers(0, 10, 100)
    jobs = []
    for size in sizes:
        np.save(tmp_path / f"{size}.npy", images[:size])
        np.save(tmp_path / f"{size}-labels.npy", labels[:size])
    for world in (1, 2, 3, 7):
        options = [
            f"--model {model_file} --images {tmp_path}/{size}.npy --labels {tmp_path}/{size}-labels"
            f".npy --output-dir {tmp_path}/{size}-{world} --batch-size 4 --threads 1"
            for size in sizes
        ]
        jobs.append((world, "evaluate", [words.split() for words in options]))
    in_worlds(jobs)
    for size in sizes:
        one = tmp_path / f"{size}-1"
        assert len(table(one)) == size
        for world in (2, 3, 7):
            other = tmp_path / f"{size}-{world}"
            assert {path.name for path in other.iterdir()} == FILES
            first, second = ((f / "predictions.csv").read_bytes() for f in (one, other))
            assert first == second
            first, second = report_of(one), report_of(other)
            assert second["world_size"] == world
            for name in ("scored", "labelled", "confusion_matrix", "mistakes", "least_confident"):
                assert first[name] == second[name]
            assert first["cross_entropy"] == pytest.approx(second["cross_entropy"], rel=1e-12)


def make_run(folder, model_file=None, **settings):
    folder.mkdir()
    config = TrainConfig(**settings)
    (folder / "config.yaml").write_text(json.dumps(to_yaml(config)))  # JSON is YAML
    if model_file:
        (folder / "model.safetensors").write_bytes(model_file.read_bytes())


@pytest.mark.parametrize(
    ("split", "part", "number"), [("validation", 1, 300), ("train", 0, 59_700)]
)
def test_parts_of_the_training_images_are_the_run_s_own(
    tmp_path, model_file, data_dir, split, part, number
):
    make_run(tmp_path / "run", model_file, validation_size=300, seed=3)
    run("--run", tmp_path / "run", "--split", split, "--data-dir", data_dir)
    folder = tmp_path / "run" / "evaluation" / split
    labels = load_mnist(data_dir, "train").labels
    chosen = split_validation(labels, 300, 3)[part]
    rows = table(folder)
    assert [int(row["index"]) for row in rows] == chosen.tolist()
    assert [int(row["label"]) for row in rows] == labels[chosen].tolist()
    assert report_of(folder)["scored"] == number
    assert report_of(folder)["without_disputed_labels"] is None


def test_folder_without_labels_gives_predictions_alone(tmp_path, model_file, images, capsys):
    from PIL import Image

    folder = tmp_path / "scans"
    folder.mkdir()
    for number, image in enumerate(images[:5]):
        Image.fromarray(image).save(folder / f"scan, {number}.png")
    run("--model", model_file, "--images", folder, "--output-dir", tmp_path / "out")
    rows, report = table(tmp_path / "out"), report_of(tmp_path / "out")
    assert [row["file"] for row in rows] == [f"scan, {number}.png" for number in range(5)]
    assert [row["label"] for row in rows] == [""] * 5
    logits = numpy_logits(model_file, images[:5])
    assert [int(row["prediction"]) for row in rows] == logits.argmax(1).tolist()
    assert (report["labelled"], report["accuracy"], report["mistakes"]) == (0, None, None)
    assert report["least_confident"][0]["file"].startswith("scan, ")
    assert "accuracy needs labels" in capsys.readouterr().out


def test_dark_ink_taken_as_it_is_is_warned_of_everywhere(tmp_path, model_file, data_dir, capsys):
    np.save(tmp_path / "dark.npy", 255 - load_mnist(data_dir, "test").images[:40].numpy())
    options = ("--model", model_file, "--images", tmp_path / "dark.npy", "--prepare", "as-is")
    run(*options, "--output-dir", tmp_path / "out", "--batch-size", 16)
    expected = "40 of 40 images look like dark ink on a light ground"
    assert expected in capsys.readouterr().out
    (warning,) = report_of(tmp_path / "out")["warnings"]
    assert expected in warning
    assert expected in (tmp_path / "out" / "report.html").read_text()


def test_unfinished_run_gives_its_newest_good_checkpoint(
    tmp_path, model_file, images, data_dir, capsys
):
    make_run(tmp_path / "run")
    other = tmp_path / "other.safetensors"
    save_model(MLP((32, 24, 16, 12)).initialise(1), other)
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, weights in ((860, other), (1720, model_file), (2580, other)):
        write_checkpoint(checkpoints, step, {"model.safetensors": weights.read_bytes()})
    (checkpoints / "step-000002580" / "model.safetensors").write_bytes(b"damaged")
    np.save(tmp_path / "images.npy", images)
    run("--run", tmp_path / "run", "--images", tmp_path / "images.npy")
    said = capsys.readouterr()
    assert "step-000002580 is skipped: model.safetensors is damaged" in said.err
    assert "not finished" in said.out and "step 1,720" in said.out
    folder = tmp_path / "run" / "evaluation" / "images-images"
    assert report_of(folder)["model"]["step"] == 1720
    logits = numpy_logits(model_file, images)
    assert [int(row["prediction"]) for row in table(folder)] == logits.argmax(1).tolist()


def test_evaluating_again_replaces_the_report(tmp_path, model_file, images):
    for number in (50, 60):
        np.save(tmp_path / "images.npy", images[:number])
        run("--model", model_file, "--images", tmp_path / "images.npy", "--output-dir", tmp_path)
        assert len(table(tmp_path)) == report_of(tmp_path)["scored"] == number


def test_report_on_other_images_stays_and_the_new_one_says_where_it_is(
    tmp_path, monkeypatch, model_file, images, capsys
):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(model_file, folder / "model.safetensors")
    options = ["--model", folder / "model.safetensors", "--images"]
    whose = {"alice": 5, "bob": 6, "carol": 7}
    for name, count in whose.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "digits.npy", images[:count])
        monkeypatch.chdir(tmp_path / name)
        run(*options, "digits.npy")  # the same words, of other images
        said = capsys.readouterr().out
        assert ("stays: this one goes to" in said) == (name != "alice")
    places = sorted((folder / "evaluation").iterdir())
    assert [place.name[:13] for place in places] == 3 * ["images-digits"] and len(places) == 3
    assert sorted(report_of(place)["scored"] for place in places) == [5, 6, 7]
    # The same images again: each report is replaced where it is, and what has changed is said.
    run(*options, "digits.npy")
    assert "replaced the report" not in capsys.readouterr().out
    run(*options, tmp_path / "alice/digits.npy", "--precision", "bf16")
    assert "replaced the report of" in (said := capsys.readouterr().out) and "by precision" in said
    assert sorted((folder / "evaluation").iterdir()) == places
    assert report_of(places[0])["precision"] == "bf16"


def test_folder_that_is_named_is_replaced_for_the_same_images_alone(tmp_path, model_file, images):
    np.save(tmp_path / "one.npy", images[:3])
    np.save(tmp_path / "other.npy", images[:3])
    (tmp_path / "link.npy").symlink_to("one.npy")
    options = ["--model", model_file, "--output-dir", tmp_path / "out", "--images"]
    run(*options, tmp_path / "one.npy")
    run(*options, tmp_path / "link.npy")
    with pytest.raises(InputError, match=r"out has the report on other images .*--output-dir"):
        run(*options, tmp_path / "other.npy")
    (tmp_path / "link.npy").unlink()
    (tmp_path / "link.npy").symlink_to("other.npy")
    with pytest.raises(InputError, match="on other images"):
        run(*options, tmp_path / "link.npy")


@pytest.mark.parametrize("name", ["predictions.csv", "report.json", "report.html"])
def test_files_that_no_evaluation_made_stay(tmp_path, model_file, images, name):
    np.save(tmp_path / "images.npy", images[:3])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine,alone\n")
    with pytest.raises(InputError, match=f"a {name} of other origin"):
        run(
            *("--model", model_file, "--images", tmp_path / "images.npy"),
            *("--output-dir", tmp_path / "out"),
        )
    assert (tmp_path / "out" / name).read_text() == "mine,alone\n"
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_missing_run_or_model_is_said_before_anything_is_fetched(tmp_path):
    for option in ("--run", "--model"):
        with pytest.raises(InputError, match=f"{option} .*typo: no such"):
            run(option, tmp_path / "typo", "--data-dir", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_into_a_checkpoint(tmp_path, model_file, images):
    np.save(tmp_path / "images.npy", images[:3])
    checkpoint = tmp_path / "run/checkpoints/step-000000012"
    checkpoint.mkdir(parents=True)
    shutil.copy(model_file, checkpoint / "model.safetensors")
    (tmp_path / "newest").symlink_to(checkpoint)
    for path in (checkpoint, tmp_path / "newest"):
        run("--model", path / "model.safetensors", "--images", tmp_path / "images.npy")
    report = report_of(tmp_path / "run/evaluation/step-000000012-images-images")
    assert report["model"]["step"] == 12 and report["scored"] == 3
    for options in (
        ["--run", checkpoint],
        ["--model", model_file, "--output-dir", checkpoint / "x"],
    ):
        with pytest.raises(InputError, match="checkpoint"):
            run(*options, "--images", tmp_path / "images.npy")
    assert [path.name for path in checkpoint.iterdir()] == ["model.safetensors"]


def test_look_at_a_run_that_ends_meanwhile_replaces_nothing(
    tmp_path, model_file, images, monkeypatch
):
    folder = tmp_path / "run"
    write_checkpoint(folder / "checkpoints", 12, {"model.safetensors": model_file.read_bytes()})
    np.save(tmp_path / "images.npy", images[:3])
    scored = job.score

    def score_while_it_ends(*arguments):
        shutil.copy(model_file, folder / "model.safetensors")
        return scored(*arguments)

    monkeypatch.setattr(job, "score", score_while_it_ends)
    with pytest.raises(InputError, match="is finished by now"):
        run("--run", folder, "--images", tmp_path / "images.npy")
    assert not (folder / "evaluation").exists()


def bad_model(folder):
    model = MLP((32, 24, 16, 12)).initialise(0)
    with torch.no_grad():
        model.layers[0].bias[0] = torch.nan
    save_model(model, folder / "nan.safetensors")
    return ["--model", folder / "nan.safetensors", "--images", "good.npy"]


def bad_in_the_middle(folder):
    images = np.zeros((200, 28, 28), np.float32)
    images[150] = 3
    np.save(folder / "floats.npy", images)
    return ["--model", "M", "--images", folder / "floats.npy", "--batch-size", "8"]


MISTAKES = {
    "neither run nor model": (["--split", "test"], "--run FOLDER or --model FILE"),
    "both": (["--run", ".", "--model", "M"], "--run FOLDER or --model FILE"),
    "split and images": (["--model", "M", "--images", "good.npy", "--split", "test"], "--split"),
    "labels alone": (["--model", "M", "--labels", "good.npy"], "--labels takes --images"),
    "split of no run": (
        ["--model", "M", "--split", "validation"],
        "--split validation takes --run",
    ),
    "no such run": (["--run", "runs/none"], "--run runs/none: no such run folder"),
    "a run without weights": (["--run", "empty"], "empty: has no weights"),
    "no such model": (["--model", "none", "--images", "good.npy"], "none: "),
    "not a model": (["--model", "good.npy", "--images", "good.npy"], "good.npy: "),
    "no such images": (["--model", "M", "--images", "none"], "none: "),
    "wrong shape": (["--model", "M", "--images", "flat.npy"], "flat.npy: expected images"),
    "too few labels": (
        ["--model", "M", "--images", "good.npy", "--labels", "labels.npy"],
        "expected 200 labels",
    ),
    "model that is not finite": (bad_model, "not finite"),
    "damage in the middle": (bad_in_the_middle, "found 3.0 in image 150"),
    "output is a file": (
        ["--model", "M", "--images", "good.npy", "--output-dir", "good.npy"],
        "--output-dir",
    ),
    "nobody held out": (["--run", "all", "--split", "validation"], "held no images out"),
    "batch of none": (["--model", "M", "--batch-size", "0"], "--batch-size takes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path, monkeypatch, model_file, images, data_dir, mistake
):
    monkeypatch.chdir(tmp_path)
    np.save("good.npy", images)
    np.save("flat.npy", images.reshape(200, 784))
    np.save("labels.npy", np.zeros(199, int))
    Path("empty").mkdir()
    make_run(Path("all"), model_file, validation_size=0)
    options, expected = MISTAKES[mistake]
    if callable(options):
        options = options(tmp_path)
    options = [model_file if word == "M" else word for word in options]
    if "--output-dir" not in options:
        options += ["--output-dir", "out"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as raised:
        run(*options, "--data-dir", data_dir)
    assert expected in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_scored_and_expected_must_agree(tmp_path, model_file, images, monkeypatch):
    np.save(tmp_path / "images.npy", images)
    inputs = open_images(tmp_path / "images.npy", None)
    monkeypatch.setattr(scoring, "rank_slice", lambda count, rank, size: slice(1, count))
    with pytest.raises(RuntimeError, match="scored 184 of 200 images"):
        score(MLP((32, 24, 16, 12)), inputs, World(), 16)


def test_progress_in_plain_lines(tmp_path, model_file, images, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "_SECONDS_BETWEEN_LINES", 0)
    np.save(tmp_path / "images.npy", images)
    inputs = open_images(tmp_path / "images.npy", None, "as-is")
    score(MLP((32, 24, 16, 12)), inputs, World(), 10)
    lines = capsys.readouterr().out.splitlines()
    pattern = r"scored (\d+) of 200 images, [\d,]+ images/s, \d+ s left"
    assert [re.fullmatch(pattern, line)[1] for line in lines] == ["80", "160", "200"]


def test_killed_evaluation_leaves_the_report_before(tmp_path, model_file, images):
    np.save(tmp_path / "images.npy", images)
    output = tmp_path / "out"
    options = ["--model", str(model_file), "--output-dir", str(output), "--threads", "1"]
    options += ["--images", str(tmp_path / "images.npy")]
    run(*options)
    np.save(tmp_path / "images.npy", np.zeros((400_000, 28, 28), np.uint8))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    job = Path(__file__).parents[2] / "jobs/evaluate.py"
    process = subprocess.Popen([sys.executable, job, *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            half = [p for p in output.glob(".unfinished-*/predictions.csv") if p.stat().st_size]
            if half or process.poll() is not None:
                break
            time.sleep(0.1)
        assert half and process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert left == before
    np.save(tmp_path / "images.npy", images)
    run(*options)
    assert {path.name for path in output.iterdir()} == FILES


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_is_one_line_and_the_report_before_stays(tmp_path, model_file, images):
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "many.npy", np.repeat(images, 50, axis=0))
    disk = tmp_path / "disk"
    disk.mkdir()
    job = Path(__file__).parents[2] / "jobs/evaluate.py"
    command = f"{sys.executable} {job} --model {model_file} --output-dir {disk}/out --threads 1"
    command += f" --images {tmp_path}/images.npy"
    script = tmp_path / "script.sh"
    script.write_text(
        f"mount -t tmpfs -o size=1m none {disk} || exit 77\n"
        f"{command} || exit 1\n"
        f"sha256sum {disk}/out/* > before; mv {tmp_path}/many.npy {tmp_path}/images.npy\n"
        f"{command}\n"
        "code=$?\n"
        f"sha256sum --check --quiet before && ls -A {disk}/out > names; exit $code\n"
    )
    done = subprocess.run(
        ["unshare", "--mount", "bash", script], cwd=tmp_path, capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip("may not mount here")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line and "--output-dir" in line
    assert set((tmp_path / "names").read_text().split()) == FILES


def test_precision_is_the_world_s(tmp_path, model_file, images):
    np.save(tmp_path / "images.npy", images)
    inputs = open_images(tmp_path / "images.npy", None)
    full = np.array(score_table(model_file, inputs, torch.float32, tmp_path / "fp32"))
    half = np.array(score_table(model_file, inputs, torch.bfloat16, tmp_path / "bf16"))
    assert report_of(tmp_path / "bf16")["precision"] == "bf16"
    assert 1e-6 < np.abs(full - half).max() < 0.05


def score_table(model_file, inputs, precision, folder):
    from mnist.model import load_model

    weights = Weights(path=model_file)
    world = World(precision=precision)
    batch_size = EvaluateConfig().batch_size
    write_evaluation(load_model(model_file), weights, inputs, folder, world, batch_size)
    return [[float(row[f"p{digit}"]) for digit in range(10)] for row in table(folder)]
