"""An evaluation without a cluster."""

import ray
import torch

import gfl
from gfl.checkpoint.files import About
from gfl.checkpoint.snapshot import take_snapshot
from gfl.config.loader import derive
from gfl_platform.cluster.events import ItemsDone
from gfl_platform.config import JobConfig
from gfl_platform.evaluation.evaluate import evaluate_checkpoint


def test_an_evaluation_needs_no_cluster(tiny, tmp_path):
    job = derive(JobConfig, tiny, ["cluster.workers=0", f"storage.root={tmp_path}"])
    torch.manual_seed(0)
    about = About(["rectangle", "ellipse", "triangle"], [1, 2, 3], 1, 1, {})
    (folder := tmp_path / "checkpoint").mkdir()
    take_snapshot(gfl.Detector(tiny), tiny, about, {}).write(folder)
    was_connected, events = ray.is_initialized(), []
    figures = evaluate_checkpoint(folder, job, events.append, results=tmp_path / "r.json")
    assert ray.is_initialized() == was_connected
    assert (figures["images"], events[-1]) == (11, ItemsDone("images evaluated", 11, 11))
    assert 0 <= figures["metrics"]["AP"] <= 1
    assert figures["fps"] > 0
    assert (tmp_path / "r.json").exists()
