"""What a driver notes of a run, and who holds it."""

from dataclasses import replace

import pytest

from gfl_platform.cluster.events import (
    CheckpointStored,
    EpochEvaluated,
    StepsDone,
    WorkerFailed,
)
from gfl_platform.storage.files import StorageError, held, read_json
from gfl_platform.tracking.status import STATUS_FILE, StatusFile, read_status

STEPS = StepsDone(
    step=10, total_steps=40, epoch=0.5, seconds_left=120.0,
    metrics={
        "images_per_second": 31.5, "loss": 1.0, "data_wait_share": 0.256,
        "step_ms_p50": 251.0, "step_ms_p90": 300.0, "step_ms_p99": 402.0,
        "worker0.data_wait_share": 0.02, "worker0.memory_gib": 0.8,
        "worker1.data_wait_share": 0.5, "worker1.memory_gib": 2, "worker1.gpu": 0.9,
        "worker1.gpu_memory_gib": 41.2,
    },
)  # fmt: skip
STORED = CheckpointStored(10, {"checkpoint_seconds": 2.34})
LOST = WorkerFailed(1, "killed", final=False)


def test_a_run_says_where_it_stands(tmp_path):
    assert read_status(tmp_path)["state"] == "not started"
    with StatusFile(tmp_path, workers=2, nodes=3) as status:
        status.handle(EpochEvaluated(5, 1, {"AP": 0.5}))
        status.handle(EpochEvaluated(10, 2, {"AP": 0.4}))
        status._written = 0.0
        status.handle(STEPS)
        rows = read_status(tmp_path)
        assert rows["state"] == "training"
        assert rows["epoch"] == "0.50 (step 10 of 40)"
        assert rows["left"].startswith("2 min")
        assert rows["AP"] == "0.4000, best 0.5000"
        assert rows["workers"] == "2 (nodes of the cluster: 3)"
        assert rows["a step"].startswith("251 ms; one in ten 300 ms or more")
        assert rows["waits for images"] == "26% of the time"
        assert rows["worker 0"] == "waits for images 2% of the time, 0.8 GiB"
        assert rows["worker 1"] == (
            "waits for images 50% of the time, 2.0 GiB, GPU busy 90%, 41.2 GiB on the GPU"
        )
        status.handle(STORED)
        rows = read_status(tmp_path)
        assert rows["checkpoint"].startswith("written in 2.3 s")
        status.handle(LOST)
        assert status.outages == {"restarts": 1, "lost_minutes": 0}
        assert "restarting after worker 1: killed" in read_status(tmp_path)["state"]
    rows = read_status(tmp_path)
    assert rows["state"] == "finished"
    assert rows["restarts"].startswith("1, ")


def test_a_run_that_goes_on_counts_its_restarts(tmp_path):
    with pytest.raises(KeyboardInterrupt), StatusFile(tmp_path, 1, 1):
        raise KeyboardInterrupt
    assert read_status(tmp_path)["state"] == "stopped"
    with StatusFile(tmp_path, 1, 1) as status:
        status.handle(STEPS)
    facts = read_json(tmp_path / STATUS_FILE)
    assert facts["restarts"] == 1
    assert facts["lost_seconds"] > 0


def test_a_failure_that_ends_the_job_is_no_restart(tmp_path):
    with StatusFile(tmp_path, 1, 1) as status:
        status.handle(STEPS)
        status.handle(replace(LOST, final=True))
        assert status.outages["restarts"] == 0


def test_reports_that_are_repeated_are_no_steps(tmp_path):
    with StatusFile(tmp_path, 1, 1) as status:
        status.handle(LOST)
        status.handle(replace(STEPS, repeated=True))
        assert read_status(tmp_path)["state"].startswith("restarting")
        assert status._lost_at is not None
        status._written = 0.0
        status.handle(STEPS)
        assert status._lost_at is None
        assert read_status(tmp_path)["state"] == "training"


def test_a_silent_driver_is_asked_for(tmp_path, monkeypatch):
    status = StatusFile(tmp_path, 1, 1)
    status.handle(STEPS)
    late = read_json(tmp_path / STATUS_FILE)["time"] + 700
    monkeypatch.setattr("gfl_platform.tracking.status.time.time", lambda: late)
    assert "no word for 12 min" in read_status(tmp_path)["state"]


def test_two_jobs_cannot_train_one_run(tmp_path):
    with held(tmp_path):  # noqa: SIM117
        with pytest.raises(StorageError, match=r"is used by process \d+ on"), held(tmp_path):
            pass
    with held(tmp_path):
        pass
