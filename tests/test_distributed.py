"""World, precision and threads, and what of Accelerate and the launchers they rely on."""

import os
import subprocess
import sys

import pytest
import torch
from test_jobs import LAUNCHERS

from mnist import distributed, threads
from mnist.cli import InputError
from mnist.distributed import World

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def parent(monkeypatch):
    """Pretend to be started by a parent of a given command line."""

    class Process:
        words: tuple[str, ...] = ()

        def __init__(self, pid):
            assert pid == os.getppid()

        def cmdline(self):
            return list(self.words)

    monkeypatch.setattr(distributed.psutil, "Process", Process)
    monkeypatch.setattr("sys.argv", ["jobs/train.py"])
    for name in distributed._WORLD_SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def set_words(text):
        Process.words = tuple(text.split())

    return set_words


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python /bin/accelerate launch --num_processes 2 jobs/train.py", 2),
        ("python /bin/accelerate launch --num-processes=3 jobs/train.py", 3),
        ("python /bin/accelerate-launch --num_processes 2 jobs/train.py", 2),
        ("python -m accelerate.commands.launch --num_processes 2 jobs/train.py", 2),
        ("python /bin/accelerate launch jobs/train.py --num_processes 2", 1),
        ("python /bin/accelerate launch jobs/train.py", 1),
        ("bash launch --num_processes 2 jobs/train.py", 1),
    ],
)
def test_what_accelerate_was_asked_for_is_seen(parent, monkeypatch, tmp_path, command, asked):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    parent(command)
    assert distributed._processes_asked_of_accelerate() == asked


def test_accelerate_configuration_file_is_seen(parent, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\n"
        "mixed_precision: 'no'\nuse_cpu: true\ndebug: false\nnum_machines: 1\n"
    )
    parent(f"python /bin/accelerate launch --config_file {file} jobs/train.py")
    assert distributed._processes_asked_of_accelerate() == 2
    with pytest.raises(InputError, match="asked for 2 processes and started 1"):
        distributed._check_world_size(1, None)


@pytest.mark.parametrize(
    ("variable", "value", "size", "wrong"),
    [
        ("WORLD_SIZE", 2, 1, True),
        ("WORLD_SIZE", 1, 2, True),
        ("WORLD_SIZE", 2, 2, False),
        ("OMPI_COMM_WORLD_SIZE", 2, 1, True),
        ("SLURM_STEP_NUM_TASKS", 2, 1, True),
        ("SLURM_STEP_NUM_TASKS", 2, 8, False),  # a launcher per node, of four processes each
    ],
)
def test_wrong_worlds_that_the_environment_shows(parent, monkeypatch, variable, value, size, wrong):
    monkeypatch.setenv(variable, str(value))
    if wrong:
        with pytest.raises(InputError, match=f"{variable}={value}, but {size} process"):
            distributed._check_world_size(size, None)
    else:
        distributed._check_world_size(size, None)


def test_expected_world_size(parent):
    distributed._check_world_size(1, 1)
    with pytest.raises(InputError, match="--expect-world-size 2, but 1 process"):
        distributed._check_world_size(1, 2)


@pytest.mark.parametrize(
    ("setting", "launcher", "native", "expected"),
    [
        ("auto", "no", True, "bf16"),
        ("auto", "no", False, "fp32"),
        ("auto", None, True, "bf16"),
        ("auto", "bf16", False, "bf16"),
        ("fp32", "bf16", True, "fp32"),
        ("bf16", "no", False, "bf16"),
    ],
)
def test_precision(monkeypatch, setting, launcher, native, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(distributed, "_multiplies_bf16_natively", lambda device: native)
    assert distributed._precision(setting, CPU) == expected


def test_fp16_needs_a_gpu_whoever_asks_for_it(monkeypatch):
    assert distributed._precision("fp16", GPU) == "fp16"
    with pytest.raises(InputError, match="--precision fp16 needs a GPU"):
        distributed._precision("fp16", CPU)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="--precision fp16 needs a GPU"):
        distributed._precision("auto", CPU)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="fp8 is not supported"):
        distributed._precision("auto", CPU)


def test_engines_that_a_launcher_was_configured_for_are_left_with_a_line(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    (line,) = distributed._leave_other_engines()
    assert "ACCELERATE_USE_DEEPSPEED=true" in line
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_cores_are_those_of_the_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert threads.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= threads.usable_cores() <= len(allowed)


def test_world_of_one_reduces_to_itself_and_passes_errors_on():
    world, tensor = World(), torch.ones(3)
    world.all_reduce(tensor)
    assert tensor.tolist() == [1, 1, 1]
    assert world.from_main(lambda: "value") == "value"

    def fail():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        world.from_main(fail)


def test_canary_torch_names_the_cpu_features_we_ask_for():
    # Should torch rename them, auto would silently fall back to fp32.
    features = torch.cpu.get_capabilities()
    if features["architecture"] == "x86_64":
        assert {"avx512_bf16", "amx_bf16"} <= features.keys()


RESTARTED = """
import os, sys, time
from mnist.training.config import TrainConfig
from mnist.distributed import connect

restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if int(os.environ["RANK"]) == restarts % 2:
    time.sleep(1)
world = connect(TrainConfig(threads=1))
world.meet()
if world.is_main:
    print(f"start {restarts} of a world of {world.size}", flush=True)
os._exit(0 if restarts == 4 else 1)
"""


@pytest.mark.launch
def test_restarted_processes_do_not_call_those_that_have_gone(tmp_path):
    # The launcher's store has the addresses of the earlier ones, and one rank comes first. Which of
    # two ranks calls the other is chance: without care, one restart in three went well.
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    words = (
        "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --max_restarts 4 "
        "--monitor_interval 0.1 --mixed_precision no --dynamo_backend no"
    ).split()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, script],
        cwd=tmp_path,
        env=clean | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"start {n} of a world of 2" for n in range(5)]
