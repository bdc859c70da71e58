"""A recorded stream of a training's events, and what reaches MLflow, the status and a terminal."""

import json
import os
import re

import pytest
import torch

from gfl_platform.cluster.events import from_json, to_json
from gfl_platform.config import load_job
from gfl_platform.tracking.metadata import describe
from gfl_platform.tracking.run import RunTracker
from gfl_platform.tracking.status import StatusFile
from gfl_platform.training.train import event_handler
from jobs.console.progress import Progress
from tests.support.goldens import (
    GOLDEN,
    as_json,
    compare_json,
    compare_text,
    plain_terminal,
    read_json,
    rounded,
)
from tests.support.tracking import store_of

STABLE = re.compile(r"(loss|qfl|giou|dfl|grad_norm|lr|epoch|restarts|(AP|AR)(\d+|s|m|l)?)$")
"""Metrics that depend neither on the time nor on the machine."""

KEPT_TAGS = re.compile(r"(restarts|deleted|workers|data\.\w+\.(images|dropped\..*))$")
"""Tags whose values are frozen; of others only the type."""

OF_MACHINE = re.compile(r"time_ms|config_hash|.*digest|uri")
"""Facts of events that depend on the time or the machine."""


def event_of(record):
    """Return the event that a record of the golden stream stands for."""
    return from_json(record)


def record_of(event):
    """Return the JSON record of an event."""
    return json.loads(json.dumps(to_json(event), default=str))


def replay(name, records, job, folder):
    """Hand recorded events to what a training's driver does with them, without Ray."""
    store = store_of(job)
    with (
        RunTracker(store, folder, describe(job, name)) as tracker,
        StatusFile(folder, workers=2, nodes=1) as status,
        Progress() as progress,
    ):
        handle = event_handler(tracker, status, progress.show)
        for record in records:
            handle(event_of(record))


@pytest.fixture
def job(tiny_file, tmp_path, monkeypatch):
    """The configuration of the recorded training."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    register = "registry={name: shapes, alias: champion}"
    return load_job(tiny_file, [f"storage.root={tmp_path}", register])


def logged_run(root, name, folders):
    """Return what MLflow's store holds of the run called `name`, what varies masked.

    Args:
        root: The storage's root, with the store.
        name: Name of the run.
        folders: Words that stand for folders, by their paths.
    """
    from mlflow import MlflowClient

    def masked(value):
        for folder, word in folders.items():
            value = value.replace(str(folder), word)
        return value

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    histories = {
        key: client.get_metric_history(run.info.run_id, key) for key in sorted(run.data.metrics)
    }
    assert all(histories.values())
    models = client.search_logged_models(experiments, f"source_run_id = '{run.info.run_id}'")
    return {
        "status": run.info.status,
        "params": {key: masked(value) for key, value in sorted(run.data.params.items())},
        "tags": {
            key: value if KEPT_TAGS.match(key) else "str"
            for key, value in sorted(run.data.tags.items())
        },
        "metrics": {
            key: [[metric.step, masked_number(key, metric.value)] for metric in history]
            for key, history in histories.items()
        },
        "artifacts": sorted(
            file.path
            for file in client.list_artifacts(run.info.run_id)
            if file.path not in ("git.diff", "evaluations")
        ),
        "models": {
            model.name: {
                "tags": {
                    key: masked(value) if key in ("uri", "deleted") else "str"
                    for key, value in sorted(model.tags.items())
                },
                "metrics": {
                    metric.key: [metric.step, masked_number(metric.key, metric.value)]
                    for metric in model.metrics
                },
            }
            for model in sorted(models, key=lambda model: model.name)
            if model.name.startswith("epoch-")
        },
    }


def masked_number(name, value):
    """Return a stable number rounded to four digits, of another only its type."""
    return rounded(value, 4) if STABLE.match(name) else type(value).__name__


def masked_record(record):
    """Return a record in which what depends on the time or the machine is a type's name."""
    return {key: masked_value(key, value) for key, value in record.items()}


def masked_value(key, value):
    if isinstance(value, dict):
        return masked_record(value)
    if OF_MACHINE.match(key) or (isinstance(value, float) and not STABLE.match(key)):
        return type(value).__name__
    return value


def by_kind(records):
    """Return masked records by their kind: threads may tell of two kinds in either order."""
    kinds = {}
    for record in records:
        if record["kind"] not in ("result", "items"):  # not what the training's workers tell
            kinds.setdefault(record["kind"], []).append(masked_record(record))
    return kinds


def assert_near(now, frozen, where=""):
    """Check that two JSON contents are alike, real numbers to one in a thousand."""
    if isinstance(frozen, dict):
        assert now.keys() == frozen.keys(), where
        for key, value in frozen.items():
            assert_near(now[key], value, f"{where}/{key}")
    elif isinstance(frozen, list):
        assert len(now) == len(frozen), where
        for number, value in enumerate(frozen):
            assert_near(now[number], value, f"{where}/{number}")
    elif isinstance(frozen, float):
        assert now == pytest.approx(frozen, rel=1e-3, abs=1e-3), where
    else:
        assert now == frozen, where


def named_checkpoints(text, root):
    """Return a text in which checkpoints are numbered in their order, below ROOT."""
    text = text.replace(str(root), "ROOT")
    names = dict.fromkeys(re.findall(r"checkpoint_[-0-9_.]+\d", text))
    for number, name in enumerate(names, start=1):
        text = text.replace(name, f"checkpoint_{number}")
    return text


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stream was recorded on CPUs")
def test_a_training_tells_what_was_recorded(trained):
    job, result, events = trained
    records = [record_of(event) for event in events]
    if os.environ.get("GFL_RECORD"):
        record_stream(job, result, records)
    frozen = [record_of(event_of(record)) for record in read_json("events/stream.json")]
    assert_near(by_kind(records), by_kind(frozen))


def record_stream(job, result, records):
    """Write the golden stream; what the driver itself adds at the end is made from the result."""
    from mlflow import MlflowClient

    run = MlflowClient(f"sqlite:///{job.storage.root}/mlflow.db").get_run(result.run_id)
    protocol = json.loads(run.data.tags["fps.protocol"])
    protocol |= {"device": "a CPU", "driver": "unknown"}
    # Evaluations of the gate come after the training's end.
    records = [record for record in records if record["kind"] != "items"]
    ended = {"kind": "result", "fps": result.fps, "protocol": protocol, "epochs": 3}
    text = as_json(rounded([*records, ended], 6))
    path = GOLDEN / "events" / "stream.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(named_checkpoints(text, job.storage.root))


@pytest.mark.parametrize("name", ["stream", "interrupted"])
def test_a_replayed_stream_reaches_mlflow_and_the_user(
    name, job, shapes_folder, tmp_path, monkeypatch, capsys, caplog
):
    plain_terminal(monkeypatch)
    records = json.loads(
        (GOLDEN / f"events/{name}.json").read_text().replace("ROOT", str(tmp_path))
    )
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    for number in (2, 3):  # the first has given way to better ones
        (folder / "ray" / f"checkpoint_{number}").mkdir(parents=True)
    replay("first", records, job, folder)
    folders = {tmp_path: "ROOT", shapes_folder: "DATA"}
    compare_json(f"events/{name}.mlflow.json", logged_run(tmp_path, "first", folders))
    printed = capsys.readouterr().out.splitlines()
    # Without a terminal a line of steps is shown every few seconds: only the first is sure.
    later = {line for line in printed[1:] if re.match(r"epoch \d+\.\d+  step", line)}
    printed = [line for line in printed if line not in later]
    warnings = [message.replace(str(tmp_path), "ROOT") for message in caplog.messages]
    compare_text(f"events/{name}.shown.txt", "\n".join([*printed, *warnings]) + "\n")


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stream was recorded on CPUs")
def test_a_training_logs_what_a_replay_logs(trained, shapes_folder):
    """Other tests may log more to that run, so only what is frozen is looked at."""
    job, _, events = trained
    uris = dict.fromkeys(event["uri"] for event in map(record_of, events) if "uri" in event)
    checkpoints = {
        uri: f"ROOT/runs/first/ray/checkpoint_{number}" for number, uri in enumerate(uris, start=1)
    }
    folders = {**checkpoints, job.storage.root: "ROOT", shapes_folder: "DATA"}
    frozen = read_json("events/stream.mlflow.json")
    now = logged_run(job.storage.root, "first", folders)
    for part in ("tags", "metrics"):
        now[part] = {key: value for key, value in now[part].items() if key in frozen[part]}
    now["artifacts"] = [path for path in now["artifacts"] if path in frozen["artifacts"]]
    assert_near(now, frozen)
