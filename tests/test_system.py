"""Files appear whole or not at all, and no process outlives its launcher."""

import os
import shutil
import subprocess
import sys

import pytest

from mnist.system import write_file


def test_contents_are_replaced(tmp_path):
    write_file(tmp_path / "file", "old")
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failed_write_leaves_the_old_contents_and_nothing_else(tmp_path, monkeypatch):
    write_file(tmp_path / "file", "old")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The first process of a system of its own. Its child is a worker's process, started when its
# launcher has ended already; or it is the launcher itself, as in a container.
ORPHAN = """
(exec env $RUN "$PYTHON" -c "$WORKER") &
wait
"""
LAUNCHER = "import os, subprocess as s; s.run([os.environ[k] for k in ('PYTHON', 'C', 'WORKER')])"
WORKER = """
from mnist.system import die_with_launcher
die_with_launcher()
print("lives")
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="a system of its own needs root and unshare",
)
@pytest.mark.parametrize(
    ("first", "run", "lives"),
    [
        (["sh", "-c", ORPHAN], "TORCHELASTIC_RUN_ID=1", False),
        (["sh", "-c", ORPHAN], "ACCELERATE_MIXED_PRECISION=no", True),  # as an image may set it
        ([sys.executable, "-c", LAUNCHER], "TORCHELASTIC_RUN_ID=1", True),
    ],
)
def test_worker_ends_whose_launcher_ended_before_it_began(first, run, lives):
    name, value = run.split("=")
    environment = os.environ | {"PYTHON": sys.executable, "C": "-c", "WORKER": WORKER, "RUN": run}
    if first[0] != "sh":
        environment[name] = value
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", *first],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if "unshare" in done.stderr:
        pytest.skip("may not have a system of its own here")
    assert (done.stdout, done.stderr) == ("lives\n" if lives else "", "")
