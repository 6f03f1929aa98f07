"""Image files in a folder: which there are, and their pixels."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE

IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm".split())
"""The files of a folder that are its images, in small or capital letters."""

_DECODERS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no others: one runs Ghostscript
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
                if labels and Path(parent, name).resolve() == labels.resolve():
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
    """The images of a folder, N x 28 x 28, decoded while they are read."""

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._folder, self._files = folder, files
        self.shape = (len(files), *IMAGE_SHAPE)

    def __getitem__(self, part: slice, /) -> NDArray[np.uint8]:
        files = self._files[part]
        result = np.empty((len(files), *IMAGE_SHAPE), np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: of what matters, the error says more
            for row, file in zip(result, files, strict=True):
                row[:] = _decode(self._folder / file)
        return result


def _decode(path: Path) -> NDArray[np.uint8]:
    """One image file of 28 by 28 in 8-bit grey."""
    from PIL import Image

    try:
        with Image.open(path, formats=_DECODERS) as image:
            found = "×".join(map(str, image.size))
            if getattr(image, "n_frames", 1) != 1:
                found += f" in {getattr(image, 'n_frames', 1)} frames"
            if found != "28×28":
                raise InputError(f"{path}: expected an image of 28×28 pixels, found {found}")
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                return ((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8)
            if image.mode in ("I", "F"):
                raise InputError(f"{path}: expected 8 or 16 bits per pixel, found 32")
            if not image.has_transparency_data:
                return np.asarray(image.convert("L"))
            return _on_ground(np.asarray(image.convert("RGBA").convert("LA")))
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything over damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = reason.removesuffix(f" {str(path)!r}")
        raise InputError(f"{path}: cannot be read as an image of 28×28: {reason}") from None


def _on_ground(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey and alpha, 28 x 28 x 2, on an opaque ground.

    Under ink that is dark on average the ground is white, as a browser's canvas shows it (on black
    the digit would vanish, and nobody would be warned of dark ink), else black.
    """
    grey, alpha = image[..., 0].astype(np.float64), image[..., 1] / 255
    ground = 255 if (grey * alpha).sum() < 127.5 * alpha.sum() else 0
    return np.rint(grey * alpha + ground * (1 - alpha)).astype(np.uint8)
