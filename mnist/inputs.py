"""Images and labels to score: MNIST's own or the user's files, checked, and read in parts.

Files are mapped into memory, or unpacked while they are read, so that anonymous memory does not
grow with the number of images. Whatever is wrong with them is an InputError of one line.
"""

import csv
import dataclasses
import gzip
import hashlib
import math
import os
import re
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, Protocol, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from mnist.config import InputError
from mnist.data import IMAGE_SHAPE, MD5, split_validation
from mnist.report import images_of_split

IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm".split())
"""The files of a folder that are its images, in small or capital letters."""

_DECODERS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no others: one runs Ghostscript
_DIGITS = frozenset("0123456789")
_EXPECTED = {
    "images": "images as an IDX file (also .gz), a .npy of N×28×28, or a folder of image files",
    "labels": "labels as an IDX file (also .gz) or a .npy of N whole numbers, or for a folder of "
    "images as a CSV (UTF-8) with the columns file and label",
}
_CHUNK_BYTES = 1 << 20
_CHUNK_IMAGES = 1024
_CHUNK_LABELS = 1 << 17
_LONGEST_LINE = 1 << 20  # of a CSV, in characters
_MOST_NAMED = 3  # of the names that an error has to tell of
_RING = np.flatnonzero(np.pad(np.zeros((26, 26)), 1, constant_values=1))  # the outermost pixels


class _Rows(Protocol):
    """What an array in memory, a mapped file, a packed file and a folder have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, part: Any, /) -> NDArray[Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Images to score, N x 28 x 28, and their labels as far as known; both are read in parts.

    Parts in ascending order are cheap; in a packed file going back starts over. Not for use by
    several threads at once. Reading raises InputError for whatever cannot be found before: pixels
    out of range, and image files that are damaged or of another size.
    """

    description: str
    """``MNIST test images``, or the path as the user gave it."""
    split: str | None = None
    """Of MNIST, where these are its own: test, validation or train."""
    images_path: Path
    labels_path: Path | None
    files: Sequence[str] | None = None
    """The images' paths in their folder, with ``/``, sorted as plain strings; None for one file."""
    labelled: int
    """How many labels are known."""
    warnings: tuple[str, ...] = ()
    """What a user should hear about, a line each."""
    image_rows: _Rows
    label_rows: _Rows | None
    order: NDArray[np.int64] | None = None
    """Which images of the file these are, ascending; None for all."""

    def __len__(self) -> int:
        return self.image_rows.shape[0] if self.order is None else len(self.order)

    def images(self, start: int, stop: int) -> NDArray[Any]:
        """A fresh array n x 28 x 28: uint8 from 0 to 255, or float32 from 0 to 1."""
        rows = self.image_rows[self._part(start, stop)]
        if rows.dtype == np.uint8:
            return np.array(rows, order="C")
        with np.errstate(all="ignore"):  # what does not fit float32 is refused below
            result = np.array(rows, np.float32, order="C")
        # Not (outside): NaN is neither inside nor outside.
        if len(result) and not (result.min() >= 0 and result.max() <= 1):
            self._refuse_floats(rows, start)
        return result

    def labels(self, start: int, stop: int) -> NDArray[np.int64]:
        """Labels 0 to 9 of these images, n; -1 where unknown."""
        if self.label_rows is None:
            return np.full(len(self.indices(start, stop)), -1)
        return np.array(self.label_rows[self._part(start, stop)], np.int64)

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """The number of each of these images in its file (or in ``files``), n."""
        if self.order is None:
            return np.arange(*slice(start, stop).indices(len(self)))
        return self.order[start:stop].copy()

    def hashes(self) -> dict[str, str | None]:
        """``images_sha256`` and ``labels_sha256`` of the files' bytes; None without such a file.

        That of a folder is of the lines that ``sha256sum`` prints for its images, in order.
        """
        if self.files is None:
            images = _sha256(self.images_path)
        else:
            lines = hashlib.sha256()
            for file in self.files:
                digest = _sha256(self.images_path / file)
                lines.update(f"{digest}  ".encode() + os.fsencode(file) + b"\n")
            images = lines.hexdigest()
        labels = None if self.labels_path is None else _sha256(self.labels_path)
        return {"images_sha256": images, "labels_sha256": labels}

    @cached_property
    def is_mnist_test(self) -> bool:
        """Whether these are the images and labels of MNIST's test set, in whatever file.

        Never of a folder, whose images would all have to be decoded to know.
        """
        number = 10_000
        if len(self) != number or self.files is not None:
            return False
        images = hashlib.md5(struct.pack(">4I", 0x803, number, *IMAGE_SHAPE), usedforsecurity=False)
        labels = hashlib.md5(struct.pack(">2I", 0x801, number), usedforsecurity=False)
        for start in range(0, number, _CHUNK_IMAGES):
            images.update(self.images(start, start + _CHUNK_IMAGES).tobytes())
            labels.update(self.labels(start, start + _CHUNK_IMAGES).astype(np.uint8).tobytes())
        expected = MD5["t10k-images-idx3-ubyte"], MD5["t10k-labels-idx1-ubyte"]
        return (images.hexdigest(), labels.hexdigest()) == expected

    def _part(self, start: int, stop: int) -> slice | NDArray[np.int64]:
        return slice(start, stop) if self.order is None else self.order[start:stop]

    def _refuse_floats(self, rows: NDArray[Any], start: int) -> NoReturn:
        """Name the first value out of range, and what may have happened to it."""
        values = rows.reshape(len(rows), -1)
        outside = ~((values >= 0) & (values <= 1))
        first = int(outside.any(1).argmax())
        value = values[first, outside[first].argmax()]
        advice = "; divide by 255" if values.min() >= 0 and 1 < values.max() <= 255 else ""
        raise InputError(
            f"{self.images_path}: expected floats from 0 to 1, found {value} in image "
            f"{start + first}{advice}"
        )


def open_mnist(
    data_dir: Path, split: Literal["test", "validation", "train"], validation_size: int, seed: int
) -> Inputs:
    """MNIST's 10,000 test images, or the part of its 60,000 training images that a run with these
    settings held out (``validation``) or trained on (``train``), by ascending number.

    Raises:
        InputError: a file is missing or is not what its name says, or the part is empty.
    """
    prefix = data_dir / "MNIST" / "raw" / ("t10k" if split == "test" else "train")
    inputs = open_images(Path(f"{prefix}-images-idx3-ubyte"), Path(f"{prefix}-labels-idx1-ubyte"))
    description = images_of_split(split)
    inputs = dataclasses.replace(inputs, description=description, split=split)
    if split == "test":
        return inputs
    if validation_size > len(inputs) or (validation_size == 0 and split == "validation"):
        held_out = f"{validation_size} of {len(inputs)} training images held out"
        raise InputError(f"{description}: expected some, found {held_out}")
    labels = torch.from_numpy(inputs.labels(0, len(inputs)))
    training, validation = split_validation(labels, validation_size, seed)
    order = (validation if split == "validation" else training).numpy()
    return dataclasses.replace(inputs, order=order, labelled=len(order))


def open_images(images: Path, labels: Path | None) -> Inputs:
    """The user's images, and labels from a file of their own or from the folders 0 to 9.

    ``labels`` is an IDX file or a ``.npy`` of as many labels as images, in their order. Images of a
    folder may have a CSV with the columns ``file`` and ``label`` instead, in any order; they must
    have one where different programs would list them in different orders.

    ``images`` is an IDX file, plain or gzipped, of any name; a ``.npy`` of uint8, or of floats from
    0 to 1; or a folder of image files of 28 by 28, directly inside or in folders 0 to 9, which
    then are their labels. Everything is checked here but for single pixels and image files.

    Raises:
        InputError: a path cannot be read, or holds anything else.
    """
    with _reading(images):
        if images.is_dir():
            return _open_folder(images, labels)
    rows = _open_rows(images, "images")
    if rows.shape[1:] != IMAGE_SHAPE:
        hint = ": are these labels?" if len(rows.shape) == 1 else ""
        raise InputError(f"{images}: expected images, N×28×28, found {_shown(rows)}{hint}")
    if rows.dtype.newbyteorder("=") not in (np.uint8, np.float16, np.float32, np.float64):
        raise InputError(
            f"{images}: expected images of uint8 from 0 to 255 or of floats from 0 to 1, "
            f"found {rows.dtype}"
        )
    if rows.shape[0] == 0:
        raise InputError(f"{images}: expected at least one image, found {_shown(rows)}")
    label_rows = _open_labels(labels, images, rows.shape[0]) if labels else None
    return Inputs(
        description=str(images),
        images_path=images,
        labels_path=labels,
        labelled=rows.shape[0] if labels else 0,
        image_rows=rows,
        label_rows=label_rows,
    )


def _open_labels(path: Path, images: Path, number: int) -> _Rows:
    """Integers 0 to 9, as many as images."""
    rows = _open_rows(path, "labels")
    if len(rows.shape) != 1:
        hint = ": are these images?" if rows.shape[1:] == IMAGE_SHAPE else ""
        raise InputError(f"{path}: expected labels of one dimension, found {_shown(rows)}{hint}")
    if not np.issubdtype(rows.dtype, np.integer):
        raise InputError(f"{path}: expected labels that are whole numbers, found {rows.dtype}")
    if rows.shape[0] != number:
        raise InputError(
            f"{path}: expected {number} labels, one for each image of {images}, "
            f"found {rows.shape[0]}"
        )
    for start in range(0, number, _CHUNK_LABELS):
        part = rows[start : start + _CHUNK_LABELS]
        if part.min() < 0 or part.max() > 9:
            first = int(((part < 0) | (part > 9)).argmax())
            raise InputError(
                f"{path}: expected labels from 0 to 9, found {part[first]} at index {start + first}"
            )
    return rows


# ------------------------------------------------------------------------------- single files


def _open_rows(path: Path, kind: Literal["images", "labels"]) -> _Rows:
    """A file's array of any shape, recognised by its first bytes."""
    with _reading(path):
        path.stat()  # raises if nothing is there
        if not path.is_file():
            found = "a folder" if path.is_dir() else "a device"
            raise InputError(f"{path}: expected {_EXPECTED[kind]}, found {found}")
        with path.open("rb") as file:
            begin = file.read(6)
            if begin[:2] == b"\x1f\x8b":
                return _PackedRows(path, kind)
            if begin == b"\x93NUMPY":
                return _map_npy(path)
            file.seek(0)
            shape = _idx_shape(file, path, kind)
            _check_size(path, shape, path.stat().st_size - file.tell())
            # An ordinary array over the mapping: slices of a np.memmap cost more.
            return np.asarray(np.memmap(path, np.uint8, "r", file.tell(), shape))


def _idx_shape(file: BinaryIO | gzip.GzipFile, path: Path, kind: str) -> tuple[int, ...]:
    """Read the header of an IDX file of unsigned bytes."""
    magic = file.read(4)
    if magic[:3] != b"\0\0\x08" or len(magic) < 4:
        found = f"a file that starts with {magic.hex(' ')}" if magic else "an empty file"
        if magic[:2] == b"\0\0" and len(magic) == 4:
            found = f"IDX of type {magic[2]:#04x}, not of unsigned bytes"
        raise InputError(f"{path}: expected {_EXPECTED[kind]}, found {found}")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise InputError(f"{path}: truncated within the sizes of its {magic[3]} dimensions")
    return struct.unpack(f">{magic[3]}I", sizes)


def _check_size(path: Path, shape: tuple[int, ...], found: int) -> None:
    if found != math.prod(shape):
        raise InputError(
            f"{path}: expected {math.prod(shape)} bytes for the shape {shape}, found {found}"
        )


def _map_npy(path: Path) -> NDArray[Any]:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header raises whatever parsing Python raises
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a .npy of plain numbers: {reason}") from None
    end = rows.offset + rows.nbytes
    if end != path.stat().st_size:
        raise InputError(f"{path}: expected {end} bytes, found {path.stat().st_size}")
    return np.asarray(rows)


class _PackedRows:
    """The array of a gzipped IDX file, unpacked while it is read.

    Opening reads all of it once: damage, and a wrong length, show only at the end.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, kind: str) -> None:
        self._path = path
        self._file = gzip.open(path)  # noqa: SIM115
        self.shape = _idx_shape(self._file, path, kind)
        self._begin = self._file.tell()
        found = 0
        while chunk := self._file.read(_CHUNK_BYTES):
            found += len(chunk)
        _check_size(path, self.shape, found)

    def __getitem__(self, part: slice, /) -> NDArray[np.uint8]:
        start, stop, _ = part.indices(self.shape[0])
        row_bytes = math.prod(self.shape[1:])
        with _reading(self._path):
            ahead = self._begin + start * row_bytes - self._file.tell()
            if ahead < 0:
                self._file.rewind()
                ahead = self._begin + start * row_bytes
            while ahead and (chunk := self._file.read(min(ahead, _CHUNK_BYTES))):
                ahead -= len(chunk)
            content = self._file.read((stop - start) * row_bytes)
        if len(content) != (stop - start) * row_bytes:
            raise InputError(f"{self._path}: has become shorter while it was read")
        return np.frombuffer(content, np.uint8).reshape(stop - start, *self.shape[1:])


def _shown(rows: _Rows) -> str:
    return "shape " + "×".join(map(str, rows.shape)) if rows.shape else "a single number"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into one line."""
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read: {reason}") from error


def _sha256(path: Path) -> str:
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------ folders


def _open_folder(folder: Path, labels: Path | None) -> Inputs:
    """Image files directly inside, in folders 0 to 9, or both."""
    files, ignored, first_ignored = [], 0, ""
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
            elif prefix and inside not in _DIGITS:
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
    labelled = sum("/" in file for file in files)
    if labels and labelled:
        raise InputError(
            f"{labels}: expected no labels beside {folder}, found {labelled} of its images in "
            "folders 0 to 9, which are their labels"
        )
    label_rows: _Rows | None = _FolderLabels(files) if labelled else None
    if labels:
        labelled = len(files)
        if _is_table(labels):
            label_rows = _read_table(labels, folder, files)
        else:
            label_rows = _open_labels(labels, folder, len(files))
            _check_order(labels, folder, files)
    warning = f"{folder}: ignored {ignored} file(s) that are no images, such as {first_ignored}"
    return Inputs(
        description=str(folder),
        images_path=folder,
        labels_path=labels,
        files=files,
        labelled=labelled,
        warnings=(warning,) if ignored else (),
        image_rows=_FolderImages(folder, files),
        label_rows=label_rows,
    )


def _raise(error: OSError) -> NoReturn:
    raise error


class _FolderLabels:
    """The labels of images that lie in folders 0 to 9, N."""

    dtype = np.dtype(np.int64)

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self.shape = (len(files),)

    def __getitem__(self, part: slice, /) -> NDArray[np.int64]:
        labels = [int(file[0]) if "/" in file else -1 for file in self._files[part]]
        return np.array(labels, np.int64)


class _FolderImages:
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


# ------------------------------------------------------------------------- labels of a folder


def _is_table(path: Path) -> bool:
    """Whether this is a file of something, but neither IDX, plain or packed, nor ``.npy``."""
    with _reading(path):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            begin = file.read(6)
    return bool(begin) and not begin.startswith((b"\0\0", b"\x1f\x8b", b"\x93NUMPY"))


def _read_table(path: Path, folder: Path, files: Sequence[str]) -> NDArray[np.uint8]:
    """The labels of ``files`` from a CSV with the columns ``file`` and ``label``, in any order.

    Raises:
        InputError: it is no such CSV, or has not exactly one row for each image.
    """
    number_of = _finder(files)
    labels, lines = np.zeros(len(files), np.uint8), [0] * len(files)
    unknown, named = 0, []
    with (
        _reading(path),
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        rows = _table_rows(path, text)
        _, header = next(rows, (0, []))
        if header.count("file") != 1 or header.count("label") != 1:
            raise InputError(
                f"{path}: expected {_EXPECTED['labels']}, each once in its first line and "
                f"separated by commas, found {_brief(','.join(header))}"
            )
        name_column, label_column = header.index("file"), header.index("label")
        for line, row in rows:
            if len(row) != len(header):
                raise InputError(
                    f"{path}: line {line}: expected {len(header)} columns separated by commas, "
                    f"found {len(row)}: {_brief(','.join(row))}"
                )
            name, label = row[name_column], row[label_column]
            if label not in _DIGITS:
                raise InputError(
                    f"{path}: line {line}: expected a label from 0 to 9, found {_brief(label)}"
                )
            number = number_of(name)
            if number is None:
                unknown += 1
                if unknown <= _MOST_NAMED:
                    named.append(f"{_brief(name)} in line {line}")
            elif lines[number]:
                raise InputError(
                    f"{path}: {_brief(files[number])} is given twice, in lines {lines[number]} "
                    f"and {line}"
                )
            else:
                labels[number], lines[number] = int(label), line
    wrong = []
    if unknown:
        wrong.append(f"{unknown} row(s) name no image of {folder}: {_some(named, unknown)}")
    missing = [file for file, line in zip(files, lines, strict=True) if not line]
    if missing:
        named = [_brief(file) for file in missing[:_MOST_NAMED]]
        wrong.append(
            f"{len(missing)} of {len(files)} images of {folder} have no row: "
            f"{_some(named, len(missing))}"
        )
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
    return labels


def _finder(files: Sequence[str]) -> Callable[[str], int | None]:
    """Which of ``files`` a name means: itself, or the only one that looks the same."""
    numbers = {file: number for number, file in enumerate(files)}
    composed: dict[str, int | None] = {}  # made once a name needs it

    def number_of(name: str) -> int | None:
        name = name.removeprefix("./")
        if name in numbers:
            return numbers[name]
        if not composed:  # Macs and some archives write ü as u and two dots
            for number, file in enumerate(files):
                form = unicodedata.normalize("NFC", file)
                composed[form] = None if form in composed else number
        return composed.get(unicodedata.normalize("NFC", name))

    return number_of


def _table_rows(path: Path, text: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV that are not blank, each with the number of its first line."""

    def lines() -> Iterator[str]:
        while line := text.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise csv.Error(f"longer than {_LONGEST_LINE - 1:,} characters")
            yield line

    reader = csv.reader(lines(), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {line}: cannot be read as CSV: {error}") from None


def _brief(text: str) -> str:
    """On one line, whatever it is."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _some(named: Sequence[str], number: int) -> str:
    return ", ".join(named) + ", …" * (number > len(named))


def _check_order(path: Path, folder: Path, files: Sequence[str]) -> None:
    """Refuse labels without names where the images' order depends on who lists them.

    Raises:
        InputError: two names come in another order, or in none, elsewhere.
    """
    for order, key in _ORDERS.items():
        for (name, first), (other, second) in pairwise((file, key(file)) for file in files):
            if not first < second:
                raise InputError(
                    f"{path}: which label is whose is not certain: as text {_brief(name)} of "
                    f"{folder} comes before {_brief(other)}, but not {order}; give --labels a CSV "
                    "with the columns file and label, or pad the numbers in the names with zeros"
                )


_NUMBER = re.compile(r"(^-?\d+|\d+)")  # of any script, as int() takes them
_PART = re.compile(r"\d+|[^\W\d_]+|[\W_]")


def _by_numbers(name: str) -> list[Any]:
    """``2.png`` before ``10.png``."""
    parts: list[Any] = _NUMBER.split(name)
    parts[1::2] = map(int, parts[1::2])
    return parts


def _as_shown(name: str) -> list[tuple[int, int | str]]:
    """As file managers and ``ls`` do: without suffix and accents, numbers by value, and signs, also
    _, before digits before letters, small or capital.
    """
    plain = os.path.splitext(name)[0].casefold()
    if not plain.isascii():
        letters = unicodedata.normalize("NFD", plain)
        plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return [
        (1, int(part)) if part.isdecimal() else (2 if part.isalnum() else 0, part)
        for part in _PART.findall(plain)
    ]


_ORDERS: dict[str, Callable[[str], Any]] = {
    "by the numbers in the names": _by_numbers,
    "regardless of small and capital letters": str.casefold,
    "as file managers show them": _as_shown,
}


# --------------------------------------------------------------------------------- suspicions


class Suspicions:
    """Counts of images that are probably not what the model expects, part after part.

    ``counts`` (images of dark ink on a light ground, blank images, images with a pixel above the
    lowest two byte values; int64) add up over parts and processes. ``first_dark`` is the position
    of the first image of dark ink, ``NONE`` if there is none; over processes its minimum counts.
    """

    NONE = 2**62

    def __init__(self) -> None:
        self.counts = np.zeros(3, np.int64)
        self.first_dark = self.NONE

    def look(self, images: NDArray[Any], start: int) -> None:
        """Count images n x 28 x 28, as ``Inputs.images`` gives them, from position ``start`` on."""
        pixels = images.reshape(len(images), -1)
        full = 255 if images.dtype == np.uint8 else 1
        highest = pixels.max(1)
        blank = pixels.min(1) == highest
        # In MNIST the ring's mean is 3.4% of full scale at most, 96.6% at least when inverted.
        ring = pixels.take(_RING, 1).sum(1, dtype=np.float32)
        dark = (ring > full / 2 * len(_RING)) & ~blank
        above_one = highest > 1 if full == 255 else highest > 0
        self.counts += [np.count_nonzero(mask) for mask in (dark, blank, above_one)]
        if dark.any():
            self.first_dark = min(self.first_dark, start + int(dark.argmax()))


def suspicion_warnings(counts: NDArray[np.int64], first_dark: int, inputs: Inputs) -> list[str]:
    """What to tell the user of counts over all images, a line each."""
    dark, blank, above_one = counts.tolist()
    total, lines = len(inputs), []
    if dark:
        number = inputs.indices(first_dark, first_dark + 1)[0]
        first = f"file {inputs.files[number]}" if inputs.files else f"number {number}"
        lines.append(
            f"{dark} of {total} images look like dark ink on a light ground (the first is {first});"
            " the model expects light ink (255) on a dark ground (0): invert them"
        )
    if not above_one and blank < total:
        lines.append("values are 0 to 1 in unsigned bytes; expected 0 to 255")
    if blank:
        lines.append(f"{blank} of {total} images are blank (all pixels are alike)")
    return lines
