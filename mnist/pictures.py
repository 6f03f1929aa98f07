"""Users' image files, decoded: upright, in 8 bits, on an opaque ground, in bounded memory."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm .heic .heif".split())
"""The files of a folder that are its images, in small or capital letters."""

_MOST_PIXELS = 200_000_000
_ORIENTATION = 0x0112  # of EXIF
_DECODERS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no others: one runs Ghostscript


def decoders() -> dict[str, str | None]:
    """The versions of the packages that decode; None of an extra that is not installed."""
    found: dict[str, str | None] = {}
    for package in ("pillow", "pillow-heif", "pypdfium2"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


class Frame(NamedTuple):
    """A picture of a file."""

    pixels: NDArray[np.uint8]
    """height×width of one that is grey, else height×width×3; upright."""
    size: tuple[int, int]
    """Width and height, upright, that it has in its file; there may be fewer pixels here."""


def count_frames(image: "Image.Image") -> int:
    """How many pictures a file holds; a phone's JPEG or HEIC has others that are not for people."""
    return 1 if image.format in ("MPO", "HEIF") else getattr(image, "n_frames", 1)


def decode_frames(
    path: Path,
    longest: int,
    check: Callable[["Image.Image"], None],
    *,
    first: int = 0,
    what: str = "an image",
    upright: bool = True,
) -> Iterator[Frame]:
    """The frames of an image file.

    Args:
        path: the file.
        longest: pixels of the longer side, to which larger frames are reduced.
        check: raises an InputError if the file, opened but not yet decoded, is not as expected.
        first: how many frames to leave out.
        what: is expected, for messages.
        upright: turn them as EXIF says.

    Raises:
        InputError: it is no image, damaged, too large, or not as expected.
    """
    from PIL import Image

    formats: tuple[str, ...] = _DECODERS
    if path.suffix.lower() in (".heic", ".heif"):
        _register_heif(path)
        formats = (*formats, "HEIF")
    number, count = first, first + 1
    while number < count:
        try:
            with warnings.catch_warnings(), _own_limit():
                warnings.simplefilter("ignore")  # Pillow's: of what matters, the error says more
                with Image.open(path, formats=formats) as image:
                    check(image)
                    count = count_frames(image)
                    if number >= count:
                        return
                    if number:
                        image.seek(number)
                    width, height = image.size
                    if width * height > _MOST_PIXELS:
                        raise InputError(
                            f"{path}: expected at most 200 megapixels, found {width}×{height}"
                        )
                    smaller = longest / max(width, height)
                    # JPEG is decoded in part.
                    image.draft(None, (math.ceil(smaller * width), math.ceil(smaller * height)))
                    orientation = image.getexif().get(_ORIENTATION, 1) if upright else 1
                    pixels = _in_8_bits(image, str(path), longest)
        except InputError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything over damaged files
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            reason = reason.removesuffix(f" {str(path)!r}")
            raise InputError(f"{path}: cannot be read as {what}: {reason}") from None
        pixels = _turned(pixels, orientation)
        lies = orientation in (5, 6, 7, 8)
        yield Frame(pixels, (height, width) if lies else (width, height))
        number += 1


@contextmanager
def _own_limit() -> Iterator[None]:
    """Pillow's limit of pixels is the caller's to set; here it is _MOST_PIXELS."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _register_heif(path: Path) -> None:
    """Have Pillow know iPhones' photos; they are upright as they are decoded."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise InputError(
            f"{path}: HEIC takes the package pillow-heif: pip install pillow-heif, or "
            "pip install '.[heic]'"
        ) from None
    register_heif_opener(thumbnails=False)  # with them, drafts would be smaller than is asked for


def draw_pdf(path: Path, longest: int, first: int = 0) -> Iterator[Frame]:
    """The pages of a PDF from the given one on, each as a picture whose longer side has
    ``longest`` pixels; its size in the file is taken to be that.

    Raises:
        InputError: it is no PDF, damaged, or not to be opened without a password.
    """
    try:
        import pypdfium2
    except ImportError:
        raise InputError(
            f"{path}: PDF takes the package pypdfium2: pip install pypdfium2, or "
            "pip install '.[pdf]'"
        ) from None
    try:
        with pypdfium2.PdfDocument(path) as document:
            document.init_forms()  # or what is filled in is not drawn
            for number in range(first, len(document)):
                page = document[number]
                scale = (longest - 0.001) / max(1.0, *page.get_size())  # it rounds up
                bitmap = page.render(scale=scale, rev_byteorder=True)
                pixels = _grey_if_plain(bitmap.to_numpy()[..., :3].copy())
                bitmap.close()
                page.close()
                yield Frame(pixels, (pixels.shape[1], pixels.shape[0]))
    except (pypdfium2.PdfiumError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a PDF: {reason}") from None


def pixels_of(image: "Image.Image", longest: int) -> NDArray[np.uint8]:
    """Of an image in memory, as ``decode_frames`` gives a file's: upright, height×width or ×3.

    Raises:
        InputError: it has more than 16 bits per pixel, no pixels, or a damaged file.
    """
    if not image.width * image.height:
        raise InputError("the image cannot be read: it has no pixels")
    try:
        own = image.copy()  # the caller's stays as it is
        own.format = image.format
        return _turned(_in_8_bits(own, "the image", longest), image.getexif().get(_ORIENTATION, 1))
    except InputError:
        raise
    except Exception as error:  # it is decoded only now; see decode_frames
        reason = " ".join(str(error).split())
        raise InputError(f"the image cannot be read: {reason}") from None


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Upright."""
    from PIL import Image, ImageOps

    if orientation == 1:
        return pixels
    turned = Image.fromarray(pixels)
    turned.getexif()[_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(turned))


def _in_8_bits(image: "Image.Image", path: str, longest: int) -> NDArray[np.uint8]:
    """Grey, height×width, or colours, ×3, on an opaque ground, in at most ``longest`` pixels."""
    from PIL import Image as PillowImage

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey = ((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8)
        image = PillowImage.fromarray(grey)
    if image.mode in ("I", "F"):
        raise InputError(f"{path}: expected 8 or 16 bits per pixel, found 32")
    transparent = image.has_transparency_data
    mode = "RGBA" if transparent else "L" if image.mode in ("1", "L") else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    image.thumbnail((longest, longest), PillowImage.Resampling.BOX)  # with transparency weighed
    if transparent:
        return _on_ground(np.asarray(image), np.asarray(image.convert("L")))
    return _grey_if_plain(np.asarray(image))


def _grey_if_plain(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """height×width of height×width×3 whose colours are all grey."""
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
