"""Checkpoints on disk: written whole, verified, and the newest good one found again.

A checkpoint is a folder ``step-000000936`` of files and a ``manifest.json`` with the SHA-256 of
each. What the files hold is the affair of those who write and read them.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from mnist.cli import InputError
from mnist.system import flush_to_disk, warn

_FORMAT = "mnist-checkpoint-1"
_MANIFEST = "manifest.json"
_NAME = "step-" + 9 * "[0-9]"  # of a checkpoint's folder, as a pattern

Contents = Callable[[], dict[str, bytes]]
"""Makes the files of a checkpoint, by name."""


def write_checkpoint(folder: Path, step: int, files: dict[str, bytes]) -> Path:
    """Make ``folder/step-…`` of the given files: flushed, read back and verified, then renamed.

    Raises:
        OSError: the disk is full, or gives back something else than it was given.
    """
    final = folder / f"step-{step:09d}"
    aside = folder / f".{final.name}.{os.getpid()}"
    digests = {name: hashlib.sha256(contents).hexdigest() for name, contents in files.items()}
    manifest = json.dumps({"format": _FORMAT, "sha256": digests}, indent=2) + "\n"
    try:
        aside.mkdir(parents=True)
        for name, contents in (files | {_MANIFEST: manifest.encode()}).items():
            (aside / name).write_bytes(contents)
            flush_to_disk(aside / name)
        flush_to_disk(aside)
        damage = find_damage(aside)
        if damage:
            raise OSError(None, f"{damage}, right after it was written")
        if final.exists():  # damaged, else nobody would write it again
            set_aside(final, "damaged")
        aside.rename(final)
        flush_to_disk(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint; each newer one that is damaged is named in a warning.

    Raises:
        InputError: there are checkpoints, and none is good.
    """
    found = all_checkpoints(folder)
    for path in found:
        damage = find_damage(path)
        if not damage:
            return path
        warn(f"{path} is skipped: {damage}")
    if found:
        raise InputError(
            f"{folder}: none of its {len(found)} checkpoints is good, see above; "
            "--fresh starts the run over"
        )
    return None


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, good or not, the newest first."""
    return sorted(folder.glob(_NAME), reverse=True)


def read_checkpoint(checkpoint: Path) -> dict[str, bytes]:
    """The files of a good checkpoint, by name: those of its manifest. What else lies there, as
    browsers of files and other jobs leave it, is not of the checkpoint."""
    return {name: (checkpoint / name).read_bytes() for name in _names(checkpoint)}


def _names(checkpoint: Path) -> list[str]:
    return list(json.loads((checkpoint / _MANIFEST).read_bytes())["sha256"])


def set_aside(checkpoint: Path, why: str) -> None:
    """Give it a name by which it is no checkpoint any more, and nothing in it is lost."""
    checkpoint.rename(checkpoint.with_name(f"{why}-{checkpoint.name}-{time.time_ns()}"))


def remove_unfinished(folder: Path) -> None:
    """Remove what saves left that were killed."""
    for left in folder.glob(f".{_NAME}.*[0-9]"):
        shutil.rmtree(left, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, and nothing that somebody else put there."""
    try:
        for name in (*_names(checkpoint), _MANIFEST):  # the manifest last, should this be killed
            (checkpoint / name).unlink(missing_ok=True)
    except (OSError, ValueError, KeyError, TypeError):
        set_aside(checkpoint, "damaged")
        return
    try:
        checkpoint.rmdir()
    except OSError:
        set_aside(checkpoint, "left-in")


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint was made after."""
    return int(checkpoint.name.removeprefix("step-"))


def enclosing_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path lies in, or is; None for any other path."""
    path = Path(os.path.realpath(path))
    for folder in (path, *path.parents):
        if folder.parent.name == "checkpoints" and fnmatchcase(folder.name, _NAME):
            return folder
    return None


def find_damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            return f"{_MANIFEST} is of format {manifest['format']}, expected {_FORMAT}"
        for name, expected in manifest["sha256"].items():
            with (checkpoint / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{name} is damaged (wrong checksum)"
    except OSError as error:
        return f"{Path(error.filename or '').name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is damaged"
    return ""


class Saver:
    """Writes checkpoints in a thread of its own, so that training goes on meanwhile.

    A slow disk skips checkpoints rather than to delay training: of those that wait for it, only the
    newest is kept. A checkpoint that cannot be written is a warning, the first one a loud one, and
    the earlier ones stay.

    Args:
        folder: of the checkpoints.
        keep: how many of the newest stay; older ones go once a new one is verified.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.newest: int | None = None
        """The step of the newest one that is safe on the disk, of those written here."""
        self._folder, self._keep = folder, keep
        self._waiting: deque[tuple[int, Contents, Callable[[], None]]] = deque(maxlen=1)
        self._failing = False
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def save(
        self, step: int, contents: Contents, verified: Callable[[], None] = lambda: None
    ) -> None:
        """Have a checkpoint written soon.

        Args:
            step: that it is of.
            contents: makes its files; called in the thread.
            verified: called there once the checkpoint is safe on the disk.
        """
        if self._last is not None and self._last.done():
            self._last.result()  # raises what should not have happened
        self._waiting.append((step, contents, verified))
        self._last = self._thread.submit(self._write)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until all is written."""
        self._thread.shutdown()
        if self._last is not None:
            self._last.result()

    def _write(self) -> None:
        if not self._waiting:  # an earlier call has written the newest
            return
        step, contents, verified = self._waiting.pop()
        try:
            write_checkpoint(self._folder, step, contents())
            self.newest = step
            verified()
            self._prune(step)
        except OSError as error:
            warn(f"no checkpoint of step {step} in {self._folder}: {error.strerror}")
            if not self._failing:
                self._say(self._consequence())
        else:
            if self._failing:
                self._say(f"step {step} is saved: checkpoints can be written again")
        self._failing = self.newest != step

    def _consequence(self) -> str:
        """What a first failure means, for whoever may still mend it while training goes on."""
        kept = next((path for path in all_checkpoints(self._folder) if not find_damage(path)), None)
        lost = "all of it" if kept is None else f"what came after step {step_of(kept):,}"
        return (
            f"WARNING: THIS RUN IS NOT BEING SAVED: interrupted now, it loses {lost}. "
            "Training goes on, and every later checkpoint is tried."
        )

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _prune(self, newest: int) -> None:
        earlier = [path for path in all_checkpoints(self._folder) if step_of(path) <= newest]
        for path in earlier[self._keep :]:
            with suppress(OSError):
                _remove(path)
