"""What ``wandb/`` in a run's folder tells: which run this is for W&B, and what W&B holds of it.

Files alone, without W&B's client: that is tracking.py.
"""

import dataclasses
import glob
import hashlib
import json
import os
import re
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnist.system import warn, write_file

_STATE = "wandb/run.json"


@dataclass(frozen=True, kw_only=True)
class State:
    """What ``wandb/run.json`` says: which run this is for W&B, and what W&B holds of it."""

    id: str | None = None
    project: str | None = None
    entity: str | None = None
    sweep: str | None = None
    sent: dict[str, str] = field(default_factory=dict)  # the mode in which each thing was
    damaged: bool = False


def read_state(run_folder: Path) -> State:
    """Nothing of what is not there; of what is not understood only that it is damaged."""
    path = run_folder / _STATE
    if not os.path.exists(path):  # nor, where it may not be looked for, an error
        return State()
    found = read_json(path)
    names = ("id", "project", "entity", "sweep")
    place: dict[str, Any] = {name: found.get(name) for name in names}
    sent = found.get("sent", {})
    texts = [value for value in place.values() if value is not None]
    texts += [*sent, *sent.values()] if isinstance(sent, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not _is_id(place["id"]):
        return State(damaged=True)
    return State(**place, sent=sent)


def write_state(run_folder: Path, state: State) -> None:
    """Record it, in one step."""
    contents = dataclasses.asdict(state)
    del contents["damaged"]
    write_file(run_folder / _STATE, json.dumps(contents, indent=2) + "\n")


def settle_state(
    run_folder: Path, project: str | None, entity: str | None, adopts: bool
) -> tuple[State, list[str]]:
    """Decide which run this is for W&B, record it, and return it with lines for the user.

    What is recorded wins, then what an agent of a sweep has put into the environment, then the
    options; a place that changes has nothing yet. Takes out of the environment what W&B would
    follow rather than what it is told.

    Args:
        run_folder: of the run.
        project: by the options.
        entity: by the options.
        adopts: whether a run that W&B does not have yet becomes the one of the environment.
    """
    recorded, notes = read_state(run_folder), []
    if recorded.damaged:
        notes.append(f"gets all of it once more, {run_folder / _STATE} is damaged")
    names = ("RUN_ID", "SWEEP_ID", "PROJECT", "ENTITY", "LAUNCH")
    found = {name: os.environ.pop(f"WANDB_{name}", None) or None for name in names}
    run_id, sweep = found["RUN_ID"], found["SWEEP_ID"]
    if adopts and run_id and not recorded.id and not _is_id(run_id):
        notes.append(f"takes no WANDB_RUN_ID {run_id!r}; the run has another")
        run_id = None
    place = found["PROJECT"], found["ENTITY"]
    if recorded.id:
        place = recorded.project, recorded.entity
    chosen = recorded.id or (run_id if adopts else None) or secrets.token_hex(4)
    in_sweep = sweep is not None and chosen == run_id
    if in_sweep:  # the runs of one sweep are in one place
        project, entity = place[0] or project, place[1] or entity
    else:
        project, entity = project or place[0], entity or place[1]
        os.environ.pop("WANDB_SWEEP_PARAM_PATH", None)  # the settings that an agent chose
    project = project or "mnist-ocr"
    same = (project, entity) == (recorded.project, recorded.entity)
    state = State(
        id=chosen,
        project=project,
        entity=entity,
        sweep=sweep if in_sweep else recorded.sweep if same else None,
        sent=recorded.sent if same else {},
    )
    write_state(run_folder, state)
    return state, notes


def _is_id(text: str | None) -> bool:
    """Whether W&B takes it as the id of a run, and a file system as a part of a name."""
    plain = text is not None and text.isprintable() and text == text.strip()
    return plain and 0 < len(text or "") <= 128 and not set(text or "") & set(":;,#?/'\\%")


def warn_of_other_id(run_folder: Path) -> None:
    """A sweep may try the same settings twice, which then are one run."""
    recorded, found = read_state(run_folder).id, os.environ.get("WANDB_RUN_ID")
    if os.environ.get("WANDB_SWEEP_ID") and recorded and found and recorded != found:
        warn(f"W&B has {run_folder} as run {recorded}, so run {found} of this sweep stays empty")


def item_of(split: str, report: dict[str, Any]) -> str:
    """By which a report is known to have been sent."""
    return f"{split} {report['time']}"


def read_json(path: Path) -> dict[str, Any]:
    """What a file says; nothing if it is not there, or damaged."""
    try:
        contents = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def digest(text: str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def plain_name(name: str, most: int = 128) -> str:
    """A name that W&B takes, for an artifact or a metric; another name's is another.

    Dots are left out as well: in a metric's name they stand for levels.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) and len(name) <= most and name != "model":
        return name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[: most - 9] or "name"
    return f"{plain}-{digest(name)[:8]}"


# ---------------------------------------------------------------------------- W&B's local logs


class Logs:
    """The logs that W&B's client has left of one of its runs; they are all it has offline.

    Args:
        run_folder: whose ``wandb/`` they are in.
        run_id: of W&B's run.
        reader: W&B's program that reads them.
    """

    def __init__(self, run_folder: Path, run_id: str, reader: str) -> None:
        self._folder, self._id, self._reader = run_folder, run_id, reader

    def all(self) -> list[Path]:
        """The oldest first."""
        logs = self._folder.glob(f"wandb/*run-*/run-{glob.escape(self._id)}.wandb")
        return sorted(logs, key=lambda log: log.parent.name.removeprefix("offline-"))

    def unsynced(self) -> list[Path]:
        """Those that ``wandb sync`` would send."""
        return [log for log in self.all() if not _synced_mark(log).exists()]

    def set_empty_aside(self) -> None:
        """Keep ``wandb sync`` from those that were killed before they were written to: it fails."""
        for log in self.unsynced():
            if not self._records(log):
                _synced_mark(log).touch()

    def mark_synced(self, held: int) -> None:
        """Keep ``wandb sync`` from those whose rows the server holds: all up to step ``held``."""
        for log in self.unsynced():
            if self.last_step(log) <= held:
                _synced_mark(log).touch()

    def last_step(self, log: Path) -> int:
        """Of the rows in a log; -1 without any."""
        histories = [r["history"]["item"] for r in self._records(log) if r["type"] == "history"]
        return max((item["step"] for item in histories if "step" in item), default=-1)

    def summary(self, logs: Sequence[Path]) -> dict[str, Any]:
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

    def _records(self, log: Path) -> list[dict[str, Any]]:
        command = [self._reader, "leet", "inspect", "--no-observability", "--json", "--run-file"]
        printed = subprocess.run([*command, str(log), str(log.parent)], stdout=subprocess.PIPE)
        lines = printed.stdout.splitlines()
        return [json.loads(line) for line in lines if line.startswith(b"{")]


def is_offline(log: Path) -> bool:
    """Whether a log is of a session that sent nothing."""
    return log.parent.name.startswith("offline-")


def _synced_mark(log: Path) -> Path:
    return log.with_name(f"{log.name}.synced")
