"""scripts/setup on a tiny clone: the real script and installers, a lock of three small packages."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.txt").read_text()
# What the tiny clone installs: the installer, what builds our package, and one to look for.
PACKAGES = ("uv", "setuptools", "iniconfig")
DEAD_INDEX = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_FIND_LINKS": "",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # discard: nobody answers
}


def locked(name: str) -> str:
    """The lines of requirements.txt that pin one package."""
    return re.search(rf"^{name}==.*?[^\\]\n", LOCK, re.MULTILINE | re.DOTALL)[0]


def make_clone(folder: Path) -> Path:
    (folder / "scripts").mkdir(parents=True)
    (folder / "mnist").mkdir()
    (folder / "mnist" / "__init__.py").touch()
    shutil.copy(ROOT / "scripts" / "setup", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "requirements.txt").write_text("".join(map(locked, PACKAGES)))
    return folder


def start(clone: Path, **environment: str) -> subprocess.Popen:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    return subprocess.Popen(
        [clone / "scripts" / "setup"],
        env={**clean, "PYTHON": sys._base_executable, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_setup(clone: Path, **environment: str) -> tuple[int, list[str]]:
    """Runs scripts/setup; returns its exit code and the lines that it said, less its name."""
    process = start(clone, **environment)
    output, _ = process.communicate()
    lines = output.splitlines()
    assert all(line.startswith("scripts/setup: ") for line in lines), output
    return process.returncode, [line.removeprefix("scripts/setup: ") for line in lines]


def installed(clone: Path) -> set[str]:
    """Which of three packages .venv imports from this clone."""
    found = set()
    for name in ("iniconfig", "pluggy", "mnist"):
        command = [clone / ".venv" / "bin" / "python", "-I", "-c", f"import {name} as m; print(m)"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0 and str(clone) in run.stdout:
            found.add(name)
    return found


@pytest.fixture
def clone(tmp_path):
    return make_clone(tmp_path / "clone")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clone that two set-ups made which started at once, and what each of them did."""
    clone = make_clone(tmp_path_factory.mktemp("made") / "clone")
    first, second = start(clone), start(clone)
    outputs = sorted((process.communicate()[0], process.returncode) for process in (first, second))
    return clone, outputs, installed(clone)


@pytest.fixture
def path_with(tmp_path):
    """A PATH with the usual tools and, instead of all Pythons, a script under the given names."""

    def make(python: str = "", names: tuple[str, ...] = ("python3",)) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        for tool in ("awk", "bash", "cat", "cmp", "dirname", "env", "grep", "readlink", "sed"):
            (folder / tool).symlink_to(shutil.which(tool))
        for name in names if python else ():
            (folder / name).write_text(f"#!/bin/bash\n{python}\n")
            (folder / name).chmod(0o755)
        return str(folder)

    return make


def test_no_python_is_one_line(clone, path_with):
    code, lines = run_setup(clone, PATH=path_with(), PYTHON="")
    assert (code, len(lines)) == (2, 1)
    assert "needs Python 3.11 or newer, found no Python" in lines[0]
    assert not (clone / ".venv").exists()


def test_old_python_is_one_line(clone, path_with):
    path = path_with("echo 3.9 /usr/bin/python3.9", names=("python3", "python"))
    code, lines = run_setup(clone, PATH=path, PYTHON="")
    assert (code, len(lines)) == (2, 1)
    assert "needs Python 3.11 or newer, found 3.9 (/usr/bin/python3.9)" in lines[0]


def test_python_without_venv_is_one_line(clone, path_with, tmp_path):
    # what Debian's python3 says without the package python3-venv
    refuse = f'case $* in *ensurepip*) exit 1 ;; esac; echo "3.12 {tmp_path}/bin/python3"'
    code, lines = run_setup(clone, PATH=path_with(refuse), PYTHON="")
    assert (code, len(lines)) == (2, 1)
    assert "apt-get install python3.12-venv" in lines[0]


def test_a_python_that_does_not_run_is_passed_over(clone, path_with, tmp_path):
    # a shim of pyenv; then one that runs, without venv so that the test ends there
    run = f"""[[ $0 == *3.13 ]] || exit 127
case $* in *ensurepip*) exit 1 ;; esac
echo "3.13 {tmp_path}/bin/python3.13"
"""
    path = path_with(run, names=("python3", "python3.14", "python3.13"))
    code, lines = run_setup(clone, PATH=path, PYTHON="")
    assert code == 2
    assert "python3.13-venv" in lines[0]


def test_unknown_option(clone):
    run = subprocess.run([clone / "scripts" / "setup", "--lok"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "scripts/setup: unknown option --lok (takes none, --lock or --adopt)\n"


@pytest.mark.network
def test_two_at_once(made):
    _, outputs, found = made
    said = "".join(output for output, _ in outputs)
    assert [code for _, code in outputs] == [0, 0]
    assert said.count("making .venv") == said.count("done in") == 1
    assert said.count("waiting for another set-up") == 1
    assert found == {"iniconfig", "mnist"}


@pytest.mark.network
def test_nothing_to_do(made, path_with):
    clone, *_ = made
    start_s = time.perf_counter()
    assert run_setup(clone, PATH=path_with(), PYTHON="", **DEAD_INDEX) == (0, [])
    assert time.perf_counter() - start_s < 1  # measured: 0.03 s


@pytest.mark.network
def test_a_copied_environment_is_not_taken_as_good(made, tmp_path, path_with):
    clone = tmp_path / "copy"
    shutil.copytree(made[0], clone, symlinks=True)
    assert run_setup(clone, PATH=path_with(), PYTHON="")[0] == 2


@pytest.mark.network
def test_the_same_folder_under_another_name(made, tmp_path, path_with):
    alias = tmp_path / "alias"
    alias.symlink_to(made[0])
    assert run_setup(alias, PATH=path_with(), PYTHON="") == (0, [])


@pytest.mark.network
def test_a_changed_lock_is_installed(made):
    clone, *_ = made
    lock = clone / "requirements.txt"
    lock.write_text(lock.read_text().replace(locked("iniconfig"), locked("pluggy")))
    code, lines = run_setup(clone)
    assert code == 0
    assert lines[0].startswith("updating .venv")
    assert installed(clone) == {"pluggy", "mnist"}  # and iniconfig is gone
    assert run_setup(clone) == (0, [])


@pytest.mark.network
def test_unreachable_index_then_repaired_by_pip(clone, tmp_path):
    code, lines = run_setup(clone, **DEAD_INDEX)
    assert (code, len(lines)) == (2, 2)
    assert lines[0].startswith("making .venv")
    assert lines[1].startswith("the package index cannot be reached: ")
    assert "Connection refused" in lines[1]
    assert Path(re.search(r"\(log: (.*)\)$", lines[1])[1]).is_file()

    # An uv that can fetch nothing: pip installs the same.
    code, lines = run_setup(clone, UV_OFFLINE="1", UV_CACHE_DIR=str(tmp_path / "cache"))
    assert (code, len(lines)) == (0, 2)
    assert "uv failed, now with pip" in (clone / ".venv" / "setup.log").read_text()
    assert installed(clone) == {"iniconfig", "mnist"}


@pytest.mark.network
def test_killed_in_the_middle_then_repaired(clone):
    process = start(clone)
    pip = clone / ".venv" / "bin" / "pip"
    while not pip.exists():  # ensurepip is at its end, nothing of ours is there
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, lines = run_setup(clone)
    assert code == 0
    assert lines[0].startswith("making .venv")
    assert installed(clone) == {"iniconfig", "mnist"}


def test_every_package_of_the_lock_has_hashes():
    pins = re.findall(r"^\S+==.*?[^\\]\n", LOCK, re.MULTILINE | re.DOTALL)
    assert len(pins) > 50
    assert all("--hash=sha256:" in pin for pin in pins)
    rest = LOCK
    for pin in pins:
        rest = rest.replace(pin, "")
    assert all(line.startswith("#") for line in rest.splitlines()), "not a pinned package"


def test_the_lock_has_no_address():
    assert not re.search(r"://|@|--(extra-)?index|--find-links|/home|/root|/tmp|/work", LOCK)


def test_the_lock_has_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = set(re.findall(r"^([\w.-]+)==", LOCK, re.MULTILINE))
    assert {re.match(r"[\w.-]+", entry)[0].lower() for entry in wanted} <= pinned


def test_scripts_are_found_through_a_link(tmp_path):
    link = tmp_path / "check"
    link.symlink_to(ROOT / "scripts" / "check")
    run = subprocess.run([link, "--fax"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "scripts/check: unknown option --fax (takes none, or --fix)\n"
