"""A clone that a user's git has made in its own way, or in a folder with a difficult name."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git repository")
@pytest.mark.parametrize("setting", ["autocrlf = true", "eol = crlf"])
def test_a_checkout_on_windows_has_the_lines_of_unix(tmp_path, setting):
    settings = tmp_path / "gitconfig"
    settings.write_text(f"[core]\n{setting}\n[safe]\ndirectory = *\n")
    git = {"GIT_CONFIG_GLOBAL": str(settings), "GIT_CONFIG_NOSYSTEM": "1"}
    clone = tmp_path / "clone"
    command = ["git", "clone", "--quiet", ROOT, clone]
    subprocess.run(command, env=os.environ | git, check=True, capture_output=True, text=True)
    files = [path for path in clone.rglob("*") if path.is_file() and ".git" not in path.parts]
    returns = {path.relative_to(clone).as_posix() for path in files if b"\r" in path.read_bytes()}
    assert {path for path in returns if not path.endswith((".png", ".npz", ".heic"))} == set()
    for picture in [
        *(clone / "docs").glob("*.png"),
        clone / "tests/nist.npz",
        *clone.rglob("*.heic"),
    ]:
        assert picture.read_bytes() == (ROOT / picture.relative_to(clone)).read_bytes()
    assert {"run", "train", "Dockerfile", "train.sbatch"} <= {path.name for path in files}


NAMES = ["my clone (1)", "cl'o\"n[e] é*", "$HOME `id` & \\t"]
# What a cluster's commands do for a job on one node: squeue tells the command as SLURM does, each
# word as it is, with spaces between.
COMMANDS = {
    "squeue": """case $* in
        *%o*) printf '%s\\n' "$COMMAND" ;;
        *%K*) printf '%s\\n' 0 1 2 ;;
        esac""",
    "srun": """while [[ $1 = --* ]]; do shift; done
        exec "$@" """,
    "sbatch": """printf '%s\\0' "$@" >>"$PWD/submitted"
        echo 7""",
}


class Site:
    """A clone's slurm/, the commands of a cluster, and a Python that tells its words."""

    def __init__(self, folder, name):
        self.clone, self.work = folder / name, folder / f"work {name}"
        self.clone.mkdir()
        self.work.mkdir()
        shutil.copytree(ROOT / "slurm", self.clone / "slurm")
        for command, script in COMMANDS.items():
            make_executable(folder / "bin" / command, script)
        said = 'printf \'%s\\0\' "$PYTHONPATH" "$MNIST_DATA_DIR" "$@" >"$PWD/said"'
        self.python = make_executable(self.clone / ".venv/bin/python", said)
        self.environment = {name: os.environ[name] for name in ("HOME", "PATH")}
        self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"

    def run(self, script, *words, copied=True, **environment):
        """As slurmd runs it, a copy elsewhere, or as it is; the process that has ended."""
        path = self.clone / "slurm" / script
        job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NAME": script, "SLURM_NNODES": "1"}
        job |= {
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_JOB_NODELIST": "n",
            "SLURMD_NODENAME": "localhost",
        }
        job |= {"COMMAND": " ".join(map(str, [path, *words]))}
        if copied:
            path = shutil.copy(path, self.work / "slurm_script")
        return subprocess.run(
            ["bash", path, *words],
            cwd=self.work,
            env=self.environment | job | {k: str(v) for k, v in environment.items()},
            capture_output=True,
            text=True,
        )

    def said(self, name="said"):
        return (self.work / name).read_bytes().decode().split("\0")[:-1]


def make_executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(params=NAMES)
def site(tmp_path, request):
    return Site(tmp_path, request.param)


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_job_of_a_clone_of_any_name_gets_its_words(site, job):
    runs, data, profile = (site.work / f"{name} (1) é'" for name in ("runs", "data", "profile"))
    profile.write_text("export PYTHONPATH=before\n")
    site.environment |= {"MNIST_RUNS_DIR": str(runs), "MNIST_DATA_DIR": str(data)}
    done = site.run(f"{job}.sbatch", "--config", "a  b'.yaml", MNIST_PROFILE=profile)
    assert done.returncode == 0, done.stderr
    path, told, *words = site.said()
    assert path == f"{site.clone}:before" and told == str(data)
    assert words[:4] == ["-P", "-m", "mnist.launch", f"{site.clone}/jobs/{job}.py"]
    assert words[-2:] == ["--config", "a  b'.yaml"]
    assert job == "evaluate" or words[-4:-2] == ["--runs-dir", str(runs)]


def test_python_whose_path_is_no_word_of_a_shell(site):
    done = site.run("train.sbatch", MNIST_PYTHON=site.python)
    assert done.returncode == 0, done.stderr
    assert site.said()[2:5] == ["-P", "-m", "mnist.launch"]


def test_sweep_in_a_clone_of_any_name_records_all_of_its_runs(site):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "MNIST_SWEEP": "my sweep's"}
    runs = site.work / "my runs"
    values = ("--config", "my files/a.yaml,my files/b.yaml")
    done = site.run("sweep.sbatch", *values, MNIST_RUNS_DIR=runs, **array)
    assert done.returncode == 0, done.stderr
    assert site.said()[-1] == str(runs / "my sweep's")  # the summary's, which is the last
    records = {path.name: path.read_text() for path in (runs / "my sweep's/.tasks").iterdir()}
    assert records == {
        "config=my-files-a.yaml+seed=0": "",
        "config=my-files-b.yaml+seed=0": "0\n",
        "config=my-files-a.yaml+seed=1": "",
    }
    # Submitted again for one task of others, which has no run any more in what was a grid.
    done = site.run("sweep.sbatch", "--seed", "3,4", MNIST_RUNS_DIR=runs, **array)
    assert done.returncode == 0, done.stderr
    again = {path.name for path in (runs / "my sweep's/.tasks").iterdir()}
    assert again == records.keys() | {"seed=3", "seed=4"}
    array["SLURM_ARRAY_TASK_ID"] = "2"
    done = site.run("sweep.sbatch", "--seed", "3,4", MNIST_RUNS_DIR=runs, **array)
    assert done.returncode == 2 and "more tasks than the options have values" in done.stderr


def test_pipeline_in_a_clone_of_any_name_submits_both(site):
    site.python.write_text("#!/bin/sh\nprintf %s 'runs é/x -- y'\n")
    options = ("--comment=a -- b", "--", "--config", "c -- d.yaml")
    for words in (options, options[2:]):
        done = site.run("pipeline.sh", *words, copied=False)
        assert done.returncode == 0, done.stderr
        submitted = site.said("submitted")
        assert ("--comment=a -- b" in submitted) == ("--" in words)
        assert f"{site.clone.resolve()}/slurm/train.sbatch" in submitted
        assert submitted[-1] == "runs é/x -- y" and "c -- d.yaml" in submitted
        (site.work / "submitted").unlink()


@pytest.mark.parametrize("quoted", ["{} -x 'b  c'", '"{}" -x "b  c"'])
def test_python_in_several_words(tmp_path, quoted):
    site = Site(tmp_path, "clone")
    wrapper = make_executable(tmp_path / ("w r" if quoted[0] == '"' else "wr"), 'exec "$PY" "$@"')
    done = site.run("train.sbatch", MNIST_PYTHON=quoted.format(wrapper), PY=site.python)
    assert done.returncode == 0, done.stderr
    assert site.said()[2:5] == ["-x", "b  c", "-P"]


@pytest.mark.parametrize(
    ("name", "environment", "said"),
    [
        ("a b", {"MNIST_PYTHON": "/no where/python"}, "no command /no"),
        ("a b", {"MNIST_PYTHON": "python 'x"}, "MNIST_PYTHON"),
        ("a b", {"MNIST_PROFILE": "/no where"}, "MNIST_PROFILE: no file /no where"),
        ("a:b", {}, "give a link without one as MNIST_ROOT"),
        ("a b", {"MNIST_ROOT": "/no where"}, "clone's folder as MNIST_ROOT"),
    ],
)
@pytest.mark.parametrize("script", ["train.sbatch", "sweep.sbatch"])
def test_what_no_job_can_use_is_said_before_it_starts(tmp_path, name, environment, said, script):
    done = Site(tmp_path, name).run(script, **environment)
    assert done.returncode == 2 and said in done.stderr
