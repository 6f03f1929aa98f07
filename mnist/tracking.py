"""A run's folder mirrored to Weights & Biases, by a process of its own.

The training process sends that process (``python -m mnist.tracking``) a few small messages and
never waits for it but at the end, for a bounded time. All that W&B gets is read from the run's
folder, so nothing is lost with it: ``python -m mnist.tracking runs/NAME`` sends whatever W&B does
not hold yet. Imports no torch; W&B is imported by that process alone.
"""

import contextlib
import csv
import glob
import hashlib
import heapq
import json
import os
import pickle
import queue
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from mnist.config import EvaluateConfig, InputError, TrainConfig, exit_codes, read_yaml
from mnist.figures import model_of_figure
from mnist.metrics import parse_rows
from mnist.report import SPLITS, read_report, report_of_run, sha256
from mnist.system import StopRequest, write_file

if TYPE_CHECKING:
    import wandb
    from PIL.Image import Image

_TABLE_ROWS = 200
_MISTAKE = "#c1121f"
_SAYS_LOST = "Fatal error while uploading data"  # in what W&B prints; finish() says nothing
_MODES = ("offline", "dryrun", "online", "run", "disabled")  # of WANDB_MODE; in pairs the same


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Where and how a run is mirrored; None leaves it to ``WANDB_*``, then to defaults."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Limits:
    """Seconds that W&B may take; a job is delayed by ``close`` at most."""

    patience: float = 30.0  # before W&B is opened, unless training ends earlier
    init: float = 10.0  # W&B takes 5.4 s more before it gives up
    finish: float = 20.0
    close: float = 30.0
    flush: float = 2.0  # between writes to the local log
    transmit: float = 5.0  # between messages to the server
    figures: float = 5.0  # wait for the figures that another process draws


LIMITS = Limits()


# --------------------------------------------------------------------------- in the job's process


class NoMirror:
    """What a job without W&B has, and every rank but the first."""

    def begin(self, run_folder: Path, adopts: bool | None = None) -> None:
        """This is the run; comes before all that follows.

        Args:
            run_folder: of the run.
            adopts: whether a run that W&B does not have yet becomes there the one that the
                environment names, as an agent of a sweep has it; by default, if it is not complete:
                an evaluation may be started beside another run's training.
        """

    def rows(self, length: int) -> None:
        """The first ``length`` bytes of ``metrics.jsonl`` are final: send what is new of them."""

    def grid(
        self,
        step: int,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        predictions: NDArray[np.int64],
        confidences: NDArray[Any],
    ) -> None:
        """Sample predictions, to go out with the row of ``step``, so before ``rows`` covers it.

        Args:
            step: of the row.
            images: n×28×28, n at most 32.
            labels: n digits.
            predictions: n digits.
            confidences: n probabilities of the predictions, 0 to 1.
        """

    def trained(self) -> None:
        """All rows and grids have been sent."""

    def evaluated(self, split: str, folder: Path) -> None:
        """``folder`` holds the ``report.json`` and ``predictions.csv`` of ``split``; of a run that
        is complete, since rows follow no report."""

    def finished(self) -> None:
        """The run is complete: send ``model.safetensors`` and the figures."""

    def close(self) -> None:
        """End, within ``LIMITS.close`` seconds; say where the run is, or what is missing there."""


class Mirror(NoMirror):
    """Mirrors a run's folder from another process; nothing here waits for it but ``close``.

    That process starts at once, to import W&B while the job imports torch, which uses one core.
    Then it leaves a short training alone: what it takes of one core, training loses on all, and
    one of 1.4 s took 1.8. Without ``begin`` it leaves nothing behind; without ``close``, as when
    the job is killed, it sends what it has and ends.
    """

    def __init__(self, settings: WandbSettings) -> None:
        self._settings = settings
        self._folder = Path()
        self._said: dict[str, Any] = {}
        self._closed = False
        self._elsewhere = False  # whether a report is where send_again does not look
        command = [sys.executable, "-P", "-m", "mnist.tracking"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        # A pipe that nobody reads fills up, and writing to it would then stop the training.
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def begin(self, run_folder: Path, adopts: bool | None = None) -> None:
        self._folder = run_folder
        if adopts is None:
            adopts = not (run_folder / "model.safetensors").exists()
        if adopts:
            _warn_of_other_id(run_folder)
        self._outbox.put((run_folder, self._settings, LIMITS, adopts))

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            while (message := self._outbox.get()) is not None:
                pickle.dump(message, pipe)
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said |= json.loads(line)

    def rows(self, length: int) -> None:
        self._outbox.put(("rows", length))

    def grid(
        self,
        step: int,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        predictions: NDArray[np.int64],
        confidences: NDArray[Any],
    ) -> None:
        self._outbox.put(("grid", step, images, labels, predictions, confidences))

    def trained(self) -> None:
        self._outbox.put(("trained",))

    def evaluated(self, split: str, folder: Path) -> None:
        self._elsewhere |= not _is_in_run(folder, self._folder)
        self._outbox.put(("evaluated", split, folder))

    def finished(self) -> None:
        self._outbox.put(("finished",))

    def close(self) -> None:
        if self._closed or self._folder == Path():  # without a run there is nothing to end
            return
        self._closed = True
        self._outbox.put(None)
        self._reader.join(LIMITS.close)
        if self._reader.is_alive():
            _kill_tree(self._process.pid)
            self._reader.join(1)
            self._said["lost"] = f"it did not finish within {LIMITS.close:.0f} s"
        elif not self._said.get("done"):
            log = self._folder / "wandb/mirror.log"
            self._said["lost"] = f"it failed, see {log}" if os.path.isfile(log) else "it failed"
        self._process.wait()
        self._tell(**self._said)

    @property
    def online(self) -> bool:
        """After ``close``: whether the server has everything."""
        missing = any(self._said.get(name) for name in ("lost", "blocked", "warning"))
        return not missing and self._said.get("mode", "online") == "online"

    def _tell(
        self,
        mode: str | None = None,
        directory: str = "",
        url: str | None = None,
        exact: bool = True,
        warning: str | None = None,
        lost: str | None = None,
        blocked: str | None = None,
        note: str | None = None,
        done: bool = False,
    ) -> None:
        """Print the end lines; see ``_Session`` for what it has said."""
        python = min(sys.executable, os.path.relpath(sys.executable), key=len)
        program, home = str(Path(python).with_name("wandb")), self._folder / "wandb"
        sync = shlex.join([program, "sync", str(home)])
        if lost or not exact:  # wandb sync would add what the server has got already once more
            sync = shlex.join([python, "-m", "mnist.tracking", str(self._folder)])
        again = "with that solved, start the same command again"
        said = None
        if blocked:
            said = f"has not got this: {blocked}; {again}, or give --wandb disabled"
        elif lost:
            said = f"has not got everything: {lost}; "
            said += again if self._elsewhere else f"send it: {sync}"
        elif warning:
            said = f"is offline: {warning}; send it later: {sync}"
        for line in filter(None, (said, note)):
            print(f"warning: W&B {line}", file=sys.stderr)
        if mode == "online":
            print(f"wandb       {url}", flush=True)
        elif mode == "offline":
            view = shlex.join([program, "leet", "run", str(home / directory)])
            print(f"wandb       offline; send it: {sync}\n{'':12}view it: {view}", flush=True)


def wandb_settings(config: TrainConfig | EvaluateConfig) -> WandbSettings:
    """What the options say.

    Raises:
        InputError: they leave it to ``WANDB_MODE``, which says nothing that is known.
    """
    found = os.environ.get("WANDB_MODE", "online")
    if config.wandb == "auto" and found not in _MODES:
        raise InputError(
            f"WANDB_MODE takes one of {', '.join(_MODES)}, not {found!r}; set it to one of these, "
            "unset it, or give --wandb"
        )
    return WandbSettings(
        mode=config.wandb,
        project=config.wandb_project,
        entity=config.wandb_entity,
        group=config.wandb_group,
        tags=config.wandb_tags,
    )


def open_mirror(settings: WandbSettings) -> NoMirror:
    """The mirror that the settings and ``WANDB_MODE`` ask for."""
    wanted: str | None = settings.mode
    if wanted == "auto":
        wanted = os.environ.get("WANDB_MODE")
    return NoMirror() if wanted == "disabled" else Mirror(settings)


def send_missing(mirror: NoMirror, run_folder: Path) -> None:
    """Send what W&B does not hold of a complete run that this job has found: it was killed, or W&B
    failed, before all was sent. Nothing is started where nothing is missing."""
    report = report_of_run(run_folder, "test")
    recorded = _read_state(run_folder).sent
    wanted = ["finished", *([] if report is None else [_item("test", report)])]
    if all(item in recorded for item in wanted):
        _warn_of_other_id(run_folder)
        return
    splits = {} if report is None else {"test": run_folder / "evaluation/test"}
    _send_complete(mirror, run_folder, splits, adopts=True)


def send_again(run_folder: Path) -> None:
    """Send what W&B does not hold of a complete run, with all of its evaluations.

    Raises:
        InputError: it is no complete run.
        SystemExit: with 1: W&B has not got everything.
    """
    model = run_folder / "model.safetensors"
    if not model.exists():
        raise InputError(
            f"{run_folder} is no complete run; start it again, and it is sent when it goes on"
        )
    final = sha256(model)
    splits = {}
    for folder in sorted(path.parent for path in run_folder.glob("evaluation/*/report.json")):
        report = read_report(folder)
        if report is None or report["model"]["sha256"] != final:
            why = "it cannot be read" if report is None else "it is of another model"
            print(f"{folder / 'report.json'} is left out: {why}", file=sys.stderr)
        else:
            splits[folder.name] = folder
    mirror = Mirror(WandbSettings(mode="online"))
    _send_complete(mirror, run_folder, splits)
    mirror.close()
    if not mirror.online:
        raise SystemExit(1)
    print(f"W&B has all of {run_folder}", flush=True)


def _send_complete(
    mirror: NoMirror, run_folder: Path, splits: dict[str, Path], adopts: bool = False
) -> None:
    """Everything of a complete run; its mirror leaves out what W&B holds."""
    mirror.begin(run_folder, adopts)
    metrics = run_folder / "metrics.jsonl"
    mirror.rows(metrics.stat().st_size if metrics.exists() else 0)
    mirror.trained()
    for split, folder in splits.items():
        mirror.evaluated(split, folder)
    mirror.finished()


def _item(split: str, report: dict[str, Any]) -> str:
    """By which a report is known to have been sent."""
    return f"{split} {report['time']}"


def _read_json(path: Path) -> dict[str, Any]:
    """What a file says; nothing if it is not there, or damaged."""
    try:
        contents = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


@dataclass(frozen=True, kw_only=True)
class _State:
    """What ``wandb/run.json`` says: which run this is for W&B, and what W&B holds of it."""

    id: str | None = None
    project: str | None = None
    entity: str | None = None
    sweep: str | None = None
    sent: dict[str, str] = field(default_factory=dict)  # the mode in which each thing was
    damaged: bool = False


def _read_state(run_folder: Path) -> _State:
    """Nothing of what is not there; of what is not understood only that it is damaged."""
    path = run_folder / "wandb/run.json"
    if not os.path.exists(path):  # nor, where it may not be looked for, an error
        return _State()
    found = _read_json(path)
    names = ("id", "project", "entity", "sweep")
    place: dict[str, Any] = {name: found.get(name) for name in names}
    sent = found.get("sent", {})
    texts = [value for value in place.values() if value is not None]
    texts += [*sent, *sent.values()] if isinstance(sent, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not _is_id(place["id"]):
        return _State(damaged=True)
    return _State(**place, sent=sent)


def _is_id(text: str | None) -> bool:
    """Whether W&B takes it as the id of a run, and a file system as a part of a name."""
    plain = text is not None and text.isprintable() and text == text.strip()
    return plain and 0 < len(text or "") <= 128 and not set(text or "") & set(":;,#?/'\\%")


def _warn_of_other_id(run_folder: Path) -> None:
    """A sweep may try the same settings twice, which then are one run."""
    recorded, found = _read_state(run_folder).id, os.environ.get("WANDB_RUN_ID")
    if os.environ.get("WANDB_SWEEP_ID") and recorded and found and recorded != found:
        print(
            f"warning: W&B has {run_folder} as run {recorded}, so run {found} of this sweep stays "
            "empty",
            file=sys.stderr,
            flush=True,
        )


def _is_in_run(evaluation: Path, run_folder: Path) -> bool:
    return evaluation.resolve().parent == (run_folder / "evaluation").resolve()


def _kill_tree(pid: int) -> None:
    """W&B's own processes are in other process groups, so these are found by descent."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (*root.children(recursive=True), root):
            with contextlib.suppress(psutil.Error):
                process.kill()


# ------------------------------------------------------------------------ in the mirror's process


class _Session:
    """One connection of W&B's client, opened when there is something to send.

    What it holds for certain is in ``wandb/run.json``; that decides which run this is. For one that
    W&B does not have yet, an agent of a sweep may have decided it, in the environment.
    """

    def __init__(
        self, folder: Path, settings: WandbSettings, limits: Limits, adopts: bool, out: IO[str]
    ) -> None:
        import wandb

        self.wandb, self.limits, self.out = wandb, limits, out
        self.folder, self.state = folder, folder / "wandb/run.json"
        recorded = _read_state(folder)
        self.notes: list[str] = []
        if recorded.damaged:
            self.notes.append(f"gets all of it once more, {self.state} is damaged")
        # W&B would follow these rather than what it is told here, so it does not see them.
        names = ("RUN_ID", "SWEEP_ID", "PROJECT", "ENTITY", "LAUNCH")
        found = {name: os.environ.pop(f"WANDB_{name}", None) or None for name in names}
        run_id, sweep, project, entity, _ = found.values()
        if adopts and run_id and not recorded.id and not _is_id(run_id):
            self.notes.append(f"takes no WANDB_RUN_ID {run_id!r}; the run has another")
            run_id = None
        self.id = recorded.id or (run_id if adopts else None) or secrets.token_hex(4)
        if recorded.id:
            project, entity = recorded.project, recorded.entity
        in_sweep = sweep is not None and self.id == run_id
        if not in_sweep:  # the runs of one sweep are in one place
            project, entity = settings.project or project, settings.entity or entity
            os.environ.pop("WANDB_SWEEP_PARAM_PATH", None)  # the settings that an agent chose
        project, entity = project or settings.project, entity or settings.entity
        self.place = {"project": project or "mnist-ocr", "entity": entity}
        same = self.place == {"project": recorded.project, "entity": recorded.entity}
        self.sent = recorded.sent if same else {}
        self.sweep = sweep if in_sweep else recorded.sweep if same else None
        self._record()

        self.settings = settings
        self.warning: str | None = None
        wanted, mode = settings.mode, os.environ.pop("WANDB_MODE", None)
        if wanted == "auto" and mode in ("offline", "dryrun"):
            wanted = "offline"
        self.mode = "offline" if wanted == "offline" else "online"
        # Without a key, auto is offline as a matter of course.
        told = mode in ("online", "run")
        self.excused = "No API key" if wanted == "auto" and not told else None
        self.run: wandb.Run | None = None
        self.held = -1  # the last step that W&B has
        self.offset = 0  # into metrics.jsonl
        self.grids: dict[int, tuple[NDArray[Any], ...]] = {}
        self.items: list[str] = []
        self.lost: list[str] = []
        if not (folder / "model.safetensors").exists():
            self.connect()

    def _record(self) -> None:
        state = {"id": self.id, **self.place, "sweep": self.sweep, "sent": self.sent}
        write_file(
            self.state,
            json.dumps(state, indent=2) + "\n",
        )

    def say(self, **facts: Any) -> None:
        _say(self.out, **facts)

    def _say_where(self, directory: Path, url: str | None = None) -> None:
        # How much arrived of what was sent online and never confirmed is not known offline.
        unsure = [log for log in self._unsynced() if not _is_offline(log)]
        exact = all(self._last_step(log) < 0 for log in unsure)
        self.say(mode=self.mode, directory=directory.name, url=url, exact=exact)

    def connect(self) -> "wandb.Run":
        """The run, open; online if that is wanted and works.

        A step that the server holds is never sent again; offline, one that any local log holds.
        """
        if self.run is not None:
            return self.run
        logs = self._logs()
        for log in self._unsynced():
            if not self._records(log):  # killed before it wrote: wandb sync fails over it
                _synced_mark(log).touch()
        if self.mode == "online":
            try:
                self.run = self._init("online")
                self.held = self.run.starting_step - 1
            except Exception as error:
                self.mode = "offline"
                if not (self.excused and self.excused in str(error)):
                    self.warning = _one_line(error)
                self.wandb.teardown()
        if self.run is None:
            self.run = self._init("offline")
            self.held = max(map(self._last_step, logs), default=-1)
            if summary := self._summary(logs):
                self.run.summary.update(summary)
        url = self.run.url if self.mode == "online" else None
        self._say_where(Path(self.run.dir).parent, url)
        for axis in ("step", "images", "epoch", "seconds"):
            self.run.define_metric(axis, hidden=True)
        self.run.define_metric("*", step_metric="step")
        return self.run

    def _init(self, mode: Literal["online", "offline"]) -> "wandb.Run":
        # A folder's name may be no text, and longer than W&B takes.
        name = self.folder.resolve().name.encode(errors="replace").decode()[:128]
        return self.wandb.init(
            id=self.id,
            project=self.place["project"],
            entity=self.place["entity"],
            name=os.getenv("WANDB_NAME") or name,
            group=self.settings.group,
            tags=self.settings.tags or None,
            config=self._config(),
            dir=self.folder,
            mode=mode,
            resume="allow",
            settings=self.wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_save_requirements=False,
                init_timeout=self.limits.init,
                finish_timeout=self.limits.finish,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=self.limits.flush,
                x_file_stream_transmit_interval=self.limits.transmit,
                x_stats_pid=os.getppid(),
                sweep_id=self.sweep,
            ),
        )

    def _config(self) -> dict[str, Any]:
        """The run's settings and environment; without those that cannot be read."""
        path = self.folder / "config.yaml"
        config: dict[str, Any] = {}
        try:
            found = read_yaml(path)
            if not isinstance(found, dict):
                raise InputError(f"{path} is damaged")
            config = json.loads(json.dumps(found, default=str))
        except (OSError, ValueError, RecursionError) as error:
            why = f"lacks the settings of this run: {_one_line(error)}"
            if why not in self.notes:
                self.notes.append(why)
        return config | {"environment": _read_json(self.folder / "environment.json")}

    def _logs(self) -> list[Path]:
        """The local logs of this run, oldest first."""
        logs = self.folder.glob(f"wandb/*run-*/run-{glob.escape(self.id)}.wandb")
        return sorted(logs, key=lambda log: log.parent.name.removeprefix("offline-"))

    def _unsynced(self) -> list[Path]:
        return [log for log in self._logs() if not _synced_mark(log).exists()]

    def _records(self, log: Path) -> list[dict[str, Any]]:
        core = self.wandb.util.get_core_path()
        command = [core, "leet", "inspect", "--no-observability", "--json", "--run-file", str(log)]
        printed = subprocess.run([*command, str(log.parent)], stdout=subprocess.PIPE).stdout
        return [json.loads(line) for line in printed.splitlines() if line.startswith(b"{")]

    def _last_step(self, log: Path) -> int:
        histories = [r["history"]["item"] for r in self._records(log) if r["type"] == "history"]
        return max((item["step"] for item in histories if "step" in item), default=-1)

    def _summary(self, logs: list[Path]) -> dict[str, Any]:
        """What earlier sessions summed up: wandb sync keeps the summary of the last one alone."""
        summary: dict[str, Any] = {}
        for record in (record for log in logs for record in self._records(log)):
            for key, value in record.get("summary", {}).get("update", {}).items():
                outer, _, inner = key.partition(".")  # {"a": {"b": 1}} is printed as {"a.b": 1}
                if inner and outer[0] != "_":
                    summary.setdefault(outer, {})[inner] = value
                elif outer[0] != "_":
                    summary[outer] = value
        return summary

    def _has(self, item: str) -> bool:
        """Whether something was sent before, to where this session sends."""
        sent = self.sent.get(item)
        return sent == "online" or (bool(sent) and (self.mode == "offline" or not self._unsynced()))

    def rows(self, length: int) -> None:
        if self._has("finished"):
            return
        run = self.connect()
        if length <= self.offset:
            return
        with (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(self.offset)
            rows = parse_rows(file.read(length - self.offset), {"step"})
        for row in rows:
            step = row["step"]
            grid = self.grids.pop(step, None)
            if step <= self.held:
                continue
            if grid:
                picture, wrong = compose_grid(*grid), int((grid[1] != grid[2]).sum())
                caption = f"step {step:,}: {wrong} of {len(grid[1])} wrong"
                row["validation/predictions"] = self.wandb.Image(picture, caption=caption)
            run.log(row, step=step, commit=True)
            self.held = step
        self.offset = length

    def grid(self, step: int, *grid: NDArray[Any]) -> None:
        self.grids[step] = grid

    def evaluated(self, split: str, folder: Path) -> None:
        report = json.loads((folder / "report.json").read_text())
        item = _item(split, report)
        if self._has(item):
            return
        if split not in SPLITS and not _is_in_run(folder, self.folder):
            # Elsewhere, reports on several folders of one name have this name.
            split += f"-{_digest(report['data']['images'])[:6]}"
        split = _plain(split, 64)
        run, Image = self.connect(), self.wandb.Image
        run.summary.update(_figures(split, report))
        pictures = _pictures(Path(report["data"]["images"]))
        shown: dict[str, Any] = {}
        if report["confusion_matrix"]:
            confusion = np.array(report["confusion_matrix"])
            picture, caption = compose_confusion(confusion), "labels down, predictions across"
            shown[f"{split}/confusion_matrix"] = Image(picture, caption=caption)
        if report["mistakes"] and pictures is not None:
            mistakes = report["mistakes"]
            columns = ("label", "prediction", "confidence")
            values = [np.array([mistake[key] for mistake in mistakes]) for key in columns]
            images = pictures[[mistake["index"] for mistake in mistakes]]
            caption = f"the {len(mistakes)} most confident mistakes"
            shown[f"{split}/mistakes"] = Image(compose_grid(images, *values), caption=caption)
        self._log_last(shown)
        artifact = self.wandb.Artifact(_plain(f"{split}-{self.id}"), type="evaluation")
        for name in ("report.json", "predictions.csv"):
            artifact.add_file(str(folder / name))
        run.log_artifact(artifact)
        table = self._table(folder / "predictions.csv", pictures)
        self._log_last({f"{split}/predictions": table})
        self.items.append(item)

    def _table(self, predictions: Path, pictures: NDArray[np.uint8] | None) -> "wandb.Table":
        """The most confident mistakes first, then the least confident of the others."""
        from PIL import Image

        def order(row: dict[str, str]) -> tuple[bool, float]:
            wrong = bool(row["label"]) and row["label"] != row["prediction"]
            confidence = float(row["confidence"])
            return not wrong, -confidence if wrong else confidence

        with predictions.open(newline="", errors="surrogateescape") as file:
            rows = heapq.nsmallest(_TABLE_ROWS, csv.DictReader(file), key=order)
        columns = ["index", "label", "prediction", "confidence"]
        table = self.wandb.Table(columns=["image", *columns])
        for row in rows:
            image = None
            if pictures is not None:
                image = self.wandb.Image(Image.fromarray(255 - pictures[int(row["index"])]))
            label = int(row["label"]) if row["label"] else None
            digits = int(row["index"]), label, int(row["prediction"])
            table.add_data(image, *digits, float(row["confidence"]))
        return table

    def _log_last(self, shown: dict[str, Any]) -> None:
        """Show something at the last row's step, apart from the rows."""
        rows = parse_rows((self.folder / "metrics.jsonl").read_bytes(), {"step"})
        self.connect().log({"step": rows[-1]["step"] if rows else 0, **shown})

    def finished(self) -> None:
        if self._has("finished"):
            return
        run = self.connect()
        figure = self.folder / "figures/loss_curves.png"  # drawn by another process
        model = sha256(self.folder / "model.safetensors")
        until = time.monotonic() + self.limits.figures
        while model_of_figure(figure) != model and time.monotonic() < until:
            time.sleep(0.05)
        if model_of_figure(figure) in (model, ""):
            self._log_last({"figures/loss_curves": self.wandb.Image(str(figure))})
        artifact = self.wandb.Artifact(_plain(f"model-{self.id}"), type="model")
        artifact.add_file(str(self.folder / "model.safetensors"))
        run.log_artifact(artifact)
        self.items.append("finished")

    def close(self) -> None:
        """Send what is left, and record what W&B now holds."""
        if self.run is None:
            offline = list(filter(_is_offline, self._unsynced()))
            if offline:
                self.mode = "offline"
                self._say_where(offline[-1].parent)
        else:
            complete = (self.folder / "model.safetensors").exists()
            if not complete:
                self.run.mark_preempting()
            try:
                self.run.finish(exit_code=int(not complete))
            except Exception as error:
                self.lost.append(_one_line(error))
            if _SAYS_LOST in (self.folder / "wandb/mirror.log").read_text(errors="replace"):
                self.lost.append("the server refused it")
            if not self.lost:
                self.sent |= dict.fromkeys(self.items, self.mode)
                self._record()
                if self.mode == "online":
                    self._mark_synced()
        note = "; ".join(self.notes)
        self.say(done=True, warning=self.warning, lost="; ".join(self.lost), note=note)

    def _mark_synced(self) -> None:
        """Keep a later ``wandb sync`` from sending again what the server holds."""
        if all(mode == "online" for mode in self.sent.values()):
            for log in self._unsynced():
                if self._last_step(log) <= self.held:
                    _synced_mark(log).touch()


def _say(out: IO[str], **facts: Any) -> None:
    """Tell the job's process; see ``Mirror._tell``."""
    with contextlib.suppress(BrokenPipeError):  # that process may have ended
        print(json.dumps(facts), file=out, flush=True)


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def _plain(name: str, most: int = 128) -> str:
    """A name that W&B takes, for an artifact or a metric; another name's is another.

    Dots are left out as well: in a metric's name they stand for levels.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) and len(name) <= most and name != "model":
        return name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[: most - 9] or "name"
    return f"{plain}-{_digest(name)[:8]}"


def _is_offline(log: Path) -> bool:
    return log.parent.name.startswith("offline-")


def _synced_mark(log: Path) -> Path:
    return log.with_name(f"{log.name}.synced")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _log_failure() -> None:
    with contextlib.suppress(OSError):  # the disk that the log is on may be full
        traceback.print_exc()


def _figures(split: str, report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a report that go to the run's summary."""
    named: dict[str, Any] = {"scored": report["scored"]}
    if report["labelled"]:
        low, high = report["accuracy_interval_95"]
        named |= {"accuracy": report["accuracy"], "accuracy_low": low, "accuracy_high": high}
        named["loss"] = report["cross_entropy"]
        named["calibration_error"] = report["calibration"]["expected_calibration_error"]
        if report["without_disputed_labels"]:
            accuracy = report["without_disputed_labels"]["accuracy"]
            named["accuracy_without_disputed_labels"] = accuracy
    return {f"{split}/{name}": value for name, value in named.items()}


def _pictures(path: Path) -> NDArray[np.uint8] | None:
    """The images of an IDX file, n×28×28; None of any other."""
    if not path.is_file() or path.open("rb").read(4) != b"\0\0\x08\x03":
        return None
    return np.memmap(path, np.uint8, "r", 16).reshape(-1, 28, 28)


def compose_grid(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    confidences: NDArray[Any],
) -> "Image":
    """Images with label, prediction and confidence, eight in a row, mistakes framed in red.

    Args:
        images: n×28×28, 0 to 255.
        labels: n digits.
        predictions: n digits.
        confidences: n probabilities of the predictions, 0 to 1.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns, width, height, side = 8, 104, 126, 84
    size = (columns * width, -(-len(images) // columns) * height)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(12)
    draw = ImageDraw.Draw(sheet)
    for index, (image, label, prediction, confidence) in enumerate(
        zip(images, labels, predictions, confidences, strict=True)
    ):
        left, top = width * (index % columns) + 10, height * (index // columns) + 5
        color = "black" if label == prediction else _MISTAKE
        picture = Image.fromarray(255 - image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        if label != prediction:
            draw.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), None, color, 2)
        text = f"label {label}\nsays {prediction}, {confidence:.1%}"
        draw.multiline_text((left, top + side + 2), text, color, font, spacing=1)
    return sheet


def compose_confusion(counts: NDArray[np.int64]) -> "Image":
    """The confusion matrix: labels down, predictions across, 10×10 counts."""
    from PIL import Image, ImageDraw, ImageFont

    cell, margin = 46, 46
    side = margin + 10 * cell + 1
    sheet, font = Image.new("RGB", (side, side), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    # Mistakes are a few in a thousand: each kind of cell has a scale of its own.
    most = {True: counts.diagonal().max(), False: (counts - np.diag(counts.diagonal())).max()}
    for digit in range(10):
        middle = margin + (digit + 0.5) * cell
        draw.text((middle, margin / 2), str(digit), "black", font, "mm")
        draw.text((margin / 2, middle), str(digit), "black", font, "mm")
    for (label, prediction), count in np.ndenumerate(counts):
        right = label == prediction
        share = 0.6 * count / max(1, most[right])
        ink = (np.array([69, 123, 157]) if right else np.array([193, 18, 31])) * share
        fill = tuple((255 * (1 - share) + ink).astype(int).tolist())
        left, top = margin + prediction * cell, margin + label * cell
        draw.rectangle((left, top, left + cell, top + cell), fill, "#dddddd")
        if count:
            draw.text((left + cell / 2, top + cell / 2), f"{count}", "black", font, "mm")
    return sheet


def _messages(pipe: IO[bytes], trained: threading.Event) -> Iterator[tuple[Any, ...]]:
    """What the job's process sends, until it closes the pipe or ends.

    A thread reads it, so that from then on the time is bounded, whatever W&B is waiting for.

    Args:
        pipe: from that process.
        trained: set once rows and grids have all arrived.
    """
    inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                message = pickle.load(pipe)
                if message[0] == "trained":
                    trained.set()
                else:
                    inbox.put(message)
        inbox.put(None)
        trained.set()
        time.sleep(LIMITS.close)
        _kill_tree(os.getpid())

    threading.Thread(target=read, daemon=True).start()
    return iter(inbox.get, None)


def _mirror() -> None:
    for stop in StopRequest.SIGNALS:  # they are for the job, which then ends this
        signal.signal(stop, signal.SIG_IGN)
    os.nice(19)
    with contextlib.suppress(OSError):  # Linux may count the above within a session alone
        Path("/proc/self/autogroup").write_text("19")
    # Nothing of W&B's can ask on this process's input, or be taken for what this process says.
    trained = threading.Event()
    messages = _messages(os.fdopen(os.dup(0), "rb"), trained)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    with contextlib.suppress(Exception):  # said when it is used
        import wandb  # noqa: F401

    first = next(messages, None)
    if first is None:  # the job has ended without a run
        return
    folder, settings, limits, adopts = first
    home = folder / "wandb"
    try:
        home.mkdir(parents=True, exist_ok=True)
        how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        log = os.open(home / "mirror.log", how, 0o666)
    except FileExistsError:
        return _say(out, blocked=f"{home} is not a folder", done=True)
    except OSError as error:
        return _say(
            out, blocked=f"{error.filename} cannot be written ({error.strerror})", done=True
        )
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in ("data", "cache", "artifact"):
        os.environ[f"WANDB_{name.upper()}_DIR"] = str(home.resolve() / name)
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    os.environ.pop("WANDB_SILENT", None)  # see _SAYS_LOST; all that is printed goes to a file
    trained.wait(limits.patience)
    try:
        session = _Session(folder, settings, limits, adopts, out)
        for name, *arguments in messages:
            try:
                getattr(session, name)(*arguments)
            except Exception as error:
                _log_failure()
                session.lost.append(_one_line(error))
        session.close()
    except Exception as error:
        _log_failure()
        if isinstance(error, OSError):  # of the file system: W&B's client raises its own
            _say(out, blocked=f"{home}: {error.strerror or _one_line(error)}", done=True)
        else:
            _say(out, lost=_one_line(error), done=True)


def main() -> None:
    """With a run's folder, send what W&B does not hold of it; else be the mirror of a job."""
    if len(sys.argv) > 1:
        with exit_codes("mnist.tracking"):
            send_again(Path(sys.argv[1]))
    try:
        _mirror()
    except Exception:
        _log_failure()
        os._exit(1)
    os._exit(0)  # W&B's own teardown would wait for a server that has gone


if __name__ == "__main__":
    # As part of the package, so that what arrives and what it is compared with are of one class.
    from mnist.tracking import main as main_of_package

    main_of_package()
