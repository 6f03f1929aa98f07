"""IDX files, tensors, the validation split, the batches."""

import gzip
import struct
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from mnist import data
from mnist.arrays import open_rows
from mnist.cli import InputError

# --------------------------------------------------------------------------------- IDX files


def test_load_mnist(good_dir: Path) -> None:
    for split, prefix, count in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        digits = data.load_mnist(good_dir, split)  # type: ignore[arg-type]
        raw = good_dir / "MNIST" / "raw"
        pixels = (raw / f"{prefix}-images-idx3-ubyte").read_bytes()[16:]
        labels = (raw / f"{prefix}-labels-idx1-ubyte").read_bytes()[8:]
        assert digits.images.shape == (count, 28, 28) and digits.images.dtype == torch.uint8
        assert digits.labels.shape == (count,) and digits.labels.dtype == torch.int64
        assert digits.images.numpy().tobytes() == pixels
        assert digits.labels.tolist() == list(labels)


def test_load_mnist_refuses_other_shapes(good_dir: Path) -> None:
    labels = good_dir / "MNIST/raw/train-labels-idx1-ubyte"
    labels.unlink()
    labels.write_bytes(struct.pack(">2I", 0x801, 5) + bytes(5))
    with pytest.raises(InputError, match=r"28 by 28.*found \(60000, 28, 28\) and \(5,\)"):
        data.load_mnist(good_dir, "train")
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.*No such file"):
        data.load_mnist(good_dir / "elsewhere", "train")


def test_idx_files_plain_and_gzipped(tmp_path: Path) -> None:
    content = struct.pack(">3I", 0x802, 2, 3) + bytes([1, 2, 3, 4, 5, 255])
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "packed").write_bytes(gzip.compress(content))
    for name in ("plain", "packed"):
        values = open_rows(tmp_path / name, "an IDX file")[:]
        assert values.dtype == np.uint8 and values.tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n", "starts with 89 50 4e 47"),
        (struct.pack(">2I", 0xD01, 2) + bytes(8), "unsigned bytes"),  # floats
        (struct.pack(">2I", 0x803, 2), "truncated"),
        (struct.pack(">2I", 0x801, 4) + bytes(3), r"expected 4 bytes .*found 3"),
        (struct.pack(">2I", 0x801, 4) + bytes(5), r"expected 4 bytes .*found 5"),
        (struct.pack(">4I", 0x803, *[2**32 - 1] * 3), "found 0"),
        (gzip.compress(struct.pack(">2I", 0x801, 999) + bytes(999))[:-9], "cannot be read"),
        (b"\x1f\x8b and then nonsense", "cannot be read"),
    ],
)
def test_idx_files_refuses(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}.*{complaint}"):
        open_rows(path, "an IDX file")


# ----------------------------------------------------------------------- tensors and the split


@pytest.mark.parametrize("count", [0, 1, 4096, 4097])
def test_normalise(count: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    expected = ((pixels.astype(np.float64) / 255 - 0.1307) / 0.3081).reshape(count, 784)
    result = data.normalise(torch.from_numpy(pixels), torch.float32)
    assert result.shape == (count, 784) and result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)
    rounded = data.normalise(torch.from_numpy(pixels), torch.bfloat16)
    assert torch.equal(rounded, result.to(torch.bfloat16))

    scaled = torch.from_numpy(pixels.astype(np.float32) / 255)
    before = scaled.clone()
    np.testing.assert_allclose(data.normalise(scaled, torch.float32), expected, atol=1e-5)
    assert torch.equal(scaled, before)  # the caller's images are left alone


@pytest.mark.parametrize("size", [0, 1, 7, 5000, 59_999, 60_000])
def test_validation_split_is_stratified(good_dir: Path, size: int) -> None:
    labels = data.load_mnist(good_dir, "train").labels
    training, validation = data.split_validation(labels, size, seed=3)
    assert training.dtype == validation.dtype == torch.int64
    assert len(validation) == size
    both = np.concatenate([training.numpy(), validation.numpy()])
    assert np.array_equal(np.sort(both), np.arange(60_000))
    assert np.all(np.diff(training) > 0) and np.all(np.diff(validation) > 0)

    counts = np.bincount(labels.numpy())
    quotas = [Fraction(size * int(count), 60_000) for count in counts]
    shares = np.bincount(labels.numpy()[validation.numpy()], minlength=10)
    expected = [int(quota) for quota in quotas]
    for digit in sorted(range(10), key=lambda digit: (expected[digit] - quotas[digit], digit)):
        expected[digit] += sum(expected) < size
    assert shares.tolist() == expected


def test_validation_split_by_hand() -> None:
    # 5 zeros, 3 ones, 2 twos; half of them is 2.5, 1.5 and 1: the tie goes to the zero.
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 0, 1, 2, 0])
    _, validation = data.split_validation(labels, 5, seed=0)
    assert Counter(labels[validation].tolist()) == {0: 3, 1: 1, 2: 1}


def test_validation_split_depends_on_the_seed_alone() -> None:
    labels = torch.from_numpy(np.random.default_rng(2).integers(0, 10, 1000))
    _, first = data.split_validation(labels, 100, seed=0)
    torch.manual_seed(99)
    _, again = data.split_validation(labels, 100, seed=0)
    _, other = data.split_validation(labels, 100, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(np.unique(first.numpy() // 250)) == 4  # drawn from all over, not from the front


# ------------------------------------------------------------------------------------ batches


def batches(**settings: int) -> list[list[int]]:
    settings = {"seed": 5, "stop_step": 6, **settings}
    return [indices.tolist() for indices in data.GlobalBatches(**settings)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 32, 33])
def test_every_sample_once_per_epoch(size: int, world_size: int) -> None:
    steps = -(-size // 16)
    whole = batches(size=size, batch_size=16, stop_step=2 * steps)
    parts = [
        batches(size=size, batch_size=16, stop_step=2 * steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert [len(batch) for batch in whole[:steps]] == [16] * (size // 16) + [size % 16] * (
        size % 16 > 0
    )
    for epoch in range(2):
        seen = [index for batch in whole[epoch * steps : (epoch + 1) * steps] for index in batch]
        assert sorted(seen) == list(range(size))
    for step, batch in enumerate(whole):
        slices = [part[step] for part in parts]
        assert [
            index for part in slices for index in part
        ] == batch  # contiguous, in the order of the ranks
        lengths = [len(part) for part in slices]
        assert max(lengths) - min(lengths) <= 1


def test_batches_differ_between_epochs_and_seeds() -> None:
    whole = batches(size=32, batch_size=16, stop_step=4)
    assert whole[:2] != whole[2:]
    assert whole == batches(size=32, batch_size=16, stop_step=4)
    assert whole != batches(size=32, batch_size=16, stop_step=4, seed=6)


def test_one_sample_on_three_ranks() -> None:
    parts = [batches(size=1, batch_size=4, stop_step=2, rank=r, world_size=3) for r in range(3)]
    assert sorted(part[0] for part in parts) == [[], [], [0]]
    empty = data.GlobalBatches(size=1, batch_size=4, seed=0, rank=0, world_size=3, stop_step=1)
    (indices,) = empty
    assert indices.dtype == torch.int64 and indices.shape == (0,)


@pytest.mark.parametrize("start", range(8))
def test_start_at_any_step(start: int) -> None:
    settings = {"size": 33, "batch_size": 16, "stop_step": 7, "rank": 1, "world_size": 2}
    tail = data.GlobalBatches(seed=5, start_step=start, **settings)
    assert [indices.tolist() for indices in tail] == batches(**settings)[start:]
    assert len(tail) == 7 - start


def test_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {
        tuple(data.epoch_order(1000, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    torch.manual_seed(99)
    assert tuple(data.epoch_order(1000, 0, 0).tolist()) in orders
    assert all(sorted(order) == list(range(1000)) for order in orders)
    # Written down: an upgrade of torch that shuffles otherwise would break every resumed run.
    assert data.epoch_order(8, 0, 0).tolist() == [7, 5, 6, 0, 3, 4, 1, 2]


def test_a_step_costs_a_view() -> None:
    order_starts = {
        indices.untyped_storage().data_ptr()
        for indices in data.GlobalBatches(size=100, batch_size=10, seed=0, stop_step=10)
    }
    assert len(order_starts) == 1


@pytest.fixture
def keep_global_random_state() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("keep_global_random_state")
@pytest.mark.parametrize("block", [1, 4, 8, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loader_gives_the_samplers_batches(
    monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(data, "_BLOCK_IMAGES", block)
    images = (torch.arange(10 * 784) % 251).to(torch.uint8).reshape(10, 28, 28)
    labels = torch.arange(10) * 3
    dataset = data.BatchedDigits(images, labels, dtype)
    sampler = data.GlobalBatches(size=10, batch_size=4, seed=0, rank=1, world_size=2, stop_step=5)
    assert len(dataset) == 10
    for indices, batch in zip(sampler, data.load_batches(dataset, sampler), strict=True):
        assert batch[1].tolist() == [3 * index for index in indices.tolist()]
        pixels = images.double()[indices].flatten(1)
        expected = ((pixels / 255 - data.MEAN) / data.STD).to(dtype)
        torch.testing.assert_close(batch[0], expected)
