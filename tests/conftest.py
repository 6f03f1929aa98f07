"""What several test modules need: MNIST itself."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from mnist.data import fetch_mnist

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
