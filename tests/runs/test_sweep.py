"""The summary of a sweep, from folders as its tasks leave them."""

import hashlib
import json
import subprocess
import sys

import pytest

from mnist.runs.sweep import summarise, table

NOTHING = hashlib.sha256(b"").hexdigest()


def make_run(folder, name, validation, test=None):
    run = folder / name
    (run / "evaluation/test").mkdir(parents=True)
    (run / "model.safetensors").touch()
    rows = [{"validation/accuracy": 0.99}, {"validation/accuracy": validation}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if test is not None:
        make_report(run, test)


def make_report(run, accuracy, model=b""):
    """Of the model with these bytes, as the evaluator leaves it."""
    hashes = {"sha256": hashlib.sha256(model).hexdigest()}
    report = {"accuracy": accuracy, "model": hashes, "predictions_sha256": NOTHING}
    report["data"] = {"description": "MNIST test images", "images": "t10k"}
    for name in ("predictions.csv", "report.html"):
        (run / "evaluation/test" / name).touch()
    (run / "evaluation/test/report.json").write_text(json.dumps(report))


def make_tasks(folder, *tasks, count=None):
    (folder / ".tasks").mkdir()
    (folder / ".tasks/count").write_text(f"{count or len(tasks)}\n")
    for number, task in enumerate(tasks):
        (folder / ".tasks" / str(number)).write_text(f"{task}\n")


def test_grid_is_ranked_by_validation_and_shows_no_test_accuracy(tmp_path):
    grid = {
        "learning-rate=1e+0+seed=0": (0.5, 0.99),
        "learning-rate=0.1+seed=0": (0.9, 0.6),
        "learning-rate=0.1+seed=1": (0.8, 0.6),
        "learning-rate=0.2+seed=0": (0.88, 0.5),
    }
    for name, accuracies in grid.items():
        make_run(tmp_path, name, *accuracies)
    lost = ["learning-rate=0.2+seed=1 2", "learning-rate=1e+0+seed=1"]
    make_tasks(tmp_path, *(f"{name} 0" for name in grid), *lost, count=8)
    summary = summarise(tmp_path)
    ranking = summary["ranking"]
    assert [row["settings"] for row in ranking] == [
        "learning-rate=0.2",
        "learning-rate=0.1",
        "learning-rate=1e+0",
    ]
    assert ranking[1]["validation_accuracy"] == {
        "mean": pytest.approx(0.85),
        "standard_deviation": pytest.approx(0.0707, abs=1e-4),
        "lowest": 0.8,
        "highest": 0.9,
        "of_each": [0.9, 0.8],
    }
    assert all(row["test_accuracy"] is None for row in ranking)
    assert summary["complete"] == 4 and summary["not_started"] == 2
    assert [run["code"] for run in summary["incomplete"]] == [2, None]
    shown = table(summary)
    assert "4 of 8" in shown and "85.00% ± 7.07 (80.00% to 90.00%)" in shown
    assert "learning-rate=0.2+seed=1, ended with code 2" in shown and "not started: 2" in shown


@pytest.mark.parametrize("command", ["mnist.runs.sweep", "mnist.sweep"])  # the latter is of old
def test_seeds_of_the_same_settings_show_test_accuracy(tmp_path, command):
    for seed, accuracy in enumerate((0.97, 0.98)):
        make_run(tmp_path, f"seed={seed}", 0.9, accuracy)
    make_tasks(tmp_path, "seed=0 0", "seed=1 0")
    words = [sys.executable, "-m", command, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    [row] = json.loads((tmp_path / "summary.json").read_text())["ranking"]
    assert row["test_accuracy"]["of_each"] == [0.97, 0.98]
    assert "97.50% ± 0.71" in done.stdout
    assert done.stdout.strip() == (tmp_path / "summary.txt").read_text().strip()


def test_runs_without_validation_images(tmp_path):
    make_run(tmp_path, "seed=0", None, 0.97)
    make_tasks(tmp_path, "seed=0 0")
    [row] = summarise(tmp_path)["ranking"]
    assert row["validation_accuracy"] is None and row["test_accuracy"]["mean"] == 0.97


def test_sweep_of_nothing_but_failures(tmp_path):
    make_tasks(tmp_path, "seed=0 2", "seed=1 1")
    assert "0 of 2" in table(summarise(tmp_path))


def test_an_accuracy_that_is_not_the_final_models_is_left_out(tmp_path):
    for seed in range(3):
        make_run(tmp_path, f"seed={seed}", 0.9, 0.97)
    make_report(tmp_path / "seed=1", 0.5, b"a checkpoint's")  # somebody had a look
    (tmp_path / "seed=2/evaluation/test/predictions.csv").write_text("half replaced")
    make_tasks(tmp_path, *(f"seed={seed} 0" for seed in range(3)))
    [row] = summarise(tmp_path)["ranking"]
    assert row["test_accuracy"]["of_each"] == [0.97, None, None]


def summarise_folder(folder):
    """As slurm/sweep.sbatch does; what it printed."""
    command = [sys.executable, "-m", "mnist.runs.sweep", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_records_of_runs_are_counted_by_what_they_tell(tmp_path):
    """As slurm/sweep.sbatch leaves them: two complete, one that runs, one that failed, two not
    started, and one of a folder whose record the disk had no room for."""
    for seed in (0, 10):
        make_run(tmp_path, f"seed={seed}", 0.9, 0.97)
    (tmp_path / "seed=6").mkdir()
    (tmp_path / ".tasks").mkdir()
    records = {0: "0\n", 10: "started\n", 2: "started\n", 3: "2\n", 4: "", 5: "", 6: ""}
    for seed, record in records.items():
        (tmp_path / f".tasks/seed={seed}").write_text(record)
    summary = summarise(tmp_path)
    assert summary["tasks"] == 7 and summary["complete"] == 2 and summary["not_started"] == 2
    codes = {run["run"]: run["code"] for run in summary["incomplete"]}
    assert codes == {"seed=2": None, "seed=3": 2, "seed=6": None}
    assert summary["ranking"][0]["runs"] == ["seed=0", "seed=10"]
    assert "there may be more" not in table(summary)


@pytest.mark.parametrize("count", [None, "", "1\n", "-4", "five", "\udce9", "9" * 5000, "1\n5\n"])
def test_folder_of_an_earlier_version_never_counts_below_what_is_there(tmp_path, count):
    for seed in range(4):
        make_run(tmp_path, f"seed={seed}", 0.9, 0.97)
    make_tasks(tmp_path, "seed=0 0", "seed=1 0", "", "\0 damaged", "seed=4")
    (tmp_path / ".tasks/count").unlink()
    if count is not None:
        (tmp_path / ".tasks/count").write_text(count, errors="surrogateescape")
    shown = summarise_folder(tmp_path)
    assert "4 of 5 runs complete" in shown and "seed=4, running or lost" in shown
    assert "not started" not in shown
    assert ("there may be more" in shown) == (count != "1\n")


def test_tasks_that_had_other_runs_before_hide_none(tmp_path):
    for name in ("seed=0", "seed=0.1", "momentum=0.5+seed=0"):
        make_run(tmp_path, name, 0.9, 0.97)
    make_run(tmp_path, "a_friend's", 0.9, 0.97)
    make_tasks(tmp_path, "momentum=0.5+seed=0 0", "momentum=0.9+seed=0", count=4)
    summary = summarise(tmp_path)  # seed=0.1 is what --fresh has moved aside
    assert [row["runs"] for row in summary["ranking"]] == [["momentum=0.5+seed=0"], ["seed=0"]]
    assert summary["tasks"] == 4 and summary["complete"] == 2 and summary["not_started"] == 1


@pytest.mark.parametrize("missing", ["", "nowhere"])
def test_what_is_no_sweep_is_refused_in_one_line(tmp_path, missing):
    command = [sys.executable, "-m", "mnist.runs.sweep", tmp_path / missing]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert str(tmp_path / missing) in done.stderr
