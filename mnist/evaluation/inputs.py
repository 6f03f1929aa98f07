"""Images and labels to score: MNIST's own or the user's files, checked, and read in parts.

Whatever is wrong with them is an InputError of one line.
"""

import dataclasses
import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from mnist.arrays import Rows, open_rows, reading, shown
from mnist.cli import InputError
from mnist.data import IMAGE_SHAPE, split_validation
from mnist.evaluation.folders import FolderImages, FolderLabels, find_images
from mnist.evaluation.labels import EXPECTED_LABELS, check_order, is_table, read_table
from mnist.evaluation.preparation import Mode, Prepared, as_they_are, prepare
from mnist.fetch import MD5
from mnist.runs.reports import images_of_split
from mnist.system import sha256

_EXPECTED_IMAGES = (
    "images as an IDX file (also .gz), a .npy of N×height×width, or a folder of image files"
)
_CHUNK_IMAGES = 1024
_CHUNK_LABELS = 1 << 17


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Images to score and their labels as far as known; both are read in parts.

    Parts in ascending order are cheap; in a packed file going back starts over. Not for use by
    several threads at once. Reading raises InputError for whatever cannot be found before: pixels
    out of range, and image files that are damaged or, unless they are prepared, of another size.
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
    image_rows: Rows
    label_rows: Rows | None
    mode: Mode = "as-is"
    """What is done to images that do not look like MNIST's."""
    order: NDArray[np.int64] | None = None
    """Which images of the file these are, ascending; None for all."""

    def __len__(self) -> int:
        return self.image_rows.shape[0] if self.order is None else len(self.order)

    def prepared(self, start: int, stop: int) -> Prepared:
        """These images as the network gets them, and what was done to them for it."""
        if self.mode == "as-is":
            return as_they_are(self.images(start, stop))
        part = slice(start, stop)
        if isinstance(self.image_rows, FolderImages):
            images: Iterable[NDArray[Any]] = self.image_rows.of_any_size(part)
        else:
            images = self.images(start, stop)
        return prepare(images, len(self.indices(start, stop)), self.mode)

    def images(self, start: int, stop: int) -> NDArray[Any]:
        """A fresh array, n×28×28 or of the file's other size: uint8 from 0 to 255, or float32 from
        0 to 1."""
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
        if self.image_rows.shape[1:] != IMAGE_SHAPE or self.files is not None:
            return False
        if len(self) != number:
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
    images, labels = (Path(f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    inputs = open_images(images, labels, "as-is")
    description = images_of_split(split)
    inputs = dataclasses.replace(inputs, description=description, split=split)
    if split == "test":
        return inputs
    if validation_size > len(inputs) or (validation_size == 0 and split == "validation"):
        held_out = f"{validation_size} of {len(inputs)} training images held out"
        raise InputError(f"{description}: expected some, found {held_out}")
    known = torch.from_numpy(inputs.labels(0, len(inputs)))
    training, validation = split_validation(known, validation_size, seed)
    order = (validation if split == "validation" else training).numpy()
    return dataclasses.replace(inputs, order=order, labelled=len(order))


def open_images(images: Path, labels: Path | None, mode: Mode = "auto") -> Inputs:
    """The user's images, and labels from a file of their own or from the folders 0 to 9.

    ``labels`` is an IDX file or a ``.npy`` of as many labels as images, in their order. Images of a
    folder may have a CSV with the columns ``file`` and ``label`` instead, in any order; they must
    have one where different programs would list them in different orders.

    ``images`` is an IDX file, plain or gzipped, of any name; a ``.npy`` of uint8, or of floats from
    0 to 1; or a folder of image files, directly inside or in folders 0 to 9, which then are their
    labels. All are of one digit each, and of 28×28 if the mode is ``as-is``. Everything is checked
    here but for single pixels and image files.

    Raises:
        InputError: a path cannot be read, or holds anything else.
    """
    with reading(images):
        if images.is_dir():
            return dataclasses.replace(_open_folder(images, labels), mode=mode)
    return images_of(open_rows(images, _EXPECTED_IMAGES), images, labels, mode)


def images_of(rows: Rows, images: Path, labels: Path | None, mode: Mode) -> Inputs:
    """Those of an array, of a file or in memory.

    Args:
        rows: the array.
        images: what to call it in messages.
        labels: as ``open_images`` has them.
        mode: what is to be done to them.

    Raises:
        InputError: these are no images, or labels are not theirs.
    """
    size = "28×28" if mode == "as-is" else "height×width"
    if len(rows.shape) != 3 or (mode == "as-is" and rows.shape[1:] != IMAGE_SHAPE):
        hint = ": are these labels?" if len(rows.shape) == 1 else ""
        hint = "; --prepare auto takes any size" if len(rows.shape) == 3 else hint
        raise InputError(f"{images}: expected images, N×{size}, found {shown(rows)}{hint}")
    if rows.dtype.newbyteorder("=") not in (np.uint8, np.float16, np.float32, np.float64):
        raise InputError(
            f"{images}: expected images of uint8 from 0 to 255 or of floats from 0 to 1, "
            f"found {rows.dtype}"
        )
    if 0 in rows.shape:
        raise InputError(f"{images}: expected at least one image, found {shown(rows)}")
    label_rows = _open_labels(labels, images, rows.shape[0]) if labels else None
    return Inputs(
        description=str(images),
        images_path=images,
        labels_path=labels,
        labelled=rows.shape[0] if labels else 0,
        mode=mode,
        image_rows=rows,
        label_rows=label_rows,
    )


def _open_labels(path: Path, images: Path, number: int) -> Rows:
    """Integers 0 to 9, as many as images."""
    rows = open_rows(path, EXPECTED_LABELS)
    if len(rows.shape) != 1:
        hint = ": are these images?" if rows.shape[1:] == IMAGE_SHAPE else ""
        raise InputError(f"{path}: expected labels of one dimension, found {shown(rows)}{hint}")
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


def _sha256(path: Path) -> str:
    with reading(path):
        return sha256(path)


def _open_folder(folder: Path, labels: Path | None) -> Inputs:
    """Image files directly inside, in folders 0 to 9, or both."""
    files, warning = find_images(folder, labels)
    labelled = sum("/" in file for file in files)
    if labels and labelled:
        raise InputError(
            f"{labels}: expected no labels beside {folder}, found {labelled} of its images in "
            "folders 0 to 9, which are their labels"
        )
    label_rows: Rows | None = FolderLabels(files) if labelled else None
    if labels:
        labelled = len(files)
        if is_table(labels):
            label_rows = read_table(labels, folder, files)
        else:
            label_rows = _open_labels(labels, folder, len(files))
            check_order(labels, folder, files)
    return Inputs(
        description=str(folder),
        images_path=folder,
        labels_path=labels,
        files=files,
        labelled=labelled,
        warnings=(warning,) if warning else (),
        image_rows=FolderImages(folder, files),
        label_rows=label_rows,
    )
