"""The mirror against W&B's real client; online against a fake of its server on loopback."""

import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from fake_wandb import FakeWandb, serving
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from wandb_logs import history, logs, metrics_only, records

from mnist.cli import InputError
from mnist.evaluation.config import EvaluateConfig
from mnist.evaluation.report import Tally, csv_header, csv_rows, figures
from mnist.figures import compose_grid
from mnist.runs import mirror as mirrors
from mnist.runs.mirror import (
    Limits,
    Mirror,
    NoMirror,
    WandbSettings,
    open_mirror,
    send_again,
    send_missing,
)
from mnist.runs.wandb_files import plain_name, read_state
from mnist.training.config import TrainConfig

KEY = "f00dfeed" * 5
STEPS = [10, 20, 25, 30, 40, 50, 60, 70, 75, 80]
VALIDATED = (25, 50, 75)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Limits:
    """A home without W&B, and short limits."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "XDG_", "NETRC")):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    short = Limits(patience=0, init=1, finish=3, close=15, flush=0.2, transmit=1, figures=0.2)
    monkeypatch.setattr(mirrors, "LIMITS", short)
    return short


@pytest.fixture
def patient(limits: Limits) -> None:
    """No limit for W&B that a busy machine meets: it runs at the lowest priority."""
    limits.init, limits.finish, limits.close = 20, 30, 90


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    with serving() as fake:
        monkeypatch.setenv("WANDB_BASE_URL", fake.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def make_folder(root: Path) -> Path:
    """A run's folder in the middle of training: no model yet."""
    folder = root / "runs/fast-seed0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 7, "hidden_sizes": [4, 4, 4, 4]}))
    (folder / "environment.json").write_text(json.dumps({"world_size": 1, "commit": "c0ffee"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row(s)) + "\n" for s in STEPS))
    return folder


def row(step: int) -> dict[str, Any]:
    values = {"step": step, "epoch": step / 25, "images": 64 * step, "train/loss": 1 / step}
    values |= {"train/accuracy": 1 - 1 / step, "learning_rate": 0.01, "images_per_second": 1e5 / 3}
    if step in VALIDATED:
        values |= {"validation/loss": 2 / step, "validation/accuracy": 0.9}
    return values


def length(folder: Path, step: int) -> int:
    """Of ``metrics.jsonl`` up to and with the row of ``step``, in bytes."""
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return sum(map(len, lines[: STEPS.index(step) + 1]))


def complete(folder: Path, split: str = "test", number: int = 50) -> Path:
    """Make the run complete, with an evaluation of images of which 4% are mistaken."""
    random = np.random.default_rng(0)
    (folder / "model.safetensors").write_bytes(b"the weights")
    (folder / "figures").mkdir(exist_ok=True)
    of_model = PngInfo()
    of_model.add_text("Model", hashlib.sha256(b"the weights").hexdigest())
    picture = Image.new("RGB", (300, 120), "white")
    picture.save(folder / "figures/loss_curves.png", pnginfo=of_model)
    images = random.integers(0, 256, (number, 28, 28), np.uint8)
    pixels = folder.parent / "images-idx3-ubyte"
    pixels.write_bytes(np.array([0x803, number, 28, 28], ">i4").tobytes() + images.tobytes())
    labels = np.arange(number) % 10
    logits = 5 * np.eye(10)[(labels + (np.arange(number) % 25 == 0)) % 10] + random.random(
        (number, 10)
    )
    probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    tally = Tally()
    tally.add(labels, np.log(probabilities), np.zeros(number, bool))
    report = {"time": "2026-11-23T08:00:00", **figures(tally)}
    report["model"] = {"sha256": hashlib.sha256(b"the weights").hexdigest()}
    report["data"] = {"images": str(pixels), "description": f"MNIST {split} images"}
    mistakes = np.flatnonzero(probabilities.argmax(1) != labels)
    report["mistakes"] = [
        {"index": int(i), "label": int(labels[i]), "prediction": int(probabilities[i].argmax())}
        | {"confidence": float(probabilities[i].max())}
        for i in mistakes
    ]
    output = folder / "evaluation" / split
    output.mkdir(parents=True)
    lines = csv_header(False).encode() + csv_rows(np.arange(number), labels, probabilities, None)
    (output / "predictions.csv").write_bytes(lines)
    (output / "report.html").touch()
    report["predictions_sha256"] = hashlib.sha256(lines).hexdigest()
    (output / "report.json").write_text(json.dumps(report))
    return output


def start(folder: Path, mode: str = "auto", **settings: Any) -> Mirror:
    mirror = Mirror(WandbSettings(mode=mode, **settings))
    mirror.begin(folder)
    return mirror


def train(mirror: Mirror, folder: Path, first: int = 10, last: int = STEPS[-1]) -> None:
    """Send grids and rows as a training does: rows when the checkpoint after them is there."""
    digits = np.arange(8)
    for step in STEPS[STEPS.index(first) : STEPS.index(last) + 1]:
        if step in VALIDATED:
            images = np.full((8, 28, 28), step, np.uint8)
            mirror.grid(step, images, digits, digits.clip(1), np.full(8, 0.5))
            mirror.rows(length(folder, step))
    mirror.rows(length(folder, last))


def whole_run(folder: Path, mode: str = "auto", number: int = 50, close: bool = True) -> Mirror:
    """From the start to the end."""
    mirror = start(folder, mode)
    train(mirror, folder)
    mirror.evaluated("test", complete(folder, number=number))
    mirror.finished()
    if close:
        mirror.close()
    return mirror


def wandb(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wandb", *map(str, words)]
    home = os.environ["HOME"]  # it makes a folder wandb where it is started
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30, cwd=home)


def steps(rows: list[dict[str, Any]]) -> list[int]:
    return [values["step"] for values in metrics_only(rows)]


def kill(mirror: Mirror) -> None:
    """kill -9 of the mirror's process and W&B's own."""
    processes = [psutil.Process(mirror._process.pid)]
    processes += processes[0].children(recursive=True)
    for process in reversed(processes):
        process.kill()
    psutil.wait_procs(processes, 5)
    mirror._outbox.put(None)


def wait_for(condition: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def assert_one_warning(capfd: pytest.CaptureFixture[str]) -> str:
    """The warning; the output has nothing else but the end lines."""
    out, err = capfd.readouterr()
    (warning,) = err.splitlines()
    assert warning.startswith("warning: W&B ")
    assert KEY not in out + err
    assert len(out.splitlines()) <= 2
    return warning


# ------------------------------------------------------------------------------------- offline


def test_offline_run_reads_back(folder, tmp_path, capfd):
    whole_run(folder, number=300)
    out, err = capfd.readouterr()
    assert err == ""
    (log,) = logs(folder)
    rows = history(log)
    assert metrics_only(rows) == [row(step) for step in STEPS]

    shown = {key: value for values in rows for key, value in values.items() if type(value) is dict}
    assert [v["step"] for v in rows if "validation/predictions" in v] == list(VALIDATED)
    assert shown["validation/predictions"]["caption"] == "step 75: 1 of 8 wrong"
    sizes = {"validation/predictions": (832, 126), "figures/loss_curves": (300, 120)}
    sizes |= {"test/confusion_matrix": (507, 507), "test/mistakes": (832, 252)}
    for key, size in sizes.items():
        with Image.open(log.parent / "files" / shown[key]["path"]) as picture:
            assert (picture.format, picture.size) == ("PNG", size)
    table = json.loads((log.parent / "files" / shown["test/predictions"]["path"]).read_text())
    assert table["columns"] == ["image", "index", "label", "prediction", "confidence"]
    assert len(table["data"]) == 200
    wrong = [label != prediction for _, _, label, prediction, _ in table["data"]]
    assert wrong == [True] * 12 + [False] * 188
    confidences = [values[4] for values in table["data"]]
    assert confidences[:12] == sorted(confidences[:12], reverse=True)
    assert confidences[12:] == sorted(confidences[12:])

    summary: dict[str, Any] = {}
    for record in records(log, "summary"):
        summary |= record.get("update", {})
    report = json.loads((folder / "evaluation/test/report.json").read_text())
    assert summary["test/accuracy"] == report["accuracy"] == 0.96
    assert summary["test/loss"] == report["cross_entropy"]
    assert summary["validation/accuracy"] == 0.9 and summary["step"] == 80
    (run,) = records(log, "run")
    assert run["config"]["update"]["environment"]["commit"] == "c0ffee"
    assert run["config"]["update"]["hidden_sizes"] == [4, 4, 4, 4]
    assert (run["project"], run["display_name"]) == ("mnist-ocr", "fast-seed0")
    kinds = {record["type"] for record in records(log, "artifact")}
    assert kinds == {"evaluation", "model", "run_table"}

    assert not any(path.is_file() for path in (tmp_path / "home").rglob("*"))
    sync, view = (line.split(": ")[1] for line in out.splitlines())
    assert shlex.split(sync)[1:] == ["sync", str(folder / "wandb")]
    assert shlex.split(view)[1:] == ["leet", "run", str(log.parent)]
    assert Path(shlex.split(sync)[0]).exists()


def test_recipe_record_is_tracked_as_any_other(tmp_path, data_dir):
    job = Path(__file__).parents[2] / "jobs/train.py"
    small = "--epochs 2 --validation-size 59000 --batch-size 100 --hidden-sizes 144 16 16 12"
    words = f"--recipe record --averaging 0.9 --elastic 1.5 {small} --evaluate none"
    places = ["--data-dir", data_dir, "--runs-dir", tmp_path / "runs", "--run-name", "small"]
    command = [sys.executable, job, *words.split(), *places, "--wandb", "offline"]
    subprocess.run(command, check=True, capture_output=True, timeout=90)
    folder = tmp_path / "runs/small"
    assert (folder / "figures/distortions.png").exists()
    (log,) = logs(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics_only(history(log)) == rows and len(rows) == 2
    (run,) = records(log, "run")
    found = run["config"]["update"]
    assert (found["recipe"], found["elastic"], found["averaging"]) == ("record", 1.5, 0.9)


def test_sync_of_an_offline_run(folder, server):
    whole_run(folder, "offline")
    assert server.operations == []
    wandb("sync", folder / "wandb")
    run = server.run
    assert metrics_only(run.rows) == [row(step) for step in STEPS]
    assert run.summary["test/accuracy"] == 0.96
    assert run.config["seed"]["value"] == 7
    assert run.exit_code == 0
    check_artifacts(run, folder)
    wandb("sync", folder / "wandb")
    assert steps(run.rows) == STEPS


def check_artifacts(run: Any, folder: Path) -> None:
    evaluation = folder / "evaluation/test"
    model, scores = run.artifacts[f"model-{run.id}"], run.artifacts[f"test-{run.id}"]
    assert model["files"] == {"model.safetensors": (folder / "model.safetensors").read_bytes()}
    names = "predictions.csv", "report.json"
    assert scores["files"] == {name: (evaluation / name).read_bytes() for name in names}
    assert (model["artifactTypeName"], scores["artifactTypeName"]) == ("model", "evaluation")
    assert all(artifact["committed"] for artifact in run.artifacts.values())
    pictures = [name for name in run.files if name.endswith(".png")]
    shown = {Path(name).name.rpartition("_")[0].rpartition("_")[0] for name in pictures}
    assert {"confusion_matrix", "mistakes", "loss_curves"} <= shown
    assert all(run.files[name].startswith(b"\x89PNG") for name in pictures)


def test_resumed_offline_after_kill(folder, server):
    for first, last in ((10, 25), (30, 50)):
        mirror = start(folder, "offline")
        train(mirror, folder, first, last)
        wait_for(lambda last=last: logs(folder) and last in steps(history(logs(folder)[-1])))
        kill(mirror)
    mirror = start(folder, "offline")
    train(mirror, folder)  # announces the old rows again
    complete(folder)
    mirror.close()
    assert [steps(history(log)) for log in logs(folder)] == [STEPS[:3], STEPS[3:6], STEPS[6:]]
    wandb("sync", folder / "wandb")
    assert metrics_only(server.run.rows) == [row(step) for step in STEPS]
    assert server.run.exit_code == 0


def test_killed_before_it_wrote(folder, server):
    mirror = start(folder, "offline")
    wait_for(lambda: logs(folder))
    mirror.rows(length(folder, 25))
    kill(mirror)
    mirror = start(folder, "offline")
    train(mirror, folder)
    mirror.close()
    wandb("sync", folder / "wandb")
    assert steps(server.run.rows) == STEPS


# -------------------------------------------------------------------------------------- online


def test_online_run(folder, server, capfd):
    whole_run(folder)
    out, err = capfd.readouterr()
    run = server.run
    assert metrics_only(run.rows) == [row(step) for step in STEPS]
    assert run.summary["test/accuracy"] == 0.96
    assert run.config["seed"]["value"] == 7
    assert run.exit_code == 0
    check_artifacts(run, folder)
    assert (out, err) == (f"wandb       {server.url}/tester/mnist-ocr/runs/{run.id}\n", "")
    axes = {metric.get("1", metric.get("2")) for metric in run.config["_wandb"]["value"]["m"]}
    assert axes == {"step", "epoch", "images", "seconds", "*"}
    # Nothing is left for wandb sync, and the key is nowhere.
    wandb("sync", "--include-online", folder / "wandb")
    assert steps(run.rows) == STEPS
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_place_of_a_run(folder, server, monkeypatch):
    for name, value in {"PROJECT": "p", "ENTITY": "e", "RUN_GROUP": "g", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    start(folder).close()
    run = server.run
    assert (run.project, run.entity, run.attributes["groupName"]) == ("p", "e", "g")
    assert run.attributes["tags"] == ["a", "b"]
    for name in "PROJECT ENTITY RUN_GROUP TAGS".split():  # the same place without being told again
        monkeypatch.delenv(f"WANDB_{name}")
    start(folder).close()
    assert (server.run.project, server.run.entity) == ("p", "e")


def test_options_win(folder, server, monkeypatch):
    for name in "PROJECT ENTITY RUN_GROUP TAGS".split():
        monkeypatch.setenv(f"WANDB_{name}", "other")
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(folder, "online", project="p", entity="e", group="g", tags=("a",)).close()
    run = server.run
    assert (run.project, run.entity, run.attributes["groupName"]) == ("p", "e", "g")
    assert run.attributes["tags"] == ["a"]


def test_key_of_netrc(folder, server, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "home/.netrc"
    netrc.write_text(f"machine 127.0.0.1:{server.server_port}\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    start(folder).close()
    assert len(server.runs) == 1


def test_resumed_online_after_kill(folder, server):
    for first, last in ((10, 25), (30, 50)):
        mirror = start(folder)
        train(mirror, folder, first, last)
        wait_for(lambda last=last: server.runs and last in steps(server.run.rows))
        kill(mirror)
    mirror = start(folder)
    wait_for(lambda: server.operations.count("RunResumeStatus") == 3)
    mirror.rows(length(folder, 60))  # on its way, or not
    kill(mirror)
    mirror = start(folder)
    train(mirror, folder)
    mirror.close()
    assert metrics_only(server.run.rows) == [row(step) for step in STEPS]
    wandb("sync", "--include-online", folder / "wandb")
    assert steps(server.run.rows) == STEPS


def test_offline_then_online(folder, server):
    mirror = start(folder, "offline")
    train(mirror, folder, last=50)
    mirror.close()
    whole_run(folder, "online")
    run = server.run
    assert metrics_only(run.rows) == [row(step) for step in STEPS]
    assert len(run.artifacts) == 3
    wandb("sync", folder / "wandb")
    assert steps(run.rows) == STEPS


def test_unfinished_run_says_so(folder, server):
    mirror = start(folder)
    train(mirror, folder, last=50)
    mirror.close()
    assert server.run.exit_code == 1
    mirror = start(folder)
    train(mirror, folder)
    complete(folder)
    mirror.close()
    assert server.run.exit_code == 0
    assert steps(server.run.rows) == STEPS


def test_evaluator_adds_to_the_run(folder, server, capfd):
    whole_run(folder)
    other = complete(folder, "validation")
    for _ in range(2):  # the second has nothing to do
        mirror = start(folder)
        mirror.evaluated("validation", other)
        mirror.close()
    run = server.run
    assert metrics_only(run.rows) == [row(step) for step in STEPS]
    assert run.summary["validation/calibration_error"] > 0
    assert run.summary["test/accuracy"] == 0.96
    assert [v["step"] for v in run.rows if "validation/mistakes" in v] == [80]
    assert run.exit_code == 0
    assert len(logs(folder)) == 2
    assert capfd.readouterr().err == ""


def test_evaluator_offline(folder, server):
    whole_run(folder, "offline")
    other = complete(folder, "validation")
    mirror = start(folder, "offline")
    mirror.evaluated("validation", other)
    mirror.close()
    assert [steps(history(log)) for log in logs(folder)] == [STEPS, []]
    wandb("sync", folder / "wandb")
    assert metrics_only(server.run.rows) == [row(step) for step in STEPS]
    assert server.run.summary["validation/calibration_error"] > 0
    assert server.run.summary["test/accuracy"] == 0.96
    assert server.run.summary["test/predictions"]["nrows"] == 50


def test_whole_run_again_sends_nothing(folder, server):
    whole_run(folder)
    server.operations.clear()
    mirror = start(folder)
    train(mirror, folder)
    mirror.evaluated("test", folder / "evaluation/test")
    mirror.finished()
    mirror.close()
    assert set(server.operations) <= {"/sdk/otel/v1/metrics"}  # W&B's own telemetry
    assert len(logs(folder)) == 1


def test_complete_run_that_was_killed_before_its_end_is_sent_when_started_again(folder, server):
    mirror = start(folder)
    train(mirror, folder, last=50)
    mirror.close()  # as where the job was killed: no further row, no report, no model
    complete(folder)
    for again in range(2):
        mirror = open_mirror(WandbSettings())
        send_missing(mirror, folder)
        mirror.close()
        assert metrics_only(server.run.rows) == [row(step) for step in STEPS]
        assert server.run.summary["test/accuracy"] == 0.96
        assert {name.partition("-")[0] for name in server.run.artifacts} == {"test", "model", "run"}
        server.operations.clear() if not again else None
    assert set(server.operations) <= {"/sdk/otel/v1/metrics"}
    assert len(logs(folder)) == 2


def test_sending_again_says_by_its_code_whether_the_server_has_all(
    folder, server, tmp_path, capsys, monkeypatch
):
    command = [sys.executable, "-m", "mnist.runs.tracking", folder]  # not complete yet
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "is no complete run" in done.stderr
    complete(folder)
    shutil.copytree(folder / "evaluation/test", other := folder / "evaluation/step-000000050-test")
    report = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps(report | {"model": {"sha256": "another"}}))
    with monkeypatch.context() as without_server:
        without_server.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
        with pytest.raises(SystemExit) as ended:
            send_again(folder)
    assert ended.value.code == 1 and "send it later" in capsys.readouterr().err
    send_again(folder)
    said = capsys.readouterr()
    assert f"W&B has all of {folder}" in said.out and "it is of another model" in said.err
    assert metrics_only(server.run.rows) == [row(step) for step in STEPS]


# -------------------------------------------------------------------------------------- sweeps


def as_agent(monkeypatch: pytest.MonkeyPatch, run_id: str, sweep: str = "s1") -> None:
    """The environment that an agent gives to a trial."""
    values = {"RUN_ID": run_id, "SWEEP_ID": sweep, "PROJECT": f"of-{sweep}", "ENTITY": "team"}
    for name, value in values.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    parameters = Path(os.environ["HOME"]) / f"config-{run_id}.yaml"
    parameters.write_text("wandb_version: 1\nlearning-rate:\n  value: 0.25\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))


@pytest.mark.timeout(240)
def test_trial_of_the_sweep_file_is_the_run_of_its_agent(server, tmp_path, data_dir, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    program = [sys.executable, "-m", "wandb"]
    for words in (["sweep", "docs/sweep.yaml"], ["agent", "--count", "1", "tester/mnist-ocr/s1"]):
        values = {"learning_rate": 1e-3, "nesterov": True, "hidden_sizes": [32, 24, 16, 12]}
        values |= {"epochs": 1, "validation_size": 59_000, "batch_size": 200, "threads": None}
        values |= {"runs_dir": f"{tmp_path}/runs", "data_dir": str(data_dir)}
        args = {name: {"value": value} for name, value in values.items()}
        server.trials = [{"run_id": "trial1", "args": args}]
        subprocess.run([*program, *words], cwd=root, check=True, capture_output=True, timeout=200)
    assert list(server.runs) == ["trial1"] and server.run.exit_code == 0
    assert (server.run.project, server.run.attributes["sweep"]) == ("mnist-ocr", "s1")
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    (last,) = map(json.loads, metrics.read_text().splitlines())
    assert server.run.summary["validation/accuracy"] == last["validation/accuracy"]
    assert server.run.config["hidden_sizes"]["value"] == [32, 24, 16, 12]
    assert server.run.config["nesterov"]["value"] is True


def test_gives_way_until_training_has_ended(patient, folder):
    mirror = start(folder, "offline")
    group = Path(f"/proc/{mirror._process.pid}/autogroup")
    if not group.exists():
        mirror.close()
        pytest.skip("the kernel does not group processes by session")

    def nice() -> int:
        return int(group.read_text().rpartition(" ")[2])

    wait_for(lambda: nice() == 19)
    train(mirror, folder)
    mirror.trained()
    wait_for(lambda: nice() == 0)
    assert psutil.Process(mirror._process.pid).nice() < 10
    mirror.close()


def test_run_stays_the_one_that_is_recorded(patient, folder, server, monkeypatch, capfd):
    as_agent(monkeypatch, "trial1")
    mirror = start(folder)
    train(mirror, folder, last=50)
    mirror.close()
    mirror = start(folder)  # again, by the agent
    train(mirror, folder)
    complete(folder)
    mirror.finished()
    mirror.close()
    assert server.run.config["learning-rate"]["value"] == 0.25  # as the sweep calls it
    for environment in ("another shell", "another agent"):
        for name in "RUN_ID SWEEP_ID PROJECT ENTITY SWEEP_PARAM_PATH".split():
            monkeypatch.delenv(f"WANDB_{name}", raising=False)
        if environment == "another agent":
            as_agent(monkeypatch, "trial7", "s7")
        server.run.attributes.pop("sweep")
        split = "test" if environment == "another shell" else "validation"
        mirror = start(folder)
        evaluation = folder / "evaluation" / split
        mirror.evaluated(split, evaluation if evaluation.exists() else complete(folder, split))
        mirror.close()
        assert server.run.attributes["sweep"] == "s1"
        assert server.run.summary[f"{split}/accuracy"] == 0.96
    assert (server.run.id, server.run.project, server.run.entity) == ("trial1", "of-s1", "team")
    assert steps(server.run.rows) == STEPS
    assert capfd.readouterr().err == ""


def test_evaluation_beside_an_agent_is_not_taken_for_its_run(patient, folder, server, monkeypatch):
    output = complete(folder)
    as_agent(monkeypatch, "trial7")
    mirror = start(folder, project="p")
    mirror.evaluated("test", output)
    mirror.close()
    assert "trial7" not in server.runs and server.run.project == "p"
    assert "sweep" not in server.run.attributes


def test_settings_that_a_sweep_tries_again_are_said_to_be_one_run(folder, monkeypatch, capfd):
    complete(folder)
    (folder / "wandb").mkdir()
    sent = {"finished": "online", "test 2026-11-23T08:00:00": "online"}
    (folder / "wandb/run.json").write_text(json.dumps({"id": "trial1", "sent": sent}))
    as_agent(monkeypatch, "trial2")
    send_missing(NoMirror(), folder)
    assert "as run trial1, so run trial2 of this sweep stays empty" in assert_one_warning(capfd)


# ------------------------------------------------------------------------------------ failures


@dataclass
class Job:
    """A job of its own that mirrored a whole run."""

    folder: Path
    server: FakeWandb
    done: subprocess.CompletedProcess[str]
    again: subprocess.CompletedProcess[str]  # what the warning tells to do, the server well again

    def warning(self) -> str:
        """The one warning; nothing else is said but the end lines."""
        (warning,) = self.done.stderr.splitlines()
        assert warning.startswith("warning: W&B ")
        assert len(self.done.stdout.splitlines()) <= 3
        return warning


def environment(server: FakeWandb, folder: Path) -> dict[str, str]:
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_", "NETRC"))}
    return kept | {"HOME": str(home), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}


def job(folder: str, close: float) -> None:
    """What such a job does; its last line says how long it waited at the end, in seconds."""
    mirrors.LIMITS = Limits(init=1, finish=3, close=close, flush=0.2, transmit=1, figures=0.2)
    run = whole_run(Path(folder), "online", close=False)
    started = time.monotonic()
    run.close()
    print(time.monotonic() - started)


WAYS = ["no key", "malformed key", 401, 403, 404, 500, "refused", "unknown host", "black hole"]
DEATHS = ["file_stream hangs", "file_stream breaks", "CreateArtifact hangs", "/put/ breaks"]
DEATHS += ["CommitArtifact hangs", "file_stream is refused"]


def bound(way: int | str) -> float:
    """Seconds that such a job may wait at its end: what is tested where the server dies, and
    enough for a busy machine elsewhere."""
    return 6 if way in DEATHS else 60


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, Future[Job]]]:
    """A job for each way in which W&B fails, all at the same time since they mostly wait.

    After each, the server is well again, and a user does what the warning says.
    """
    root = tmp_path_factory.mktemp("failures")
    with ExitStack() as stack:
        closed, silent = (stack.enter_context(socket.socket()) for _ in range(2))
        for port in (closed, silent):
            port.bind(("127.0.0.1", 0))
        silent.listen()

        def run(way: Any) -> Job:
            folder = make_folder(root / str(way).replace("/", ""))
            server = stack.enter_context(serving())
            env = environment(server, folder)
            what, _, how = str(way).partition(" ")
            if isinstance(way, int):
                server.fail_with = way
            elif how == "hangs":
                server.die_on = what
            elif how == "breaks":
                server.break_on = what
            elif how == "is refused":
                server.refuse_on = what
            elif way == "no key":
                del env["WANDB_API_KEY"]
            elif way == "malformed key":
                env["WANDB_API_KEY"] = KEY[:12]
            else:
                place = {"unknown host": "host.invalid"}
                for name, port in (("refused", closed), ("black hole", silent)):
                    place[name] = f"127.0.0.1:{port.getsockname()[1]}"
                env["WANDB_BASE_URL"] = f"http://{place[way]}"
            code = f"import test_tracking; test_tracking.job({str(folder)!r}, {bound(way)})"
            command = [sys.executable, "-c", code]
            env["PYTHONPATH"] = (
                f"{Path(__file__).parent}:{Path(__file__).parents[1]}:{env.get('PYTHONPATH', '')}"
            )
            here = folder.parent  # wandb sync makes a folder wandb where it is started
            done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True)
            server.fail_with = server.die_on = server.hang_on = server.break_on = None
            server.refuse_on = None
            command, env = done.stderr.rpartition(": ")[2], environment(server, folder)
            again = subprocess.run(
                command, shell=True, env=env, cwd=here, capture_output=True, text=True
            )
            return Job(folder, server, done, again)

        with ThreadPoolExecutor(6) as pool:
            yield {way: pool.submit(run, way) for way in WAYS + DEATHS}


@pytest.mark.parametrize("way", WAYS + DEATHS, ids=str)
def test_failures_are_bounded(jobs, way):
    folder, done = jobs[way].result().folder, jobs[way].result().done
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < bound(way) + 2
    assert KEY[:12] not in done.stdout + done.stderr
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_server(jobs, way):
    folder, warning = jobs[way].result().folder, jobs[way].result().warning()
    assert "W&B is offline: " in warning
    log = logs(folder)[-1]
    assert log.parent.name.startswith("offline-")
    assert metrics_only(history(log)) == [row(step) for step in STEPS]
    assert shlex.split(warning.rpartition(": ")[2])[1:] == ["sync", str(folder / "wandb")]


@pytest.mark.parametrize("way", WAYS + DEATHS, ids=str)
def test_what_the_warning_says_sends_the_rest(jobs, way):
    again, run = jobs[way].result().again, jobs[way].result().server.run
    assert again.returncode == 0, again.stderr
    assert metrics_only(run.rows) == [row(step) for step in STEPS]
    assert run.summary["test/accuracy"] == 0.96
    check_artifacts(run, jobs[way].result().folder)
    assert run.exit_code == 0


@pytest.mark.parametrize("death", DEATHS)
def test_server_dies(jobs, death):
    assert "has not got everything" in jobs[death].result().warning()


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_never_a_prompt(folder, mode):
    code = (
        "from pathlib import Path; from mnist.runs.mirror import *; import sys;"
        f"mirror = Mirror(WandbSettings(mode={mode!r})); "
        "mirror.begin(Path(sys.argv[1])); mirror.close()"
    )
    terminal, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, timeout=20,
    )  # fmt: skip
    said = os.read(terminal, 65536).decode()
    os.close(terminal)
    os.close(slave)
    assert done.returncode == 0
    assert ("warning" in said) == (mode == "online")
    assert len(said.splitlines()) == 2 + (mode == "online")


def test_stuck_mirror_stops_nobody(folder, capfd, limits):
    limits.close = 1
    mirror = start(folder)
    wait_for(lambda: logs(folder))
    processes = psutil.Process(mirror._process.pid).children(recursive=True)
    assert processes
    os.kill(mirror._process.pid, signal.SIGSTOP)
    started = time.monotonic()
    images, digits = np.zeros((32, 28, 28), np.uint8), np.zeros(32, int)
    for step in range(1000):  # 25 MB; a pipe holds 64 KB
        mirror.grid(step, images, digits, digits, np.zeros(32))
    assert time.monotonic() - started < 0.5
    mirror.close()
    assert time.monotonic() - started < 3
    assert "did not finish within 1 s" in assert_one_warning(capfd)
    assert psutil.wait_procs(processes, 3)[1] == []


def test_crashed_mirror(folder, capfd):
    mirror = start(folder)
    wait_for(lambda: logs(folder))
    kill(mirror)
    train(mirror, folder)
    mirror.close()
    assert "mirror.log" in assert_one_warning(capfd)


def test_signals_are_for_the_job(folder):
    mirror = start(folder)
    wait_for(lambda: logs(folder))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(mirror._process.pid, number)
    train(mirror, folder)
    mirror.close()
    assert steps(history(logs(folder)[-1])) == STEPS


@pytest.mark.parametrize("patience", [0, 30])
def test_ends_after_its_job(folder, server, patience):
    code = (
        "import os, sys, time; from pathlib import Path; from mnist.runs.mirror import *;"
        f"LIMITS.patience = {patience}; mirror = Mirror(WandbSettings());"
        "mirror.begin(Path(sys.argv[1])); mirror.rows(int(sys.argv[2]));"
        "time.sleep(1); print(mirror._process.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, folder, str(length(folder, 50))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        process = psutil.Process(int(job.stdout.readline()))
        if patience:  # a short training is left alone
            assert not server.runs
        else:
            wait_for(lambda: process.children(recursive=True) and server.runs)
        processes = [process, *process.children(recursive=True)]
        job.kill()
        assert psutil.wait_procs(processes, 10)[1] == []
    assert steps(server.run.rows) == STEPS[:6]
    assert server.run.exit_code == 1


# ------------------------------------------------------------------------- folders of any kind


@pytest.mark.parametrize("way", ["a file", "a loose link", "a folder in the place of its log"])
def test_folder_that_cannot_be_written(patient, folder, capfd, way):
    output, home = complete(folder), folder / "wandb"
    if way == "a file":
        home.touch()
    elif way == "a loose link":
        home.symlink_to("nowhere")
    else:
        (home / "mirror.log").mkdir(parents=True)
    mirror = start(folder)
    mirror.evaluated("test", output)
    mirror.close()
    warning = assert_one_warning(capfd)
    assert "has not got this: " in warning and str(home) in warning
    assert "start the same command again" in warning and "mnist.runs.tracking" not in warning


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a folder needs root")
@pytest.mark.parametrize("options", ["-o ro", "-o size=4k"], ids=["read-only", "full"])
def test_run_on_a_disk_that_takes_nothing(folder, tmp_path, options):
    output = complete(folder)
    shutil.move(output, output := tmp_path / "elsewhere")
    code = "import sys; from pathlib import Path; from test_tracking import *; folder, output = "
    code += "map(Path, sys.argv[1:]); limits = mirrors.LIMITS; limits.patience = 0;"
    code += "limits.close = 50; mirror = start(folder);"
    code += "mirror.evaluated('images-x', output); mirror.close()"
    home = folder / "wandb"
    home.mkdir()
    mount = f"mount -t tmpfs {options} none {home} || exit 77\n"
    fill = f"cat /dev/zero > {home}/filler 2> /dev/null\n" if options != "-o ro" else ""
    script = tmp_path / "script"
    words = shlex.join([sys.executable, "-P", "-c", code, str(folder), str(output)])
    script.write_text(mount + fill + words)
    folders = [Path(__file__).parents[up] for up in range(3)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run(
        ["unshare", "--mount", "bash", script], env=env, capture_output=True, text=True, timeout=60
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    (warning,) = done.stderr.splitlines()
    reason = "Read-only file system" if options == "-o ro" else "No space left on device"
    assert reason in warning and str(home) in warning + done.stdout
    assert "with that solved, start the same command again" in warning


NAMES = ["images-my digits (1)", "images-my digits [1]", "images-é", "images-ü", "👍", ".x", "..x"]
NAMES += ["a" * 200, "a" * 199 + "b", "images-a.b", "_a", "-a", "model", "\udcff", "images-ok", ""]


def test_every_name_has_one_of_its_own_that_wandb_takes():
    plain = [plain_name(name, 64) for name in NAMES]
    assert plain[NAMES.index("images-ok")] == "images-ok"
    assert plain[0].startswith("images-my-digits-1-")
    assert len(set(plain)) == len(NAMES)
    code = "import sys; from wandb.sdk.artifacts._validators import validate_artifact_name as take"
    code += "; [take(name) for name in sys.argv[1:]]"
    whole = [plain_name(f"{name}-{'i' * 128}") for name in plain]
    subprocess.run([sys.executable, "-c", code, *plain, *whole], check=True)
    assert all(name.isascii() and "." not in name and name[0].isalnum() for name in plain)


def test_images_of_any_name_are_sent(patient, folder, server, tmp_path, capfd):
    output = complete(folder)
    report = json.loads((output / "report.json").read_text())
    mirror = start(folder)
    for place in ("a", "b"):  # two folders of one name, their reports outside of the run
        shutil.copytree(output, elsewhere := tmp_path / place)
        report |= {"time": place, "data": {"images": f"/{place}/my digits (1)"}}
        (elsewhere / "report.json").write_text(json.dumps(report))
        mirror.evaluated("images-my digits (1)", elsewhere)
    mirror.close()
    assert capfd.readouterr().err == ""
    sent = [name for name in server.run.artifacts if name.startswith("images-my-digits-1-")]
    keys = {key for key in server.run.summary if key.endswith("/accuracy")} - {
        "train/accuracy",
        "validation/accuracy",
    }
    assert len(sent) == len(keys) == 2


DAMAGED = ["", "[]", "{", "\x00", '{"id": 7}', '{"id": "a", "sent": [1]}', '{"id": "a/b"}']
DAMAGED += ['{"id": "a", "project": {}}', '{"id": "a", "sent": {"finished": 1}}', "{}"]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_record_is_not_believed(folder, text):
    (folder / "wandb").mkdir()
    (folder / "wandb/run.json").write_text(text)
    state = read_state(folder)
    assert state.damaged and state.id is None and state.sent == {}


def test_damaged_folder_costs_a_warning(patient, folder, server, capfd):
    output = complete(folder)
    (folder / "wandb").mkdir()
    (folder / "wandb/run.json").write_text('{"id": 7}')
    (folder / "config.yaml").write_text("seed: 1\nseed: [")
    (folder / "environment.json").write_text("[")
    mirror = start(folder)
    mirror.evaluated("test", output)
    mirror.close()
    warning = assert_one_warning(capfd)
    assert "run.json is damaged" in warning and "config.yaml" in warning
    assert server.run.summary["test/accuracy"] == 0.96


# ---------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("value", ["offlin", "", "OFFLINE", " offline", "shared", "true", "0"])
def test_wrong_mode_is_refused(monkeypatch, value):
    monkeypatch.setenv("WANDB_MODE", value)
    for config in (TrainConfig(), EvaluateConfig()):
        with pytest.raises(InputError, match=f"WANDB_MODE takes one of offline, .*not '{value}'"):
            WandbSettings.of(config)
    assert WandbSettings.of(TrainConfig(wandb="offline")).mode == "offline"


@pytest.mark.parametrize("value", ["offline", "dryrun", "online", "run"])
def test_modes_that_wandb_takes(patient, folder, server, monkeypatch, value):
    monkeypatch.setenv("WANDB_MODE", value)
    mirror = Mirror(WandbSettings.of(TrainConfig()))
    mirror.begin(folder)
    mirror.close()
    assert bool(server.runs) == (value in ("online", "run"))
    assert logs(folder)


def test_option_wins_over_a_wrong_mode(patient, folder, server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offlin")
    start(folder, "online").close()
    assert len(server.runs) == 1 and capfd.readouterr().err == ""


def test_disabled(folder, monkeypatch):
    assert type(open_mirror(WandbSettings(mode="disabled"))) is NoMirror
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert type(open_mirror(WandbSettings())) is NoMirror
    assert not (folder / "wandb").exists()


def test_without_wandb(folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "wandb.py").write_text("raise ImportError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start(folder).close()
    assert_one_warning(capfd)


def test_the_job_imports_neither_wandb_nor_torch():
    code = (
        "import sys, mnist.runs.tracking;"
        "print({'wandb', 'torch', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_grid_frames_the_mistakes():
    images = np.zeros((9, 28, 28), np.uint8)
    images[:, 14, 14] = 255
    labels = np.arange(9)
    predictions = labels.copy()
    predictions[[2, 8]] = 0
    picture = np.asarray(compose_grid(images, labels, predictions, np.full(9, 0.5)))
    assert picture.shape == (2 * 126, 8 * 104, 3)
    cells = picture.reshape(2, 126, 8, 104, 3).transpose(0, 2, 1, 3, 4).reshape(16, 126, 104, 3)
    red = (cells == (0xC1, 0x12, 0x1F)).all(3).sum((1, 2))
    assert np.flatnonzero(red > 300).tolist() == [2, 8] and (red[[0, 1, 3]] == 0).all()
    assert (cells[0, 47:50, 52:55] == 0).all()  # the one dark pixel, three times as large
    assert (cells[9:] == 255).all()
    assert (cells[:9, 90:] < 128).any((1, 2, 3)).all()  # each has its text


def test_moved_run_still_syncs(folder, server, tmp_path):
    whole_run(folder, "offline")
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    wandb("sync", moved / "wandb")
    assert steps(server.run.rows) == STEPS
    assert len([name for name in server.run.files if name.endswith(".png")]) == 6
