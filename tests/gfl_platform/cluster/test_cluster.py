"""Resources that a job needs of the cluster, and messages about workers that stop."""

import copy
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from gfl.config.loader import derive
from gfl.data.dataset import DetectionDataset, build_loader
from gfl.data.samplers import TrainBatches
from gfl.data.split import load_splits
from gfl.errors import DataError, PreemptedError
from gfl_platform.cluster import resources
from gfl_platform.cluster.events import WorkerFailed
from gfl_platform.cluster.launch import (
    ControllerCallback,
    JobFailedError,
    one_line,
    portable,
    root_cause,
)
from gfl_platform.cluster.resources import of_autoscaler, shortage
from gfl_platform.config import load_job
from gfl_platform.storage.s3 import S3Error, S3UnavailableError


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_image_is_named_in_one_line_whichever_process_read_it(coco, tiny, processes):
    folder, file = coco(annotations=[{"bbox": [0, 0, 9, 9]}])
    (Path(folder) / "a.jpg").write_bytes(b"no picture")
    split = f"{{images: {folder}, annotations: {file}}}"
    config = derive(
        type(tiny), tiny, [f"data.train={split}", f"data.val={split}", "model.num_classes=1"]
    )
    dataset = DetectionDataset(load_splits(config)[0], config, training=True)
    loader = build_loader(
        dataset, TrainBatches(dataset.split.records, config, 0, 1, 0), processes, pin=False
    )
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    line = one_line(caught.value)
    assert line.startswith(f"{folder}/a.jpg: cannot be read as an image")
    assert line.endswith("replace or remove it")


def test_the_cause_is_found_inside_its_wrappings():
    inner = ValueError("why\nand a traceback")
    outer, outermost = RuntimeError("outer"), RuntimeError("outermost")
    outer.cause, outermost.controller_failure = inner, outer
    assert root_cause(outermost) is inner
    assert one_line(inner) == "why"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(JobFailedError("")) == "JobFailedError"


class EventLog:
    """Stands in for the queue of events, and keeps them."""

    def __init__(self):
        self.events = []

    def tell(self, event):
        self.events.append(event)


class DiedWithItsNodeError(ActorDiedError):
    """As Ray raises it of an actor whose node was drained."""

    preempted = True


def test_a_node_that_is_drained_is_no_failure():
    log = EventLog()
    callback = ControllerCallback(log, max_failures=1)
    died = WorkerHealthCheckFailedError("rank 1 is gone", DiedWithItsNodeError())
    stopped = PreemptedError("step 4")
    for lost in ({0: stopped, 1: stopped}, {1: died}):
        for _ in range(3):
            callback.after_exception(None, {**lost})
        callback.after_report(None, [{}], None)
    assert [event.reason for event in log.events] == ["its node is drained"] * 2
    callback.after_exception(None, {0: RuntimeError("first")})
    assert not log.events[-1].final
    with pytest.raises(JobFailedError, match="second"):
        callback.after_exception(None, {0: RuntimeError("second")})
    assert log.events[-1].final  # the job does not go on from its last checkpoint


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (S3Error("denied"), "denied"),
        (DataError("a.json: no box"), "a.json: no box"),
        (KeyError("bbox"), "KeyError: 'bbox'"),
        (TypeError("'<' not supported\nand so on"), "TypeError: '<' not supported"),
        (OverflowError("id too large"), "OverflowError: id too large"),
    ],
)
def test_what_every_attempt_would_meet_is_tried_once(error, reason):
    log = EventLog()
    with pytest.raises(JobFailedError, match=f"^{re.escape(reason)}$"):
        ControllerCallback(log, max_failures=3).after_exception(None, {0: error})
    assert log.events == [WorkerFailed(0, reason, final=True)]


class PairError(ValueError):
    """An error that pickles, but cannot be read: its class takes two arguments."""

    def __init__(self, one, other):
        super().__init__(f"{one}, not {other}")


def test_an_error_that_no_other_process_can_read_keeps_its_message():
    error = copy.deepcopy(portable(PairError("a", "b")))
    assert isinstance(error, ValueError)  # hence final
    assert str(error) == "PairError: a, not b"
    known = DataError("a.json: no box")
    assert portable(known) is known


@pytest.mark.parametrize(
    "error", [S3UnavailableError("503"), RuntimeError("connection closed"), OSError("no route")]
)
def test_what_fails_for_a_while_is_tried_again(error):
    log = EventLog()
    ControllerCallback(log, max_failures=1).after_exception(None, {0: error})
    assert log.events == [WorkerFailed(0, str(error), final=False)]


def test_a_worker_that_stops_its_partners_is_one_loss():
    log = EventLog()
    died = WorkerHealthCheckFailedError("rank 1 is gone", ActorDiedError())
    partner = RuntimeError("Connection closed by peer")
    ControllerCallback(log, max_failures=1).after_exception(None, {0: partner, 1: died})
    assert [event.rank for event in log.events] == [1]
    with pytest.raises(JobFailedError, match="bad data"):
        ControllerCallback(log, max_failures=9).after_exception(
            None, {0: partner, 1: died, 2: ValueError("bad data")}
        )
    assert log.events[-1] == WorkerFailed(2, "bad data", final=True)


@pytest.fixture
def no_cluster(monkeypatch):
    """This process is connected to no cluster, and any attempt to connect would be seen."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"):
        monkeypatch.setenv(name, "1")  # which `connect` would set for this process


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://localhost:{}", "[::1]:{}"])
def test_a_cluster_that_is_gone_is_said_at_once(no_cluster, monkeypatch, form):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = form.format(closed.getsockname()[1])
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray would try for a long time"))
    with pytest.raises(resources.ClusterError) as caught:
        resources.connect()
    assert str(caught.value).startswith(f"RAY_ADDRESS={address}: no Ray cluster answers there (")


def test_a_cluster_that_answers_is_left_to_ray(no_cluster, monkeypatch):
    calls = []
    monkeypatch.setattr("ray.init", lambda **options: calls.append(options))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for address in (f"127.0.0.1:{listening.getsockname()[1]}", "auto"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            resources.connect()
    assert len(calls) == 2
    assert not any("address" in options for options in calls)


def test_a_folder_that_ray_cannot_use_is_named_by_its_variable(no_cluster, monkeypatch, tmp_path):
    long = tmp_path / ("of-a-user-with-a-long-name" * 4)
    long.mkdir()
    for name in ("RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(long))
    # Ray starts in another process, because this one may hold the cluster of the session.
    command = "from gfl_platform.cluster import resources; resources.connect()"
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    message = ended.stderr.splitlines()[-1]
    assert re.search(rf"ClusterError: TMPDIR={long}: .*107 bytes.* set TMPDIR", message)

    def fail(**_):  # as Ray does in a process of its own
        raise NotADirectoryError(20, "Not a directory", "/dev/null/.ray")

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(resources.ClusterError, match=r"^HOME=/dev/null: .* set HOME to one"):
        resources.connect()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(resources.ClusterError, match=r"^Ray cannot start on this machine: .*ray'$"):
        resources.connect()


def test_the_most_that_an_autoscaler_adds_is_in_its_file():
    definition = yaml.safe_load(Path("ray-cluster.yaml").read_text())
    assert of_autoscaler(definition) == {"CPU": 64, "GPU": 8, "spot": 8}
    definition["max_workers"] = 4
    definition["available_node_types"]["gpu_spot"]["max_workers"] = 3
    assert of_autoscaler(definition) == {"CPU": 32, "GPU": 4, "spot": 3}


def test_an_autoscaler_may_have_what_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    present = {"CPU": 2.0}
    monkeypatch.delenv("KUBERAY_GEN_RAY_START_CMD", raising=False)
    monkeypatch.setattr("ray.cluster_resources", lambda: present)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

    def allot(*overrides):
        return resources.allot(load_job("configs/demo.yaml", overrides))

    assert allot("cluster.workers=[1, 8]") == resources.Workers(8, 1, False, 1)
    with pytest.raises(resources.ClusterError, match="0 is for evaluations and benchmarks"):
        allot("cluster.workers=0")
    with pytest.raises(
        resources.ClusterError, match="3 workers need 3 CPUs, but the cluster has 2;"
    ):
        allot("cluster.workers=[3, 8]")
    (tmp_path / "ray_bootstrap_config.yaml").write_text(Path("ray-cluster.yaml").read_text())
    assert allot("cluster.workers=8") == resources.Workers(8, 8, True, 1)
    with pytest.raises(
        resources.ClusterError, match=r"has 8 at most \(.*ray_bootstrap_config.yaml,"
    ):
        allot("cluster.workers=9")
    (tmp_path / "ray_bootstrap_config.yaml").unlink()
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head  --no-monitor ")
    assert allot("cluster={workers: 64, use_gpu: true}").count == 64


def test_workers_wait_for_what_an_autoscaler_has_yet_to_add(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0, "GPU": 2.0})
    assert shortage(resources.Workers(2, 2, True, 1)) is None
    assert shortage(resources.Workers(8, 2, True, 1)) is None  # elastic: starts with two
    needs_both = resources.Workers(4, 4, True, 1)
    assert shortage(needs_both) == "waiting for 4 GPUs, the cluster has 2"
    assert shortage(resources.Workers(2, 2, False, 8)) == "waiting for 16 CPUs, the cluster has 3"
    monkeypatch.setattr("ray.cluster_resources", dict)
    assert shortage(needs_both) == "waiting for 4 GPUs, the cluster has 0"
