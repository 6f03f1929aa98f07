"""A run's folder: whose it is, where its training begins or goes on, what it runs on."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mnist.cli import InputError, option, read_yaml
from mnist.distributed import PRECISIONS, World
from mnist.products import Kind
from mnist.runs.checkpoint import (
    all_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    remove_unfinished,
    set_aside,
)
from mnist.runs.environment import environment
from mnist.system import move_aside, warn, write_file

_LOCK_SECONDS = 10.0  # a killed process may need some to end
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # says a file system


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What decides which run a folder is of, in plain YAML types."""

    all: Mapping[str, Any]
    """What ``config.yaml`` holds."""
    numeric: Mapping[str, Any]
    """Those of them that change the numbers."""
    usual: Mapping[str, Any]
    """The defaults of these: an earlier version that did not know one did as it says."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins, or goes on."""

    complete: bool = False
    checkpoint: dict[str, bytes] | None = None  # its files, by name
    step: int = 0  # steps done
    logged_step: int = 0  # of the last row
    metrics_bytes: int = 0  # of metrics.jsonl up to there
    seconds: float = 0.0  # of training, up to there
    open_seconds: float = 0.0  # since then
    precision: str | None = None  # as the first start settled it
    products: Kind | None = None  # likewise


def open_run_folder(
    folder: Path,
    settings: RunSettings,
    world: World,
    stack: ExitStack,
    *,
    fresh: bool,
    faster_products: Callable[[World], Kind],
) -> Start:
    """Make the run's folder, or check that it is of the same run; say where training begins.

    Args:
        folder: of the run.
        settings: of the run.
        world: what the run runs on.
        stack: holds the folder's lock until it is closed.
        fresh: whether to move what is there aside, instead of going on in it.
        faster_products: which products the run is to take, if neither its settings nor the folder
            say so; given the world with the run's precision.

    Raises:
        InputError: the folder is in use, of other settings, something else, has no good checkpoint
            among its checkpoints, or cannot be written.
    """
    try:
        if not fresh and _is_complete(folder, settings):
            return Start(complete=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        hold(folder, stack)
        if fresh and not _is_restart():
            _check_is_run(folder)
            if folder.exists():
                move_aside(folder)
        if _is_complete(folder, settings):  # by the process that held it
            return Start(complete=True)
        folder.mkdir(exist_ok=True)
        start = _find_start(folder)
        if start.precision == "fp16" and world.device.type == "cpu":
            raise InputError(f"{folder} is a run in fp16, which takes a GPU to go on")
        if start.precision is not None:
            world = dataclasses.replace(world, precision=PRECISIONS[start.precision])
        products = _products(folder, settings) or faster_products(world)
        start = dataclasses.replace(start, products=products)
        summed = start.precision == "fp32" and world.size > 1 and world.device.type == "cpu"
        if summed and recorded_settings(folder).get("exact_sums"):
            warn(
                f"{folder} was begun with --exact-sums, which is no more: results can differ in "
                "the last bits"
            )
        contents = {**settings.all, "products": products}
        write_file(folder / "config.yaml", yaml.safe_dump(contents, sort_keys=False))
        _record_environment(folder / "environment.json", world, start)
    except FileExistsError:
        raise InputError(f"--runs-dir {folder.parent} is not a folder") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"run folder {folder}: {reason}; see --runs-dir") from None
    return start


def _products(folder: Path, settings: RunSettings) -> Kind | None:
    """What the settings say, or else the run's folder, if that is more than "auto"."""
    asked = settings.all["products"]
    if asked == "auto" and (folder / "config.yaml").exists():
        asked = recorded_settings(folder).get("products")
    return asked if asked in ("torch", "onednn") else None


def refuse_other_run(folder: Path, settings: RunSettings) -> None:
    """Before anything is fetched or waits for others.

    Raises:
        InputError: the folder is of a run with other settings, or not of a run.
    """
    with contextlib.suppress(OSError, yaml.YAMLError):  # said when the folder is opened
        _is_complete(folder, settings)


def _is_complete(folder: Path, settings: RunSettings) -> bool:
    """Whether the run's folder has its final model.

    Raises:
        InputError: it is of another run, or not of a run.
    """
    _check_is_run(folder)
    if not (folder / "config.yaml").exists():
        return False
    recorded = {**settings.usual, **recorded_settings(folder)}
    numeric = dict(settings.numeric)
    if "auto" not in (settings.all["products"], recorded.get("products", "auto")):
        numeric["products"] = settings.all["products"]
    changed = [
        f"{option(name)} {recorded[name]} there, {value} here"
        for name, value in numeric.items()
        if recorded[name] != value
    ]
    if changed:
        raise InputError(
            f"{folder} is a run with other settings ({'; '.join(changed)}); "
            "choose another --run-name, or --fresh to start over"
        )
    return (folder / "model.safetensors").exists()


def recorded_settings(folder: Path) -> dict[str, Any]:
    """What a run's ``config.yaml`` says.

    Raises:
        InputError: it holds no settings.
        OSError: it cannot be read.
    """
    path = folder / "config.yaml"
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise InputError(f"{path} is damaged: it holds no settings")
    return settings


def _check_is_run(folder: Path) -> None:
    named = [path.name for path in folder.iterdir()] if folder.exists() else []
    if "config.yaml" not in named and any(not name.startswith(".") for name in named):
        raise InputError(f"{folder} is not a run folder; choose another --run-name")


def hold(
    folder: Path,
    stack: ExitStack,
    other: str = "choose another --run-name",
    lock: Path | None = None,
) -> None:
    """Lock a folder; the system releases the lock even when this process is killed.

    Args:
        folder: to lock.
        stack: holds the lock until it is closed.
        other: what else a user can do where it is in use.
        lock: a file for it; by default it lies beside ``folder``.

    Raises:
        InputError: it stays in use for 10 s.
    """
    lock = lock or folder.parent / f".{folder.name}.lock"
    try:
        stack.enter_context(FileLock(lock).acquire(timeout=_LOCK_SECONDS))
    except Timeout:
        raise InputError(
            f"{folder} is in use by another process; wait for its end, or {other}"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warn(
            f"{folder.parent}: its file system has no locks ({error.strerror}); do not start this "
            "twice at once"
        )


def _is_restart() -> bool:
    """Whether a launcher or scheduler has started this very command before."""
    counters = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counters)


def _find_start(folder: Path) -> Start:
    """The newest good checkpoint, or the beginning."""
    checkpoints = folder / "checkpoints"
    remove_unfinished(checkpoints)
    newest = newest_checkpoint(checkpoints)
    if newest is None:
        return Start()
    for damaged in all_checkpoints(checkpoints):
        if damaged > newest:  # else it would be warned of for ever
            set_aside(damaged, "damaged")
    files = read_checkpoint(newest)
    try:
        state = json.loads(files["state.json"])
        del state["settings"]
        start = Start(checkpoint=files, **state)
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{newest} is of another version of this package; --fresh starts the run over"
        ) from None
    print(f"{folder} goes on from step {start.step:,}", flush=True)
    return start


def _record_environment(path: Path, world: World, start: Start) -> None:
    """Write what the run runs on, with that of its earlier starts, and warn of differences."""
    now = environment(world) | ({"precision": start.precision} if start.precision else {})
    starts = _earlier_starts(path) if start.step else []
    brief = {name: now[name] for name in ("world_size", "threads", "device", "precision")}
    for name, value in brief.items():
        if starts and starts[-1].get(name, value) != value:
            warn(
                f"goes on with {name} {value} instead of {starts[-1][name]}: results can differ in "
                "the last bits"
            )
    starts.append({"step": start.step} | brief)
    write_file(path, json.dumps(now | {"starts": starts}, indent=2) + "\n")


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Those that an ``environment.json`` tells, none if it is damaged: nothing depends on them."""
    try:
        starts = json.loads(path.read_bytes())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    well = isinstance(starts, list) and all(isinstance(start, dict) for start in starts)
    return starts if well else []
