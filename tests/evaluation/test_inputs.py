"""What is read, what is refused and how that is said, and the memory it takes."""

import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mnist import data
from mnist.cli import InputError
from mnist.evaluation import report
from mnist.evaluation.inputs import Inputs, open_images, open_mnist
from mnist.evaluation.preparation import WITHOUT_DIGIT
from mnist.evaluation.suspicions import Suspicions, suspicion_warnings
from mnist.pictures import IMAGE_SUFFIXES

PIXELS = np.random.default_rng(1).integers(0, 256, (23, 28, 28), dtype=np.uint8)
LABELS = np.arange(23) * 7 % 10


def idx(array: NDArray[Any]) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def npy(array: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def image_file(path: Path, pixels: NDArray[Any] | Image.Image = PIXELS[0], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def folder_of_pngs(folder: Path) -> Path:
    for number, pixels in enumerate(PIXELS):
        image_file(folder / f"{number:02}.png", pixels)
    return folder


@contextmanager
def refused(path: Path, complaint: str) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """One line that begins with the file and says this, as a pattern."""
    with pytest.raises(InputError, match=complaint) as caught:
        yield caught
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def images_or_refusal(path: Path, named: Path | None = None) -> NDArray[Any] | None:
    """The only image, or None where it is refused in one line that begins with the file."""
    try:
        return open_images(path, None).images(0, 1)
    except InputError as error:
        message = str(error)
    assert message.startswith(f"{named or path}: ") and "\n" not in message
    return None


# ------------------------------------------------------------------------------ what is read

FORMS: dict[str, Callable[[], bytes]] = {
    "idx": lambda: idx(PIXELS),
    "idx.gz": lambda: gzip.compress(idx(PIXELS)),
    "two members.gz": lambda: gzip.compress(idx(PIXELS)[:9000]) + gzip.compress(idx(PIXELS)[9000:]),
    "npy": lambda: npy(PIXELS),
    "Fortran order": lambda: npy(np.asfortranarray(PIXELS)),
    "float16": lambda: npy((PIXELS / 255).astype(np.float16)),
    "float32": lambda: npy((PIXELS / 255).astype(np.float32)),
    "float64": lambda: npy(PIXELS / 255),
    "float32, big-endian": lambda: npy((PIXELS / 255).astype(">f4")),
    "float64, Fortran order": lambda: npy(np.asfortranarray(PIXELS / 255)),
}


@pytest.fixture(params=[*FORMS, "folder"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(form: str, tmp_path: Path) -> Inputs:
    """The same images in every form, under names that say nothing of it."""
    if form == "folder":
        return open_images(folder_of_pngs(tmp_path / "images"), None)
    return open_images(write(tmp_path / "images", FORMS[form]()), None)


def expected_images(form: str) -> NDArray[Any]:
    if "float" not in form:
        return PIXELS
    name = form.split(",")[0]
    return (PIXELS / 255).astype(name).astype(np.float32)


def test_every_form_in_parts(form: str, opened: Inputs) -> None:
    assert len(opened) == 23
    expected = expected_images(form)
    # Ascending, with gaps as between processes, over the end, empty, and back again.
    for start, stop in ((0, 5), (5, 10), (17, 20), (20, 30), (23, 23), (9, 9), (3, 4), (0, 23)):
        images = opened.images(start, stop)
        assert np.array_equal(images, expected[start:stop]) and images.dtype == expected.dtype
        assert opened.indices(start, stop).tolist() == list(range(23))[start:stop]
        assert opened.labels(start, stop).tolist() == [-1] * len(images)


def test_images_are_the_callers_own(form: str, opened: Inputs) -> None:
    images = opened.images(2, 8)
    assert type(images) is np.ndarray and images.flags.c_contiguous and images.flags.writeable
    before = images.copy()
    images[:] = 0
    assert np.array_equal(opened.images(2, 8), before)


def test_description_and_paths(
    form: str, opened: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = write(tmp_path / "labels", idx(LABELS))
    relative = open_images(Path("images"), labels)
    assert (relative.description, relative.images_path) == ("images", Path("images"))
    assert relative.labels_path == labels and opened.labels_path is None
    assert relative.labelled == 23 and opened.labelled == 0 and opened.warnings == ()
    assert (opened.files is not None) == (form == "folder")
    assert relative.labels(3, 9).tolist() == LABELS[3:9].tolist()


def test_any_reading_order_of_packed_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (3000, 28, 28), dtype=np.uint8)
    packed = open_images(write(tmp_path / "x", gzip.compress(idx(pixels), 1)), None)
    for start in np.random.default_rng(3).integers(0, 3000, 12).tolist():
        assert np.array_equal(packed.images(start, start + 300), pixels[start : start + 300])


@pytest.mark.parametrize("kind", ["b", "B", "<i2", ">i2", "u2", "i4", ">u4", "i8", "u8"])
def test_labels_of_any_integers(tmp_path: Path, kind: str) -> None:
    images = write(tmp_path / "images", idx(PIXELS))
    found = open_images(images, write(tmp_path / "labels", npy(LABELS.astype(kind))))
    labels = found.labels(4, 30)
    assert labels.tolist() == LABELS[4:].tolist() and labels.dtype == np.int64
    labels[:] = 0
    assert found.labels(4, 30).tolist() == LABELS[4:].tolist() and found.labelled == 23


def test_labels_of_idx_files(tmp_path: Path) -> None:
    images = write(tmp_path / "images", idx(PIXELS))
    for content in (idx(LABELS), gzip.compress(idx(LABELS))):
        found = open_images(images, write(tmp_path / "labels", content))
        for start, stop in ((0, 9), (9, 23), (2, 4)):
            assert found.labels(start, stop).tolist() == LABELS[start:stop].tolist()


# ----------------------------------------------------------------------------------- refusals

IMAGES = r"expected images as an IDX file \(also \.gz\), a \.npy of N×height×width, or a folder of"
TYPES = "expected images of uint8 from 0 to 255 or of floats from 0 to 1, found"
VIDEO = np.zeros((2, 1, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", f"{IMAGES} image files, found an empty file"),
        (b"label,1x1\n7,0,0\n", f"{IMAGES} image files, found a file that starts with 6c 61 62 65"),
        (b"\0\0", f"{IMAGES}.*starts with 00 00$"),
        (struct.pack(">4I", 0xD03, 1, 28, 28) + bytes(3136), "found IDX of type 0x0d, not of unsi"),
        (gzip.compress(npy(PIXELS)), f"{IMAGES}.*starts with 93 4e 55 4d"),
        (gzip.compress(b""), f"{IMAGES}.*an empty file"),
        (idx(PIXELS[:0]), "expected at least one image, found shape 0×28×28"),
        (npy(PIXELS[:0]), "expected at least one image, found shape 0×28×28"),
        (gzip.compress(idx(PIXELS[:0])), "expected at least one image, found shape 0×28×28"),
        (idx(PIXELS.reshape(23, 784)), "expected images, N×height×width, found shape 23×784$"),
        (npy(np.zeros((3, 0, 32), np.uint8)), "expected at least one image, found shape 3×0×32"),
        (idx(VIDEO), "expected images, N×height×width, found shape 2×1×28×28"),
        (npy(np.uint8(3)), "expected images, N×height×width, found a single number"),
        (idx(LABELS), "expected images, N×height×width, found shape 23: are these labels?"),
        (npy(PIXELS.astype(np.int64)), f"{TYPES} int64"),
        (npy(PIXELS > 100), f"{TYPES} bool"),
        (npy(PIXELS.astype(np.complex64)), f"{TYPES} complex64"),
        (npy(PIXELS.astype(object), allow_pickle=True), "npy of plain numbers:.*Python objects"),
        (npy(PIXELS)[:-1], "cannot be read as a .npy of plain numbers: "),
        (npy(PIXELS) + b"1", "expected 18160 bytes, found 18161"),
        (npy(PIXELS)[:60], "cannot be read as a .npy of plain numbers: "),
        (npy(PIXELS).replace(b"(23,", b"(-3,"), "cannot be read as a .npy of plain numbers: "),
        (npy(PIXELS).replace(b"descr", b"d\0scr"), "cannot be read as a .npy of plain numbers: "),
        (idx(PIXELS)[:-1], r"expected 18032 bytes for the shape \(23, 28, 28\), found 18031"),
        (idx(PIXELS) + b"1", "expected 18032 bytes .*found 18033"),
        (idx(PIXELS)[:7], "truncated within the sizes of its 3 dimensions"),
        (
            struct.pack(">4I", 0x803, *[2**32 - 1] * 3),
            "expected 79228162458924105385300197375 byte",
        ),
        (gzip.compress(idx(PIXELS)[:-1]), "expected 18032 bytes .*found 18031"),
        (gzip.compress(idx(PIXELS) + b"1"), "expected 18032 bytes .*found 18033"),
        (gzip.compress(idx(PIXELS)[:7]), "truncated within the sizes"),
        (gzip.compress(idx(PIXELS)) + b"rubbish", "cannot be read: Not a gzipped file"),
        (b"\x1f\x8b and then nonsense", "cannot be read: Unknown compression method"),
    ],
)
def test_refused_images(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = write(tmp_path / "mine", content)
    with refused(path, complaint):
        open_images(path, None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            b"7\n2\n",
            r"expected labels as an IDX file \(also \.gz\) or a \.npy of N whole numbers, ",
        ),
        (idx(PIXELS), "labels of one dimension, found shape 23×28×28: are these images?"),
        (npy(np.eye(10)[LABELS]), "labels of one dimension, found shape 23×10$"),
        (npy(LABELS / 1), "expected labels that are whole numbers, found float64"),
        (npy(LABELS > 3), "expected labels that are whole numbers, found bool"),
        (npy(LABELS[:22]), "expected 23 labels, one for each image of .*images, found 22"),
        (gzip.compress(idx(np.resize(LABELS, 24))), "expected 23 labels,.* found 24"),
        (idx(np.where(LABELS == 4, 10, LABELS)), "labels from 0 to 9, found 10 at index 2$"),
        (npy(np.where(LABELS == 1, -1, LABELS)), "labels from 0 to 9, found -1 at index 3$"),
        (npy(LABELS.astype("u8") + 2**63), f"labels from 0 to 9, found {2**63} at index 0$"),
        (gzip.compress(idx(LABELS))[:-1], "cannot be read: Compressed file ended"),
    ],
)
def test_refused_labels(tmp_path: Path, content: bytes, complaint: str) -> None:
    images = write(tmp_path / "images", idx(PIXELS))
    path = write(tmp_path / "labels", content)
    with refused(path, complaint):
        open_images(images, path)


def test_wrong_label_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist.evaluation.inputs._CHUNK_LABELS", 4)
    images = write(tmp_path / "images", idx(PIXELS))
    labels = LABELS.copy()
    labels[19] = 11  # the last of its chunk
    path = write(tmp_path / "labels", gzip.compress(idx(labels)))
    with refused(path, "found 11 at index 19"):
        open_images(images, path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    images = write(tmp_path / "images", idx(PIXELS))
    missing = tmp_path / "missing"
    with refused(missing, "cannot be read: No such file or directory"):
        open_images(missing, None)
    with refused(missing, "cannot be read: No such file or directory"):
        open_images(images, missing)
    with refused(tmp_path, "expected labels as an IDX .*, found a folder"):
        open_images(images, tmp_path)
    with refused(images / "inside", "cannot be read: Not a directory"):
        open_images(images / "inside", None)
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it: opening would wait for ever
    with refused(tmp_path / "pipe", f"{IMAGES} image files, found a device"):
        open_images(tmp_path / "pipe", None)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of another kind")
def test_permission_denied(tmp_path: Path) -> None:
    # Not in tmp_path, which only its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        path = write(Path(name, "images"), idx(PIXELS))
        folder = folder_of_pngs(Path(name, "folder"))
        closed = image_file(Path(name, "with a closed one", "3", "a.png")).parent
        for denied in (path, folder / "05.png", closed):
            denied.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # to root nothing is denied
        try:
            with refused(path, "cannot be read: Permission denied"):
                open_images(path, None)
            with refused(closed.parent, "cannot be read: Permission denied"):
                open_images(closed.parent, None)
            with refused(folder / "05.png", "cannot be read as an image of .*: Permission denied"):
                open_images(folder, None).images(0, 23)
        finally:
            os.seteuid(user)
            closed.chmod(0o755)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    for content in (idx(PIXELS[:2]), gzip.compress(idx(PIXELS[:2])), npy(PIXELS[:2])):
        for length in (*range(0, len(content), 7), *range(len(content) - 20, len(content))):
            path = write(tmp_path / "x", content[:length])
            with refused(path, "found|cannot be read|truncated"):
                open_images(path, None)


def test_every_flipped_bit_of_a_packed_file(tmp_path: Path) -> None:
    """Each is refused at opening, or changes nothing that is read."""
    content = gzip.compress(idx(PIXELS[:1] // 128 * 255))
    refusals = 0
    for bit in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path = write(tmp_path / "x", bytes(damaged))
        images = images_or_refusal(path)
        if images is None:
            refusals += 1
        else:
            assert np.array_equal(images, PIXELS[:1] // 128 * 255), bit
    assert refusals > 0.8 * 8 * len(content) / 5


def test_packed_file_that_changes_after_opening(tmp_path: Path) -> None:
    noise = np.random.default_rng(4).integers(0, 256, (2000, 28, 28), dtype=np.uint8)
    path = write(tmp_path / "x", gzip.compress(idx(noise)))
    packed = open_images(path, None)
    os.truncate(path, 1_000_000)
    with refused(path, "cannot be read: Compressed file ended"):
        packed.images(1500, 1600)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (1.5, "found 1.5 in image 13; divide by 255$"),
        (255, "found 255.0 in image 13; divide by 255$"),
        (256, "found 256.0 in image 13$"),
        (-0.25, "found -0.25 in image 13$"),
        (np.nan, "found nan in image 13$"),
        (np.inf, "found inf in image 13$"),
    ],
)
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_floats_out_of_range(tmp_path: Path, kind: str, value: float, complaint: str) -> None:
    pixels = (PIXELS / 255).astype(kind)
    pixels[13, 4, 5] = value
    path = write(tmp_path / "x", npy(pixels))
    found = open_images(path, None)
    found.images(0, 13)
    with refused(path, f"expected floats from 0 to 1, {complaint}"):
        found.images(10, 20)
    found.images(14, 23)


def test_floats_beyond_float32(tmp_path: Path) -> None:
    path = write(tmp_path / "x", npy(np.full((1, 28, 28), 1e300)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy's of the cast would be a second line
        with refused(path, "found 1e[+]300 in image 0$"):
            open_images(path, None).images(0, 1)


# ------------------------------------------------------------------------------------ folders


def test_folders_of_digits_and_images_beside_them(tmp_path: Path) -> None:
    names = ["3/b.png", "3/a.PNG", "10.png", "9.png", "0/z.png", "B.png", "a.png"]
    for number, name in enumerate(names):
        image_file(tmp_path / name, PIXELS[number])
    (tmp_path / "7").mkdir()
    found = open_images(tmp_path, None)
    assert found.files is not None
    expected = ["0/z.png", "10.png", "3/a.PNG", "3/b.png", "9.png", "B.png", "a.png"]
    assert list(found.files) == expected
    assert found.labels(0, 7).tolist() == [0, -1, 3, 3, -1, -1, -1] and found.labelled == 3
    assert found.labels(2, 4).tolist() == [3, 3] and found.indices(2, 4).tolist() == [2, 3]
    assert np.array_equal(found.images(0, 7), PIXELS[[4, 2, 1, 0, 3, 5, 6]])
    assert np.array_equal(found.images(3, 5), PIXELS[[0, 3]])


def test_labels_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of_pngs(tmp_path / "folder")
    labels = write(tmp_path / "labels", npy(LABELS))
    assert open_images(folder, labels).labels(5, 9).tolist() == LABELS[5:9].tolist()
    image_file(folder / "4" / "x.png")
    with refused(labels, "expected no labels beside .*folder, found 1 of its images in folders 0"):
        open_images(folder, labels)


def named_folder(folder: Path, *names: str) -> Path:
    """Empty files: nothing is decoded before it is scored."""
    for name in names:
        write(folder / name, b"")
    return folder


NAMES = [f"{number}.png" for number in range(12)]  # as text 0 1 10 11 2 …: no label is in its row
ROWS = [f"{number}.png,{number * 7 % 10}" for number in range(12)]
NUMBERS = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
EXPECTED = [number * 7 % 10 for number in NUMBERS]
TABLES: dict[str, bytes] = {
    "plain": "\n".join(["file,label", *ROWS]).encode(),
    "any order": "\n".join(["file,label", *ROWS[::-1], ""]).encode(),
    "BOM, CRLF": ("\ufeff" + "\r\n".join(["file,label", *ROWS, ""])).encode(),
    "CR": "\r".join(["file,label", *ROWS]).encode(),
    "blank lines": "\n\n".join(["", "file,label", *ROWS, "", ""]).encode(),
    "quoted": "\n".join(
        f'"{name}","{label}"' for name, label in (row.split(",") for row in ["file,label", *ROWS])
    ).encode(),
    "more columns": "\n".join(
        ["index,label,prediction,file,"]
        + [f"3,{row.split(',')[1]},9,{row.split(',')[0]}," for row in ROWS]
    ).encode(),
    "./": "\n./".join(["file,label", *ROWS]).encode(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_labels_by_name(tmp_path: Path, kind: str) -> None:
    folder = named_folder(tmp_path / "folder", *NAMES)
    path = write(tmp_path / "labels", TABLES[kind])
    found = open_images(folder, path)
    assert found.files is not None and [Path(file).stem for file in found.files][2] == "10"
    assert found.labels(0, 12).tolist() == EXPECTED and found.labelled == 12
    assert found.labels(3, 6).tolist() == EXPECTED[3:6] and found.labels(3, 6).dtype == np.int64
    assert found.hashes()["labels_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.warnings == () and found.labels_path == path


def test_labels_from_predictions_of_our_own(tmp_path: Path) -> None:
    names = sorted(["2.png", "10.png", 'a, "b".png', "ü\r\n.png", os.fsdecode(b"\xff.png")])
    folder = named_folder(tmp_path / "folder", *names)
    probabilities = np.full((5, 10), 0.1, np.float32)
    labels = np.array([4, 0, 9, 1, 7])
    rows = report.csv_rows(np.arange(5), labels, probabilities, names)
    path = write(tmp_path / "predictions.csv", report.csv_header(with_files=True).encode() + rows)
    assert open_images(folder, path).labels(0, 5).tolist() == labels.tolist()
    rows = report.csv_rows(np.arange(5), labels - 1, probabilities, names)  # one is unknown
    write(path, report.csv_header(with_files=True).encode() + rows)
    with refused(path, "line 3: expected a label from 0 to 9, found ''"):
        open_images(folder, path)


def test_names_that_look_the_same(tmp_path: Path) -> None:
    composed, apart = "\u00fc.png", "u\u0308.png"
    for folder, file, name in (("a", composed, apart), ("b", apart, composed)):
        images = named_folder(tmp_path / folder, file, "other.png")
        path = write(tmp_path / "labels", f"file,label\nother.png,3\n./{name},7\n".encode())
        found = open_images(images, path)
        assert found.files is not None
        assert found.labels(0, 2)[found.files.index(file)] == 7
        both = f"file,label\n{file},3\n{name},7\nother.png,1\n"
        with refused(write(path, both.encode()), f"'{file}' is given twice, in lines 2 and 3$"):
            open_images(images, path)
    images = named_folder(tmp_path / "both", composed, apart)
    write(path, f"file,label\n{composed},3\n{apart},7\n".encode())
    assert open_images(images, path).labels(0, 2).tolist() == [7, 3]
    # A third way to write what two files look like.
    images = named_folder(tmp_path / "three", "\u1e69.png", "s\u0323\u0307.png")
    write(path, "file,label\ns\u0307\u0323.png,3\n\u1e69.png,7\n".encode())
    with refused(path, "1 row.s. name no image of .*three: 's.* in line 2; 1 of 2 images"):
        open_images(images, path)


TABLE = r"expected labels as an IDX .*, or for a folder of images as a CSV \(UTF-8\) with the colum"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", f"{TABLE}ns file and label, found an empty file$"),
        (
            b"file,label\n",
            "12 of 12 images of .*folder have no row: '0.png', '1.png', '10.png', …$",
        ),
        (b"\n\n", f"{TABLE}.* found ''$"),
        (b"file;label\n0.png;7\n", f"{TABLE}.*separated by commas, found 'file;label'$"),
        (b'"file";"label"\n"0.png";"7"\n', "line 1: cannot be read as CSV: ',' expected after"),
        (b"file\tlabel\n0.png\t7\n", f"{TABLE}.*separated by commas, found 'file..label'$"),
        (b"file,label\n0.png;7\n", "line 2: expected 2 columns separated by commas, found 1: '0.p"),
        (
            b"file,label\n\n0.png\n",
            "line 3: expected 2 columns separated by commas, found 1: '0.pn",
        ),
        (b"file,label\n0.png,7,1\n", "line 2: expected 2 columns separated by commas, found 3: "),
        (b"0.png,7\n1.png,3\n", f"{TABLE}.* found '0.png,7'$"),
        (b"7\n2\n", f"{TABLE}.* found '7'$"),
        (b"file,digit\n0.png,7\n", f"{TABLE}.* found 'file,digit'$"),
        (b"file,label,label\n0.png,7,8\n", f"{TABLE}.*each once .* found 'file,label,label'$"),
        (b"index,label\n0,7\n", f"{TABLE}.* found 'index,label'$"),
        (b"\x7fELF\x02\0\0\xff\xfe\r\xff", f"{TABLE}.* found '.x7fELF.x02"),
        ("file,label\n0.png,7\n".encode("utf-16"), f"{TABLE}.* found '.udcff.udcfef.x00i.x00l"),
        (
            b"file,label\n0.p\0ng,7\n",
            "1 row.s. name no image of .*: '0.p.x00ng' in line 2; 12 of 1",
        ),
        (b"file,label\n0.png,7\n" + bytes(300), "line 3: expected 2 columns.*found 1: '.x00.x00"),
        (b"file,label\n0.png,7" + bytes(300), "line 2: expected a label from 0 to 9, found '7.x00"),
        (
            b'file,label\n0.png,7\n"1.png,7\n2.png,3\n',
            "line 3: cannot be read as CSV: unexpected e",
        ),
        (b'file,label\n"1.png,7\n2.png",3\n', r"name no image of .*: '1.png,7.n2.png' in line 2; "),
        (b"file,label\n" + b"a" * 200_000 + b",7\n", "line 2: cannot be read as CSV: field larger"),
        (b"file,label\n" + b"a," * 800_000, "line 2: cannot be read as CSV: longer than 1,048,575"),
        (b"file,label\n" + b"a" * 200 + b",7\n", f"name no image of .*: '{'a' * 60}…' in line 2;"),
        *(
            (f"file,label\n0.png,1\n1.png,{label}\n".encode(), "line 3: expected a label from 0 to")
            for label in ("", "7.5", "7.0", "seven", "10", "-1", " 7", "07", "+7", "\u0663", "0x1")
        ),
        (gzip.compress(TABLES["plain"]), f"{TABLE}.* found a file that starts with 66 69 6c 65"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refused_tables(tmp_path: Path, content: bytes, complaint: str) -> None:
    folder = named_folder(tmp_path / "folder", *NAMES)
    path = write(tmp_path / "labels", content)
    with refused(path, complaint) as caught:
        open_images(folder, path)
    assert len(str(caught.value)) < 600


def test_rows_and_images_that_do_not_match(tmp_path: Path) -> None:
    folder = named_folder(tmp_path / "folder", *NAMES, ".hidden.png", "notes.txt")
    rows = [*ROWS, "no.png,3", "folder/0.png,1", ".hidden.png,1", "notes.txt,2"]
    path = write(tmp_path / "labels", "\n".join(["file,label", *rows[2:]]).encode())
    with refused(path, "4 row.s. name no image of .*folder: 'no.png' in line 12, 'folder/0.png' in "
                 "line 13, '.hidden.png' in line 14, …; 2 of 12 images of .*folder have no row: "
                 "'0.png', '1.png'$"):  # fmt: skip
        open_images(folder, path)
    write(path, "\n".join(["file,label", *ROWS[:5], *ROWS[6:]]).encode())
    with refused(path, "labels: 1 of 12 images of .*folder have no row: '5.png'$"):
        open_images(folder, path)
    write(path, "\n".join(["file,label", *ROWS, "", "x.png,0"]).encode())
    with refused(path, "labels: 1 row.s. name no image of .*folder: 'x.png' in line 15$"):
        open_images(folder, path)
    write(path, "\n".join(["file,label", *ROWS, ROWS[3]]).encode())
    with refused(path, "labels: '3.png' is given twice, in lines 5 and 14$"):
        open_images(folder, path)


def test_tables_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", TABLES["plain"])
    for content in (idx(PIXELS), npy(PIXELS), gzip.compress(idx(PIXELS))):
        with refused(path, "expected labels as an IDX .*, or for a folder of images as a CSV"):
            open_images(write(tmp_path / "images", content), path)
    folder = named_folder(tmp_path / "folder", "3/0.png")
    with refused(path, "expected no labels beside .*folder, found 1 of its images in folders 0"):
        open_images(folder, path)
    os.mkfifo(tmp_path / "pipe")
    with refused(tmp_path / "pipe", "expected labels as an IDX .*, found a device"):
        open_images(named_folder(tmp_path / "images of it", *NAMES), tmp_path / "pipe")


def test_table_among_its_images_is_not_ignored(tmp_path: Path, monkeypatch: Any) -> None:
    named_folder(tmp_path / "folder", *NAMES)
    path = write(tmp_path / "folder" / "labels.csv", TABLES["plain"])
    assert open_images(tmp_path / "folder", path).warnings == ()
    monkeypatch.chdir(tmp_path / "folder")
    assert open_images(Path(), Path("labels.csv")).warnings == ()
    assert len(open_images(Path(), None).warnings) == 1


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["2.png", "10.png"], "'10.png' of .* comes before '2.png', but not by the numbers in the"),
        ([f"{n}.png" for n in range(500)], "'109.png' of .* before '11.png', but not by the numbe"),
        (["a 9 b.png", "a 10 b.png"], "'a 10 b.png' of .*, but not by the numbers"),
        (["-2.png", "-1.png"], "'-1.png' of .* comes before '-2.png', but not by the numbers"),
        (["٩.png", "١٠.png"], "'١٠.png' of .* comes before '٩.png', but not by the numbers"),
        (["01.png", "1.png"], "'01.png' of .* comes before '1.png', but not by the numbers"),
        (["B.png", "a.png"], "'B.png' of .* comes before 'a.png', but not regardless of small and"),
        (["A.png", "a.png"], "'A.png' of .* comes before 'a.png', but not regardless of small and"),
        (["1.PNG", "1.png"], "but not regardless of small and"),
        (["1.png", "1.jpg"], "'1.jpg' of .* comes before '1.png', but not as file managers show"),
        (["a-1.png", "a.png"], "'a-1.png' of .* comes before 'a.png', but not as file managers"),
        (
            ["img1.png", "img_1.png"],
            "'img1.png' of .* before 'img_1.png', but not as file managers",
        ),
        (["f.png", "\u00e9.png"], "'f.png' of .* comes before 'é.png', but not as file managers"),
        (["\u00e9.png", "e\u0301.png"], "but not as file managers"),
    ],
)
def test_labels_without_names_where_the_order_is_not_certain(
    tmp_path: Path, names: list[str], order: str
) -> None:
    folder = named_folder(tmp_path / "folder", *names)
    path = write(tmp_path / "labels", npy(np.zeros(len(names), np.uint8)))
    with refused(path, f"which label is whose is not certain: .*{order}.*; give --labels a CSV"):
        open_images(folder, path)
    assert len(open_images(folder, None)) == len(names)
    table = "".join(f'"{name}",{number % 10}\n' for number, name in enumerate(names))
    found = open_images(folder, write(path, f"file,label\n{table}".encode()))
    expected = [names.index(name) % 10 for name in sorted(names)]
    assert found.labels(0, 1000).tolist() == expected


@pytest.mark.parametrize(
    "names",
    [
        [f"{number:02}.png" for number in range(100)],
        ["a.png", "ab.png", "b.png"],
        ["9.png"],
        ["scan 1_007.JPG", "scan 1_008.jpg", "scan 2_001.tif"],
        ["digit-0008.png", "digit-0009.png", "digit-0010.png", "number-0001.png"],
        ["2024-01-05 12.30.59.png", "2024-01-05 12.31.00.png"],
        [f"{name}.png" for name in "äöü"],
    ],
)
def test_labels_without_names_where_all_orders_agree(tmp_path: Path, names: list[str]) -> None:
    folder = named_folder(tmp_path / "folder", *names)
    labels = np.arange(len(names)) * 3 % 10
    found = open_images(folder, write(tmp_path / "labels", npy(labels)))
    assert found.files == names and found.labels(0, 100).tolist() == labels.tolist()


def test_files_that_are_ignored(tmp_path: Path) -> None:
    folder = folder_of_pngs(tmp_path)
    write(folder / ".hidden.png", b"")
    write(folder / ".git" / "x.png", b"")
    assert open_images(folder, None).warnings == ()
    for name in ("notes.txt", "4/labels.csv", "other/readme", "png"):
        write(folder / name, b"")
    found = open_images(folder, None)
    assert len(found) == 23
    assert found.warnings == (
        f"{folder}: ignored 4 file(s) that are no images, such as 4/labels.csv",
    )
    write(folder / "0.txt", b"")
    assert (
        open_images(folder, None)
        .warnings[0]
        .endswith("5 file(s) that are no images, such as 0.txt")
    )


@pytest.mark.parametrize("place", ["ten", "03", "10", "3/more", "-1", "٣"])
def test_images_in_other_folders(tmp_path: Path, place: str) -> None:
    image_file(tmp_path / "3" / "a.png")
    image_file(tmp_path / place / "b.png")
    with refused(tmp_path, f"directly inside or in folders 0 to 9, found {place}/b.png"):
        open_images(tmp_path, None)


def test_folder_without_images(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", b"")
    with refused(tmp_path, r"expected image files \(\.bmp .*\), found none among 1 other file"):
        open_images(tmp_path, None)


def test_linked_folders_are_read(tmp_path: Path) -> None:
    image_file(tmp_path / "real" / "a.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "5").symlink_to(tmp_path / "real")
    assert open_images(tmp_path / "folder", None).labels(0, 1).tolist() == [5]


def grey_of(red: int, green: int, blue: int) -> int:
    """ITU-R 601 luma."""
    return round(0.299 * red + 0.587 * green + 0.114 * blue)


def rgba(ink: tuple[int, ...], ground: tuple[int, ...]) -> Image.Image:
    """A block of 12 by 12 on a ground."""
    image = Image.new("RGBA", (28, 28), ground)
    image.paste(ink, (8, 8, 20, 20))
    return image


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (28, 28), 0)
    image.putpalette([0, 0, 0, 250, 100, 10])
    image.paste(1, (8, 8, 20, 20))
    if transparent:
        image.info["transparency"] = 0
    return image


def sixteen_bits() -> Image.Image:
    values = np.full((28, 28), 128, np.uint16)  # the largest that rounds to 0
    values[8:20, 8:20] = 77 * 257 - 128  # the smallest that rounds to 77
    return Image.fromarray(values)


MODES: dict[str, tuple[Callable[[], Image.Image], str, int, int]] = {
    "L": (lambda: rgba((9, 9, 9, 255), (200, 200, 200, 255)).convert("L"), "png", 9, 200),
    "RGB": (
        lambda: rgba((200, 30, 60, 255), (0, 0, 255, 255)).convert("RGB"),
        "png",
        grey_of(200, 30, 60),
        grey_of(0, 0, 255),
    ),
    "1": (lambda: rgba((255, 255, 255, 255), (0, 0, 0, 255)).convert("1"), "png", 255, 0),
    "P": (lambda: palette(False), "png", grey_of(250, 100, 10), 0),
    "GIF": (lambda: palette(False), "gif", grey_of(250, 100, 10), 0),
    "P, transparent ground": (lambda: palette(True), "png", grey_of(250, 100, 10), 0),
    "16 bits": (sixteen_bits, "png", 77, 0),
    "16 bits, TIFF": (sixteen_bits, "tif", 77, 0),
    "opaque": (lambda: rgba((0, 0, 0, 255), (50, 50, 50, 255)), "png", 0, 50),
    "black ink": (lambda: rgba((0, 0, 0, 255), (0, 0, 0, 0)), "png", 0, 255),
    "black ink on white, invisible": (
        lambda: rgba((0, 0, 0, 255), (255, 255, 255, 0)),
        "png",
        0,
        255,
    ),
    "white ink": (lambda: rgba((255, 255, 255, 255), (0, 0, 0, 0)), "png", 255, 0),
    "white ink, WebP": (lambda: rgba((255, 255, 255, 255), (0, 0, 0, 0)), "webp", 255, 0),
    "half-transparent dark ink": (lambda: rgba((40, 40, 40, 51), (0, 0, 0, 0)), "png", 212, 255),
    "grey with alpha": (
        lambda: rgba((255, 255, 255, 102), (0, 0, 0, 0)).convert("LA"),
        "png",
        102,
        0,
    ),
    "invisible": (lambda: rgba((255, 255, 255, 0), (0, 0, 0, 0)), "png", 0, 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_every_kind(tmp_path: Path, mode: str) -> None:
    make, suffix, ink, ground = MODES[mode]
    options = {"lossless": True} if suffix == "webp" else {}
    image_file(tmp_path / f"x.{suffix}", make(), **options)
    expected = np.full((28, 28), ground)
    expected[8:20, 8:20] = ink
    found = open_images(tmp_path, None).images(0, 1)[0]
    assert found.tolist() == expected.tolist()


def test_sixteen_bit_pgm(tmp_path: Path) -> None:
    values = PIXELS[0].astype(">u2") * 257
    write(tmp_path / "x.pgm", b"P5 28 28 65535\n" + values.tobytes())
    write(tmp_path / "y.pgm", b"P2 28 28 255\n" + b" ".join(b"%d" % v for v in PIXELS[1].ravel()))
    assert np.array_equal(open_images(tmp_path, None).images(0, 2), PIXELS[:2])


# Pillow writes no HEIC; test_formats.py reads some.
WRITTEN = IMAGE_SUFFIXES - {".heic", ".heif"}


@pytest.mark.parametrize("suffix", sorted(WRITTEN))
def test_every_suffix(tmp_path: Path, suffix: str) -> None:
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100}, ".jpeg": {"quality": 100}}
    image_file(tmp_path / f"x{suffix.upper()}", **options.get(suffix, {}))
    difference = open_images(tmp_path, None).images(0, 1)[0].astype(int) - PIXELS[0]
    assert np.abs(difference).max() <= (4 if "jp" in suffix else 0)


@pytest.mark.parametrize("suffix", sorted(WRITTEN - {".jpeg", ".tiff"}))
def test_truncated_image_files(tmp_path: Path, suffix: str) -> None:
    """Refused, or cut off behind the last pixel; never read as something else."""
    path = image_file(tmp_path / "x" / f"0{suffix}", PIXELS[0] // 4)
    content = path.read_bytes()
    found = open_images(path.parent, None)
    expected = found.images(0, 1)
    for length in (0, 1, 9, 30, len(content) // 3, len(content) // 2, len(content) - 80):
        path.write_bytes(content[:length])
        with refused(path, "cannot be read as an image of 28×28: [^/]*$"):
            found.images(0, 1)
    for length in range(len(content) - 30, len(content)):
        path.write_bytes(content[:length])
        images = images_or_refusal(path.parent, path)
        assert images is None or np.array_equal(images, expected)


def test_refused_image_files(tmp_path: Path) -> None:
    path = image_file(tmp_path / "x.png", np.zeros((28, 32), np.uint8))
    as_is, any_size = (open_images(tmp_path, None, mode) for mode in ("as-is", "auto"))
    with refused(path, "expected an image of 28×28 pixels, found 32×28; --prepare auto takes any"):
        as_is.prepared(0, 1)
    assert any_size.prepared(0, 1).treatments.tolist() == [WITHOUT_DIGIT]  # it is black

    def refuse_both(complaint: str) -> None:
        for found, what in ((as_is, "an image of 28×28"), (any_size, "an image")):
            with refused(path, complaint.replace("IMAGE", what)):
                found.prepared(0, 1)

    frames = [Image.fromarray(pixels) for pixels in PIXELS[:3]]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    refuse_both("expected IMAGE of one frame, found 3 frames$")
    Image.fromarray(PIXELS[0].astype(np.float32)).save(path, "TIFF")
    refuse_both("expected 8 or 16 bits per pixel, found 32$")
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n")  # no Ghostscript
    refuse_both("cannot be read as IMAGE: cannot identify image file$")
    path.write_bytes(b"P5 99999 99999 255\n")  # a bomb
    with refused(path, "expected at most 200 megapixels, found 99999×99999$"):
        any_size.prepared(0, 1)
    path.unlink()
    refuse_both("cannot be read as IMAGE: No such file or directory")


def test_packed_images_of_another_size_are_refused_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "mine", npy(np.zeros((3, 32, 32), np.uint8)))
    with refused(path, "expected images, N×28×28, found shape 3×32×32; --prepare auto takes any"):
        open_images(path, None, "as-is")
    assert len(open_images(path, None)) == 3


# -------------------------------------------------------------------------------------- MNIST


def raw_images(data_dir: Path, prefix: str) -> NDArray[np.uint8]:
    path = data_dir / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte"
    return np.fromfile(path, np.uint8)[16:].reshape(-1, 28, 28)


def raw_labels(data_dir: Path, prefix: str) -> NDArray[np.uint8]:
    return np.fromfile(data_dir / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", np.uint8)[8:]


def test_mnist_test_images(data_dir: Path) -> None:
    found = open_mnist(data_dir, "test", 5000, 0)
    assert found.description == "MNIST test images" and found.is_mnist_test
    assert len(found) == found.labelled == 10_000 and found.files is None
    assert np.array_equal(found.images(0, 10_000), raw_images(data_dir, "t10k"))
    assert np.array_equal(found.labels(0, 10_000), raw_labels(data_dir, "t10k"))
    assert found.indices(9_998, 10_000).tolist() == [9_998, 9_999]


@pytest.mark.parametrize(("size", "seed"), [(5000, 0), (1234, 7)])
def test_mnist_training_images(data_dir: Path, size: int, seed: int) -> None:
    images, labels = raw_images(data_dir, "train"), raw_labels(data_dir, "train")
    digits = data.load_mnist(data_dir, "train")
    parts = data.split_validation(digits.labels, size, seed)
    splits: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    for split, part in zip(splits, parts, strict=True):
        found = open_mnist(data_dir, split, size, seed)
        assert found.description == f"MNIST {split} images" and not found.is_mnist_test
        assert len(found) == found.labelled == len(part)
        expected = part.numpy()
        for start, stop in ((0, 500), (700, 900), (len(part) - 3, len(part) + 3)):
            numbers = found.indices(start, stop)
            assert numbers.tolist() == expected[start:stop].tolist()
            assert np.array_equal(found.images(start, stop), images[numbers])
            assert np.array_equal(found.labels(start, stop), labels[numbers])
            numbers[:] = 0
            assert found.indices(start, stop).tolist() == expected[start:stop].tolist()
        assert found.images(0, 3).flags.writeable and type(found.images(0, 3)) is np.ndarray


def test_refused_mnist(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="MNIST validation images: expected some, found 0 of 60000"
    ):
        open_mnist(data_dir, "validation", 0, 0)
    assert len(open_mnist(data_dir, "train", 0, 0)) == 60_000
    raw = tmp_path / "MNIST" / "raw"
    with refused(raw / "t10k-images-idx3-ubyte", "cannot be read: No such file"):
        open_mnist(tmp_path, "test", 5000, 0)
    write(raw / "train-images-idx3-ubyte", idx(PIXELS))
    write(raw / "train-labels-idx1-ubyte", idx(LABELS))
    with pytest.raises(InputError, match=r"MNIST train images: .* 5000 of 23 training images held"):
        open_mnist(tmp_path, "train", 5000, 0)


def test_mnist_test_images_are_recognised(data_dir: Path, tmp_path: Path) -> None:
    images, labels = raw_images(data_dir, "t10k"), raw_labels(data_dir, "t10k")
    raw = data_dir / "MNIST" / "raw"
    images_path, labels_path = raw / "t10k-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    assert open_images(images_path, labels_path).is_mnist_test
    assert not open_images(images_path, None).is_mnist_test
    packed = write(tmp_path / "packed", gzip.compress(images_path.read_bytes(), 1))
    labels_npy = write(tmp_path / "labels", npy(labels.astype(np.int32)))
    assert open_images(packed, labels_npy).is_mnist_test
    assert open_images(write(tmp_path / "npy", npy(images)), labels_npy).is_mnist_test
    as_floats = write(tmp_path / "floats", npy((images / 255).astype(np.float16)))
    assert not open_images(as_floats, labels_npy).is_mnist_test
    images[9_999, 3, 3] += 1
    assert not open_images(write(tmp_path / "npy", npy(images)), labels_npy).is_mnist_test
    labels = labels.copy()
    labels[0] = 8
    assert not open_images(images_path, write(tmp_path / "other", idx(labels))).is_mnist_test


def test_hashes(data_dir: Path, tmp_path: Path) -> None:
    packed, labels = gzip.compress(idx(PIXELS)), idx(LABELS)
    images_path, labels_path = write(tmp_path / "a", packed), write(tmp_path / "b", labels)
    found = open_images(images_path, labels_path)
    found.images(3, 5)
    for _ in range(2):
        assert found.hashes() == {
            "images_sha256": hashlib.sha256(packed).hexdigest(),
            "labels_sha256": hashlib.sha256(labels).hexdigest(),
        }
    assert open_images(images_path, None).hashes()["labels_sha256"] is None
    train = data_dir / "MNIST" / "raw" / "train-images-idx3-ubyte"
    assert open_mnist(data_dir, "validation", 500, 1).hashes() == {
        "images_sha256": hashlib.sha256(train.read_bytes()).hexdigest(),
        "labels_sha256": hashlib.sha256(
            train.with_name("train-labels-idx1-ubyte").read_bytes()
        ).hexdigest(),
    }


def test_hash_of_a_folder(tmp_path: Path) -> None:
    names = ["2/b.png", "10.png", "a ü.png"]
    for name in names:
        image_file(tmp_path / name, PIXELS[len(name)])
    write(tmp_path / "notes.txt", b"not part of it")
    lines = "".join(
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(names)
    )
    found = open_images(tmp_path, None)
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert found.hashes() == {"images_sha256": expected, "labels_sha256": None}
    image_file(tmp_path / "10.png", PIXELS[0])
    assert found.hashes()["images_sha256"] != expected


# --------------------------------------------------------------------------------- suspicions


def looked_at(images: NDArray[Any], step: int = 1000) -> Suspicions:
    seen = Suspicions()
    for start in range(0, len(images), step):
        seen.look(images[start : start + step], start)
    return seen


@pytest.mark.parametrize("prefix", ["train", "t10k"])
def test_mnist_is_beyond_suspicion_and_its_inverse_is_not(data_dir: Path, prefix: str) -> None:
    images = raw_images(data_dir, prefix)
    right, inverted = looked_at(images), looked_at(255 - images)
    assert right.counts.tolist() == [0, 0, len(images)] and right.first_dark == Suspicions.NONE
    assert inverted.counts.tolist() == [len(images), 0, len(images)] and inverted.first_dark == 0
    floats = images[:5000] / np.float32(255)
    assert looked_at(floats).counts.tolist() == [0, 0, 5000]
    assert looked_at(1 - floats).counts.tolist() == [5000, 0, 5000]


def test_suspicions_add_up_and_say_where(tmp_path: Path, data_dir: Path) -> None:
    images = raw_images(data_dir, "t10k")[:300].copy()
    images[[130, 205]] = 255 - images[[130, 205]]
    images[[7, 8, 299]] = np.array([0, 255, 90], np.uint8)[:, None, None]
    whole = looked_at(images, 300)
    assert whole.counts.tolist() == [2, 3, 299] and whole.first_dark == 130
    assert looked_at(images, 64).counts.tolist() == [2, 3, 299]
    processes = [Suspicions(), Suspicions()]
    processes[0].look(images[:150], 0)
    processes[1].look(images[150:], 150)
    counts = processes[0].counts + processes[1].counts
    assert counts.tolist() == [2, 3, 299] and processes[1].first_dark == 205
    found = open_images(write(tmp_path / "x", idx(images)), None)
    assert suspicion_warnings(counts, 130, found) == [
        "2 of 300 images look like dark ink on a light ground (the first is number 130); the model "
        "expects light ink (255) on a dark ground (0): invert them",
        "3 of 300 images are blank (all pixels are alike)",
    ]


def test_suspicions_name_the_users_own_numbers(data_dir: Path, tmp_path: Path) -> None:
    validation = open_mnist(data_dir, "validation", 5000, 0)
    number = validation.indices(40, 41)[0]
    warning = suspicion_warnings(np.array([1, 0, 5000]), 40, validation)[0]
    assert (
        f"1 of 5000 images look like dark ink on a light ground (the first is number {number})"
        in warning
    )
    folder = open_images(folder_of_pngs(tmp_path), None)
    warning = suspicion_warnings(np.array([1, 0, 23]), 17, folder)[0]
    assert "(the first is file 17.png)" in warning


def test_bytes_of_zero_and_one(tmp_path: Path) -> None:
    images = PIXELS // 128
    found = open_images(write(tmp_path / "x", idx(images)), None)
    complaint = "values are 0 to 1 in unsigned bytes; expected 0 to 255"
    assert suspicion_warnings(looked_at(images).counts, 0, found) == [complaint]
    images[22, 5, 5] = 2
    assert suspicion_warnings(looked_at(images).counts, 0, found) == []
    floats = PIXELS // 128 / np.float32(4)
    assert suspicion_warnings(looked_at(floats).counts, Suspicions.NONE, found) == []
    # All black: blank is all there is to say.
    warnings = suspicion_warnings(looked_at(images * 0).counts, Suspicions.NONE, found)
    assert warnings == ["23 of 23 images are blank (all pixels are alike)"]


# ------------------------------------------------------------------------------------- memory

STREAM = """
import sys
import tracemalloc
from pathlib import Path
from mnist.evaluation.inputs import open_images

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])

warm = open_images(Path(sys.argv[1]), None)
warm.images(0, 1000)
tracemalloc.start()
for path in sys.argv[1:]:
    tracemalloc.reset_peak()
    before = peak = anonymous()
    found = open_images(Path(path), Path(path + ".labels"))
    seen = 0
    for start in range(0, len(found), 1000):
        seen += len(found.images(start, start + 1000)) + found.labels(start, start + 1000).sum()
        peak = max(peak, anonymous())
    print(seen, peak - before, tracemalloc.get_traced_memory()[1] // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """157 MB of images in each form; files with holes, so that the disk holds nothing."""
    number, size = 200_000, 200_000 * 784
    header = struct.pack(">4I", 0x803, number, 28, 28)
    paths = [tmp_path / name for name in ("idx", "npy", "gz")]
    write(paths[0], header)
    os.truncate(paths[0], len(header) + size)
    np.lib.format.open_memmap(paths[1], "w+", np.uint8, (number, 28, 28)).flush()
    with gzip.open(paths[2], "wb", compresslevel=1) as file:
        file.write(header)
        for _ in range(100):
            file.write(bytes(size // 100))
    for path in paths:
        labels = struct.pack(">2I", 0x801, number) + bytes([1]) * number
        write(path.with_name(f"{path.name}.labels"), labels)
    command = [sys.executable, "-c", STREAM, *map(str, paths)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        seen, growth, highest = map(int, line.split())
        assert seen == 2 * number
        # In kB. The second has the moments between two looks at the first, as in opening.
        assert growth < 30_000 and highest < 30_000, lines
