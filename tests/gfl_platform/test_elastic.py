"""Workers that come and go, by death and by notice: the losses stay those of a fixed number."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
from tests_support import run_workers

from gfl.checkpoint import read_about
from gfl.data import load_splits
from gfl.engine import fit
from gfl_platform.config import load_job

REPORT_STEPS = 5
CHECKPOINT_STEPS = 12
LOSSES = ("loss", "loss_qfl", "loss_giou", "loss_dfl")


@pytest.fixture
def nodes(monkeypatch):
    """A cluster whose head has no CPU, and two nodes of one."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "6")
    system = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000,
              "health_check_failure_threshold": 3}  # fmt: skip
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": system})
    for _ in range(2):
        made.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


class Training:
    """A driver that trains, in a process of its own."""

    def __init__(self, words, folder):
        self._folder = folder
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-m", "jobs.train", *words, "run.name=elastic"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait_for(self, condition, seconds=90):
        """Return the status once `condition` holds of it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, json.JSONDecodeError):
                status = json.loads((self._folder / "runs/elastic/status.json").read_text())
                if condition(status):
                    return status
            assert self.process.poll() is None, self.log()
            time.sleep(0.1)
        raise AssertionError(f"{status}\n{self.log()}")

    def steps_on(self, workers):
        """Wait until `workers` train; return the first step that they reported."""
        since = time.time()
        self.wait_for(lambda s: s["workers"] == workers and s["time"] > since)
        known = self.wait_for(lambda s: s["state"] == "training" and s["workers"] == workers)
        return self.wait_for(lambda s: s["step"] != known["step"])["step"]

    def log(self):
        return (self._folder / "log").read_text()[-3000:]


def node_of_a_worker(cluster):
    """Return a node on which a training process runs."""
    raylets = {n.all_processes["raylet"][0].process.pid: n for n in cluster.worker_nodes}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent in raylets:
                    return raylets[parent]
    raise AssertionError("no training process")


def drain(cluster, node):
    """Give notice, as `spot.py` does."""
    subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
            *("--address", cluster.address, "--node-id", node.node_id),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"),
            *("--deadline-remaining-seconds", "60"),
        ],
        check=True,
        capture_output=True,
    )


class Enough(Exception):  # noqa: N818
    """The step up to which losses are compared has been trained."""


class Curve:
    """Keeps the reports of steps."""

    def __init__(self, last):
        self.last, self.rows = last, {}

    def on_steps(self, report):
        self.rows[report.step] = report.metrics
        if report.step >= self.last:
            raise Enough

    def on_checkpoint(self, report):
        pass  # but reports end there, too

    on_epoch = on_checkpoint


def train_on_a_fixed_number(_rank, job, last, folder):
    torch.set_num_threads(1)
    curve = Curve(last)
    with contextlib.suppress(Enough):
        fit(job, load_splits(job), curve, device=torch.device("cpu"), failure_folder=folder,
            report_every=REPORT_STEPS, checkpoint_every=CHECKPOINT_STEPS)  # fmt: skip
    return curve.rows


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_workers_that_come_and_go_change_no_loss(nodes, tiny_file, tmp_path, capsys):
    words = [
        str(tiny_file), "data.repeat=20", "schedule.epochs=20", f"storage.root={tmp_path}",
        f"storage.checkpoint_steps={CHECKPOINT_STEPS}", f"tracking.every_steps={REPORT_STEPS}",
        "cluster={workers: [1, 2], resize_seconds: 2, max_failures: 1}",
    ]  # fmt: skip
    began, seen = time.monotonic(), []

    def tell(what):
        seen.append(f"{time.monotonic() - began:6.1f} s  {what}")

    training = Training(words, tmp_path)
    before = training.wait_for(lambda s: s.get("step", 0) > CHECKPOINT_STEPS + REPORT_STEPS)
    assert before["workers"] == 2
    tell(f"step {before['step']} on 2 workers")

    lost = node_of_a_worker(nodes)
    os.kill(lost.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    tell("a node is killed")
    tell(f"step {training.steps_on(1)} on 1 worker")

    nodes.remove_node(lost)
    nodes.add_node(num_cpus=1)
    tell("there is another node")
    tell(f"step {training.steps_on(2)} on 2 workers")

    nodes.add_node(num_cpus=1)
    drain(nodes, node_of_a_worker(nodes))
    tell("a node has notice; a third is there")
    # The second time that workers stop: it does not count, and nothing has to be trained again.
    noted = training.wait_for(lambda s: "drained" in s["state"])
    checkpoints = (tmp_path / "runs" / "elastic" / "ray").glob("*/about.json")
    assert noted["step"] == max(read_about(path.parent).step for path in checkpoints)
    tell(f"left after step {noted['step']}; step {training.steps_on(2)} on 2 workers")

    training.process.send_signal(signal.SIGINT)
    training.process.wait(60)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = mlflow.search_runs(experiment_names=["gfl"], output_format="list")
    client = mlflow.MlflowClient()
    curves = {n: client.get_metric_history(run.info.run_id, n) for n in LOSSES}
    steps = [point.step for point in curves["loss"]]
    assert steps == sorted(set(steps))
    tell(f"compared up to step {steps[-1]}")
    fixed = run_workers(
        2, train_on_a_fixed_number, load_job(words[0], words[1:]), steps[-1], tmp_path
    )
    for name, curve in curves.items():
        expected = [fixed[0][point.step][name] for point in curve]
        assert [point.value for point in curve] == pytest.approx(expected, rel=1e-4), name
    tell("done")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(seen) + "\n")
