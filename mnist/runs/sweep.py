"""Summary of a sweep, however far it is: python -m mnist.runs.sweep FOLDER, as slurm/sweep.sbatch.

Writes ``summary.json`` and ``summary.txt`` into the folder, and prints the latter.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from mnist.cli import InputError, exit_codes
from mnist.runs.metrics import read_metrics
from mnist.runs.reports import report_of_run
from mnist.system import write_file

_NUMBER = re.compile(r"[0-9]{1,9}")


def summarise(folder: Path) -> dict[str, Any]:
    """The settings of complete runs, by validation accuracy after the last step, and the rest.

    Test accuracies are of one setting's seeds alone: among several, nobody shall choose by them.

    Raises:
        InputError: there is no sweep.
    """
    records, count, certain = _read_tasks(folder / ".tasks")
    finished = {path.parent.name for path in folder.glob("*/model.safetensors")}
    # Records may be lost, but not runs that --fresh has moved aside, to NAME.1, taken for others.
    aside = {name for name in finished if name.rpartition(".")[0] in finished | records.keys()}
    lost = {name for name in finished - records.keys() - aside if "=" in name}
    names = [*records, *sorted(lost)]
    if not names and not count:
        raise InputError(f"{folder}: no sweep, as neither .tasks nor a complete run is in there")
    complete = [name for name in names if name in finished]
    incomplete = [
        {"run": name, "code": int(record) if _NUMBER.fullmatch(record) else None}
        for name, record in records.items()
        if name not in finished and (record or (folder / name).exists())
    ]
    groups: dict[str, list[Path]] = {}
    for name in complete:
        groups.setdefault(re.sub(r"\bseed=\d+", "", name).strip("+"), []).append(folder / name)
    ranking: list[dict[str, Any]] = [
        {
            "settings": settings,  # those that the runs' names tell
            "runs": [run.name for run in runs],
            "validation_accuracy": _spread(map(_validation_accuracy, runs)),
            "test_accuracy": None if settings else _spread(map(_test_accuracy, runs)),
        }
        for settings, runs in groups.items()
    ]
    ranking.sort(key=lambda row: -(row["validation_accuracy"] or {"mean": 0})["mean"])
    tasks = max(count, len(names))
    return {
        "sweep": folder.resolve().name,
        "tasks": tasks,
        "complete": len(complete),
        "ranking": ranking,
        "incomplete": incomplete,
        "not_started": tasks - len(complete) - len(incomplete),
        "tasks_certain": certain,
    }


def _read_tasks(tasks: Path) -> tuple[dict[str, str], int, bool]:
    """What is recorded of each run, by name; how many there are at least; whether that is certain.

    slurm/sweep.sbatch leaves a file per run: empty before its start, "started", then its exit code.
    Once it left a file per task of the array, with the run's name and at its end the code, and the
    number of tasks in ``count``. Whatever is damaged there counts as much as it still tells.
    """
    records = {}
    numbered = sorted(tasks.glob("[0-9]*"), key=lambda path: (len(path.name), path.name))
    for path in numbered:
        name, _, code = _read(path).partition(" ")
        if re.fullmatch(r"\w[\w.=+-]*", name):
            records[name] = code or "started"
    for path in sorted(tasks.glob("*=*"), key=_natural):
        records[path.name] = _read(path)
    count = _read(tasks / "count")
    known = int(count) if _NUMBER.fullmatch(count) else 0
    return records, max(known, len(numbered)), known > 0 or bool(records and not numbered)


def _natural(path: Path) -> list[Any]:
    """To sort seed=10 after seed=9."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def _read(path: Path) -> str:
    """A small file's text without space around it; none where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _validation_accuracy(run: Path) -> float | None:
    """After the last step; None without validation images."""
    rows = read_metrics(run / "metrics.jsonl", keys=())
    return rows[-1].get("validation/accuracy") if rows else None


def _test_accuracy(run: Path) -> float | None:
    """Of the final model; None where nobody has scored that."""
    report = report_of_run(run, "test")
    return None if report is None else report["accuracy"]


def _spread(accuracies: Iterable[float | None]) -> dict[str, Any] | None:
    values = list(accuracies)
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {
        "mean": statistics.mean(known),
        "standard_deviation": statistics.stdev(known) if len(known) > 1 else None,
        "lowest": min(known),
        "highest": max(known),
        "of_each": values,
    }


def table(summary: dict[str, Any]) -> str:
    """A summary in lines to read."""
    lines = [f"{summary['sweep']}: {summary['complete']} of {summary['tasks']} runs complete", ""]
    rows = [("rank", "settings", "runs", "validation accuracy", "test accuracy")]
    for rank, row in enumerate(summary["ranking"], 1):
        accuracies = _shown(row["validation_accuracy"]), _shown(row["test_accuracy"])
        rows.append((str(rank), row["settings"] or "the same", str(len(row["runs"])), *accuracies))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    lines.append("")
    for run in summary["incomplete"]:
        ended = "running or lost" if run["code"] is None else f"ended with code {run['code']}"
        lines.append(f"not complete: {run['run']}, {ended}")
    if summary["not_started"]:
        lines.append(f"not started: {summary['not_started']}")
    if not summary["tasks_certain"]:
        lines.append("there may be more: how many tasks it has is lost")
    return "\n".join(lines).rstrip() + "\n"


def _shown(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return "-"
    shown = f"{accuracy['mean']:.2%}"
    if accuracy["standard_deviation"] is not None:
        shown += f" ± {100 * accuracy['standard_deviation']:.2f}"
        shown += f" ({accuracy['lowest']:.2%} to {accuracy['highest']:.2%})"
    return shown


if __name__ == "__main__":
    with exit_codes("sweep"):
        if len(sys.argv) != 2:
            raise InputError("takes the folder of a sweep, and nothing else")
        sweep = Path(sys.argv[1])
        if not sweep.is_dir():
            raise InputError(f"{sweep}: no such folder")
        try:
            with FileLock(sweep / ".lock"):  # tasks may end at the same moment
                summary = summarise(sweep)
                write_file(sweep / "summary.json", json.dumps(summary, indent=2) + "\n")
                write_file(sweep / "summary.txt", table(summary))
        except OSError as error:
            raise InputError(f"{error.filename or sweep}: {error.strerror}") from None
        print(f"\n{table(summary)}", end="")
