"""Real launches, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from mnist.model import MLP
from mnist.runs.metrics import read_metrics
from mnist.threads import usable_cores

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[1]
JOB = str(ROOT / "jobs/train.py")
EVALUATE = str(ROOT / "jobs/evaluate.py")
BIN = Path(sys.executable).parent
ACCELERATE = f"{BIN}/accelerate launch"
TWO_PROCESSES = {
    "accelerate": f"{ACCELERATE} --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0",
    "torchrun": f"{BIN}/torchrun --standalone --nproc-per-node 2",
}
LAUNCHERS = tuple(
    "WORLD_SIZE RANK LOCAL_ NODE_RANK GROUP_ ROLE_ MASTER_ TORCHELASTIC_ ACCELERATE_ OMP_ OMPI_ "
    "PMI_ MV2_ SLURM_ MNIST_".split()
)
# 1,000 images, 10 steps.
SMALL = (
    "--validation-size 59000 --batch-size 200 --epochs 2 --hidden-sizes 64 48 32 16 "
    "--learning-rate 0.1 --products torch"
)


def run(command, cwd, **environment):
    """Run a command without any launcher's or SLURM's variables; return the finished process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    clean["HF_HOME"] = str(Path(cwd) / ".nothing")  # no configuration of Accelerate either
    return subprocess.run(
        command.split(),
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A run of one process by `accelerate launch` with no configuration, in a folder of its own."""
    cwd = tmp_path_factory.mktemp("one")
    command = f"{ACCELERATE} {JOB} {SMALL} --run-name one"
    done = run(command, cwd, MNIST_DATA_DIR=str(data_dir))
    assert done.returncode == 0, done.stderr
    return cwd, command, done


def test_plain_launch_leaves_a_whole_run(finished):
    cwd, _, done = finished
    folder = cwd / "runs" / "one"
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    checkpoint = "checkpoints/step-000000010/"
    assert {name for name in names if not name.startswith("checkpoints/step-000000005")} == {
        f"{checkpoint}manifest.json",
        f"{checkpoint}model.safetensors",
        f"{checkpoint}optimizer.safetensors",
        f"{checkpoint}state.json",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "figures/loss_curves.png",
        "figures/sample_predictions.png",
        "evaluation/test/predictions.csv",
        "evaluation/test/report.html",
        "evaluation/test/report.json",
    }
    for figure in (folder / "figures").iterdir():
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    environment = json.loads((folder / "environment.json").read_text())
    # The launcher sets OMP_NUM_THREADS=1.
    assert environment["threads"] == usable_cores()
    assert environment["world_size"] == 1
    report = json.loads((folder / "evaluation/test/report.json").read_text())
    assert report["scored"] == 10_000 and report["correct"] == report["accuracy"] * 10_000
    assert f"accuracy {report['accuracy']:.2%}" in done.stdout
    assert "epoch 2/2" in done.stdout and "runs/one" in done.stdout


def test_same_command_again_is_complete_and_changes_nothing(finished, data_dir):
    cwd, command, done = finished
    before = {path: path.stat().st_mtime_ns for path in cwd.rglob("*") if path.is_file()}
    again = run(command.replace(ACCELERATE, sys.executable), cwd, MNIST_DATA_DIR=str(data_dir))
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in cwd.rglob("*") if path.is_file()} == before
    assert "complete" in again.stdout and "epoch 2/2" not in again.stdout
    assert done.stdout[done.stdout.index("test ") :] in again.stdout


def test_same_seed_same_bytes(finished, tmp_path, data_dir):
    cwd, command, _ = finished
    again = run(
        command.replace(ACCELERATE, sys.executable) + " --evaluate none",
        tmp_path,
        MNIST_DATA_DIR=str(data_dir),
    )
    assert again.returncode == 0, again.stderr
    one, other = (folder / "runs" / "one" for folder in (cwd, tmp_path))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, other))
    times = {"seconds", "images_per_second"}
    assert [{k: v for k, v in row.items() if k not in times} for row in rows] == [
        {k: v for k, v in row.items() if k not in times} for row in others
    ]
    assert not (other / "evaluation").exists()  # --evaluate none
    assert (other / "figures" / "sample_predictions.png").exists()


@pytest.fixture(scope="module")
def alone_in_fp32(tmp_path_factory, data_dir):
    cwd = tmp_path_factory.mktemp("alone")
    command = f"{sys.executable} {JOB} {SMALL} --run-name one --precision fp32 --evaluate none"
    done = run(command, cwd, MNIST_DATA_DIR=str(data_dir))
    assert done.returncode == 0, done.stderr
    return cwd / "runs/one/model.safetensors"


@pytest.mark.parametrize("launcher", TWO_PROCESSES)
def test_documented_lines_really_make_a_world_of_two(alone_in_fp32, tmp_path, data_dir, launcher):
    done = run(
        f"{TWO_PROCESSES[launcher]} {JOB} {SMALL} --run-name one --expect-world-size 2 "
        f"--data-dir {data_dir} --precision fp32 --products torch",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    environment = json.loads((tmp_path / "runs/one/environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["threads"] == max(1, usable_cores() // 2)
    assert done.stdout.count("epoch 2/2") == 1  # rank 0 alone speaks
    together = load_file(tmp_path / "runs/one/model.safetensors")
    alone = load_file(alone_in_fp32)
    initial = MLP((64, 48, 32, 16)).initialise(0).state_dict()
    for name, weights in alone.items():
        moved = (weights - initial[name]).abs().max()
        # Rounding moves hidden values across the ReLU; another experiment would be far away.
        assert moved > 1e-3 and (together[name] - weights).abs().max() < 0.02 * moved


def test_scripts_train_makes_a_world_of_n(tmp_path, data_dir):
    done = run(
        f"{ROOT}/scripts/train --processes 2 {SMALL} --evaluate none --data-dir {data_dir} "
        "--run-name two",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    environment = json.loads((tmp_path / "runs/two/environment.json").read_text())
    assert environment["world_size"] == 2


@pytest.mark.parametrize("line", ["--num_processes 2", "--cpu --num_processes 2"])
def test_launch_lines_that_form_a_silent_world_of_one_are_errors(tmp_path, data_dir, line):
    done = run(f"{ACCELERATE} {line} {JOB} {SMALL} --data-dir {data_dir}", tmp_path)
    assert done.returncode == 1  # of the launcher, whatever the job's
    assert "asked for 2 processes and started 1" in done.stderr
    assert "scripts/train --processes N" in done.stderr
    assert not (tmp_path / "runs").exists()


MISTAKES = {
    "unknown option": ("--batch-siz 3", "--batch-siz"),
    "batch of none": ("--batch-size 0", "--batch-size"),
    "five hidden widths": ("--hidden-sizes 5 4 3 2 1", "--hidden-sizes"),
    "data folder is a file": ("--data-dir file", "file"),
    "run folder below a file": ("--runs-dir file/runs", "--runs-dir"),
    "fp16 without a GPU": ("--precision fp16", "--precision fp16"),
    "other world than expected": ("--expect-world-size 2", "--expect-world-size 2"),
}


def check_mistake(done, folder, expected):
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert expected in line
    assert done.stdout == ""
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, data_dir, mistake):
    (tmp_path / "file").write_text("")
    options, expected = MISTAKES[mistake]
    done = run(f"{sys.executable} {JOB} {SMALL} {options}", tmp_path, MNIST_DATA_DIR=str(data_dir))
    check_mistake(done, tmp_path, expected)


@pytest.mark.parametrize(
    "options", ["--batch-size 0", "--data-dir file", "--processes 2 --data-dir file"]
)
def test_scripts_return_the_code_of_the_job_and_hide_the_launcher(tmp_path, options):
    (tmp_path / "file").write_text("")
    done = run(f"{ROOT}/scripts/train {SMALL} {options}", tmp_path)
    check_mistake(done, tmp_path, "file" if "file" in options else "--batch-size")


def test_environment_that_contradicts_accelerate_is_an_error(tmp_path, data_dir):
    # What `srun -n 2` without a launcher does: two worlds of one.
    done = run(
        f"{sys.executable} {JOB} {SMALL} --data-dir {data_dir}", tmp_path, SLURM_STEP_NUM_TASKS="2"
    )
    assert done.returncode == 2
    assert "SLURM_STEP_NUM_TASKS=2, but 1 process" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a read-only folder needs root")
def test_read_only_folder_is_named(tmp_path, data_dir):
    folder = tmp_path / "runs"
    folder.mkdir()
    mount = f"mount -t tmpfs -o ro none {folder}"
    job = f"{sys.executable} {JOB} {SMALL} --data-dir {data_dir}"
    script = tmp_path / "script.sh"
    script.write_text(f"{mount} || exit 77\nexec {job}\n")
    done = run(f"unshare --mount bash {script}", tmp_path)
    if done.returncode == 77:
        pytest.skip("may not mount here")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"train.py: run folder {Path('runs') / folder_name(done)}: Read-only file system; "
        "see --runs-dir"
    ]


@pytest.mark.parametrize(
    "line", [f"{ACCELERATE} {EVALUATE}", f"{ROOT}/scripts/evaluate --processes 2"]
)
def test_evaluation_of_a_run_is_what_training_wrote(finished, tmp_path, data_dir, line):
    run_folder = finished[0] / "runs" / "one"
    done = run(f"{line} --run {run_folder} --output-dir out --data-dir {data_dir}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10,000 of 10,000" in done.stdout and done.stdout.count("accuracy") == 1
    by_training = run_folder / "evaluation" / "test"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in by_training.iterdir()
    }
    one, other = (
        json.loads((folder / "report.json").read_text())
        for folder in (by_training, tmp_path / "out")
    )
    assert other["world_size"] == 1 + ("scripts" in line)
    for name in ("model", "confusion_matrix"):
        assert (
            one[name] == {**other, "model": other["model"] | {"path": one["model"]["path"]}}[name]
        )


def test_evaluation_of_damaged_images_on_another_rank_is_one_line(finished, tmp_path):
    images = np.zeros((5000, 28, 28), np.float32)
    images[4000] = 2  # of the second rank's share
    np.save(tmp_path / "images.npy", images)
    model = finished[0] / "runs" / "one" / "model.safetensors"
    command = f"{ROOT}/scripts/evaluate --processes 2 --model {model} --images images.npy"
    done = run(f"{command} --output-dir out", tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "found 2.0 in image 4000" in line
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]


def test_evaluation_s_mistakes_are_answered_before_anything_is_launched(tmp_path):
    for command in (f"{sys.executable} {EVALUATE}", f"{ROOT}/scripts/evaluate"):
        done = run(f"{command} --run runs/x --split tset", tmp_path)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "--split" in line and "validation" in line


def folder_name(done):
    return done.stderr.split("run folder runs/")[1].split(":")[0]


def peak_memory(command, cwd):
    """Peak resident memory of a command in MB, started by a small process of its own: Linux counts
    the memory of the process that starts one as that one's."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    words = [sys.executable, "-c", code, *command.split()]
    # Linux: kilobytes.
    return int(subprocess.run(words, cwd=cwd, check=True, capture_output=True).stdout) / 1024


def test_training_needs_at_most_500_mb_beyond_its_imports(tmp_path, data_dir):
    (tmp_path / "imports.py").write_text("import torch, accelerate\n")
    imports = peak_memory(f"{sys.executable} imports.py", tmp_path)
    command = (
        f"{sys.executable} {JOB} --epochs 1 --precision fp32 --products torch --data-dir {data_dir}"
    )
    assert 300 < peak_memory(command, tmp_path) < imports + 500  # torch alone has more than 300


@pytest.mark.parametrize("world", ["WORLD_SIZE=2", "WORLD_SIZE=2 RANK=1", "OMPI_COMM_WORLD_SIZE=2"])
def test_half_a_launchers_environment_is_one_line(tmp_path, data_dir, world):
    variables = dict(word.split("=") for word in world.split())
    done = run(f"{sys.executable} {JOB} --data-dir {data_dir}", tmp_path, **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no world forms from WORLD_SIZE=2" in line
    assert list(tmp_path.iterdir()) == []


def test_damaged_run_folder_is_one_line(finished, tmp_path, data_dir):
    cwd, command, _ = finished
    command = command.replace(ACCELERATE, sys.executable)
    for damage, code in [
        ({"config.yaml": ""}, 2),
        ({"config.yaml": "- 1"}, 2),
        ({"model.safetensors": ""}, 2),
        # What the summary needs not, or what is made again.
        ({"metrics.jsonl": "", "evaluation/test/report.json": "{}", "environment.json": "["}, 0),
    ]:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        shutil.copytree(cwd / "runs", tmp_path / "runs")
        for name, contents in damage.items():
            (tmp_path / "runs/one" / name).write_text(contents)
        done = run(command, tmp_path, MNIST_DATA_DIR=str(data_dir))
        assert done.returncode == code, (damage, done.stderr)
        said = [next(iter(damage)) in line for line in done.stderr.splitlines()]
        assert all(said) and 1 <= len(said) <= 2 - (code > 0)
        assert code or "test        accuracy" in done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_job_does_not_outlive_its_launcher(tmp_path, data_dir, processes):
    command = f"{ROOT}/scripts/train --processes {processes} --data-dir {data_dir} --threads 1"
    launcher = subprocess.Popen(
        f"{command} --epochs 1000 --run-name long".split(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert b"epoch" in launcher.stdout.readline()
        jobs = psutil.Process(launcher.pid).children(recursive=True)
        assert len(jobs) >= processes
    finally:
        launcher.kill()
        launcher.wait()
    assert psutil.wait_procs(jobs, timeout=5)[1] == []


def starts_figures(process: psutil.Process) -> bool:
    try:
        return any("mnist.figures" in word for word in process.cmdline())
    except psutil.NoSuchProcess:  # a child that has ended since it was listed
        return False


def test_job_does_not_outlive_a_launcher_that_dies_early(tmp_path, data_dir):
    # While the processes import torch: without care, one goes on to wait for the launcher's store.
    launcher = subprocess.Popen(
        f"{ROOT}/scripts/train --processes 2 --data-dir {data_dir}".split(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    jobs: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while not any(map(starts_figures, jobs)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
            jobs = psutil.Process(launcher.pid).children(recursive=True)
    finally:
        launcher.kill()
        launcher.wait()
    assert psutil.wait_procs(jobs, timeout=5)[1] == []


def test_user_s_own_expectation_of_the_world_holds(tmp_path, data_dir):
    # Whatever Accelerate's own file says, here for other machines and by another version.
    (tmp_path / ".nothing/accelerate").mkdir(parents=True)
    other = (
        "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: TPU\nnum_processes: 8\nnew: 1\n"
    )
    (tmp_path / ".nothing/accelerate/default_config.yaml").write_text(other)
    done = run(f"{ROOT}/scripts/train --expect-world-size 3 --data-dir {data_dir}", tmp_path)
    assert done.returncode == 2
    assert "--expect-world-size 3, but 1 process" in done.stderr
