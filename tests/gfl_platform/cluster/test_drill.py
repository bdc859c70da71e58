"""The drill: everything fails, and no digit changes. `make drill` shows its timeline.

It trains with three workers, because the sum over two does not depend on its order.
"""

import contextlib
import os
import signal
import sys
import time

import pytest
import torch
from mlflow import MlflowClient

from gfl.checkpoint.files import read_about
from gfl.checkpoint.snapshot import load_checkpoint
from gfl_platform.storage.cache import Cache
from gfl_platform.storage.s3 import list_objects, upload
from tests.support import drivers, servers
from tests.support.drivers import training_processes
from tests.support.tracking import history

STEPS_BETWEEN_CHECKPOINTS, STEPS_BETWEEN_REPORTS = 10, 1
CHECKPOINT = "checkpoint_seconds"
"""In a run's status once a checkpoint is stored."""
OUTAGE = 60.0
"""Seconds without the MLflow server."""
RESTART = float(os.environ.get("GFL_DRILL_RESTART", "20"))
"""Seconds from a worker's death to the next steps, at most."""
BUSY = 20.0
"""Seconds in which S3 answers 503."""


@pytest.fixture
def cluster(s3, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    with drivers.cluster_of(4) as made:  # one node is killed
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        yield made


@pytest.fixture
def mlflow_server(tmp_path, postgres, s3):
    server = servers.MLflow(tmp_path, store=postgres, artifacts="s3://gfl/mlflow")
    server.start()
    yield server
    server.stop()


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_all_that_can_fail_fails_and_no_digit_changes(
    cluster, mlflow_server, s3, tiny_file, shapes_folder, tmp_path, capsys
):
    upload(shapes_folder, "s3://gfl/drill-data")
    data = [
        f"data.{part}={{images: s3://gfl/drill-data/{part}/images, "
        f"annotations: s3://gfl/drill-data/{part}/annotations.json}}"
        for part in ("train", "val")
    ]
    overrides = [
        str(tiny_file), *data, "data.batch=6", "data.repeat=10", "schedule.epochs=2",
        "cluster={workers: 3, max_failures: 5}", "storage.root=s3://gfl/drill",
        f"storage.cache={tmp_path}/cache",
        "storage.keep_checkpoints=9", f"tracking.uri={mlflow_server.uri}",
        "tracking.unreachable=spool", f"tracking.every_steps={STEPS_BETWEEN_REPORTS}",
    ]  # fmt: skip
    began = time.monotonic()

    def driver(name, *more):
        # Where a driver keeps what it knows of a run on S3.
        status = tmp_path / "cache" / "roots" / "gfl" / "drill" / "runs" / name / "status.json"
        return drivers.Driver([*overrides, *more], name, tmp_path, status)

    def tell(what):
        with capsys.disabled():
            sys.stdout.write(f"{time.monotonic() - began:6.1f} s  {what}\n")
            sys.stdout.flush()

    tell("the undisturbed run starts")
    calm = driver("calm")
    calm.start()
    assert calm.process.wait(600) == 0, calm.log()

    tell("the disturbed run starts")
    fit = driver("disturbed", f"storage.checkpoint_steps={STEPS_BETWEEN_CHECKPOINTS}")
    fit.start()
    fit.wait_for(lambda s: s.get("step", 0) > 0)
    mlflow_server.stop()
    dead_since = time.monotonic()
    tell("the MLflow server is killed")

    fit.wait_for(lambda s: s.get("step", 0) > STEPS_BETWEEN_CHECKPOINTS and CHECKPOINT in s)
    time.sleep(1)  # for Ray to note it
    before = fit.status()["step"]
    os.kill(training_processes(cluster)[0][0], signal.SIGKILL)
    tell(f"a worker is killed after step {before}")
    seconds, step = fit.steps_again(restarted=True)
    tell(f"step {step}, {seconds:.1f} s later")
    assert seconds < RESTART
    assert step > STEPS_BETWEEN_CHECKPOINTS
    assert step > before - STEPS_BETWEEN_CHECKPOINTS - 5  # made while the next was on its way

    pid, node = training_processes(cluster)[0]
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it dies with its node
    tell("a node is killed")
    seconds, step = fit.steps_again(restarted=True)
    tell(f"step {step}, {seconds:.1f} s later")

    s3.busy(True)
    tell("S3 answers 503")
    time.sleep(BUSY)
    s3.busy(False)
    seconds, step = fit.steps_again()
    tell(f"S3 is back; step {step}, {seconds:.1f} s later")

    time.sleep(max(0.0, dead_since + OUTAGE - time.monotonic()))
    mlflow_server.start()
    tell("the MLflow server is back")
    fit.steps_again()
    fit.process.kill()
    fit.process.wait()
    tell(f"the driver is killed after step {fit.status()['step']}")
    fit.start("--resume")
    assert fit.process.wait(600) == 0, fit.log()
    tell("the resumed run is done")

    cache = Cache(tmp_path / "verdict", 10**10)
    last = {}
    # The driver that continued the run took its lease over: a folder of its own.
    for name, ray_folder in (("calm", "ray"), ("disturbed", "ray-2")):
        where = f"s3://gfl/drill/runs/{name}/{ray_folder}"
        folders = {key.split("/")[0] for key in list_objects(where) if "checkpoint" in key}
        copies = [cache.local(f"{where}/{f}") for f in folders if f.startswith("checkpoint_2")]
        last[name] = max(copies, key=lambda folder: read_about(folder).step)
    weights, others = (load_checkpoint(last[name])[0].state_dict() for name in last)
    assert read_about(last["calm"]).metrics == read_about(last["disturbed"]).metrics
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key
    tell("the final weights are the same bit for bit, and so is the AP")

    client = MlflowClient(mlflow_server.uri, mlflow_server.uri)
    experiment = client.get_experiment_by_name("gfl").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert sorted(runs) == ["calm", "disturbed"]
    assert len(client.search_runs([experiment])) == 2
    for metric in ("loss", "qfl", "giou", "dfl", "AP"):
        one, other = (
            [(m.step, m.value) for m in history(client, runs[n].info.run_id, metric)]
            for n in ("calm", "disturbed")
        )
        assert sorted(one) == sorted(other), metric
        assert len({step for step, _ in other}) == len(other)
    assert runs["disturbed"].info.status == "FINISHED"
    tell("one MLflow run, every step in it once, with the same losses")
