"""Files appear whole or not at all."""

import os

import pytest

from mnist.system import write_file


def test_contents_are_replaced(tmp_path):
    write_file(tmp_path / "file", "old")
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failed_write_leaves_the_old_contents_and_nothing_else(tmp_path, monkeypatch):
    write_file(tmp_path / "file", "old")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
