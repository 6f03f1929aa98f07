"""Threads, and products that are whole, in environments made for other programs."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from mnist import threads
from mnist.threads import Surroundings, choose
from mnist.training.config import RECIPES, parse_train_config

# What a job does, or a program that has loaded torch before; then a product of known value.
PROGRAM = """
import json, sys
from mnist.threads import _is_whole, set_threads, surroundings, usable_cores
if sys.argv[1] == "job":
    surroundings()
import torch
torch.set_num_threads(2)
before = _is_whole(torch.float32)
given = set_threads(2)
print(json.dumps([before, given, _is_whole(torch.float32), usable_cores()]))
"""


def compute(program, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, program],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


LIMITED = {"OMP_THREAD_LIMIT": "1"}
OTHERS = {"OMP_DYNAMIC": "true", "OMP_MAX_ACTIVE_LEVELS": "0", "OMP_PROC_BIND": "true"}


def test_products_are_whole_with_all_threads_whatever_the_environment_says():
    assert compute("job", **LIMITED, **OTHERS) == [True, 2, True, threads.usable_cores()]


def test_products_are_whole_with_fewer_threads_where_torch_is_loaded_already():
    before, given, whole, _ = compute("torch first", **LIMITED)
    # If this fails, oneDNN counts threads by itself now, and mnist/threads.py may be done without.
    assert not before
    assert whole and given == 1


@pytest.mark.parametrize(
    ("explicit", "from_file", "around", "processes", "expected", "why"),
    [
        (None, None, {}, 1, 8, ""),
        (None, None, {}, 3, 2, ""),
        (None, None, {}, 99, 1, ""),
        (32, 4, {"asked": 2, "limit": 1}, 1, 32, ""),
        (None, 4, {"asked": 2}, 1, 4, ""),
        (None, 32, {}, 1, 8, "threads in --config is 32"),
        (None, 32, {}, 2, 4, "threads in --config is 32"),
        (None, None, {"asked": 3}, 1, 3, ""),
        (None, None, {"asked": 64}, 1, 8, "OMP_NUM_THREADS is 64"),
        (None, None, {"limit": 1}, 1, 1, "OMP_THREAD_LIMIT allows 1"),
        (None, None, {"limit": 8}, 1, 8, ""),
    ],
)
def test_threads_of_eight_cores(monkeypatch, explicit, from_file, around, processes, expected, why):
    monkeypatch.setattr(threads, "surroundings", lambda: Surroundings(cores=8, **around))
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    found, lines = choose(explicit, from_file, processes)
    assert found == expected and len(lines) == bool(why) and why in "".join(lines)


def test_a_launcher_s_own_number_of_threads_is_nobody_s_wish(monkeypatch):
    class Launcher:
        def __init__(self, pid):
            pass

        def exe(self):
            return "/usr/bin/python3.11"

        def environ(self):
            return self.variables

    monkeypatch.setattr(threads.psutil, "Process", Launcher)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    found = threads.surroundings.__wrapped__
    assert found().asked == 1  # python jobs/train.py
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    Launcher.variables = {}
    assert found().asked is None
    for text, number in (("1", 1), ("4,2", 4), ("0", None), ("many", None), ("-3", None)):
        Launcher.variables = {"OMP_NUM_THREADS": text}
        assert found().asked == number


def test_threads_of_a_file_are_no_setting_of_the_run(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"threads": 32, **RECIPES["fast"]}))
    config = parse_train_config(["--config", str(file)])
    assert (config.threads, config.threads_in_file) == (None, 32)
    config = parse_train_config(["--config", str(file), "--threads", "3"])
    assert config.threads == 3
