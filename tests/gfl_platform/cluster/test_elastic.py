"""Workers that come and go, by death and by notice: the losses stay those of a fixed number."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from mlflow import MlflowClient

from gfl.checkpoint.files import read_about
from gfl.data.split import load_splits
from gfl.train.engine import FitOptions, fit
from gfl_platform.config import load_job
from tests.support import drivers
from tests.support.processes import run_workers
from tests.support.tracking import history

REPORT_STEPS = 5
CHECKPOINT_STEPS = 12
LOSSES = ("loss", "qfl", "giou", "dfl")


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "6")
    with drivers.cluster_of(2) as made:
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        yield made


def node_of_a_worker(nodes):
    return drivers.training_processes(nodes)[0][1]


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
        options = FitOptions(
            torch.device("cpu"),
            folder,
            report_every=REPORT_STEPS,
            checkpoint_every=CHECKPOINT_STEPS,
        )
        fit(job, load_splits(job), curve, options)
    return curve.rows


@pytest.mark.chaos
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

    status = tmp_path / "runs" / "elastic" / "status.json"
    training = drivers.Driver(words, "elastic", tmp_path, status)
    training.start()
    before = training.wait_for(lambda s: s.get("step", 0) > CHECKPOINT_STEPS + REPORT_STEPS)
    assert before["workers"] == 2
    tell(f"step {before['step']} on 2 workers")

    lost = node_of_a_worker(nodes)
    os.kill(lost.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    tell("a node is killed")
    tell(f"step {training.steps_again(1)[1]} on 1 worker")

    nodes.remove_node(lost)
    nodes.add_node(num_cpus=1)
    tell("there is another node")
    tell(f"step {training.steps_again(2)[1]} on 2 workers")

    nodes.add_node(num_cpus=1)
    drain(nodes, node_of_a_worker(nodes))
    tell("a node has notice; a third is there")
    # The second time that workers stop: it does not count, and nothing has to be trained again.
    noted = training.wait_for(lambda s: "drained" in s["state"])
    checkpoints = (tmp_path / "runs" / "elastic" / "ray").glob("*/about.json")
    assert noted["step"] == max(read_about(path.parent).step for path in checkpoints)
    tell(f"left after step {noted['step']}; step {training.steps_again(2)[1]} on 2 workers")

    training.process.send_signal(signal.SIGINT)
    training.process.wait(60)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("gfl").experiment_id])
    curves = {n: history(client, run.info.run_id, n) for n in LOSSES}
    steps = [point.step for point in curves["loss"]]
    assert steps == sorted(set(steps))
    tell(f"compared up to step {steps[-1]}")
    fixed = run_workers(
        2, train_on_a_fixed_number, load_job(words[0], words[1:]), steps[-1], tmp_path
    )
    for name, curve in curves.items():
        expected = [fixed[0][point.step][name] for point in curve]
        assert [point.value for point in curve] == pytest.approx(expected, rel=1e-6), name
    tell("done")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(seen) + "\n")
