"""Local files: written whole, and down to the device before a write returns."""

import errno
import fcntl
import os
import stat

import pytest

from gfl.checkpoint.files import CHECKSUMS, write_checksums
from gfl.files import inside, write_atomically
from gfl_platform.storage.files import StorageError, held, read_rebuildable, space_required


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


def test_checksums_reach_the_device_after_the_files_that_they_are_of(tmp_path, monkeypatch):
    synchronised = []
    monkeypatch.setattr(os, "fsync", lambda file: synchronised.append(os.fstat(file).st_ino))
    weights, checkpoint = tmp_path / "made" / "weights", tmp_path / "made"
    checkpoint.mkdir()
    weights.write_text("w")
    write_checksums(checkpoint, ["weights"])
    paths = (weights, checkpoint / CHECKSUMS, checkpoint, tmp_path)
    assert synchronised == [path.stat().st_ino for path in paths]


def test_a_full_device_is_told_also_where_torch_hides_it(tmp_path):
    def fail_as_torch_does():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(StorageError, match="no space left"), space_required(str(tmp_path)):
        fail_as_torch_does()


@pytest.mark.parametrize("name", ["a.txt", "a/b.txt", "..a/b..", "a b/ä.json", ".hidden"])
def test_a_plain_name_stays_inside(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", "..", ".", "../a", "a/../../b", "a/..", "/etc/passwd", "a//b", "a/./b", "a\\b", "a\0"],
)
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not a name of a file below a folder") as error:
        inside(tmp_path, name)
    assert repr(name) in str(error.value)


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    """It was told that another job holds the run, with no name in it."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"has no locks \(No locks available\).*storage\.root"):
        held(tmp_path).__enter__()


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\0\0"])
def test_a_damaged_file_whose_content_can_be_had_again_is_told_of_once(tmp_path, caplog, content):
    (tmp_path / "a.json").write_text(content)
    assert read_rebuildable(tmp_path / "a.json") == {}
    assert len(caplog.records) == 1
    assert str(tmp_path / "a.json") in caplog.text
    assert read_rebuildable(tmp_path / "none.json") == {}
