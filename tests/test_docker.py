"""The image: what is in it, what runs in it, how it ends. Without an engine much is skipped.

The real Dockerfile is built with a lock of three small packages. MNIST_IMAGE=NAME names a whole
image (`docker build -t NAME .`), in which the job itself is tried.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from test_scripts import ROOT, locked

CONTAINER = ROOT / "scripts" / "container.py"
BASE = "python:3.12-slim"
MARKER = "marker-of-a-private-index"
USER = os.getuid() or 4242  # root would own everything anyway

# A launcher that a signal ends at once, while its job is still saving.
LAUNCHER = """
import subprocess, sys, time
job = '''
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
'''
subprocess.run([sys.executable, "-c", job])
"""


def docker(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = ["docker", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def run(image: str, *arguments: str | Path, options: tuple = ()) -> tuple[int, str]:
    """Exit code and output of a container without network."""
    name = f"mnist-test-{uuid.uuid4().hex[:8]}"
    where = ("--rm", "--name", name, "--network", "none")
    try:
        done = docker("run", *where, *options, image, *arguments)
    except subprocess.TimeoutExpired:  # that ended the client alone
        docker("rm", "--force", name)
        raise
    return done.returncode, done.stdout + done.stderr


def wait_for(text: str, read, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while text not in (found := read()):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


# ------------------------------------------------------------------------- without an engine


def start(*arguments: str) -> subprocess.Popen[str]:
    if sys.platform != "linux":
        pytest.skip("the image's process 1 is for Linux")
    command = [sys.executable, "-I", CONTAINER, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 75"], 75),
        (["sh", "-c", "kill -9 $$"], 137),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_exit_code_is_the_commands(command, code):
    process = start(*command)
    process.communicate(timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_on(number):
    script = f"trap 'echo got; exit 75' {number:d}; echo ready; while :; do sleep 0.1; done"
    process = start("sh", "-c", script)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "got\n"
    assert process.returncode == 75


def test_what_a_launcher_leaves_behind_may_save():
    process = start(sys.executable, "-c", LAUNCHER)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 143


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_options_are_those_of_training(arguments):
    process = start(*arguments, "--no-such-option")
    assert "train.py: Unrecognized options: --no-such-option" in process.communicate(timeout=60)[0]
    assert process.returncode == 2


# ------------------------------------------------------------------------- with an engine


@pytest.fixture(scope="module")
def engine():
    if shutil.which("docker") is None:
        pytest.skip("no docker here")
    try:
        answer = docker("version", "--format", "{{.Server.Version}}", timeout=10)
    except subprocess.TimeoutExpired:
        pytest.skip("docker does not answer")
    if answer.returncode:
        pytest.skip(f"no docker engine answers: {answer.stderr.strip()}")


@pytest.fixture
def container(engine):
    """A name for a container that is removed in the end."""
    name = f"mnist-test-{uuid.uuid4().hex[:8]}"
    yield name
    docker("rm", "--force", name)


def build(context: Path, tag: str) -> None:
    secret = context.parent / "pip.conf"
    pip_conf = docker("run", "--rm", "--entrypoint", "cat", BASE, "/etc/pip.conf").stdout
    secret.write_text(f"{pip_conf or '[global]'}\nextra-index-url = file:///{MARKER}\n")
    options = ["--network", "host", "--progress", "plain", "--secret", f"id=pip.conf,src={secret}"]
    done = docker("build", *options, "--tag", tag, context, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def tiny(engine, tmp_path_factory):
    """Context and name of an image by the real Dockerfile, with a lock of three packages."""
    if docker("image", "inspect", BASE).returncode:
        pytest.skip(f"no image {BASE} here (docker pull {BASE})")
    context = tmp_path_factory.mktemp("docker") / "context"
    context.mkdir()
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, context)
    shutil.copytree(ROOT / "scripts", context / "scripts")
    packages = ("uv", "setuptools", "psutil")
    (context / "requirements.txt").write_text("".join(map(locked, packages)))
    for name in ("jobs/job.py", "mnist/__init__.py", "mnist/__pycache__/old.pyc", "tests/test.py"):
        (context / name).parent.mkdir(exist_ok=True, parents=True)
        (context / name).touch(mode=0o600)
    for name in (".env", ".git/config", "data/images", "runs/run/model", "wandb/key", "mnist/.key"):
        (context / name).parent.mkdir(exist_ok=True, parents=True)
        (context / name).write_text(MARKER)
    tag = f"mnist-test-{uuid.uuid4().hex[:8]}"
    build(context, tag)
    yield context, tag
    docker("rmi", "--force", tag, f"{tag}-changed")


pytestmark = pytest.mark.timeout(300)


@pytest.mark.network
def test_nothing_of_the_builder_is_in_the_image(tiny):
    _, tag = tiny
    made = "-path ./.venv -o -name *.egg-info -o -name *.cpython-312.pyc".split()
    find = ["find", ".", "(", *made, ")", "-prune", "-o", "-type", "f", "-print"]
    code, output = run(tag, *find)
    files = set(output.split())
    scripts = {f"./scripts/{path.name}" for path in (ROOT / "scripts").iterdir() if path.is_file()}
    top = {"./LICENSE", "./README.md", "./pyproject.toml", "./requirements.txt"}
    assert code == 0
    assert files == scripts | top | {"./jobs/job.py", "./mnist/__init__.py", "./tests/test.py"}
    grep = ("grep", "-rl", MARKER, "/app", "/etc", "/home", "/tmp", "/usr", "/var")
    # as root, who may read all of it
    assert run(tag, *grep, options=("--user", "0")) == (1, "")
    assert MARKER not in docker("history", "--no-trunc", tag).stdout
    described = docker("inspect", tag).stdout
    assert MARKER not in described
    assert json.loads(described)[0]["Config"]["User"] == "1000:1000"


@pytest.mark.network
def test_any_user_reads_the_code_and_writes_to_a_mounted_folder(tiny, tmp_path):
    _, tag = tiny
    if os.getuid() == 0:
        os.chown(tmp_path, USER, USER)
    options = ("--read-only", "--tmpfs", "/tmp", "--user", f"{USER}:{USER}")
    options += ("--volume", f"{tmp_path}:/app/runs")
    assert run(tag, "sh", "-c", "cat */*.py >runs/file", options=options) == (0, "")
    assert (tmp_path / "file").stat().st_uid == USER
    assert run(tag, "scripts/setup", options=options) == (0, "")  # nothing to do
    code = "import mnist; from pathlib import Path; print(*map(oct, [Path('data').stat().st_mode]))"
    assert run(tag, "python", "-c", code) == (0, "0o41777\n")


@pytest.mark.network
def test_stop_lets_the_job_save(tiny, container):
    _, tag = tiny
    launcher = ("python", "-c", LAUNCHER)
    docker("run", "--detach", "--name", container, "--network", "none", tag, *launcher)
    wait_for("ready", lambda: docker("logs", container).stdout)
    docker("stop", container)
    assert docker("logs", container).stdout == "ready\nsaved\n"
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout == "143\n"


@pytest.mark.network
def test_a_change_of_the_code_installs_nothing(tiny):
    context, tag = tiny

    def layers(tag: str) -> list[str]:
        return json.loads(docker("inspect", tag).stdout)[0]["RootFS"]["Layers"]

    (context / "mnist" / "__init__.py").write_text("changed = True\n")
    start_s = time.perf_counter()
    build(context, changed := f"{tag}-changed")
    assert time.perf_counter() - start_s < 60  # measured: 4 s
    assert run(changed, "python", "-c", "import mnist; print(mnist.changed)") == (0, "True\n")
    pairs = zip(layers(tag), layers(changed), strict=True)
    assert [one == other for one, other in pairs][-3:] == [True, False, False]


@pytest.fixture
def finished(engine):
    if not os.environ.get("MNIST_IMAGE"):
        pytest.skip("MNIST_IMAGE names no image (docker build -t NAME .)")
    return os.environ["MNIST_IMAGE"]


def test_job_is_stopped_and_goes_on(finished, container, data_dir, tmp_path):
    if os.getuid() == 0:
        os.chown(tmp_path, USER, USER)
    options = ("--read-only", "--tmpfs", "/tmp", "--user", f"{USER}:{USER}")
    options += ("--volume", f"{data_dir}:/app/data:ro", "--volume", f"{tmp_path}:/app/runs")
    options += ("--memory", "2g", "--shm-size", "64k")
    job = "--validation-size 50000 --epochs 4 --processes 2 --threads 1 --evaluate none".split()
    code, output = run(finished, *job, "--run-name", "alone", options=options)
    assert code == 0, output
    job += ["--run-name", "stopped"]
    docker("run", "--detach", "--name", container, "--network", "none", *options, finished, *job)
    wait_for("epoch 1/4", lambda: docker("logs", container).stdout)
    docker("stop", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout == "75\n"
    code, output = run(finished, *job, options=options)
    assert code == 0 and "goes on from step" in output
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "stopped")]
    assert models[0] == models[1]
    evaluate = ("accelerate", "launch", "jobs/evaluate.py", "--run", "runs/stopped")
    code, output = run(finished, *evaluate, options=options)
    assert code == 0 and "10,000 of 10,000" in output
    photos = ("--volume", f"{ROOT}/tests/reading:/photos:ro")
    for words in (
        ("read", "--run", "runs/stopped", "/photos"),
        ("export", "--run", "runs/stopped", "--format", "onnx"),
    ):
        code, output = run(finished, *words, options=(*options, *photos))
        assert code == 0, output
    assert (tmp_path / "stopped/readings/photos/readings.csv").read_text().count(".heic") >= 2
    assert (tmp_path / "stopped/export/model.onnx").exists()
    assert {path.lstat().st_uid for path in tmp_path.rglob("*")} == {USER}
