"""Which files are to be read, and their pages."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist.cli import InputError
from mnist.pictures import IMAGE_SUFFIXES, Frame, count_frames, decode_frames

if TYPE_CHECKING:
    from PIL import Image

LONGEST = 2000
"""Pixels of the longer side of a page, to which larger ones are reduced: of a sheet of A4 with
digits of 4 mm these are 28 high."""


def find_photos(named: Sequence[Path]) -> list[Path]:
    """The files that are named, and those of folders that are named, each once.

    Raises:
        InputError: a folder holds no image files, or cannot be read.
    """
    photos: dict[Path, Path] = {}
    for path in named:
        found = _inside(path) if path.is_dir() else [path]
        if not found:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise InputError(f"{path}: no image files in it ({suffixes})")
        for photo in found:
            photos.setdefault(photo.resolve(), photo)
    return list(photos.values())


def _inside(folder: Path) -> list[Path]:
    """Image files at any depth, sorted as plain strings; nothing that is hidden."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found, key=str)


def load_pages(photo: Path) -> Iterator[Frame]:
    """The pages of a file: every frame of a TIFF, else one.

    Raises:
        InputError: it cannot be read; also in the middle of several.
    """

    def check(image: "Image.Image") -> None:
        frames = count_frames(image)
        if frames != 1 and image.format != "TIFF":
            raise InputError(f"{photo}: expected a still image, found {frames} frames")

    return decode_frames(photo, LONGEST, check)
