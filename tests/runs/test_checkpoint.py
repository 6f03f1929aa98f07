"""Checkpoints are whole or absent, and damaged ones are found and skipped."""

import json
import os
import shutil

import pytest

from mnist.cli import InputError
from mnist.runs.checkpoint import find_damage, newest_checkpoint, step_of, write_checkpoint

FILES = {"model.safetensors": b"weights" * 1000, "state.json": b"{}"}


@pytest.fixture
def folder(tmp_path):
    for step in (5, 999_999_999, 40):
        write_checkpoint(tmp_path, step, FILES)
    return tmp_path


def test_newest_is_of_the_highest_step_and_holds_what_was_given(folder):
    newest = newest_checkpoint(folder)
    assert newest == folder / "step-999999999" and step_of(newest) == 999_999_999
    for name, contents in FILES.items():
        assert (newest / name).read_bytes() == contents
    assert {path.name for path in newest.iterdir()} == {*FILES, "manifest.json"}
    assert len(list(folder.iterdir())) == 3


def test_no_checkpoints_is_none(tmp_path):
    assert newest_checkpoint(tmp_path) is newest_checkpoint(tmp_path / "missing") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def newer_format(path):
    manifest = json.loads((path.parent / "manifest.json").read_text())
    (path.parent / "manifest.json").write_text(json.dumps(manifest | {"format": "of 2030"}))


DAMAGES = {
    "truncated": truncate,
    "flipped bit": flip,
    "missing": os.remove,
    "folder of nothing": lambda path: (shutil.rmtree(path.parent), path.parent.mkdir()),
    "a file": lambda path: (shutil.rmtree(path.parent), path.parent.write_text("")),
    "newer format": newer_format,
    "manifest truncated": lambda path: truncate(path.parent / "manifest.json"),
    "manifest of something": lambda path: (path.parent / "manifest.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_one_is_named_and_skipped(folder, capsys, damage):
    newest = newest_checkpoint(folder)
    DAMAGES[damage](newest / "model.safetensors")
    assert newest_checkpoint(folder) == folder / "step-000000040"
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1 and str(newest) in warnings
    (folder / "step-000000005" / "state.json").unlink()
    (folder / "step-000000040" / "manifest.json").unlink()
    with pytest.raises(InputError, match="none of its 3 checkpoints is good"):
        newest_checkpoint(folder)


def test_damaged_one_of_the_same_step_is_replaced(folder):
    flip(folder / "step-000000040" / "state.json")
    write_checkpoint(folder, 40, FILES)
    assert find_damage(folder / "step-000000040") == ""


def test_what_the_disk_gives_back_is_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mnist.runs.checkpoint.flush_to_disk", lambda path: path.is_file() and flip(path)
    )
    with pytest.raises(OSError, match="damaged"):
        write_checkpoint(tmp_path, 1, FILES)
    assert list(tmp_path.iterdir()) == []
