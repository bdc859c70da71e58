"""From which checkpoint the workers of a training go on."""

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint

from gfl.checkpoint.files import (
    ABOUT,
    CHECKSUMS,
    CONFIG,
    TRAINING,
    WEIGHTS,
    About,
    require_whole,
)
from gfl.checkpoint.snapshot import Snapshot, load_checkpoint, take_snapshot
from gfl.model.detector import Detector
from gfl_platform.storage.cache import Cache
from gfl_platform.storage.files import StorageError, read_json
from gfl_platform.training import worker
from gfl_platform.training.conditions import CONDITIONS_FILE
from gfl_platform.training.worker import REPORTS_FILE, _latest_whole_checkpoint

CACHE = Cache(Path("unused"), 0)
"""These lie on a disk."""


def emptied(path):
    path.write_text("")


def removed(path):
    path.unlink()


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A checkpoint as a worker writes it."""
    folder = tmp_path_factory.mktemp("written")
    about = About(["rectangle", "ellipse", "triangle"], [1, 2, 3], 4, 1, {})
    snapshot = take_snapshot(Detector(tiny), tiny, about, {"optimizer": {}})
    snapshot.write(folder, {REPORTS_FILE: "[]"})
    return folder


@pytest.fixture
def stored(written, tmp_path, monkeypatch):
    """Two checkpoints, the older first, of which Ray says so."""
    folders = [tmp_path / name for name in ("before", "latest")]
    for folder in folders:
        shutil.copytree(written, folder)
    known = [
        SimpleNamespace(checkpoint=Checkpoint(folder), metrics={"step": step})
        for step, folder in enumerate(folders)
    ]
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: known[-1].checkpoint)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: list(known))
    return folders


def test_the_latest_checkpoint_is_gone_on_from(stored):
    assert _latest_whole_checkpoint(CACHE, pytest.fail) == (stored[1], str(stored[1]))


@pytest.mark.parametrize("harm", [emptied, removed])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, ABOUT, TRAINING, REPORTS_FILE, CHECKSUMS])
def test_one_that_lost_a_file_is_told_of_and_the_one_before_is_used(stored, name, harm):
    harm(stored[1] / name)
    reasons = []
    assert _latest_whole_checkpoint(CACHE, reasons.append) == (stored[0], str(stored[0]))
    assert len(reasons) == 1
    assert str(stored[1]) in reasons[0]
    assert name in reasons[0]


def test_where_all_are_damaged_it_says_so(stored):
    for folder in stored:
        removed(folder / CHECKSUMS)
    with pytest.raises(StorageError, match="there is no other: start anew"):
        _latest_whole_checkpoint(CACHE, [].append)


def test_where_it_is_damaged_on_one_node_all_use_the_one_before(stored, monkeypatch):
    """As this worker sees it, for which nothing is wrong."""
    monkeypatch.setattr(worker, "problem_of_any_worker", lambda _: others.pop())
    others, reasons = ["", "elsewhere: damaged"], []
    assert _latest_whole_checkpoint(CACHE, reasons.append) == (stored[0], str(stored[0]))
    assert reasons == ["elsewhere: damaged"]


def test_a_checkpoint_is_copied_to_storage_that_this_node_sees(written, tmp_path):
    stored = Checkpoint(tmp_path / "run" / "ray" / "checkpoint_1")
    with pytest.raises(StorageError, match=r"/run: not there on .* that all nodes share"):
        worker._require_shared(stored.filesystem, str(tmp_path / "run"))
    worker._copy(written, stored)
    worker._require_shared(stored.filesystem, str(tmp_path / "run"))
    names = sorted(path.name for path in written.iterdir())
    assert names
    assert sorted(path.name for path in Path(stored.path).iterdir()) == names
    assert all((Path(stored.path) / n).read_bytes() == (written / n).read_bytes() for n in names)


def test_a_checkpoint_is_written_where_it_stays(tiny, written, tmp_path, monkeypatch):
    """On a folder nothing is written twice; a failure leaves nothing that is half there."""
    place = SimpleNamespace(storage_filesystem=LocalFileSystem(), experiment_fs_path=str(tmp_path))
    context = SimpleNamespace(get_world_rank=lambda: 0, get_storage=lambda: place)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    told = []
    listener = worker.WorkerListener(SimpleNamespace(tell=told.append), {"device": "cpu"})
    detector, about = load_checkpoint(written)
    snapshot = take_snapshot(detector, tiny, about, {"optimizer": {}})
    store = listener._store(snapshot, "[]", 4, 0.5)
    (tmp_path / "unstored").mkdir()
    given = Checkpoint(tmp_path / "unstored")
    stored = store(given, "checkpoint_1")
    require_whole(Path(stored.path))
    assert read_json(Path(stored.path) / CONDITIONS_FILE) == {"device": "cpu"}
    assert Path(stored.path) == tmp_path / "checkpoint_1"
    assert not any((tmp_path / "unstored").iterdir())
    (told_of,) = told
    assert told_of.metrics["checkpoint_blocked_seconds"] == 0.5
    monkeypatch.setattr(Snapshot, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store(given, "checkpoint_2")
    assert not (tmp_path / "checkpoint_2").exists()


def test_what_killed_workers_had_not_stored_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ("gfl-unstored-abandoned", "gfl-unstored-new", "another")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (0, 0))
    worker.remove_abandoned()
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
