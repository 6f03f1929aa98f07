"""Image files in a folder: which there are, and their pixels."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE
from mnist.pictures import IMAGE_SUFFIXES, count_frames, decode_frames

if TYPE_CHECKING:
    from PIL import Image

LONGEST = 1024
"""Pixels of the longer side of an image, to which larger ones are reduced."""

DIGITS = frozenset("0123456789")


def find_images(folder: Path, labels: Path | None) -> tuple[list[str], str]:
    """The image files directly inside, in folders 0 to 9, or both, sorted as plain strings; and a
    warning of other files, or "".

    Args:
        folder: where they are.
        labels: a file of labels, which may lie among them.

    Raises:
        InputError: there are none, or some in other folders.
        OSError: a folder cannot be read.
    """
    files: list[str] = []
    ignored, first_ignored = 0, ""
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in (name for name in names if not name.startswith(".")):
            if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                if labels and os.path.realpath(Path(parent, name)) == os.path.realpath(labels):
                    continue
                ignored += 1
                first_ignored = min(first_ignored or prefix + name, prefix + name)
            elif prefix and inside not in DIGITS:
                raise InputError(
                    f"{folder}: expected images directly inside or in folders 0 to 9, "
                    f"found {prefix}{name}"
                )
            else:
                files.append(prefix + name)
    files.sort()
    if not files:
        raise InputError(
            f"{folder}: expected image files ({' '.join(sorted(IMAGE_SUFFIXES))}), "
            f"found none among {ignored} other file(s)"
        )
    warning = f"{folder}: ignored {ignored} file(s) that are no images, such as {first_ignored}"
    return files, warning if ignored else ""


def _raise(error: OSError) -> NoReturn:
    raise error


class FolderLabels:
    """The labels of images that lie in folders 0 to 9, N."""

    dtype = np.dtype(np.int64)

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self.shape = (len(files),)

    def __getitem__(self, part: slice, /) -> NDArray[np.int64]:
        labels = [int(file[0]) if "/" in file else -1 for file in self._files[part]]
        return np.array(labels, np.int64)


class FolderImages:
    """The images of a folder, N×28×28, decoded while they are read."""

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._folder, self._files = folder, files
        self.shape = (len(files), *IMAGE_SHAPE)

    def __getitem__(self, part: slice, /) -> NDArray[np.uint8]:
        files = self._files[part]
        result = np.empty((len(files), *IMAGE_SHAPE), np.uint8)
        for row, image in zip(result, self._decoded(files, any_size=False), strict=True):
            row[:] = image
        return result

    def of_any_size(self, part: slice) -> Iterator[NDArray[np.uint8]]:
        """The images one by one, upright, height×width or ×3, those larger than ``LONGEST``
        reduced to that."""
        return self._decoded(self._files[part], any_size=True)

    def _decoded(self, files: Sequence[str], any_size: bool) -> Iterator[NDArray[np.uint8]]:
        for file in files:
            yield decode_image(self._folder / file, any_size)


def decode_image(path: Path, any_size: bool) -> NDArray[np.uint8]:
    """One image file in 8 bits: height×width if it is grey, else ×3.

    Raises:
        InputError: it cannot be read, has several frames, or unless any size will do is not 28×28.
    """
    what = "an image" if any_size else "an image of 28×28"

    def check(image: "Image.Image") -> None:
        frames = count_frames(image)
        if frames != 1:
            raise InputError(f"{path}: expected {what} of one frame, found {frames} frames")
        if not any_size and image.size != (28, 28):
            raise InputError(
                f"{path}: expected an image of 28×28 pixels, found {image.width}×{image.height}; "
                "--prepare auto takes any size"
            )

    ((pixels, _),) = decode_frames(path, LONGEST, check, what=what, upright=any_size)
    if any_size or pixels.ndim == 2:
        return pixels
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))
