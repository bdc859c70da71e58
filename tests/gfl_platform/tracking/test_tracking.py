"""A real MLflow server that dies and comes back: nothing is lost, nothing is logged twice."""

import shutil
import signal
import socket
import threading
import time

import boto3
import pytest

from gfl_platform.cluster.events import (
    EpochEvaluated,
    FolderWritten,
    StepsDone,
    TagsSet,
    WorkerFailed,
)
from gfl_platform.config import load_job
from gfl_platform.registry import models
from gfl_platform.tracking.client import TrackingError
from gfl_platform.tracking.delivery import BATCH
from gfl_platform.tracking.metadata import RUN_FILE, describe
from gfl_platform.tracking.run import RunTracker, settle
from gfl_platform.tracking.spool import backlog, refusals
from gfl_platform.tracking.status import StatusFile, read_status
from gfl_platform.training import train
from tests.support import servers
from tests.support.tracking import history, store_of


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = servers.MLflow(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


def job_for(server, tmp_path, *more):
    overrides = [f"tracking.uri={server.uri}", f"storage.root={tmp_path}", *more]
    return load_job("configs/demo.yaml", overrides)


def steps(number):
    return StepsDone(number, 999, number / 10, 0.0, {"loss": 1 / number})


@pytest.fixture(autouse=True)
def few_attempts(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def test_the_password_of_a_store_that_does_not_answer_is_told_to_nobody(tmp_path, caplog):
    uri = "tracking.uri=http://u:secret@127.0.0.1:9"
    job = load_job("configs/demo.yaml", [uri, f"storage.root={tmp_path}"])
    with pytest.raises(TrackingError, match=r"u:\*\*\*@127\.0\.0\.1:9") as error:
        store_of(job).require_answer()
    tracker = RunTracker(store_of(job), tmp_path, describe(job, "dead"), may_be_away=True)
    assert "u:***@127.0.0.1:9" in caplog.text
    with pytest.raises(TrackingError) as unregistered:
        train._register(store_of(job), "m", tmp_path, tracker, {})
    tracker.close("FAILED")
    assert "secret" not in f"{error.value} {unregistered.value} {caplog.text}"


def test_a_report_that_was_not_noted_counts_as_new(tiny_file, tmp_path, monkeypatch):
    """What ended the driver between number and event must leave neither."""
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    tracker = RunTracker(store_of(job), tmp_path, describe(job, "cut"))

    def die(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(tracker._spool, "add", die)
        with pytest.raises(SystemExit):
            tracker.handle(steps(1))
        with pytest.raises(SystemExit):
            tracker.handle(WorkerFailed(0, "killed", final=False))
    tracker.handle(steps(1))
    tracker.handle(WorkerFailed(0, "killed", final=False))
    tracker.close("FINISHED")
    points = history(store_of(job).client, tracker.run_id, "loss")
    assert [metric.step for metric in points] == [1]
    assert store_of(job).client.get_run(tracker.run_id).data.tags["restarts"] == "1"


def test_a_backlog_is_delivered_at_the_end(tiny_file, tmp_path):
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    tracker = RunTracker(store_of(job), tmp_path, describe(job, "behind"))
    for number in range(1, 3 * BATCH):
        tracker._spool.add(steps(number))
    tracker.close("FINISHED")
    assert backlog(tmp_path) == 0
    points = history(store_of(job).client, tracker.run_id, "loss")
    assert len(points) == 3 * BATCH - 1


def test_a_history_that_nobody_logged_is_not_taken_for_one(tiny_file, tmp_path):
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    with RunTracker(store_of(job), tmp_path, describe(job, "one")) as tracker:
        tracker.handle(steps(1))
    with pytest.raises(AssertionError, match=r"no metric 'loss_dfl'; logged: epoch, loss"):
        history(store_of(job).client, tracker.run_id, "loss_dfl")


def test_a_run_that_goes_on_elsewhere_is_logged_once(tiny_file, tmp_path):
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    folders = [tmp_path / name for name in ("here", "elsewhere")]
    for folder, numbers in zip(folders, ((1, 2, 3), (2, 3, 4)), strict=True):
        folder.mkdir()
        if folder is folders[1]:
            shutil.copy(folders[0] / RUN_FILE, folder)
        with RunTracker(store_of(job), folder, describe(job, "moving")) as tracker:
            for number in numbers:
                tracker.handle(steps(number))
            run_id = tracker.require_run()
    points = history(store_of(job).client, run_id, "loss")
    assert sorted(each.step for each in points) == [1, 2, 3, 4]


def test_a_run_stays_in_the_store_that_was_chosen_for_it(tiny_file, tmp_path, caplog):
    def job_in(*store):
        return load_job(tiny_file, [f"storage.root={tmp_path}", *store])

    folder = tmp_path / "runs" / "chosen"
    folder.mkdir(parents=True)
    chosen = job_in(f"tracking.uri=sqlite:///{tmp_path}/chosen.db")
    with RunTracker(store_of(chosen), folder, describe(chosen, "chosen")) as tracker:
        tracker.handle(steps(1))
        run_id = tracker.require_run()
    with pytest.raises(TrackingError, match=r"'chosen' is kept in sqlite:.*set tracking\.uri"):
        settle(store_of(job_in()), folder)
    with pytest.raises(TrackingError, match="'chosen' is kept in"):
        RunTracker(store_of(job_in()), folder, describe(job_in(), "chosen"), may_be_away=True)
    assert not (tmp_path / "mlflow.db").exists()
    other = job_in(f"tracking.uri=sqlite:///{tmp_path}/other.db")
    with RunTracker(store_of(other), folder, describe(other, "chosen")) as lost:
        lost.handle(steps(2))
    assert "tracking.uri=sqlite" in caplog.text
    assert backlog(folder) == 3  # that it goes on, a report, its end
    settle(store_of(chosen), folder)
    assert backlog(folder) == 0
    points = history(store_of(chosen).client, run_id, "loss")
    assert [each.step for each in points] == [1, 2]


def test_a_checkpoint_of_an_epoch_trained_again_takes_the_place_of_the_first(tiny_file, tmp_path):
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    with RunTracker(store_of(job), tmp_path, describe(job, "again")) as tracker:
        for uri in ("damaged", "whole"):
            tracker.handle(EpochEvaluated(4, 1, {"AP": 0.1}, str(tmp_path / uri)))
    client = store_of(job).client
    experiment = client.get_run(tracker.run_id).info.experiment_id
    (model,) = client.search_logged_models([experiment])
    assert model.tags["uri"] == str(tmp_path / "whole")


def test_an_epoch_that_a_worker_repeats_is_noted_once(tiny_file, tmp_path):
    job = load_job(tiny_file, [f"storage.root={tmp_path}"])
    tracker = RunTracker(store_of(job), tmp_path, describe(job, "repeated"))
    for step, epoch, repeated in ((4, 1, False), (4, 1, True), (8, 2, True)):
        metrics = {"AP": 0.1 * epoch}
        tracker.handle(EpochEvaluated(step, epoch, metrics, str(tmp_path), repeated))
    tracker.close("FINISHED")
    points = history(store_of(job).client, tracker.run_id, "AP")
    assert [metric.value for metric in points] == [0.1, 0.2]


def test_a_store_that_hangs_holds_up_nobody_and_loses_nothing(tmp_path, monkeypatch):
    """Neither does who is killed meanwhile, nor a second Ctrl-C."""
    again = (threading.main_thread().ident, signal.SIGINT)
    # A shell's background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}"
        job = load_job("configs/demo.yaml", [uri, f"storage.root={tmp_path}"])
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        tracker = RunTracker(store_of(job), tmp_path, describe(job, "hanging"), may_be_away=True)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        started = time.monotonic()
        time.sleep(1)  # after a failure
        for number in range(1, 4):
            tracker.handle(steps(number))
        assert backlog(tmp_path) == 4  # and the opening
        timer = threading.Timer(1, signal.pthread_kill, again)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                tracker.close("KILLED")
        finally:
            timer.cancel()
            signal.signal(signal.SIGINT, before)
        assert time.monotonic() - started < 30
    assert backlog(tmp_path) == 5


@pytest.mark.chaos
def test_a_server_that_dies_loses_nothing_and_doubles_nothing(server, tmp_path):
    server.stop()  # Another test may have left it running.
    server.start()
    job = job_for(server, tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = RunTracker(store_of(job), folder, describe(job, "lasting"))
    tracker.handle(steps(1))
    server.stop()
    started = time.monotonic()
    for number in range(2, 400):
        tracker.handle(steps(number))
    assert time.monotonic() - started < 5  # the driver does not wait for a dead server, either
    tracker.close("KILLED")
    assert backlog(folder) >= 399
    with pytest.raises(TrackingError):
        RunTracker(store_of(job), folder, describe(job, "lasting"))
    server.start()
    again = RunTracker(store_of(job), folder, describe(job, "lasting"))
    for number in range(350, 450):  # steps since the checkpoint are trained again
        again.handle(steps(number))
    again.close("FINISHED")
    assert backlog(folder) == 0
    (run,) = store_of(job).client.search_runs([experiment_of(job)])
    points = history(store_of(job).client, run.info.run_id, "loss")
    assert sorted(metric.step for metric in points) == list(range(1, 450))
    assert all(metric.value == 1 / metric.step for metric in points)
    assert run.info.status == "FINISHED"
    assert run.data.tags["restarts"] == "1"
    assert run.data.params["optim.lr"] == str(job.optim.lr)


@pytest.mark.chaos
def test_a_run_may_begin_without_a_server(server, tmp_path):
    server.stop()
    job = job_for(server, tmp_path, "tracking.unreachable=spool", "tracking.experiment=spooled")
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = RunTracker(store_of(job), folder, describe(job, "early"))
    tracker.handle(steps(1))
    assert tracker.run_id is None
    tracker.close("FAILED")
    again = RunTracker(store_of(job), folder, describe(job, "early"))
    again.handle(steps(1))
    again.handle(steps(2))
    again.close("FINISHED")
    server.start()
    for _ in range(2):  # once more changes nothing
        settle(store_of(job), folder)
    (run,) = store_of(job).client.search_runs([experiment_of(job)])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "early")
    assert run.data.tags["restarts"] == "1"
    points = history(store_of(job).client, run.info.run_id, "loss")
    assert [metric.step for metric in points] == [1, 2]


def test_a_run_whose_driver_was_killed_is_closed_later(tmp_path):
    job = load_job("configs/demo.yaml", [f"storage.root={tmp_path}"])
    tracker = RunTracker(store_of(job), tmp_path, describe(job, "killed"))
    status = StatusFile(tmp_path, workers=1, nodes=1)
    tracker.handle(steps(1))
    tracker.flush()  # and here it is killed
    for _ in range(2):
        settle(store_of(job), tmp_path)
        assert store_of(job).client.get_run(tracker.run_id).info.status == "KILLED"
        assert read_status(tmp_path)["state"] == "stopped"
    with status:  # as with --resume
        again = RunTracker(store_of(job), tmp_path, describe(job, "killed"))
        assert store_of(job).client.get_run(tracker.run_id).info.status == "RUNNING"
        again.close("FINISHED")
    settle(store_of(job), tmp_path)
    run = store_of(job).client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["restarts"] == "1"


@pytest.mark.chaos
def test_what_a_store_will_never_take_holds_up_nothing(server, tmp_path, caplog):
    server.stop()
    server.start()
    job = job_for(server, tmp_path, "tracking.experiment=refused")
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = RunTracker(store_of(job), folder, describe(job, "refused"))
    tracker.handle(TagsSet({"a\tb": "no name of a tag"}))
    tracker.handle(steps(1))
    tracker.flush()
    assert "not logged: tags" in caplog.text
    assert backlog(folder) == 0
    tracker.close("FINISHED")


@pytest.mark.chaos
def test_a_database_that_dies_loses_nothing_and_stops_nothing(tmp_path, caplog):
    """MLflow without a server; alone, it would try for two minutes to connect."""
    database = servers.PostgreSQL()
    database.start()
    secret = database.uri.replace("postgres@", "postgres:secret@")
    job = load_job("configs/demo.yaml", [f"tracking.uri={secret}", f"storage.root={tmp_path}"])
    spooling = job.model_copy(
        update={"tracking": job.tracking.model_copy(update={"unreachable": "spool"})}
    )
    database.stop()
    started = time.monotonic()
    with pytest.raises(TrackingError, match=r"postgres:\*\*\*@.* refused") as error:
        RunTracker(store_of(job), tmp_path, describe(job, "database"))
    assert "tracking.unreachable=spool" in str(error.value)
    tracker = RunTracker(store_of(spooling), tmp_path, describe(spooling, "database"))
    for number in range(1, 100):
        tracker.handle(steps(number))
    assert time.monotonic() - started < 15
    database.start()
    deadline = time.monotonic() + 30
    while backlog(tmp_path) and time.monotonic() < deadline:
        tracker.handle(TagsSet({"a": "b"}))  # it waits a little after a failure
        time.sleep(0.2)
    assert backlog(tmp_path) == 0
    database.stop()
    for number in range(100, 200):
        tracker.handle(steps(number))
    assert backlog(tmp_path) > 0
    database.start()
    tracker.close("FINISHED")
    try:
        assert backlog(tmp_path) == 0
        assert "not logged" not in caplog.text
        (run,) = store_of(job).client.search_runs([experiment_of(job)])
        points = history(store_of(job).client, run.info.run_id, "loss")
        assert sorted(metric.step for metric in points) == list(range(1, 200))
        assert "secret" not in str(run.data.params)
    finally:
        database.remove()


@pytest.mark.chaos
def test_artifacts_wait_for_their_storage(s3, server, tmp_path, tmp_path_factory, caplog):
    """The server answers, but where its artifacts lie does not: texts and folders come later."""
    server.stop()
    boto3.client("s3").create_bucket(Bucket="artifacts")
    storing = servers.MLflow(tmp_path_factory.mktemp("storing"), artifacts="s3://artifacts")
    storing.start()
    job = job_for(storing, tmp_path)
    folder, report = tmp_path / "run", tmp_path / "report"
    for output in (folder, report):
        output.mkdir()
    (report / "index.html").write_text("figures")
    s3.busy(True)
    tracker = RunTracker(store_of(job), folder, describe(job, "artifacts"))
    tracker.handle(FolderWritten(str(report)))
    tracker.handle(FolderWritten(f"{tmp_path}/gone"))
    assert backlog(folder) == 3
    s3.busy(False)
    tracker.close("FINISHED")
    settle(store_of(job), folder)  # the server may have cut the connection
    try:
        assert backlog(folder) == 0
        (run,) = store_of(job).client.search_runs([experiment_of(job)])
        client = store_of(job).client
        listed = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "packages.txt", "report"} <= listed
        (figures,) = client.list_artifacts(run.info.run_id, "report")
        assert figures.path == "report/index.html"
        assert "gone is gone; it is kept" in caplog.text
        assert len(refusals(folder)) == 1
    finally:
        storing.stop()


@pytest.mark.chaos
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_that_could_not_be_registered_is_by_resuming(server, tiny_file, tmp_path):
    server.stop()
    words = [
        "schedule.epochs=1",
        "cluster.workers=1",
        "registry.name=late",
        "tracking.experiment=late",
    ]
    spooling = ["tracking.unreachable=spool", f"storage.root={tmp_path}"]
    job = load_job(tiny_file, [f"tracking.uri={server.uri}", *spooling, *words])
    with pytest.raises(TrackingError, match=r"late: not registered .* --resume registers it"):
        train.train(job, "late", resume=False, watch=print)
    server.start()
    result = train.train(job, "late", resume=True, watch=print)
    assert result.version == 1
    again = models.register_once(store_of(job), "late", result.checkpoint, result.run_id, {})
    assert again == 1  # and nothing more
    (run,) = store_of(job).client.search_runs([experiment_of(job)])
    assert run.info.status == "FINISHED"
    points = history(store_of(job).client, run.info.run_id, "AP")
    assert len(points) == 1


def experiment_of(job):
    return store_of(job).client.get_experiment_by_name(job.tracking.experiment).experiment_id
