"""Summary of a sweep, however far it is: python -m mnist.sweep FOLDER, as slurm/sweep.sbatch does.

Writes ``summary.json`` and ``summary.txt`` into the folder, and prints the latter.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from mnist.config import NUMERIC, exit_codes, option
from mnist.system import write_file
from mnist.tracking import read_metrics


def summarise(folder: Path) -> dict[str, Any]:
    """The settings of complete runs, by validation accuracy after the last step, and the rest.

    Test accuracies are of one setting's seeds alone: among several, nobody shall choose by them.
    """
    tasks = folder / ".tasks"  # a file per task: its run's name and, at its end, its exit code
    started = [path.read_text().split() for path in sorted(tasks.glob("[0-9]*"))]
    complete = [name for name, *_ in started if (folder / name / "model.safetensors").exists()]
    settings = {
        name: yaml.safe_load((folder / name / "config.yaml").read_text()) for name in complete
    }
    varied = [
        key
        for key in NUMERIC
        if key != "seed" and len({str(values[key]) for values in settings.values()}) > 1
    ]
    groups: dict[str, list[str]] = {}
    for name in complete:
        groups.setdefault(str([settings[name][key] for key in varied]), []).append(name)
    ranking: list[dict[str, Any]] = [
        {
            "settings": {key: settings[names[0]][key] for key in varied},
            "seeds": [settings[name]["seed"] for name in names],
            "validation_accuracy": _spread([_validation_accuracy(folder / n) for n in names]),
            "test_accuracy": None
            if varied
            else _spread([_test_accuracy(folder / n) for n in names]),
        }
        for names in groups.values()
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
    return read_metrics(run / "metrics.jsonl")[-1].get("validation/accuracy")


def _test_accuracy(run: Path) -> float | None:
    report = run / "evaluation/test/report.json"
    return json.loads(report.read_text())["accuracy"] if report.exists() else None


def _spread(values: list[float | None]) -> dict[str, Any] | None:
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
    rows = [["rank", "seeds", "validation accuracy", "test accuracy"]]
    names = list(summary["ranking"][0]["settings"]) if summary["ranking"] else []
    rows[0][3:] = map(option, names) if names else rows[0][3:]
    for rank, row in enumerate(summary["ranking"], 1):
        rows.append([str(rank), str(len(row["seeds"])), _shown(row["validation_accuracy"])])
        rows[-1] += [str(row["settings"][n]) for n in names] or [_shown(row["test_accuracy"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    for run in summary["incomplete"]:
        code = run["code"]
        ended = "still to end, or lost" if code is None else f"ended with code {code}"
        lines.append(f"not complete: {run['run']}, {ended}")
    if summary["not_started"]:
        lines.append(f"not started: {summary['not_started']}")
    return "\n".join(lines).rstrip() + "\n"


def _shown(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return "unknown"
    deviation = accuracy["standard_deviation"]
    if deviation is None:
        return f"{accuracy['mean']:.2%}"
    extremes = f"({accuracy['lowest']:.2%} to {accuracy['highest']:.2%})"
    return f"{accuracy['mean']:.2%} ± {100 * deviation:.2f} {extremes}"


if __name__ == "__main__":
    with exit_codes("sweep"):
        sweep = Path(sys.argv[1])
        with FileLock(sweep / ".lock"):  # tasks may end at the same moment
            summary = summarise(sweep)
            write_file(sweep / "summary.json", json.dumps(summary, indent=2) + "\n")
            write_file(sweep / "summary.txt", table(summary))
        print(table(summary), end="")
