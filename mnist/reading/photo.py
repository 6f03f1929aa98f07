"""Which files are to be read, and their pages."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist.cli import InputError
from mnist.pictures import IMAGE_SUFFIXES, Frame, count_frames, decode_frames, draw_pdf

if TYPE_CHECKING:
    from PIL import Image

LONGEST = 2000
"""Pixels of the longer side of a page, to which larger ones are reduced: of a sheet of A4 with
digits of 4 mm these are 28 high."""

_SUFFIXES = IMAGE_SUFFIXES | {".pdf"}
_NONE_INSIDE = f"no image files in it ({' '.join(sorted(_SUFFIXES))})"


def find_photos(named: Sequence[Path], listed: Path | None = None) -> list[str]:
    """The files that are named, those of folders and patterns that are named, and those of a list,
    each once.

    Args:
        named: files, folders, or patterns such as ``scans/*.png`` that no shell has expanded.
        listed: a file of paths, one a line, or each ended by a NUL byte, as ``find -print0`` does.
            They are taken as they are: none is a pattern, and a folder may be empty.

    Raises:
        InputError: a named folder or the list holds no image files, or cannot be read.
    """
    photos: dict[str, str] = {}
    for path in map(str, named):
        if os.path.isdir(path):
            found = _inside(path)
        elif not os.path.exists(path) and glob.has_magic(path):
            found = []
            for match in sorted(glob.glob(path, recursive=True)):
                name = os.path.basename(match)
                if os.path.isdir(match):
                    found += [] if _is_hidden(name) else _inside(match)
                elif _is_photo(name):
                    found.append(match)
        else:
            found = [path]
        if not found:
            raise InputError(f"{path}: {_NONE_INSIDE}")
        for photo in found:
            photos.setdefault(os.path.realpath(photo), photo)
    for path in _of_list(listed) if listed else ():
        for photo in _inside(path) if os.path.isdir(path) else [path]:
            photos.setdefault(os.path.realpath(photo), photo)
    if not photos:
        raise InputError(f"--files-from {listed}: {_NONE_INSIDE}")
    return list(photos.values())


def _of_list(listed: Path) -> list[str]:
    try:
        content = listed.read_bytes()
    except OSError as error:
        raise InputError(f"--files-from {listed}: {error.strerror}") from None
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    found = [str(Path(os.fsdecode(line))) for line in lines if line.strip()]
    if not found:
        raise InputError(f"--files-from {listed}: expected a path on each line, found none")
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_photo(name: str) -> bool:
    return not _is_hidden(name) and os.path.splitext(name)[1].lower() in _SUFFIXES


def _inside(folder: str) -> list[str]:
    """Image files at any depth, sorted as plain strings; nothing that is hidden."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [os.path.join(parent, name) for name in names if _is_photo(name)]
    return sorted(found)


def load_pages(photo: Path, first: int = 0) -> Iterator[Frame]:
    """The pages of a file: of a PDF, every frame of a TIFF, else one.

    Args:
        photo: the file.
        first: how many to leave out.

    Raises:
        InputError: it cannot be read; also in the middle of several.
    """

    if photo.suffix.lower() == ".pdf":
        return draw_pdf(photo, LONGEST, first)

    def check(image: "Image.Image") -> None:
        frames = count_frames(image)
        if frames != 1 and image.format != "TIFF":
            raise InputError(f"{photo}: expected a still image, found {frames} frames")

    return decode_frames(photo, LONGEST, check, first=first)
