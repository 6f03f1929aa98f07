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
# A Python whose venvs have a pip that installs what requirements.txt names into lib/packages, or
# does what the file behave beside it says: fail half way, or hang there.
FAKE_PYTHON = """#!/bin/bash
venv=${0%/bin/python}
read -r behave <BEHAVE
case $* in
    *version_info*) echo "MINOR BASE" ;;
    *'import fcntl'* | *'import ensurepip, venv' | *' pip --version' | *'-r '*uv.txt) ;;
    *'-m venv'*)
        [ "$behave" != 'no venv' ] || { echo 'Error: no venv today'; exit 1; }
        venv=${!#}
        [[ $* != *--clear* ]] || rm -rf "$venv"
        mkdir -p "$venv/bin" "$venv/lib"
        ln -s BASE "$venv/bin/python"
        ;;
    *' config list') echo "$FAKE_PIP_CONFIG" ;;
    *'import mnist'*) [ -e "$venv/lib/mnist" ] ;;
    *'-r '*requirements.txt)
        rm -f "$venv/lib/packages" # as installers do: they write into no file
        [ "$behave" = works ] || echo half >"$venv/lib/packages"
        case $behave in
            fails) echo 'OSError: No space left on device'; exit 1 ;;
            hangs) echo hanging >"$venv/setup.hangs"; exec sleep 100 ;;
        esac
        cat "${!#}" >"$venv/lib/packages"
        ;;
    *--editable*) echo "${!#}" >"$venv/lib/new" && mv "$venv/lib/new" "$venv/lib/mnist" ;;
    *) exec REAL "$@" ;;
esac
"""
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


def fake_python(folder: Path, minor: str) -> None:
    """Makes a Python of FAKE_PYTHON."""
    path = folder / f"python{minor}"
    folder.mkdir(exist_ok=True)
    (folder / "behave").write_text("works")
    path.write_text(
        FAKE_PYTHON.replace("MINOR", minor)
        .replace("BASE", str(path))
        .replace("BEHAVE", str(folder / "behave"))
        .replace("REAL", sys._base_executable)
    )
    path.chmod(0o755)


def contents(folder: Path, without: tuple[str, ...] = ()) -> dict[str, tuple]:
    """All that is in a folder, links as links: mode, time (of what is no folder) and contents."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        name = str(path.relative_to(folder))
        status = path.lstat()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder", status.st_mode)
        else:
            found[name] = (status.st_mode, status.st_mtime_ns, path.read_bytes())
    return {name: what for name, what in found.items() if name not in without}


def environment(clone: Path) -> dict[str, tuple]:
    """contents of .venv, less what set-up notes beside the environment."""
    return contents((clone / ".venv").resolve(), ("setup.log", "setup.hangs", "made-by-setup.txt"))


@pytest.fixture
def clone(tmp_path):
    return make_clone(tmp_path / "clone")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clone that two set-ups made which started at once, and what each of them did."""
    folder = tmp_path_factory.mktemp("made")
    clone = make_clone(folder / "clone")
    # What sends other packages of the user's elsewhere does not send these.
    (folder / "uv").mkdir()
    (folder / "uv" / "uv.toml").write_text(f'[pip]\ntarget = "{folder}/elsewhere"\n')
    stray = {"XDG_CONFIG_HOME": str(folder), "PIP_TARGET": str(folder / "elsewhere")}
    first, second = start(clone, **stray), start(clone, **stray)
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


@pytest.fixture
def fake(tmp_path):
    """A folder with two Pythons, and the file behave that says what they do."""
    folder = tmp_path / "fake"
    for minor in ("3.98", "3.99"):
        fake_python(folder, minor)
    return folder


def fake_setup(clone: Path, fake: Path, behave: str = "works", minor: str = "3.98", **more: str):
    (fake / "behave").write_text(behave)
    return run_setup(clone, PYTHON=str(fake / f"python{minor}"), **more)


def add_requirement(clone: Path, name: str = "more") -> str:
    """Changes requirements.txt; returns what it was."""
    lock = clone / "requirements.txt"
    before = lock.read_text()
    lock.write_text(before + f"{name}==1.0\n")
    return before


def own_environment(venv: Path) -> None:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (venv / "installed.txt").write_text("numpy==2.0\n")  # of pip freeze


def own_folder(venv: Path) -> None:
    venv.mkdir()
    (venv / "notes.txt").write_text("mine")


def own_file(venv: Path) -> None:
    venv.write_text("name-of-an-environment\n")  # of some virtualenv tools


@pytest.mark.parametrize("behind_a_link", [False, True])
@pytest.mark.parametrize("make", [own_environment, own_folder, own_file])
def test_what_it_did_not_make_stays(clone, tmp_path, fake, make, behind_a_link):
    place = clone / ".venv"
    theirs = tmp_path / "theirs" if behind_a_link else place
    make(theirs)
    if behind_a_link:
        place.symlink_to(theirs)
    before = contents(theirs)
    for _ in range(2):
        code, (line,) = fake_setup(clone, fake)
        assert code == 2
        where = f"{place} (a link to {theirs})" if behind_a_link else str(place)
        assert line.startswith(f"{where} was not made by scripts/setup and stays as it is: move it")
        assert ("accelerate launch" in line) == (make is own_environment)
        assert contents(theirs) == before
    assert place.is_symlink() == behind_a_link


@pytest.mark.parametrize("kind", ["folder", "link to a folder", "link to nothing"])
def test_an_empty_place_is_used(clone, tmp_path, fake, kind):
    if kind == "folder":
        (clone / ".venv").mkdir()
    else:
        (clone / ".venv").symlink_to("../elsewhere")
    if kind == "link to a folder":
        (tmp_path / "elsewhere" / "lost+found").mkdir(parents=True)  # a disk that is mounted there
    code, lines = fake_setup(clone, fake)
    assert (code, len(lines)) == (0, 2)
    assert (clone / ".venv").is_symlink() == (kind != "folder")
    assert (clone / ".venv" / "lib" / "packages").read_text() == (
        clone / "requirements.txt"
    ).read_text()
    assert fake_setup(clone, fake) == (0, [])


def test_a_link_that_leads_nowhere_is_one_line(clone):
    (clone / ".venv").symlink_to(".venv")
    code, lines = run_setup(clone)
    assert code == 2
    assert lines == [f"{clone}/.venv is a link that leads nowhere: remove it"]


@pytest.mark.parametrize("outside", [False, True])
def test_the_environment_of_another_clone_stays(clone, tmp_path, fake, outside):
    other = make_clone(tmp_path / "other in use")
    if outside:
        (other / ".venv").symlink_to(tmp_path / "environment")
    assert fake_setup(other, fake)[0] == 0
    target = (other / ".venv").resolve()
    (clone / ".venv").symlink_to(target)
    before = contents(target)

    add_requirement(clone)
    adopt = [clone / "scripts" / "setup", "--adopt"]
    for _ in range(2):
        code, (line,) = fake_setup(clone, fake)
        assert code == 2
        assert line.startswith(
            f"{clone}/.venv (a link to {target}) belongs to the clone {other}, which uses it"
        )
        run = subprocess.run(adopt, capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (2, f"scripts/setup: {line}\n")
    assert contents(target) == before
    assert fake_setup(other, fake) == (0, [])

    if outside:  # left behind by a clone that is gone
        shutil.rmtree(other)
        code, lines = fake_setup(clone, fake)
        assert code == 0
        assert lines[0].startswith("making .venv")
        assert "more" in (target / "lib" / "packages").read_text()


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_moved_or_copied_clone_makes_its_own(clone, tmp_path, fake, how):
    assert fake_setup(clone, fake)[0] == 0
    again = tmp_path / "again"
    if how == "moved":
        clone.rename(again)
    else:
        shutil.copytree(clone, again, symlinks=True)
    before = environment(again)
    code, lines = fake_setup(again, fake, "fails")
    assert code == 2
    assert "; .venv is as it was (log: " in lines[1]
    assert environment(again) == before
    code, lines = fake_setup(again, fake)
    assert code == 0
    assert (again / ".venv" / "lib" / "mnist").read_text() == f"{again}\n"
    assert not (again / ".venv" / ".before").exists()
    assert fake_setup(again, fake) == (0, [])


@pytest.mark.parametrize(
    ("change", "behave"), [("lock", "fails"), ("Python", "fails"), ("Python", "no venv")]
)
def test_a_failure_leaves_what_was_there(clone, fake, path_with, change, behave):
    no_python = path_with()
    assert fake_setup(clone, fake)[0] == 0
    (clone / ".venv" / "notes.txt").write_text("mine")
    before = environment(clone)
    lock = add_requirement(clone) if change == "lock" else (clone / "requirements.txt").read_text()
    minor = "3.98" if change == "lock" else "3.99"
    for _ in range(2):
        code, lines = fake_setup(clone, fake, behave, minor)
        assert (code, len(lines)) == (2, 2)
        assert lines[0].startswith("updating .venv" if change == "lock" else "making .venv")
        assert "; .venv is as it was" in lines[1]
        assert environment(clone) == before
    changed = (clone / "requirements.txt").read_text()
    (clone / "requirements.txt").write_text(lock)
    assert run_setup(clone, PATH=no_python, PYTHON="") == (0, [])

    (clone / "requirements.txt").write_text(changed)
    assert fake_setup(clone, fake, "works", minor)[0] == 0
    assert (clone / ".venv" / "lib" / "packages").read_text() == changed
    assert (clone / ".venv" / "notes.txt").read_text() == "mine"
    assert not (clone / ".venv" / ".before").exists()
    assert run_setup(clone, PATH=no_python, PYTHON="") == (0, [])


@pytest.mark.parametrize(
    ("number", "minor"),
    [
        (signal.SIGINT, "3.98"),
        (signal.SIGTERM, "3.99"),
        (signal.SIGKILL, "3.98"),
        (signal.SIGKILL, "3.99"),
    ],
)
def test_stopped_in_the_middle(clone, fake, number, minor):
    assert fake_setup(clone, fake)[0] == 0
    before = environment(clone)
    lock = add_requirement(clone)
    (fake / "behave").write_text("hangs")
    process = start(clone, PYTHON=str(fake / f"python{minor}"))
    while not (clone / ".venv" / "setup.hangs").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    output, _ = process.communicate()
    if number == signal.SIGKILL:
        assert (clone / ".venv" / "lib" / "packages").read_text() == "half\n"
    else:
        assert process.returncode == 2
        assert output.endswith("scripts/setup: stopped by a signal; .venv is as it was\n")
        assert environment(clone) == before

    # the next one tries again, and with the old lock there is nothing left to do
    code, lines = fake_setup(clone, fake, "fails", minor)
    assert code == 2
    assert lines[0].startswith("updating .venv" if minor == "3.98" else "making .venv")
    assert environment(clone) == before
    (clone / "requirements.txt").write_text(lock)
    assert fake_setup(clone, fake) == (0, [])
    assert environment(clone) == before


@pytest.mark.parametrize(("behave", "first"), [("fails", 1), ("works", 15)])
def test_killed_before_any_step(clone, fake, tmp_path, behave, first):
    # Its steps are commands; in a PATH where the Nth of them kills the set-up and all it started.
    # Only from the 15th does it matter whether the installer worked.
    steps = tmp_path / "steps"
    steps.mkdir()
    for tool in ("mkdir", "mktemp", "mv", "rm", "rmdir"):
        (steps / tool).write_text(f"""#!/bin/bash
echo {tool} >>{steps}/done
mapfile -t steps <{steps}/done
[ ${{#steps[@]}} -lt "$LAST" ] || kill -KILL 0
exec {shutil.which(tool)} "$@"
""")
        (steps / tool).chmod(0o755)
    assert fake_setup(clone, fake)[0] == 0
    add_requirement(clone)
    lock = (clone / "requirements.txt").read_text()
    venv = clone / ".venv"
    before = environment(clone)
    old = shutil.copytree(venv, tmp_path / "old", symlinks=True)
    python = str(fake / "python3.98")
    path = f"{steps}:{os.environ['PATH']}"

    for last in range(first, 60):
        shutil.rmtree(venv)
        shutil.copytree(old, venv, symlinks=True)
        (steps / "done").unlink(missing_ok=True)
        (fake / "behave").write_text(behave)
        process = start(clone, PYTHON=python, PATH=path, LAST=str(last))
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        if (venv / "installed.txt").exists() and (venv / "bin" / "python").exists():
            assert (venv / "lib" / "packages").exists()
        code, _ = fake_setup(clone, fake, "fails")
        if code == 0:  # it had been complete
            assert behave == "works"
            assert (venv / "lib" / "packages").read_text() == lock
        else:
            assert environment(clone) == before
        assert not (venv / ".before").exists()
    assert process.returncode == (0 if behave == "works" else 2)
    assert last > first + 5


def test_environments_of_earlier_versions(clone, fake):
    assert fake_setup(clone, fake)[0] == 0
    venv = clone / ".venv"
    (venv / "made-by-setup.txt").unlink()
    lock = add_requirement(clone)
    before = environment(clone)
    code, lines = fake_setup(clone, fake, "fails")
    assert code == 2
    assert lines[0].startswith("updating .venv")
    assert environment(clone) == before

    # They ended a failed update so, with all packages still there, and would have wiped them.
    (clone / "requirements.txt").write_text(lock)
    (venv / "made-by-setup.txt").unlink()
    (venv / "installed.txt").rename(venv / "installed.txt.new")
    before = environment(clone)
    code, lines = fake_setup(clone, fake, "fails")
    assert code == 2
    assert lines[0].startswith("making .venv")
    assert before.pop("installed.txt.new")
    assert environment(clone) == before
    assert fake_setup(clone, fake)[0] == 0


def test_killed_at_first_then_made(clone, fake):
    # the first that is written, perhaps not to its end
    for beginning in ("", "made by scr"):
        (clone / ".venv").mkdir()
        (clone / ".venv" / "made-by-setup.txt").write_text(beginning)
        (clone / ".venv" / "bin").mkdir()
        assert fake_setup(clone, fake)[0] == 0
        shutil.rmtree(clone / ".venv")

    # What was never complete is not kept: it may be what fills the disk.
    assert fake_setup(clone, fake, "fails")[0] == 2
    (clone / ".venv" / "lib" / "half").touch()
    assert fake_setup(clone, fake, "fails")[0] == 2
    assert not (clone / ".venv" / "lib" / "half").exists()
    assert fake_setup(clone, fake)[0] == 0


def test_a_pip_that_installs_elsewhere_is_one_line(clone, fake):
    code, lines = fake_setup(clone, fake, FAKE_PIP_CONFIG="global.target='/home/me/lib'")
    assert (code, len(lines)) == (2, 2)
    assert "sends packages elsewhere: remove global.target='/home/me/lib' (log" in lines[1]


def test_an_adopted_environment_stays(clone, fake):
    subprocess.run([fake / "python3.98", "-m", "venv", clone / ".venv"], check=True)
    adopt = [clone / "scripts" / "setup", "--adopt"]
    assert subprocess.run(adopt, check=False).returncode == 0
    assert fake_setup(clone, fake) == (0, [])
    lock = add_requirement(clone)
    before = contents(clone / ".venv")
    for minor in ("3.98", "3.99"):
        code, (line,) = fake_setup(clone, fake, minor=minor)
        assert code == 2
        assert "run scripts/setup --adopt" in line
        assert contents(clone / ".venv") == before
    (clone / "requirements.txt").write_text(lock)
    assert fake_setup(clone, fake) == (0, [])
    add_requirement(clone)
    assert subprocess.run(adopt, check=False).returncode == 0
    assert fake_setup(clone, fake) == (0, [])


@pytest.mark.network
def test_two_at_once(made):
    _, outputs, found = made
    said = "".join(output for output, _ in outputs)
    assert [code for _, code in outputs] == [0, 0]
    assert said.count("making .venv") == said.count("done in") == 1
    assert said.count("waiting for another set-up") == 1
    assert found == {"iniconfig", "mnist"}
    assert not (made[0].parent / "elsewhere").exists()


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
def test_an_update_without_an_index_changes_nothing(made, tmp_path, path_with):
    clone, *_ = made
    lock = clone / "requirements.txt"
    old, new = lock.read_text(), lock.read_text() + locked("pluggy")
    before = environment(clone)
    lock.write_text(new)
    quick = {"PIP_RETRIES": "1", "UV_HTTP_RETRIES": "0", "UV_CACHE_DIR": str(tmp_path / "cache")}
    code, lines = run_setup(clone, **DEAD_INDEX, **quick)
    assert (code, len(lines)) == (2, 2)
    assert lines[0].startswith("updating .venv")
    assert lines[1].startswith("the package index cannot be reached: ")
    assert "; .venv is as it was (log: " in lines[1]
    assert environment(clone) == before
    assert installed(clone) == {"iniconfig", "mnist"}
    lock.write_text(old)
    assert run_setup(clone, PATH=path_with(), PYTHON="", **DEAD_INDEX) == (0, [])


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
