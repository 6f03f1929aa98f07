"""A clone that a user's git has made in its own way, or in a folder with a difficult name."""

import os
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
    assert {path for path in returns if not path.endswith(".png")} == set()
    for picture in (clone / "docs").glob("*.png"):
        assert picture.read_bytes() == (ROOT / "docs" / picture.name).read_bytes()
    assert {"run", "train", "Dockerfile", "train.sbatch"} <= {path.name for path in files}
