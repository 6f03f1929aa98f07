"""A run's folder mirrored to Weights & Biases: the job's side, which never waits for the other.

The other is a process of its own (``python -m mnist.runs.tracking``), which gets a few small
messages, and reads all that W&B gets from the run's folder, so that nothing is lost with it. Both
ends of the pipe between them are here. Imports no torch and no W&B.
"""

import contextlib
import json
import os
import pickle
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.runs.reports import lies_in_run, read_report, report_of_run
from mnist.runs.wandb_files import item_of, read_state, warn_of_other_id
from mnist.system import give_way, kill_tree, sha256, warn

_MODES = ("offline", "dryrun", "online", "run", "disabled")  # of WANDB_MODE; in pairs the same


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Where and how a run is mirrored; None leaves it to ``WANDB_*``, then to defaults."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Any) -> "WandbSettings":
        """Those of a job's options ``wandb``, ``wandb_project``, … that it has."""
        names = {"mode": "wandb"}
        names |= {name: f"wandb_{name}" for name in ("project", "entity", "group", "tags")}
        found = {n: getattr(options, o) for n, o in names.items() if hasattr(options, o)}
        return cls(**found)

    def __post_init__(self) -> None:
        """Raise an InputError if it is left to a ``WANDB_MODE`` that says nothing known."""
        found = os.environ.get("WANDB_MODE", "online")
        if self.mode == "auto" and found not in _MODES:
            raise InputError(
                f"WANDB_MODE takes one of {', '.join(_MODES)}, not {found!r}; set it to one of "
                "these, unset it, or give --wandb"
            )


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

    def readings(self, folder: Path, pictures: bool) -> None:
        """``folder`` holds a ``readings.json``, whose counts and scores are sent, and with
        ``pictures`` the ``readings.html``, which shows users' photos; of a run that is complete."""

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
        command = [sys.executable, "-P", "-m", "mnist.runs.tracking"]
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
            warn_of_other_id(run_folder)
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
        self._elsewhere |= not lies_in_run(folder, self._folder)
        self._outbox.put(("evaluated", split, folder))

    def readings(self, folder: Path, pictures: bool) -> None:
        self._elsewhere = True  # send_again sends none
        self._outbox.put(("readings", folder, pictures))

    def finished(self) -> None:
        self._outbox.put(("finished",))

    def close(self) -> None:
        if self._closed or self._folder == Path():  # without a run there is nothing to end
            return
        self._closed = True
        self._outbox.put(None)
        self._reader.join(LIMITS.close)
        if self._reader.is_alive():
            kill_tree(self._process.pid)
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
            sync = shlex.join([python, "-m", "mnist.runs.tracking", str(self._folder)])
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
            warn(f"W&B {line}")
        if mode == "online":
            print(f"wandb       {url}", flush=True)
        elif mode == "offline":
            view = shlex.join([program, "leet", "run", str(home / directory)])
            print(f"wandb       offline; send it: {sync}\n{'':12}view it: {view}", flush=True)


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
    recorded = read_state(run_folder).sent
    wanted = ["finished", *([] if report is None else [item_of("test", report)])]
    if all(item in recorded for item in wanted):
        warn_of_other_id(run_folder)
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


def messages(pipe: IO[bytes], trained: threading.Event) -> Iterator[tuple[Any, ...]]:
    """What the job's process sends, until it closes the pipe or ends.

    A thread reads it, so that from then on the time is bounded, whatever W&B is waiting for. From
    the end of training on this process gives way no more: somebody waits for it.

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
                    give_way(0)
                else:
                    inbox.put(message)
        inbox.put(None)
        trained.set()
        give_way(0)
        time.sleep(LIMITS.close)
        kill_tree(os.getpid())

    threading.Thread(target=read, daemon=True).start()
    return iter(inbox.get, None)


def say(out: IO[str], **facts: Any) -> None:
    """Tell the job's process; see ``Mirror._tell``."""
    with contextlib.suppress(BrokenPipeError):  # that process may have ended
        print(json.dumps(facts), file=out, flush=True)


def one_line(error: Exception) -> str:
    """What an error says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
