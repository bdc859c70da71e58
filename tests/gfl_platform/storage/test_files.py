"""Local files: written whole, and down to the device before a write returns."""

import os
import stat

import pytest

from gfl_platform.storage.files import write_atomically


def test_a_file_and_its_folder_reach_the_device(tmp_path, monkeypatch):
    """A power cut after the call must not leave an empty file, nor the file of before."""
    synchronised = []
    fsync = os.fsync

    def record(descriptor):
        mode = os.fstat(descriptor).st_mode
        synchronised.append(("folder" if stat.S_ISDIR(mode) else "file", os.fstat(descriptor)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(tmp_path / "new" / "a.txt", "whole")
    (kind, file), (parent_kind, folder) = synchronised
    assert (kind, parent_kind) == ("file", "folder")
    assert file.st_size == len("whole")
    assert file.st_ino == (tmp_path / "new" / "a.txt").stat().st_ino
    assert folder.st_ino == (tmp_path / "new").stat().st_ino


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "before")

    def fail(_):
        raise OSError("device is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="device is full"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
