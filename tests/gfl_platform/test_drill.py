"""The drill: everything fails, and no digit changes. `make drill` shows its timeline."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import servers
import torch
from mlflow import MlflowClient

from gfl.checkpoint import load_checkpoint, read_about
from gfl_platform.mirror import Cache
from gfl_platform.s3 import list_objects, upload

STEPS_BETWEEN_CHECKPOINTS = 10
OUTAGE = 60.0
"""Seconds without the MLflow server."""
BUSY = 20.0
"""Seconds in which S3 answers 503."""


class Fit:
    """A driver that trains, in a process of its own."""

    def __init__(self, overrides, folder, name):
        self.words = [*overrides, f"run.name={name}"]
        self.folder, self.name, self.process = folder, name, None
        # Where the driver keeps what it knows of a run on S3.
        self._status = folder / "cache" / "roots" / "gfl" / "drill" / "runs" / name / "status.json"

    def start(self, *more):
        command = [sys.executable, "-m", "jobs.train", *self.words, *more]
        with (self.folder / f"{self.name}.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def status(self):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            return json.loads(self._status.read_text())
        return {}

    def wait_for(self, condition, seconds=120):
        """Return what the status says once `condition` holds of it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition(found := self.status()):
                return found
            assert self.process.poll() is None, self.log()
            time.sleep(0.1)
        raise AssertionError(f"{self.status()}\n{self.log()}")

    def steps_again(self):
        """Wait until training has gone on by a report; return the seconds and the step."""
        started, since = time.monotonic(), self.status()["time"]
        found = self.wait_for(lambda s: s.get("state") == "training" and s["time"] > since)
        return time.monotonic() - started, found["step"]

    def finish(self):
        assert self.process.wait(600) == 0, self.log()

    def log(self):
        return (self.folder / f"{self.name}.log").read_text()[-3000:]


def workers_of(cluster_processes):
    """Return pid and raylet's pid of the training processes below these."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent in cluster_processes:
                    found.append((int(folder.name), parent))
    return sorted(found)


@pytest.fixture
def cluster(s3, monkeypatch):
    """A head without CPUs and three nodes of one."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # A dead node is noticed within seconds; by default it takes half a minute.
    system = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000,
              "health_check_failure_threshold": 3}  # fmt: skip
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": system})
    for _ in range(3):
        made.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


@pytest.fixture
def mlflow_server(tmp_path, postgres, s3):
    server = servers.MLflow(tmp_path, store=postgres, artifacts="s3://gfl/mlflow")
    server.start()
    yield server
    server.stop()


def raylets(cluster):
    return {
        node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.cluster
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
        str(tiny_file), *data, "data.repeat=10", "schedule.epochs=4", "cluster.workers=2",
        "cluster.max_failures=5", "storage.root=s3://gfl/drill", f"storage.cache={tmp_path}/cache",
        f"storage.checkpoint_steps={STEPS_BETWEEN_CHECKPOINTS}", "storage.keep_checkpoints=9",
        f"tracking.uri={mlflow_server.uri}", "tracking.unreachable=spool",
        "tracking.every_steps=5",
    ]  # fmt: skip
    began = time.monotonic()

    def tell(what):
        with capsys.disabled():
            sys.stdout.write(f"{time.monotonic() - began:6.1f} s  {what}\n")
            sys.stdout.flush()

    tell("the undisturbed run starts")
    calm = Fit(overrides, tmp_path, "calm")
    calm.start()
    calm.finish()

    tell("the disturbed run starts")
    fit = Fit(overrides, tmp_path, "disturbed")
    fit.start()
    fit.wait_for(lambda s: s.get("step", 0) > STEPS_BETWEEN_CHECKPOINTS)
    mlflow_server.stop()
    dead_since = time.monotonic()
    tell("the MLflow server is killed")

    before = fit.status()["step"]
    os.kill(workers_of(raylets(cluster))[0][0], signal.SIGKILL)
    tell(f"a worker is killed after step {before}")
    seconds, step = fit.steps_again()
    tell(f"step {step}, {seconds:.1f} s later")
    assert seconds < 20
    assert step > before - STEPS_BETWEEN_CHECKPOINTS - 5

    pid, raylet = workers_of(raylets(cluster))[0]
    os.kill(raylet, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it dies with its node
    tell("a node is killed")
    seconds, step = fit.steps_again()
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
    fit.finish()
    tell("the resumed run is done")

    cache = Cache(tmp_path / "verdict", 10**9)
    last = {}
    for name in ("calm", "disturbed"):
        where = f"s3://gfl/drill/runs/{name}/ray"
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
    for metric in ("loss", "loss_dfl", "AP"):
        one, other = (
            [(m.step, m.value) for m in client.get_metric_history(runs[n].info.run_id, metric)]
            for n in ("calm", "disturbed")
        )
        assert sorted(one) == sorted(other), metric
        assert len({step for step, _ in other}) == len(other)
    assert runs["disturbed"].info.status == "FINISHED"
    tell("one MLflow run, every step in it once, with the same losses")
