"""The jobs of slurm/ on a real cluster of two nodes, which tests/slurm_cluster starts here."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import stress
import yaml
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.numpy import load_file
from test_jobs import LAUNCHERS, SMALL

from mnist.data import load_mnist

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "slurm"
LACK = [
    name for name in ("slurmctld", "slurmd", "munged", "ip", "unshare") if not shutil.which(name)
]

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(LACK), reason=f"no {', '.join(LACK)}: install slurm-wlm and munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a cluster"),
]

TINY = [
    *SMALL.split(),
    "--threads",
    "1",
    "--precision",
    "fp32",
    "--products",
    "torch",
    "--evaluate",
    "none",
]
# As in stress.py, long enough to be disturbed often: 20 s of training.
LONG = [*stress.OPTIONS.split(), "--precision", "fp32", "--products", "torch", "--epochs", "80"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


def poll(condition, what, seconds=120):
    """Wait until a condition holds, and return what it is then."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"after {seconds} s: {what}"
        time.sleep(0.2)
    return found


class Cluster:
    """Two nodes, and a folder that jobs are submitted in."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment

    def run(self, *words, **environment):
        done = subprocess.run(
            list(map(str, words)),
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def control(self, *words):
        """Start or stop the cluster or a node. The daemons that this starts keep pipes open."""
        with (self.folder / "cluster.log").open("w+") as log:
            command = [ROOT / "tests/slurm_cluster", *words]
            subprocess.run(
                command, env=self.environment, stdout=log, stderr=log, timeout=60, check=True
            )
            log.seek(0)
            return log.read()

    def submit(self, *words, **environment):
        number = self.run("sbatch", "--parsable", "--cpus-per-task=1", *words, **environment)
        return Job(self, number.strip())


class Job:
    """One that was submitted."""

    def __init__(self, cluster, number):
        self.cluster, self.number = cluster, number

    def __getitem__(self, field):
        """What SLURM tells of it, e.g. its JobState."""
        line = self.cluster.run("scontrol", "show", "job", "-o", self.number)
        return re.search(rf"\b{field}=(\S*)", line)[1]

    @property
    def log(self):
        return "\n".join(f.read_text() for f in self.cluster.folder.glob(f"*-{self.number}.log"))

    def wait(self, *states, seconds=120):
        """Until it is in one of the states, by default any in which a job has ended."""
        states = states or ENDED
        poll(lambda: self["JobState"] in states, f"job not {states}: {self.log}", seconds)
        return self["JobState"]

    def succeed(self):
        assert self.wait() == "COMPLETED", self.log
        return self


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("cluster")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    clean |= {"MNIST_DATA_DIR": str(data_dir), "MNIST_PYTHON": sys.executable}
    for number in range(1, 9):  # others may test on this machine
        lock = FileLock(f"/run/mnist-slurm-{number}.lock")
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            pass
    started = Cluster(folder, clean | {"CLUSTER": str(number), "NODES": "2", "GPUS": "2"})
    try:
        started.environment["SLURM_CONF"] = started.control("up").strip()
        yield started
    finally:
        started.control("down")
        lock.release()


@pytest.fixture(scope="module")
def jobs(cluster):
    """What needs no disturbing, all at once."""
    train, sweep = SLURM / "train.sbatch", SLURM / "sweep.sbatch"
    clone = cluster.folder / "my clone (1)"  # what squeue tells of it, its job takes apart
    clone.symlink_to(ROOT)
    named = clone / "slurm/train.sbatch"

    def pipeline(*words):
        said = cluster.run(SLURM / "pipeline.sh", "--cpus-per-task=1", "--", *TINY, *words)
        return [Job(cluster, number) for number in re.findall(r"\b\d+\b", said)[:2]]

    return {
        # Together on two nodes; each lasts some seconds.
        "two": cluster.submit("-N2", train, *TINY, "--epochs", "25", "--run-name", "two"),
        "four": cluster.submit(
            "-N2", "--gpus-per-node=2", train, *TINY, "--epochs", "25", "--run-name", "four"
        ),
        "one": cluster.submit(named, *TINY, "--epochs", "25", "--run-name", "one"),
        "broken": cluster.submit("--array=0-1", sweep, *TINY, MNIST_PYTHON="false"),
        "pipeline": pipeline("--run-name", "piped"),
        "failing": pipeline("--learning-rate", "1e9"),
        "sweep": cluster.submit("--array=0-2%2", sweep, *TINY, "--learning-rate", "0.1,1e9"),
    }


def test_two_nodes_train_together_and_two_jobs_share_them(cluster, jobs):
    for name in ("two", "four"):
        jobs[name].succeed()
    two, four = jobs["two"], jobs["four"]
    assert two["NodeList"] == four["NodeList"] == "node[1-2]"
    assert two["StartTime"] < four["EndTime"] and four["StartTime"] < two["EndTime"]
    jobs["one"].succeed()
    runs = cluster.folder / "runs"
    alone = load_file(runs / "one/model.safetensors")
    for name, size in {"one": 1, "two": 2, "four": 4}.items():
        environment = json.loads((runs / name / "environment.json").read_text())
        assert environment["world_size"] == size
        for parameter, weights in load_file(runs / name / "model.safetensors").items():
            # Rounding moves hidden values across the ReLU; another experiment would be far away.
            difference = abs(weights - alone[parameter]).max()
            assert difference < 0.02 * abs(alone[parameter]).max()


def test_failure_is_tried_three_times(cluster, jobs):
    for task in (0, 1):
        job = Job(cluster, f"{jobs['broken'].number}_{task}")
        assert job.wait() == "FAILED"
        assert job["ExitCode"] == "1:0" and job["Restarts"] == "2"
        assert "failed 3 times in a row: given up" in job.log


def test_pipeline_evaluates_what_it_trained(cluster, jobs):
    train, evaluate = (job.succeed() for job in jobs["pipeline"])
    assert train["EndTime"] <= evaluate["StartTime"]
    report = json.loads((cluster.folder / "runs/piped/evaluation/test/report.json").read_text())
    assert report["scored"] == 10_000


def test_pipeline_ends_where_training_fails(jobs):
    train, evaluate = jobs["failing"]
    assert train.wait() == "FAILED" and train["ExitCode"] == "2:0" and train["Restarts"] == "0"
    assert "training diverged" in train.log
    assert evaluate.wait() == "CANCELLED"


def test_pipeline_submits_nothing_for_a_mistake(cluster):
    submitted = ("squeue", "--states=all", "--noheader", "--format=%A")
    before = cluster.run(*submitted)
    with pytest.raises(AssertionError, match="--epochs takes 1 or more"):
        cluster.run(SLURM / "pipeline.sh", "--epochs", "0")
    assert set(cluster.run(*submitted).split()) == set(before.split())


def test_sweep_summarises_what_did_not_fail(cluster, jobs):
    number = jobs["sweep"].number
    tasks = [Job(cluster, f"{number}_{task}") for task in range(3)]
    assert [task.wait() for task in tasks] == ["COMPLETED", "FAILED", "COMPLETED"]
    folder = cluster.folder / f"runs/sweep-{number}"
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["runs"] for row in summary["ranking"]] == [
        ["learning-rate=0.1+seed=0", "learning-rate=0.1+seed=1"]
    ]
    assert summary["ranking"][0]["validation_accuracy"]["standard_deviation"] > 0
    assert [run["code"] for run in summary["incomplete"]] == [2]
    assert "2 of 3 runs complete" in (folder / "summary.txt").read_text()
    for seed in (0, 1):
        settings = yaml.safe_load(
            (folder / f"learning-rate=0.1+seed={seed}/config.yaml").read_text()
        )
        assert settings["seed"] == seed and settings["learning_rate"] == 0.1
        assert settings["evaluate"] == "none"
    times = [(task["StartTime"], task["EndTime"]) for task in tasks]
    for moment, _ in times:
        assert sum(start <= moment < end for start, end in times) <= 2


# ---------------------------------------------------------------- one long run, often disturbed


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """The same run on this machine, of two processes, which nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    words = [sys.executable, "-m", "mnist.launch", ROOT / "jobs/train.py", "--processes", "2"]
    words += [*LONG, "--run-name", "alone", "--runs-dir", folder, "--data-dir", data_dir]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    done = subprocess.Popen(words, cwd=folder, env=clean, stdout=subprocess.DEVNULL)
    yield done, folder / "alone"
    done.kill()


class Victim(Job):
    """A job of the run that is disturbed."""

    def __init__(self, cluster):
        words = ("-N2", SLURM / "train.sbatch", *LONG, "--run-name", "victim")
        super().__init__(cluster, cluster.submit(*words).number)

    def train(self):
        """Let it train a little since its last start; return how often it was started again."""

        def trains():
            assert self["JobState"] not in ENDED, self.log
            since = self.log.rpartition(", start ")[2]
            return since.startswith(f"{int(self['Restarts']) + 1}\n") and "epoch" in since

        poll(trains, self.log)
        return int(self["Restarts"])

    def goes_on(self, restarts, most=1):
        """It is started again, at most so often; return the step from which it then trains, and
        what it said before.
        """
        poll(lambda: int(self["Restarts"]) > restarts, self.log)
        assert self.train() <= restarts + most
        before, _, since = self.log.rpartition(", start ")
        [step] = re.findall(r"goes on from step ([\d,]+)", since)
        return step, before.rpartition(f", start {restarts + 1}\n")[2]


@pytest.fixture(scope="module")
def victims(alone):
    return []


@pytest.fixture
def victim(cluster, victims):
    """The run's job, which trains."""
    if not victims or victims[-1]["JobState"] in ENDED:
        victims.append(Victim(cluster))
    victims[-1].train()
    return victims[-1]


def saved_step(said):
    [step] = re.findall(r"interrupted at step ([\d,]+): saved", said)
    return step


def test_cancelled_job_saves_and_does_not_come_back(cluster, victim):
    cluster.run("scancel", victim.number)
    assert victim.wait() == "CANCELLED"
    poll(lambda: "not requeued from here" in victim.log, victim.log)
    step = saved_step(victim.log)
    assert victim["Restarts"] == "0" and victim.number not in cluster.run("squeue", "-h")
    again = Victim(cluster)
    again.train()
    assert f"goes on from step {step}" in again.log
    cluster.run("scancel", again.number)


def test_preempted_job_goes_on(cluster, victim):
    restarts = victim.train()
    words = ("--partition=high", "-N1", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.submit(*words).succeed()
    step, said = victim.goes_on(restarts)
    assert saved_step(said) == step and "interrupted and saved: requeued" in said


def test_job_requeued_by_hand_goes_on(cluster, victim):
    restarts = victim.train()
    cluster.run("scontrol", "requeue", victim.number)
    step, said = victim.goes_on(restarts)
    assert saved_step(said) == step


def test_job_goes_on_beyond_its_time_limit(cluster, victim):
    restarts = victim.train()
    end = time.strftime("%FT%T", time.localtime(time.time() + 65))  # it is told 60 s before
    cluster.run("scontrol", "update", f"JobId={victim.number}", f"EndTime={end}")
    step, said = victim.goes_on(restarts)
    cluster.run("scontrol", "update", f"JobId={victim.number}", "TimeLimit=60")
    assert saved_step(said) == step and "interrupted and saved: requeued" in said


def test_job_that_lost_a_node_goes_on(cluster, victim):
    restarts = victim.train()
    checkpoints = cluster.folder / "runs/victim/checkpoints"
    saved = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    cluster.control("kill-node", "2")
    poll(lambda: victim["JobState"] != "RUNNING", victim.log)
    cluster.control("start-node", "2")
    # SLURM may start it before the node is back: then it fails to start, and is requeued once more.
    step, said = victim.goes_on(restarts, most=4)
    assert int(step.replace(",", "")) >= saved and "Node failure on node2" in said


def test_disturbed_run_ends_with_the_bits_of_one_left_alone(cluster, victim, alone):
    process, folder = alone
    victim.succeed()
    assert process.wait(60) == 0
    stress.compare(cluster.folder / "runs/victim", folder)


# ------------------------------------------------------------------------------- reading photos


def test_reading_that_lost_a_node_ends_with_the_same_bytes(cluster, fast_run, data_dir, tmp_path):
    digits = load_mnist(data_dir, "test").images.numpy()
    photos = cluster.folder / "photos"
    photos.mkdir()
    for number in range(240):
        row = np.hstack(digits[4 * number : 4 * number + 4])
        Image.fromarray(230 - (0.8 * row).astype(np.uint8)).save(photos / f"{number:03}.png")
    words = ["--model", fast_run / "model.safetensors", photos, "--output-dir"]
    command = [sys.executable, "-m", "mnist.launch", ROOT / "jobs/read.py", *words, tmp_path]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    subprocess.run(command, env=clean, check=True, capture_output=True, timeout=120)

    output = cluster.folder / "readings"
    job = cluster.submit("-N2", SLURM / "read.sbatch", *words, output)

    def read():
        parts = [path.read_bytes() for path in output.glob(".unfinished-*/*.records")]
        return len(parts) == 2 and all(part.count(b"\n") > 20 for part in parts)

    poll(read, job.log)
    cluster.control("kill-node", "2")
    poll(lambda: job["JobState"] != "RUNNING", job.log)
    cluster.control("start-node", "2")
    job.succeed()
    assert "Node failure on node2" in job.log and "goes on: " in job.log
    for name in ("readings.csv", "readings.html"):
        assert (output / name).read_bytes() == (tmp_path / name).read_bytes()
