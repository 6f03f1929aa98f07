"""Runs that are interrupted, killed, started twice, or whose files are damaged."""

import errno
import fcntl
import functools
import hashlib
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import termios
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import stress
import torch
import yaml
from fork_worlds import StopAt, in_worlds, loader_of_first
from wandb_logs import history, logs, metrics_only

from mnist import system
from mnist.cli import InputError
from mnist.data import load_mnist
from mnist.distributed import World
from mnist.evaluation.config import parse_evaluate_config
from mnist.evaluation.job import evaluate
from mnist.model import load_model, save_model
from mnist.runs import folder as run_folder
from mnist.runs.checkpoint import newest_checkpoint
from mnist.runs.mirror import NoMirror
from mnist.runs.reports import read_report
from mnist.training import loop
from mnist.training.config import TrainConfig, to_yaml
from mnist.training.job import finish, open_run
from mnist.training.loop import fit

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
JOB = str(ROOT / "jobs/train.py")
# 3,000 images in 60 steps an epoch; 15 epochs take 2 to 4 s.
OPTIONS = (
    "--validation-size 57000 --batch-size 50 --hidden-sizes 256 128 64 32 --threads 1 "
    "--log-every 7 --evaluate none --precision fp32 --products torch"
).split()
LONG = ["--epochs", "15"]
WORLD = World(threads=1)


@pytest.fixture(autouse=True)
def two_thousand_images(monkeypatch):
    """The first 2,000 training images are all that runs of this process have."""
    monkeypatch.setattr(loop, "load_mnist", loader_of_first(2000))


def config(folder, data_dir, **settings):
    defaults = {
        "validation_size": 1000,
        "batch_size": 110,
        "hidden_sizes": (32, 24, 16, 12),
        "runs_dir": folder,
        "data_dir": data_dir,
        "run_name": "run",
        "epochs": 4,
        "log_every": 3,
        "checkpoint_every": 4,
        "precision": "fp32",
        "products": "torch",
    }
    return TrainConfig(**defaults | settings)


def train(settings, stop=None, world=WORLD):
    """The folder of a run that is begun or goes on in this process."""
    with ExitStack() as stack:
        start = open_run(settings, world, stack)
        model = fit(settings, world, start, stop)
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def interrupt(settings, step, world=WORLD):
    with pytest.raises(SystemExit) as stopped:
        train(settings, StopAt(step), world)
    assert stopped.value.code == 75


SETTINGS = {
    "sgd": {"weight_decay": 1e-3, "nesterov": True},
    "adamw": {"optimizer": "adamw", "schedule": "triangular", "warmup": 0.3},
    # Two large layers.
    "bf16": {"precision": "bf16", "hidden_sizes": (96, 704, 16, 12)},
    "bf16 of oneDNN": {
        "precision": "bf16",
        "hidden_sizes": (96, 704, 16, 12),
        "products": "onednn",
    },
    "smoothing": {"label_smoothing": 0.1},
    "tied": {
        "optimizer": "adamw",
        "tied": 0.5,
        "averaging": 0.9,
        "hidden_sizes": (144, 16, 16, 12),
    },
    "record": {"averaging": 0.9, "schedule": "cosine", "warmup": 0.1, "rotation": 12, "elastic": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_run_interrupted_anywhere_ends_with_the_same_bits(tmp_path, data_dir, name, capsys):
    settings = SETTINGS[name]
    world = World(threads=1, precision=torch.bfloat16) if "bf16" in name else WORLD
    alone = config(tmp_path / "alone", data_dir, **settings)
    expected = train(alone, world=world)
    # 10 steps an epoch: inside one, at a row, at an epoch's end, at a row and checkpoint.
    for step in (1, 9, 10, 36):
        victim = config(tmp_path / f"{name}-{step}", data_dir, **settings)
        interrupt(victim, step, world)
        assert f"interrupted at step {step}: saved" in capsys.readouterr().err
        assert (train(victim, world=world) == expected).all()
        assert stress.rows(victim.run_folder) == stress.rows(alone.run_folder)
    victim = config(tmp_path / "often", data_dir, **settings)
    for _ in range(5):
        interrupt(victim, 7, world)
    assert (train(victim, world=world) == expected).all()
    assert stress.rows(victim.run_folder) == stress.rows(alone.run_folder)


def test_request_at_the_last_step_lets_the_run_complete(tmp_path, data_dir):
    settings = config(tmp_path, data_dir)
    train(settings, StopAt(40))


def test_checkpoints_at_steps_and_epochs_and_the_newest_two_stay(tmp_path, data_dir):
    settings = config(tmp_path, data_dir, checkpoint_every=7, epochs=2)
    train(settings)
    names = sorted(path.name for path in (settings.run_folder / "checkpoints").iterdir())
    assert len(names) == 2 and names[-1] == "step-000000020"
    kept = config(
        tmp_path, data_dir, checkpoint_every=7, epochs=2, keep_checkpoints=9, run_name="k"
    )
    for _ in range(1, 20):  # slowly: none is skipped
        interrupt(kept, 1)
    train(kept)
    assert len(list((kept.run_folder / "checkpoints").iterdir())) == 9
    newest = kept.run_folder / "checkpoints" / "step-000000020"
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == state["logged_step"] == 20 and state["precision"] == "fp32"
    assert state["metrics_bytes"] == (kept.run_folder / "metrics.jsonl").stat().st_size
    assert state["settings"]["checkpoint_every"] == 7


@pytest.mark.parametrize(("exact", "processes"), [(True, 2), (True, 1), (False, 2)])
def test_run_begun_with_exact_sums_goes_on_and_says_what_is_no_more(
    tmp_path, data_dir, capsys, exact, processes
):
    settings = config(tmp_path, data_dir)
    interrupt(settings, 5)
    recorded = to_yaml(settings) | {"exact_sums": exact}
    (settings.run_folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    capsys.readouterr()
    with ExitStack() as stack:
        assert open_run(settings, World(size=processes), stack).step == 5
    said = "was begun with --exact-sums, which is no more: results can differ in the last bits"
    assert (said in capsys.readouterr().err) == (exact and processes > 1)


def test_model_of_a_checkpoint_is_a_model_file(tmp_path, data_dir):
    settings = config(tmp_path, data_dir)
    expected = train(settings)
    newest = max((settings.run_folder / "checkpoints").iterdir())
    found = [
        p.detach().numpy().ravel() for p in load_model(newest / "model.safetensors").parameters()
    ]
    assert (np.concatenate(found) == expected).all()


def test_damaged_newest_checkpoint_costs_only_its_steps(tmp_path, data_dir, capsys):
    alone = config(tmp_path / "alone", data_dir)
    expected = train(alone)
    settings = config(tmp_path, data_dir)
    interrupt(settings, 10)
    interrupt(settings, 5)
    checkpoints = settings.run_folder / "checkpoints"
    (checkpoints / "step-000000015" / "optimizer.safetensors").write_bytes(b"damaged")
    assert (train(settings) == expected).all()
    said = capsys.readouterr()
    assert "step-000000015 is skipped: optimizer.safetensors is damaged" in said.err
    assert "goes on from step 10" in said.out
    assert stress.rows(settings.run_folder) == stress.rows(alone.run_folder)
    # For whoever wants to look into it.
    assert len(list(checkpoints.glob("damaged-step-000000015-*"))) == 1


def test_run_interrupted_before_its_first_row_is_evaluated(tmp_path, data_dir, capsys):
    settings = config(tmp_path, data_dir)
    interrupt(settings, 1)
    words = f"--run {settings.run_folder} --data-dir {data_dir} --wandb disabled"
    evaluate(parse_evaluate_config(words.split()))
    report = read_report(settings.run_folder / "evaluation/test")
    assert report["scored"] == 10_000 and report["model"]["step"] == 1
    assert "metrics.jsonl is damaged: 0 of its 0 lines are rows" not in capsys.readouterr().err


def test_damaged_rows_and_environment_do_not_stop_a_run(tmp_path, data_dir, capsys):
    expected = train(config(tmp_path / "alone", data_dir))
    damages = ["", "{}\n", "[1\n", '{"step": "x"}\n' * 9, "\0" * 2000]
    for number, damage in enumerate(damages):
        settings = config(tmp_path / str(number), data_dir)
        interrupt(settings, 12)
        for name in ("metrics.jsonl", "environment.json"):
            (settings.run_folder / name).write_text(damage)
        assert (train(settings) == expected).all(), damage
        assert "has lost rows" in capsys.readouterr().err, damage
    save_model(final_model(settings), settings.run_folder / "model.safetensors")
    finish(settings, WORLD, Recorder(), NoMirror())
    assert "40 steps in" in capsys.readouterr().out


def test_rows_that_cannot_be_written_are_named_with_a_way_out(tmp_path, data_dir):
    settings = config(tmp_path, data_dir)
    settings.run_folder.mkdir(parents=True)
    (settings.run_folder / "config.yaml").write_text(yaml.safe_dump(to_yaml(settings)))
    (settings.run_folder / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics.jsonl: Is a directory: .*move it away"):
        train(settings)


class Recorder:
    """A painter that writes down what it is told to draw, and draws it."""

    def __init__(self):
        self.drawn = []

    def draw(self, function, *arguments, model):
        self.drawn.append(arguments[-1].name)
        function(*arguments, model=model)


@pytest.mark.parametrize("evaluates", ["test", "none"])
def test_report_and_figures_are_the_final_model_s_whatever_was_there(
    tmp_path, data_dir, capsys, evaluates
):
    settings = config(tmp_path, data_dir, evaluate=evaluates)
    folder, painter = settings.run_folder, Recorder()
    interrupt(settings, 10)
    for split in ("test", "validation"):  # somebody has a look
        words = f"--run {folder} --data-dir {data_dir} --split {split} --wandb disabled"
        evaluate(parse_evaluate_config(words.split()))
    earlier = {s: read_report(folder / "evaluation" / s) for s in ("test", "validation")}
    (folder / "figures").mkdir()
    (folder / "figures/loss_curves.png").write_bytes(b"of something else")
    train(settings)
    save_model(final := final_model(settings), folder / "model.safetensors")
    capsys.readouterr()
    finish(settings, WORLD, painter, NoMirror())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for split, of_checkpoint in earlier.items():
        report = read_report(folder / "evaluation" / split)
        assert report["model"]["sha256"] == digest != of_checkpoint["model"]["sha256"]
        assert report["correct"] != of_checkpoint["correct"]
    digits = load_mnist(data_dir, "test")
    inputs = ((digits.images.double() / 255 - 0.1307) / 0.3081).flatten(1)
    right = (final.double()(inputs).argmax(1) == digits.labels).sum().item()
    assert f"{right:,} of 10,000 right" in capsys.readouterr().out
    assert painter.drawn == ["loss_curves.png", "sample_predictions.png"]

    # Once more: nothing is made again.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    finish(settings, WORLD, painter, NoMirror())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert len(painter.drawn) == 2


def final_model(settings):
    newest = newest_checkpoint(settings.run_folder / "checkpoints")
    return load_model(newest / "model.safetensors")


def test_damaged_or_foreign_report_does_not_stand_for_the_run(tmp_path, data_dir, capsys):
    settings = config(tmp_path, data_dir, epochs=1)
    folder, mine = settings.run_folder, tmp_path / "mine.npy"
    train(settings)
    save_model(final_model(settings), folder / "model.safetensors")
    np.save(mine, np.zeros((3, 28, 28), np.uint8))
    report = folder / "evaluation/test/report.json"
    words = f"--run {folder} --images {mine} --output-dir {report.parent} --wandb disabled"
    evaluate(parse_evaluate_config(words.split()))
    finish(settings, WORLD, Recorder(), NoMirror())
    assert read_report(folder / "evaluation/test.1")["scored"] == 3  # the user's stays
    for damage in (b"", b"{}", b"[1", b'{"model": 1, "data": {}}'):
        report.write_bytes(damage)
        finish(settings, WORLD, Recorder(), NoMirror())
        assert read_report(report.parent)["scored"] == 10_000
    (report.parent / "predictions.csv").write_text("cut off")
    finish(settings, WORLD, Recorder(), NoMirror())
    assert len((report.parent / "predictions.csv").read_text().splitlines()) == 10_001
    assert capsys.readouterr().out.count("10,000 right") == 6


def test_what_else_lies_in_a_checkpoint_stops_nothing_and_stays(tmp_path, data_dir):
    alone = config(tmp_path / "alone", data_dir)
    expected = train(alone)
    settings = config(tmp_path, data_dir, keep_checkpoints=1)
    interrupt(settings, 10)
    checkpoints = settings.run_folder / "checkpoints"
    [newest] = checkpoints.iterdir()
    (newest / "evaluation/test").mkdir(parents=True)
    (newest / "evaluation/test/notes.txt").write_text("mine")
    (newest / ".DS_Store").write_bytes(b"a browser's")
    (checkpoints / "step-best").mkdir()
    (checkpoints / ".step-mine").mkdir()
    assert (train(settings) == expected).all()
    names = sorted(path.name for path in checkpoints.iterdir())
    assert [name.rstrip("0123456789") for name in names] == [
        *(".step-mine", "left-in-step-000000010-", "step-", "step-best")
    ]
    assert (checkpoints / names[1] / "evaluation/test/notes.txt").read_text() == "mine"
    assert not (checkpoints / names[1] / "model.safetensors").exists()


def refuse(kind, number):
    """An fsync that fails in this way on folders or on files."""
    real = os.fsync

    def fsync(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("kind", [stat.S_ISDIR, stat.S_ISREG])
def test_file_system_that_cannot_flush_saves_with_one_warning(
    tmp_path, data_dir, monkeypatch, capsys, kind, number
):
    monkeypatch.setattr(system, "_warned", False)
    monkeypatch.setattr(os, "fsync", refuse(kind, number))
    settings = config(tmp_path, data_dir, epochs=1)
    interrupt(settings, 3)
    train(settings)
    said = capsys.readouterr().err.splitlines()
    assert sum("cannot flush this to disk" in line for line in said) == 1
    assert newest_checkpoint(settings.run_folder / "checkpoints").name == "step-000000010"


def test_run_that_cannot_save_says_so_at_once_and_is_not_called_saved(
    tmp_path, data_dir, monkeypatch, capsys
):
    settings = config(tmp_path, data_dir)
    interrupt(settings, 5)
    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", refuse(stat.S_ISREG, errno.EIO))
    monkeypatch.setattr(run_folder, "write_file", lambda *_: None)  # its own disk is well
    sent = []
    mirror = NoMirror()
    mirror.rows = sent.append
    with ExitStack() as stack:
        start = open_run(settings, WORLD, stack)
        with pytest.raises(SystemExit) as stopped:
            fit(settings, WORLD, start, StopAt(20), mirror)
    assert stopped.value.code == 1 and sent == []
    said = capsys.readouterr().err
    assert said.count("THIS RUN IS NOT BEING SAVED: interrupted now, it loses what came after") == 1
    assert "Input/output error" in said.splitlines()[0]
    assert "interrupted at step 25: NOT saved" in said
    monkeypatch.undo()
    monkeypatch.setattr(loop, "load_mnist", loader_of_first(2000))
    assert (train(settings) == train(config(tmp_path / "alone", data_dir))).all()


def test_no_good_checkpoint_is_an_error_that_says_so(tmp_path, data_dir):
    settings = config(tmp_path, data_dir)
    interrupt(settings, 5)
    for file in settings.run_folder.glob("checkpoints/*/model.safetensors"):
        file.unlink()
    before = (settings.run_folder / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"none of its . checkpoints is good.*--fresh"):
        train(settings)
    assert (settings.run_folder / "metrics.jsonl").read_bytes() == before


def test_lost_rows_are_warned_of_and_the_run_goes_on(tmp_path, data_dir, capsys):
    expected = train(config(tmp_path / "alone", data_dir))
    settings = config(tmp_path, data_dir)
    interrupt(settings, 12)
    (settings.run_folder / "metrics.jsonl").write_text("")
    assert (train(settings) == expected).all()
    assert "has lost rows" in capsys.readouterr().err


def test_other_world_or_threads_are_warned_of_and_recorded(tmp_path, data_dir, capsys):
    settings = config(tmp_path, data_dir)
    interrupt(settings, 12)
    assert "warning" not in capsys.readouterr().err
    interrupt(settings, 5, World(threads=2))
    assert "warning: goes on with threads 2 instead of 1" in capsys.readouterr().err
    starts = json.loads((settings.run_folder / "environment.json").read_text())["starts"]
    assert [(one["step"], one["threads"]) for one in starts] == [(0, 1), (12, 2)]


def test_precision_stays_that_of_the_first_start(tmp_path, data_dir):
    half = World(threads=1, precision=torch.bfloat16)
    settings = config(tmp_path, data_dir, precision="auto", hidden_sizes=(96, 24, 16, 12))
    expected = train(
        config(tmp_path / "alone", data_dir, precision="auto", hidden_sizes=(96, 24, 16, 12)),
        world=half,
    )
    interrupt(settings, 12, half)
    assert (train(settings, world=WORLD) == expected).all()


def test_fresh_keeps_the_old_folder_aside(tmp_path, data_dir, monkeypatch, capsys):
    settings = config(tmp_path, data_dir)
    interrupt(settings, 12)
    fresh = config(tmp_path, data_dir, fresh=True, seed=1)
    interrupt(fresh, 7)
    assert "is kept as" in capsys.readouterr().out
    interrupt(config(tmp_path, data_dir, fresh=True), 3)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"run", "run.1", "run.2"}
    assert (tmp_path / "run.1" / "checkpoints" / "step-000000012").exists()
    assert (tmp_path / "run.2" / "checkpoints" / "step-000000007").exists()
    # The same command again, by a launcher's restart: it goes on.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    interrupt(config(tmp_path, data_dir, fresh=True), 2)
    assert "goes on from step 3" in capsys.readouterr().out
    assert not (tmp_path / "run.3").exists()


def test_after_fresh_another_command_goes_on_and_is_named(tmp_path, data_dir, capsys):
    interrupt(config(tmp_path, data_dir, fresh=True), 5)
    assert "the same command without --fresh goes on with" in capsys.readouterr().err
    interrupt(config(tmp_path, data_dir), 5)
    said = capsys.readouterr()
    assert "goes on from step 5" in said.out and "the same command again goes on with" in said.err


def test_fresh_leaves_a_foreign_folder_alone(tmp_path, data_dir):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a run folder"):
        train(config(tmp_path, data_dir, fresh=True))
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_saving_leaves_nothing_behind_of_itself(tmp_path, data_dir):
    settings = config(tmp_path, data_dir)
    half = settings.run_folder / "checkpoints" / ".step-000000099.1"
    interrupt(settings, 5)
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    train(settings)
    assert not half.exists()


# ------------------------------------------------------------------------------ real processes


@contextmanager
def started(words, cwd, **environment):
    """A process, and at the end nobody of its tree."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK")}
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env=clean | {"HF_HOME": str(cwd)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        everyone, _ = (
            stress.tree(psutil.Process(process.pid)) if process.poll() is None else ([], [])
        )
        for one in everyone:
            if one.is_running():
                one.kill()
        process.wait()


def wait_for_training(folder, process, since=0):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        rows = folder / "metrics.jsonl"
        if rows.exists() and rows.stat().st_size > since:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


def newest_step(folder):
    return max((path.name for path in (folder / "checkpoints").glob("step-*")), default="")


def wait_for_checkpoint(folder, process, earlier=""):
    while newest_step(folder) == earlier:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


LINES = {
    "job": [sys.executable, JOB],
    "scripts/train": [ROOT / "scripts/train"],
    "scripts/train of two": [ROOT / "scripts/train", "--processes", "2"],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """Where a run is that nobody interrupted, of one process or of two."""

    @functools.cache
    def folder_of(line):
        folder = tmp_path_factory.mktemp("alone")
        words = [*LINES[line], *OPTIONS, *LONG, "--run-name", "run", "--data-dir", data_dir]
        subprocess.run(list(map(str, words)), cwd=folder, check=True, capture_output=True)
        return folder / "runs" / "run"

    return lambda line: folder_of("scripts/train of two" if "two" in line else "job")


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("job", signal.SIGUSR1),
        ("scripts/train", signal.SIGINT),
        ("scripts/train of two", signal.SIGTERM),
    ],
)
def test_signal_saves_ends_with_75_and_the_same_command_goes_on(
    tmp_path, data_dir, alone, line, number
):
    folder = tmp_path / "runs" / "run"
    words = [*LINES[line], *OPTIONS, *LONG, "--run-name", "run", "--data-dir", data_dir]
    with started(words, tmp_path) as process:
        wait_for_training(folder, process)
        everyone, _ = stress.tree(psutil.Process(process.pid))
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)  # the same request
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - began < 10
    assert process.returncode == 75, said
    (line_,) = [text for text in said.splitlines() if "interrupted" in text]
    assert ": saved" in line_ and "Traceback" not in said
    assert psutil.wait_procs(everyone, timeout=5)[1] == []
    with started(words, tmp_path) as process:
        out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "goes on from step" in out
    stress.compare(folder, alone(line))


def test_a_worker_killed_ends_the_others_and_restarts_go_on(tmp_path, data_dir, alone):
    folder = tmp_path / "runs" / "run"
    options = [
        *OPTIONS,
        *LONG,
        "--run-name",
        "run",
        "--data-dir",
        data_dir,
        "--checkpoint-every",
        "9",
    ]
    with started([ROOT / "scripts/train", "--processes", "2", *options], tmp_path) as process:
        wait_for_checkpoint(folder, process)
        everyone, workers = stress.tree(psutil.Process(process.pid))
        assert len(workers) == 2
        workers[1].kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, 75)
    assert "another process is gone" in said or "SIGTERM" in said
    assert psutil.wait_procs(everyone, timeout=5)[1] == []

    launcher = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --max_restarts 2"
    )
    words = [BIN / "accelerate", "launch", *launcher.split(), "--dynamo_backend", "no"]
    words += ["--main_process_port", "0", JOB, "--expect-world-size", "2", *options]
    saved = newest_step(folder)
    with started(words, tmp_path) as process:
        wait_for_checkpoint(folder, process, saved)  # rows may be far ahead of it
        workers = []
        while not workers:  # none are found while a child of theirs ends
            workers = stress.tree(psutil.Process(process.pid))[1]
        workers[0].kill()
        out, said = process.communicate(timeout=110)
    assert process.returncode == 0, said
    assert out.count("goes on from step") >= 2
    stress.compare(folder, alone("scripts/train of two"))
    assert stress.rows(folder)[-1]["step"] == 15 * 60


def test_world_may_change_in_the_middle(tmp_path, data_dir):
    runs = tmp_path / "runs"
    common = f"--runs-dir {runs} --data-dir {data_dir} --precision fp32 --products torch "
    common += "--threads 1 --batch-size 64 --validation-size 1200 --log-every 50 --epochs 1 "
    # A checkpoint has the weights themselves in float64, and their average, which nothing depends
    # on, in float32.
    common += "--hidden-sizes 64 48 32 16 --averaging 0.9"
    jobs = [[1, "train in float64", f"{common} --run-name alone".split()]]
    for other, far in ((1, ""), (3, " over a network")):
        changing = f"{common} --run-name to{other} --checkpoint-every 40".split()
        jobs += [[2, f"interrupt in float64{far}", changing]]
        jobs += [[other, f"train in float64{far}", changing]]
    in_worlds(jobs)
    one = np.load(runs / "alone" / "weights0.npy")
    for other in (1, 3):
        for rank in range(other):
            changed = np.load(runs / f"to{other}" / f"weights{rank}.npy")
            assert np.abs(one - changed).max() < 1e-6
        starts = json.loads((runs / f"to{other}" / "environment.json").read_text())["starts"]
        assert [(s["step"], s["world_size"]) for s in starts] == [(0, 2), (100, other)]


def test_two_starts_at_once_and_no_stale_lock(tmp_path, data_dir):
    folder = tmp_path / "runs" / "run"
    words = [sys.executable, JOB, *OPTIONS, "--epochs", "4000", "--run-name", "run"]
    words += ["--data-dir", data_dir]
    with started(words, tmp_path) as first:
        wait_for_training(folder, first)
        second = subprocess.run(
            list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert "runs/run is in use by another process" in line
        assert first.poll() is None
        first.kill()
        first.wait()
    with started(words, tmp_path) as third:  # at once: the lock has gone with its holder
        wait_for_training(folder, third, (folder / "metrics.jsonl").stat().st_size)


def test_run_interrupted_twice_is_one_curve_in_wandb(tmp_path, data_dir):
    folder = tmp_path / "runs" / "run"
    words = [sys.executable, JOB, *OPTIONS, "--epochs", "25", "--run-name", "run"]
    words += ["--data-dir", data_dir, "--wandb", "offline", "--checkpoint-every", "20"]
    for number in (signal.SIGTERM, signal.SIGKILL, None):
        rows = folder / "metrics.jsonl"
        with started(words, tmp_path) as process:
            if number is not None:
                wait_for_training(
                    folder, process, 6000 + (rows.stat().st_size if rows.exists() else 0)
                )
                process.send_signal(number)
            out, said = process.communicate(timeout=100)
        assert process.returncode == {signal.SIGTERM: 75, signal.SIGKILL: -9}.get(number, 0), said
    assert "wandb sync" in out and "wandb leet run" in out and "warning" not in said
    sent = [row for log in logs(folder) for row in metrics_only(history(log))]
    assert len(logs(folder)) == 3
    assert sent == [json.loads(line) for line in rows.read_text().splitlines()]


SIGNALLED = """
import sys, time
from mnist.system import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for _ in range(1000):
        time.sleep(0.01)
        if stop.requested and sys.argv[1] == "obey":
            sys.exit(75)
"""


@pytest.fixture
def hangup_not_ignored():
    """Also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup_not_ignored")
def test_hangup_saves_unless_it_was_ignored_at_the_start(tmp_path):
    words = [sys.executable, "-c", SIGNALLED, "obey"]
    for ignored in (False, True):
        process = subprocess.Popen(
            ["nohup", *words] if ignored else words, stdout=subprocess.PIPE, cwd=tmp_path
        )
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        if ignored:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.terminate()
        assert process.wait(2) == 75


GONE = """
import sys, time
from mnist.system import StopRequest
with StopRequest() as stop:
    open("ready", "w").close()
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.1)
    print("said to nobody", flush=True)
    print("nor this", file=sys.stderr, flush=True)
    open("saved", "w").close()
"""


@pytest.mark.usefixtures("hangup_not_ignored")
def test_terminal_that_closes_does_not_keep_a_run_from_saving(tmp_path):
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", GONE],
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    while not (tmp_path / "ready").exists() and process.poll() is None:
        time.sleep(0.01)
    os.close(master)  # the terminal is closed: the kernel sends SIGHUP, writing fails from now on
    assert process.wait(5) == 0 and (tmp_path / "saved").exists()


def test_signals_within_five_seconds_are_one_request_and_a_later_one_ends_at_once(tmp_path):
    words = [sys.executable, "-c", SIGNALLED]
    with started([*words, "obey"], tmp_path) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(2) == 75
    with started([*words, "hang"], tmp_path) as process:
        process.stdout.readline()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.5)
        assert process.poll() is None
        time.sleep(4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 128 + signal.SIGTERM


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, data_dir):
    # Room for two checkpoints of 0.43 MB, not for a third before the first is removed.
    runs = tmp_path / "runs"
    runs.mkdir()
    job = (
        f"{sys.executable} {JOB} --validation-size 59000 --batch-size 200 --threads 1 "
        "--hidden-sizes 64 48 32 16 --run-name run --evaluate none --precision fp32 "
        f"--products torch --data-dir {data_dir}"
    )
    script = tmp_path / "script.sh"
    script.write_text(
        f"mount -t tmpfs -o size=1200k none {runs} || exit 77\n"
        f"{job} --epochs 3 --keep-checkpoints 3\n"
        "code=$?\n"
        f"ls {runs}/run/checkpoints > before; {job} --epochs 3 || exit 1\n"
        "exit $code\n"
    )
    done = subprocess.run(
        ["unshare", "--mount", "bash", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    if done.returncode == 77:
        pytest.skip("may not mount here")
    print(done.stdout, done.stderr)
    assert "no checkpoint of step" in done.stderr and "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(300)
def test_runs_killed_at_random_end_as_if_nothing_had_happened(tmp_path, data_dir):
    # The short form of tests/stress.py: the launcher, a worker, the whole tree.
    assert stress.stress(tmp_path, data_dir, world=2, kills=3, seed=2) >= 1
