"""Writing files so that they appear whole or not at all."""

import os
from pathlib import Path


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
