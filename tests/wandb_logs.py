"""What W&B's client has left in a run's folder, as its own reader tells it."""

import json
import subprocess
from pathlib import Path
from typing import Any


def logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda log: log.stat().st_mtime)


def records(log: Path, kind: str) -> list[dict[str, Any]]:
    """What a local log holds, read by W&B itself."""
    from wandb.util import get_core_path  # slow to import, and a job does not need it

    # What `wandb leet inspect --json` runs, without 1 s of imports.
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"]
    done = subprocess.run([*command, log, log.parent], capture_output=True, check=True)
    lines = map(json.loads, done.stdout.splitlines())
    return [record[kind] for record in lines if record["type"] == kind]


def history(log: Path) -> list[dict[str, Any]]:
    """The history as a server gets it; ``leet inspect`` prints {"a": {"b": 1}} as {"a.b": 1}."""
    rows = []
    for record in records(log, "history"):
        rows.append(values := {})
        for key, value in record["item"].items():
            outer, _, inner = key.partition(".")
            if inner:
                values.setdefault(outer, {})[inner] = value
            else:
                values[key] = value
    return rows


def metrics_only(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in a history: no media, nothing of W&B's own."""
    found = []
    for values in rows:
        plain = {k: v for k, v in values.items() if k[0] != "_" and not isinstance(v, dict)}
        if "train/loss" in values:
            found.append(plain)
    return found
