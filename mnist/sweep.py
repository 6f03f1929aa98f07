"""Summary of a sweep, however far it is: python -m mnist.sweep FOLDER, as slurm/sweep.sbatch does.

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

from mnist.config import exit_codes
from mnist.metrics import read_metrics
from mnist.report import report_of_run
from mnist.system import write_file


def summarise(folder: Path) -> dict[str, Any]:
    """The settings of complete runs, by validation accuracy after the last step, and the rest.

    Test accuracies are of one setting's seeds alone: among several, nobody shall choose by them.
    """
    tasks = folder / ".tasks"  # a file per task: its run's name and, at its end, its exit code
    started = [path.read_text().split() for path in sorted(tasks.glob("[0-9]*"))]
    complete = [name for name, *_ in started if (folder / name / "model.safetensors").exists()]
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
    count = int((tasks / "count").read_text())
    return {
        "sweep": folder.name,
        "tasks": count,
        "complete": len(complete),
        "ranking": ranking,
        "incomplete": [
            {"run": name, "code": int(code[0]) if code else None}
            for name, *code in started
            if name not in complete
        ],
        "not_started": count - len(started),
    }


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
        sweep = Path(sys.argv[1])
        with FileLock(sweep / ".lock"):  # tasks may end at the same moment
            summary = summarise(sweep)
            write_file(sweep / "summary.json", json.dumps(summary, indent=2) + "\n")
            write_file(sweep / "summary.txt", table(summary))
        print(f"\n{table(summary)}", end="")
