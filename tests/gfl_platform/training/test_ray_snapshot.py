"""Ray's list of a run's checkpoints is rebuilt where Ray could not read it."""

import json
import shutil

import pytest

from gfl.checkpoint.files import write_checksums
from gfl.config.loader import config_hash, dump_config, load_config
from gfl_platform.cluster.events import EpochEvaluated, to_json
from gfl_platform.config import StorageConfig, load_job
from gfl_platform.storage.files import StorageError
from gfl_platform.storage.s3 import list_objects, upload
from gfl_platform.storage.storage import Storage
from gfl_platform.training import train
from gfl_platform.training.ray_snapshot import SNAPSHOT_FILE, mend_snapshot
from gfl_platform.training.worker import REPORTS_FILE


def write_checkpoint(folder, config, step, metrics=None):
    """Write the texts of a checkpoint; `metrics` are those of an epoch that ended with it."""
    folder.mkdir(parents=True)
    about = {"classes": ["a"], "category_ids": [1], "step": step, "epoch": step // 2}
    (folder / "about.json").write_text(json.dumps(about | {"metrics": metrics or {}}))
    (folder / "config.yaml").write_text(dump_config(config))
    events = [EpochEvaluated(step, step // 2, metrics)] if metrics else []
    (folder / REPORTS_FILE).write_text(json.dumps([to_json(event) for event in events]))
    write_checksums(folder, ["about.json", "config.yaml", REPORTS_FILE])


@pytest.fixture
def run(tiny_file, tmp_path):
    """A storage, and the folder of two epochs' checkpoints, one within an epoch, and half a one."""
    config, folder = load_config(tiny_file), tmp_path / "root" / "runs" / "x" / "ray"
    write_checkpoint(folder / "checkpoint_1", config, 2, {"AP": 0.5, "AP50": 0.6})
    write_checkpoint(folder / "checkpoint_2", config, 4, {"AP": 0.4, "AP50": 0.7})
    write_checkpoint(folder / "checkpoint_3", config, 5)
    write_checkpoint(folder / "checkpoint_4", config, 6)
    (folder / "checkpoint_4" / "about.json").write_text("")
    return Storage(StorageConfig(root=str(tmp_path / "root"))), folder, config_hash(config)


def names_in(state):
    return [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]


GONE = json.dumps(
    {
        "checkpoint_results": [{"checkpoint_dir_name": "checkpoint_0", "metrics": {}}],
        "checkpoint_report_indices": [0],
        "latest_checkpoint_result": {"checkpoint_dir_name": "checkpoint_0"},
        "current_report_index": 1,
    }
)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\0" * 99, GONE, None])
def test_a_damaged_list_is_rebuilt_from_what_is_whole(run, caplog, content):
    storage, folder, expected_hash = run
    if content is not None:
        (folder / SNAPSHOT_FILE).write_text(content)
    mend_snapshot(storage, folder)
    state = json.loads((folder / SNAPSHOT_FILE).read_text())
    assert names_in(state) == ["checkpoint_3", "checkpoint_2", "checkpoint_1"]  # the best AP last
    assert state["checkpoint_report_indices"] == [2, 1, 0]
    assert state["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoint_3"
    best = state["checkpoint_results"][-1]["metrics"]
    assert best == {"epoch": 1, "step": 2, "config_hash": expected_hash, "AP": 0.5, "AP50": 0.6,
                    "metrics": {"AP": 0.5, "AP50": 0.6}}  # fmt: skip
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
    caplog.clear()
    before = (folder / SNAPSHOT_FILE).stat().st_mtime_ns
    mend_snapshot(storage, folder)
    assert (folder / SNAPSHOT_FILE).stat().st_mtime_ns == before
    assert not caplog.records


def test_a_list_without_any_whole_checkpoint_is_named(run):
    storage, folder, _ = run
    for number in (1, 2, 3):
        shutil.rmtree(folder / f"checkpoint_{number}")
    mend_snapshot(storage, folder)  # a run that was killed during its first checkpoint begins anew
    assert not (folder / SNAPSHOT_FILE).exists()
    (folder / SNAPSHOT_FILE).write_text("")
    with pytest.raises(StorageError, match=rf"{SNAPSHOT_FILE}: damaged .* another run\.name"):
        mend_snapshot(storage, folder)


def test_a_damaged_list_in_a_bucket_is_rebuilt(run, s3, tmp_path):
    _, folder, _ = run
    (folder / SNAPSHOT_FILE).write_text("")
    root = f"s3://gfl/{tmp_path.name}"
    upload(folder, f"{root}/runs/x/ray")
    storage = Storage(StorageConfig(root=root, cache=str(tmp_path / "cache")))
    mend_snapshot(storage, storage.root / "runs" / "x" / "ray")
    assert list_objects(f"{root}/runs/x/ray/{SNAPSHOT_FILE}")[""][1] > 100
    mend_snapshot(storage, storage.root / "runs" / "y" / "ray")  # a run that has not begun
    assert not list_objects(f"{root}/runs/y")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_goes_on_from_a_list_that_was_rebuilt(trained, tiny_file, tmp_path):
    """The layout is that of this version of Ray: it reads our list as its own."""
    job, result, _ = trained
    shutil.copytree(Storage(job.storage).root / "runs" / "first", tmp_path / "runs" / "first")
    (tmp_path / "runs" / "first" / "run.json").unlink()
    (tmp_path / "runs" / "first" / "ray" / SNAPSHOT_FILE).write_text("")
    events = []
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    again = train.train(job, "first", resume=True, watch=events.append)
    assert all(event.repeated for event in events if isinstance(event, EpochEvaluated))
    assert again.metrics == result.metrics
