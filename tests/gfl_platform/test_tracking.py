"""A real MLflow server that dies and comes back: nothing is lost, nothing is logged twice."""

import time

import pytest
import servers

from gfl_platform.config import load_job
from gfl_platform.delivery import Delivery
from gfl_platform.spool import backlog
from gfl_platform.store import TrackingError, client_of
from gfl_platform.tracking import RunTracker


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = servers.MLflow(tmp_path_factory.mktemp("server"))
    yield made
    made.stop()


def job_for(server, tmp_path, *more):
    overrides = [f"tracking.uri={server.uri}", f"storage.root={tmp_path}", *more]
    return load_job("configs/demo.yaml", overrides)


def steps(number):
    return {"kind": "steps", "step": number, "epoch": number / 10, "metrics": {"loss": 1 / number}}


@pytest.fixture(autouse=True)
def few_attempts(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.cluster
def test_a_server_that_dies_loses_nothing_and_doubles_nothing(server, tmp_path):
    server.start()
    job = job_for(server, tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = RunTracker(job, "lasting", folder)
    tracker.handle(steps(1))
    server.stop()
    started = time.monotonic()
    for number in range(2, 400):
        tracker.handle(steps(number))
    assert time.monotonic() - started < 5  # the driver does not wait for a dead server, either
    tracker.close("KILLED")
    assert backlog(folder) >= 399
    with pytest.raises(TrackingError):
        RunTracker(job, "lasting", folder)
    server.start()
    again = RunTracker(job, "lasting", folder)
    for number in range(350, 450):  # steps since the checkpoint are trained again
        again.handle(steps(number))
    again.close("FINISHED")
    assert backlog(folder) == 0
    (run,) = client_of(job).search_runs([experiment_of(job)])
    history = client_of(job).get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 450))
    assert all(metric.value == 1 / metric.step for metric in history)
    assert run.info.status == "FINISHED"
    assert run.data.tags["restarts"] == "1"
    assert run.data.params["optim.lr"] == str(job.optim.lr)


@pytest.mark.cluster
def test_a_run_may_begin_without_a_server(server, tmp_path):
    server.stop()
    job = job_for(server, tmp_path, "tracking.unreachable=spool", "tracking.experiment=spooled")
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = RunTracker(job, "early", folder)
    tracker.handle(steps(1))
    assert tracker.run_id is None
    tracker.close("FAILED")
    again = RunTracker(job, "early", folder)
    again.handle(steps(1))
    again.handle(steps(2))
    again.close("FINISHED")
    server.start()
    for _ in range(2):  # once more changes nothing
        Delivery(job, folder).deliver()
    (run,) = client_of(job).search_runs([experiment_of(job)])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "early")
    assert run.data.tags["restarts"] == "1"
    history = client_of(job).get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2]


@pytest.mark.cluster
def test_what_a_store_will_never_take_holds_up_nothing(server, tmp_path, caplog):
    server.stop()
    server.start()
    job = job_for(server, tmp_path, "tracking.experiment=refused")
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = RunTracker(job, "refused", folder)
    tracker.handle({"kind": "tags", "tags": {"a\tb": "no name of a tag"}})
    tracker.handle(steps(1))
    assert "not logged: tags" in caplog.text
    assert backlog(folder) == 0
    tracker.close("FINISHED")


def experiment_of(job):
    return client_of(job).get_experiment_by_name(job.tracking.experiment).experiment_id
