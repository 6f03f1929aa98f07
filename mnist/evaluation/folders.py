"""Image files in a folder: which there are, and their pixels."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm".split())
"""The files of a folder that are its images, in small or capital letters."""

LONGEST = 1024
"""Pixels of the longer side of an image, to which larger ones are reduced."""

_MOST_PIXELS = 200_000_000
_ORIENTATION = 0x0112  # of EXIF
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's: of what matters, the error says more
                image = _decode(self._folder / file, any_size)
            yield image


def _decode(path: Path, any_size: bool) -> NDArray[np.uint8]:
    """One image file in 8 bits: height×width if it is grey, else ×3."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # see _MOST_PIXELS
    what = "an image" if any_size else "an image of 28×28"
    try:
        with Image.open(path, formats=_DECODERS) as image:
            found = "×".join(map(str, image.size))
            frames = getattr(image, "n_frames", 1)
            if frames != 1 and image.format != "MPO":  # a phone's JPEG, with a second picture
                raise InputError(f"{path}: expected {what} of one frame, found {frames} frames")
            if not any_size and found != "28×28":
                raise InputError(
                    f"{path}: expected an image of 28×28 pixels, found {found}; "
                    "--prepare auto takes any size"
                )
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(f"{path}: expected at most 200 megapixels, found {found}")
            image.draft(None, (LONGEST, LONGEST))  # JPEG is decoded in part
            orientation = image.getexif().get(_ORIENTATION, 1)
            pixels = _in_8_bits(image, path)
            if not any_size:
                grey = pixels if pixels.ndim == 2 else Image.fromarray(pixels).convert("L")
                return np.asarray(grey)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything over damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = reason.removesuffix(f" {str(path)!r}")
        raise InputError(f"{path}: cannot be read as {what}: {reason}") from None
    upright = Image.fromarray(pixels)
    upright.getexif()[_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(upright))


def _in_8_bits(image: "Image.Image", path: Path) -> NDArray[np.uint8]:
    """Grey, height×width, or colours, ×3, on an opaque ground, in at most ``LONGEST`` pixels."""
    from PIL import Image as PillowImage

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey = ((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8)
        image = PillowImage.fromarray(grey)
    if image.mode in ("I", "F"):
        raise InputError(f"{path}: expected 8 or 16 bits per pixel, found 32")
    transparent = image.has_transparency_data
    image = image.convert("RGBA" if transparent else "L" if image.mode in ("1", "L") else "RGB")
    image.thumbnail((LONGEST, LONGEST), PillowImage.Resampling.BOX)  # with transparency weighed
    if transparent:
        return _on_ground(np.asarray(image), np.asarray(image.convert("L")))
    pixels = np.asarray(image)
    plain = pixels.ndim == 3 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0] if plain else pixels


def _on_ground(image: NDArray[np.uint8], grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colours and alpha, height×width×4, on an opaque ground; grey if they are.

    Under ink that is dark on average the ground is white, as a browser's canvas shows it (on black
    the digit would vanish), else black.

    Args:
        image: the colours and alpha.
        grey: how light the colours are, height×width.
    """
    alpha = image[..., 3:] / 255
    ground = 255 if (grey * alpha[..., 0]).sum() < 127.5 * alpha.sum() else 0
    colours = image[..., :3]
    if (colours == colours[..., :1]).all():
        colours = grey[..., None]
    made = np.rint(colours * alpha + ground * (1 - alpha)).astype(np.uint8)
    return made[..., 0] if made.shape[2] == 1 else made
