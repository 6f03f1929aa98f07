"""What several test modules need: MNIST itself."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mnist.fetch import fetch_mnist
from mnist.model import Doubt, load_model, save_model

# Two threads are 10 times slower than one while another process wants a core.
torch.set_num_threads(1)

# Hundreds of processes import the same modules: compiled once, an import of torch takes half.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) is not None:
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="mnist-compiled-")
    atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)

# Of the jobs that tests start; test_tracking.py and test_jobs.py ask for it by an option.
os.environ["WANDB_MODE"] = "disabled"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the four right files; tests read it and never write to it."""
    found = Path(os.environ.get("MNIST_DATA_DIR", Path(__file__).parents[1] / "data")).resolve()
    if not (found / "MNIST" / "raw").is_dir():
        found = tmp_path_factory.mktemp("fetched")
        fetch_mnist(found)
    return found


@pytest.fixture
def good_dir(data_dir: Path, tmp_path: Path) -> Path:
    """A data folder of this test's own. To damage a file, unlink it first: it may be a link."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (data_dir / "MNIST" / "raw").glob("*-ubyte"):
        try:
            os.link(file, raw / file.name)
        except OSError:
            shutil.copyfile(file, raw / file.name)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def fast_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of recipe fast; tests read it and never write to it."""
    runs = tmp_path_factory.mktemp("fast")
    job = Path(__file__).parents[1] / "jobs" / "train.py"
    options = ["--recipe", "fast", "--epochs", "2", "--run-name", "fast", "--evaluate", "none"]
    places = ["--data-dir", str(data_dir), "--runs-dir", str(runs)]
    subprocess.run(
        [sys.executable, job, *options, *places], check=True, capture_output=True, timeout=100
    )
    return runs / "fast"


@pytest.fixture(scope="session")
def with_doubt(fast_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes files of that run's model with a temperature and a threshold."""

    def save(**doubt: float) -> Path:
        model = load_model(fast_run / "model.safetensors")
        model.doubt = Doubt(**doubt)
        path = tmp_path_factory.mktemp("doubt") / "model.safetensors"
        save_model(model, path)
        return path

    return save


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Opens a page in headless Chromium, and gives what that prints; nothing may be on its
    console."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    profile = tmp_path_factory.mktemp("profile")

    def browse(source: str, *options: str) -> str:
        path = profile / "page.html"
        path.write_text(source)
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile / 'user'}", "--enable-logging=stderr", *options]
        done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return browse
