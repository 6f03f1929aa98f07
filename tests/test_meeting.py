"""Processes that are late are waited for, those that stay away are named, signals are heard."""

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import HashStore

from mnist import meeting
from mnist.cli import WorldError
from mnist.meeting import RollCall
from mnist.system import StopRequest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(meeting, "_SECONDS_BEFORE_LINE", 0.6)
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 2.0)


def call(store, rank, size=3):
    return RollCall("start", "rank", rank, size, "nowhere:1", lambda: store)


def test_late_ones_are_waited_for_and_named(capfd):
    store = HashStore()
    early = [threading.Thread(target=call(store, rank).wait) for rank in (0, 1)]
    for thread in early:
        thread.start()
    time.sleep(1.2)
    call(store, 2).wait()
    for thread in early:
        thread.join(1)
        assert not thread.is_alive()
    # The lowest of those here says it, once.
    assert capfd.readouterr().err == "waiting for rank 2 of 3 (1 s so far, 2 s at most)\n"


def test_those_that_do_not_come_are_an_error_that_is_tried_again(capfd):
    with pytest.raises(WorldError, match=r"ranks 0, 2 of 3 did not come within 2 s"):
        call(HashStore(), 1).wait()


def test_request_to_stop_ends_the_wait():
    stop = StopRequest()
    threading.Timer(0.3, setattr, (stop, "requested", True)).start()
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        call(HashStore(), 0).wait(stop=stop)
    assert ended.value.code == 75 and time.monotonic() - began < 1.9


def test_the_two_timeouts_are_those_that_are_promised(monkeypatch):
    monkeypatch.undo()
    assert meeting.PATIENCE_SECONDS == 600
    assert datetime.timedelta(seconds=60) == meeting.COLLECTIVE_TIMEOUT


# Rank 1 is late three times by twice what a collective waits: to meet, with the data, and with what
# an evaluation opens.
LATE = """
import datetime, json, os, sys, time
sys.path.insert(0, sys.argv[1])
import fork_worlds
from mnist import distributed
from mnist.evaluation import job as evaluation
from mnist.training import loop

distributed.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=1)
def late(function):
    def wrapped(*arguments, **options):
        if os.environ["RANK"] == "1":
            time.sleep(2)
        return function(*arguments, **options)
    return wrapped

fork_worlds.connect = late(fork_worlds.connect)
loop.load_mnist = late(fork_worlds.loader_of_first(2000))
evaluation.open_inputs = late(evaluation.open_inputs)
train, evaluate = json.loads(sys.argv[2])
for job, options in (("train", train), ("evaluate", [evaluate])):
    port = fork_worlds.free_port()
    children = [fork_worlds.fork(rank, 2, port, job, options) for rank in range(2)]
    assert not any([os.waitpid(child, 0)[1] for child in children])
"""


def test_process_that_is_late_for_longer_than_a_collective_waits_loses_nothing(tmp_path, data_dir):
    train = (
        f"--validation-size 1000 --epochs 1 --hidden-sizes 32 24 16 12 --runs-dir {tmp_path} "
        f"--run-name run --data-dir {data_dir} --threads 1 --precision fp32 --products torch"
    ).split()
    evaluate = f"--run {tmp_path}/run --data-dir {data_dir} --threads 1 --wandb disabled".split()
    done = subprocess.run(
        [sys.executable, "-c", LATE, ROOT / "tests", json.dumps([train, evaluate])],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/evaluation/test/report.json").read_text())
    assert (report["world_size"], report["scored"]) == (2, 10_000)


@pytest.mark.launch
def test_launcher_whose_processes_wait_ends_within_ten_seconds(tmp_path, data_dir):
    # Rank 1 sleeps before it begins to import anything.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '1':\n    time.sleep(300)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path)}
    launcher = subprocess.Popen(
        [ROOT / "scripts/train", "--processes", "2", "--data-dir", data_dir],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in launcher.stderr:
            if line.startswith("waiting for rank 1 of 2 ("):
                break
        everyone = psutil.Process(launcher.pid).children(recursive=True)
        assert len(everyone) >= 2
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(10) == 128 + signal.SIGTERM
    finally:
        launcher.kill()
        launcher.wait()
    assert psutil.wait_procs(everyone, timeout=5)[1] == []
