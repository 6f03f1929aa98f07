"""What is asked of the operating system: whole files, and processes that end with their parent."""

import ctypes
import os
import signal
import sys
from pathlib import Path

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (on Linux; elsewhere do nothing)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def write_file(path: Path, contents: bytes | str) -> None:
    """Replace ``path`` in one step; a reader, or a crash, meets the old contents or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
