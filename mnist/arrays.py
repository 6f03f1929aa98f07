"""Arrays in files: IDX, plain or packed, and ``.npy``.

They are mapped into memory, or unpacked while they are read, so that anonymous memory does not grow
with the number of images.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError

_CHUNK_BYTES = 1 << 20


class Rows(Protocol):
    """What an array in memory, a mapped file, a packed file and a folder have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, part: Any, /) -> NDArray[Any]: ...


def open_rows(path: Path, expected: str) -> Rows:
    """A file's array of any shape, recognised by its first bytes.

    Args:
        path: the file.
        expected: what should be there, for a person to read.

    Raises:
        InputError: it cannot be read, or holds anything else.
    """
    with reading(path):
        path.stat()  # raises if nothing is there
        if not path.is_file():
            found = "a folder" if path.is_dir() else "a device"
            raise InputError(f"{path}: expected {expected}, found {found}")
        with path.open("rb") as file:
            begin = file.read(6)
            if begin[:2] == b"\x1f\x8b":
                return _PackedRows(path, expected)
            if begin == b"\x93NUMPY":
                return _map_npy(path)
            file.seek(0)
            shape = _idx_shape(file, path, expected)
            _check_size(path, shape, path.stat().st_size - file.tell())
            # An ordinary array over the mapping: slices of a np.memmap cost more.
            return np.asarray(np.memmap(path, np.uint8, "r", file.tell(), shape))


def _idx_shape(file: BinaryIO | gzip.GzipFile, path: Path, expected: str) -> tuple[int, ...]:
    """Read the header of an IDX file of unsigned bytes."""
    magic = file.read(4)
    if magic[:3] != b"\0\0\x08" or len(magic) < 4:
        found = f"a file that starts with {magic.hex(' ')}" if magic else "an empty file"
        if magic[:2] == b"\0\0" and len(magic) == 4:
            found = f"IDX of type {magic[2]:#04x}, not of unsigned bytes"
        raise InputError(f"{path}: expected {expected}, found {found}")
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

    def __init__(self, path: Path, expected: str) -> None:
        self._path = path
        self._file = gzip.open(path)  # noqa: SIM115
        self.shape = _idx_shape(self._file, path, expected)
        self._begin = self._file.tell()
        found = 0
        while chunk := self._file.read(_CHUNK_BYTES):
            found += len(chunk)
        _check_size(path, self.shape, found)

    def __getitem__(self, part: slice, /) -> NDArray[np.uint8]:
        start, stop, _ = part.indices(self.shape[0])
        row_bytes = math.prod(self.shape[1:])
        with reading(self._path):
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


def shown(rows: Rows) -> str:
    """An array's shape, for a person."""
    return "shape " + "×".join(map(str, rows.shape)) if rows.shape else "a single number"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into an InputError of one line."""
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read: {reason}") from error
