"""Figures against scikit-learn and cases by hand; the files, and that they are whole or absent."""

import csv
import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)

from mnist.cli import InputError
from mnist.evaluation.report import (
    DISPUTED_TEST_LABELS,
    Example,
    Examples,
    Tally,
    candidates,
    csv_header,
    csv_rows,
    figures,
    publish,
    staging,
    wilson_interval,
)


def random_predictions(number, seed=0):
    """Labels and log probabilities of a model that is right about half of the time."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, number)
    logits = generator.normal(size=(number, 10)) * 2 + 3 * np.eye(10)[labels]
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return labels, log_probabilities.astype(np.float32)


def tally_of(labels, log_probabilities, disputed=None):
    tally = Tally()
    disputed = np.zeros(len(labels), bool) if disputed is None else disputed
    tally.add(labels, log_probabilities, disputed)
    return tally


def test_figures_are_scikit_learns():
    labels, log_probabilities = random_predictions(3000)
    found = figures(tally_of(labels, log_probabilities))
    predictions = log_probabilities.argmax(1)
    assert found["scored"] == found["labelled"] == 3000
    assert found["accuracy"] == accuracy_score(labels, predictions)
    assert 0.3 < found["accuracy"] < 0.95
    assert found["confusion_matrix"] == confusion_matrix(labels, predictions).tolist()
    probabilities = np.exp(log_probabilities.astype(float))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert found["cross_entropy"] == pytest.approx(log_loss(labels, probabilities), rel=1e-6)
    expected = precision_recall_fscore_support(labels, predictions)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in found["digits"]] == pytest.approx(values.tolist())
    assert [row["predicted"] for row in found["digits"]] == np.bincount(predictions).tolist()


def test_calibration_error_as_its_paper_defines_it():
    labels, log_probabilities = random_predictions(3000)
    found = figures(tally_of(labels, log_probabilities))["calibration"]
    confidences = np.exp(log_probabilities.max(1)).astype(float)
    correct = log_probabilities.argmax(1) == labels
    error = 0.0
    for row in found["bins"]:
        inside = (row["from"] < confidences) & (confidences <= row["to"])
        assert row["number"] == inside.sum()
        if inside.any():
            assert row["confidence"] == pytest.approx(confidences[inside].mean())
            assert row["accuracy"] == pytest.approx(correct[inside].mean())
            error += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
        else:
            assert row["confidence"] is row["accuracy"] is None
    assert len(found["bins"]) == 15
    assert found["expected_calibration_error"] == pytest.approx(error)
    assert error > 0.01


def test_figures_by_hand():
    # Three sevens, one of them taken for a one with 0.8; a one taken for a one with 0.5.
    probabilities = np.full((4, 10), 1e-12)
    probabilities[[0, 1, 2, 3], [7, 7, 1, 1]] = [0.9, 0.9, 0.8, 0.5]
    probabilities[2, 7] = 0.2
    labels = np.array([7, 7, 7, 1])
    found = figures(tally_of(labels, np.log(probabilities).astype(np.float32)))
    assert (found["correct"], found["accuracy"]) == (3, 0.75)
    assert found["cross_entropy"] == pytest.approx(-np.log([0.9, 0.9, 0.2, 0.5]).sum() / 4)
    one, seven, two = (found["digits"][digit] for digit in (1, 7, 2))
    assert (one["precision"], one["recall"], one["support"]) == (0.5, 1.0, 1)
    assert (seven["precision"], seven["recall"], seven["support"]) == (1.0, pytest.approx(2 / 3), 3)
    assert (one["f1"], seven["f1"]) == (pytest.approx(2 / 3), pytest.approx(0.8))
    assert two == {
        "digit": 2, "predicted": 0, "precision": None, "recall": None, "f1": None, "support": 0
    }  # fmt: skip
    assert found["confusions"] == [{"label": 7, "prediction": 1, "number": 1}]
    # Bins: two right at 0.9, one wrong at 0.8, one right at 0.5.
    error = found["calibration"]["expected_calibration_error"]
    assert error == pytest.approx((0.2 + 0.8 + 0.5) / 4)
    assert found["without_disputed_labels"] is None


def test_disputed_labels_are_left_out_beside():
    labels, log_probabilities = random_predictions(1000)
    disputed = np.arange(1000) % 7 == 0
    found = figures(tally_of(labels, log_probabilities, disputed))["without_disputed_labels"]
    right = (log_probabilities.argmax(1) == labels)[~disputed]
    assert found["number"] == len(right)
    assert (found["correct"], found["accuracy"]) == (right.sum(), right.mean())
    assert found["disputed_labels"] == sorted(set(DISPUTED_TEST_LABELS))
    assert len(found["disputed_labels"]) == 15


@pytest.mark.parametrize("cuts", [[], [0, 500], [1, 2, 999], list(range(1000))])
def test_sums_add_up_over_parts(cuts):
    labels, log_probabilities = random_predictions(1000)
    labels[::3] = -1
    whole, parts = tally_of(labels, log_probabilities), Tally()
    for chosen in np.split(np.arange(1000), cuts):
        part = tally_of(labels[chosen], log_probabilities[chosen])
        parts.sums += part.sums
    np.testing.assert_allclose(parts.sums, whole.sums, rtol=1e-12)
    assert figures(parts)["confusion_matrix"] == figures(whole)["confusion_matrix"]


def test_without_labels_there_are_predictions_alone():
    _, log_probabilities = random_predictions(50)
    found = figures(tally_of(np.full(50, -1), log_probabilities))
    assert (found["scored"], found["labelled"]) == (50, 0)
    predicted = [row.pop("predicted") for row in found["digits"]]
    assert predicted == np.bincount(log_probabilities.argmax(1), minlength=10).tolist()
    for name in ("correct", "accuracy", "cross_entropy", "confusion_matrix", "calibration"):
        assert found[name] is None
    assert all(set(row.values()) == {row["digit"], None} for row in found["digits"])


def test_unknown_labels_count_for_nothing_but_predictions():
    labels, log_probabilities = random_predictions(1000)
    some = np.where(np.arange(1000) < 400, labels, -1)
    found = figures(tally_of(some, log_probabilities))
    expected = figures(tally_of(labels[:400], log_probabilities[:400]))
    assert (found["scored"], found["labelled"]) == (1000, 400)
    for name in ("correct", "accuracy_interval_95", "cross_entropy", "calibration", "confusions"):
        assert found[name] == expected[name]


@pytest.mark.parametrize(("correct", "number"), [(9816, 10_000), (10_000, 10_000), (0, 7), (1, 2)])
def test_interval_is_wilsons(correct, number):
    expected = binomtest(correct, number).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, number) == pytest.approx(
        (expected.low, expected.high), abs=1e-7
    )


def test_examples_are_the_most_confident_mistakes_whatever_the_parts():
    labels, log_probabilities = random_predictions(500)
    confidences = np.round(np.exp(log_probabilities.max(1)), 2)  # with ties
    predictions = log_probabilities.argmax(1)
    labels[:100] = -1

    def example(i):
        return Example(i, None, labels[i], predictions[i], confidences[i], np.zeros((28, 28)))

    def kept(cuts):
        examples = Examples()
        for chosen in reversed(np.split(np.arange(500), cuts)):
            most, least = candidates(labels[chosen], predictions[chosen], confidences[chosen])
            examples.add(map(example, chosen[most]), map(example, chosen[least]))
        return [e.index for e in examples.mistakes], [e.index for e in examples.least_confident]

    wrong = [i for i in range(100, 500) if labels[i] != predictions[i]]
    mistakes = sorted(wrong, key=lambda i: (-confidences[i], i))[:24]
    least = sorted(range(500), key=lambda i: (confidences[i], i))[:24]
    for cuts in ([], [250], [3, 7, 490]):
        assert kept(cuts) == (mistakes, least)


def test_csv_keeps_every_float32_and_any_file_name():
    _, log_probabilities = random_predictions(20)
    probabilities = np.exp(log_probabilities)
    probabilities[0] = np.float32([1, 0, 1e-30, 1e-45, 0.1, 1 / 3, 0, 0, 0, 0])
    labels = np.array([-1, 3] * 10)
    files = [f"a{i}.png" for i in range(17)] + ['q"uote.png', "com,ma.png", "line\nbreak.png"]
    text = csv_header(True).encode() + csv_rows(np.arange(5, 25), labels, probabilities, files)
    header, *rows = csv.reader(io.StringIO(text.decode(), newline=""))
    assert header == ["index", "label", "prediction", "confidence"] + [
        f"p{i}" for i in range(10)
    ] + ["file"]
    assert [int(row[0]) for row in rows] == list(range(5, 25))
    assert [row[1] for row in rows] == ["", "3"] * 10
    assert [int(row[2]) for row in rows] == probabilities.argmax(1).tolist()
    values = np.array([row[3:14] for row in rows], np.float32)
    assert (values[:, 1:] == probabilities).all() and (values[:, 0] == probabilities.max(1)).all()
    assert [row[14] for row in rows] == files
    plain = csv_rows(np.arange(20), labels, probabilities, None).decode().splitlines()
    assert all(line.count(",") == 13 for line in [csv_header(False), *plain])


def write(output, text):
    with staging(output) as aside:
        (aside / "predictions.csv").write_text(text)
        publish(aside, output, {"is": text}, text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_are_replaced_together_and_nothing_else_is_touched(tmp_path):
    output = tmp_path / "new" / "folder"
    write(output, "one")
    (output / "mine.txt").write_text("mine")
    write(output, "two")
    assert json.loads((output / "report.json").read_text()) == {"is": "two"}
    assert {**contents(output), "report.json": ""} == {
        "mine.txt": "mine", "predictions.csv": "two", "report.html": "two", "report.json": ""
    }  # fmt: skip


def test_a_failure_leaves_what_was_there(tmp_path):
    output = tmp_path / "new" / "folder"

    def fail():
        with staging(output) as aside:
            (aside / "predictions.csv").write_text("half")
            raise InputError("bad images")

    with pytest.raises(InputError, match="bad images"):
        fail()
    assert list(tmp_path.iterdir()) == []
    write(output, "one")
    before = contents(output)
    with pytest.raises(InputError, match="bad images"):
        fail()
    assert contents(output) == before


def test_what_a_killed_evaluation_left_is_removed_by_the_next(tmp_path):
    host = socket.gethostname()
    dead, alive, foreign = (
        tmp_path / f".unfinished-{name}"
        for name in (f"{host}-{2**22 + 1}", f"{host}-{os.getppid()}", "elsewhere-1")
    )
    for folder in (dead, alive, foreign):
        folder.mkdir()
    write(tmp_path, "one")
    assert [folder.exists() for folder in (dead, alive, foreign)] == [False, True, True]


def test_unusable_output_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/sub: Not a directory.*--output-dir"):
        write(Path(tmp_path / "file" / "sub"), "one")
    with pytest.raises(InputError, match=r"file: File exists.*--output-dir"):
        write(Path(tmp_path / "file"), "one")
