"""Training over a real Ray cluster with a real MLflow store: what users get, and what survives."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError

from gfl.checkpoint.files import read_about
from gfl.checkpoint.snapshot import load_checkpoint
from gfl.config.loader import ConfigError, derive, load_config
from gfl.errors import DataError
from gfl.evaluation.coco_eval import evaluate_detections
from gfl_platform.cluster import launch
from gfl_platform.cluster.event_queue import pumped
from gfl_platform.cluster.events import (
    CheckpointDamaged,
    DataDescribed,
    EpochEvaluated,
    ItemsDone,
    OfTrial,
    SpeedMeasured,
    StepsDone,
    WorkerFailed,
)
from gfl_platform.config import JobConfig, load_job
from gfl_platform.evaluation.evaluate import evaluate_checkpoint
from gfl_platform.registry import models
from gfl_platform.storage.files import StorageError
from gfl_platform.tracking import metadata
from gfl_platform.tracking.client import TrackingError
from gfl_platform.training import train
from tests.support.detections import as_rows
from tests.support.tracking import history, store_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def job_of(tiny_file, root, *overrides):
    return load_job(tiny_file, [f"storage.root={root}", *overrides])


def test_the_driver_hears_of_steps_and_epochs(trained):
    _, result, events = trained
    steps = [e.step for e in events if isinstance(e, StepsDone)]
    assert steps
    assert steps == sorted(set(steps))
    assert [e.epoch for e in events if isinstance(e, EpochEvaluated)] == [1, 2, 3]
    assert result.fps > 0
    assert result.seconds > 0


def test_the_queue_of_events_ends_with_its_job():
    heard = []
    with pumped(heard.append) as events:
        events.tell(CheckpointDamaged("half"))
        replace(events, trial="007").tell(CheckpointDamaged("gone"))
    assert heard == [CheckpointDamaged("half"), OfTrial("007", CheckpointDamaged("gone"))]

    def tell_until_it_is_dead():  # Ray does not wait for that
        for _ in range(100):
            ray.get(events.tell(CheckpointDamaged("half")))
            time.sleep(0.1)

    with pytest.raises(ActorDiedError):
        tell_until_it_is_dead()


def test_the_run_holds_all_that_reproduces_it(trained):
    job, result, events = trained
    client = store_of(job).client
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params["loss.qfl.beta"] == "2.0"
    assert run.data.params["cluster.max_failures"] == "3"
    assert len(run.data.tags["git.commit"]) >= 7
    assert len(run.data.tags["data.train.digest"]) == 64
    assert int(run.data.tags["data.train.images"]) > 0
    files = {f.path for f in client.list_artifacts(result.run_id)}
    assert {"config.yaml", "packages.txt"} <= files
    metrics = {
        "loss", "qfl", "giou", "dfl", "lr", "images_per_second", "AP", "AP50", "AP75", "APs", "APm",
        "APl", "AR1", "AR10", "AR100", "fps", "step_ms_p50", "step_ms_p99", "data_wait_share",
        "workers.data_wait_share.mean", "workers.memory_gib.max", "checkpoint_seconds",
        "checkpoint_blocked_seconds",
    }  # fmt: skip
    assert metrics <= set(run.data.metrics)
    assert run.data.metrics["APl"] == -1  # as COCO has it: on images of 64 px no object is large
    steps = [m.step for m in history(client, result.run_id, "loss")]
    assert steps == [e.step for e in events if isinstance(e, StepsDone)]
    assert len(history(client, result.run_id, "AP")) == 3


def test_every_epoch_is_a_model_that_stays_where_it_is(trained):
    job, result, _ = trained
    client = store_of(job).client
    experiment = client.get_run(result.run_id).info.experiment_id
    models = client.search_logged_models([experiment], filter_string="metrics.AP >= 0")
    external = [m for m in models if m.name.startswith("epoch-")]
    assert {m.name for m in external} == {"epoch-1", "epoch-2", "epoch-3"}
    for model in external:  # all but those that gave way to better ones
        folder = Path(model.tags["uri"])
        assert folder.is_dir() == ("deleted" not in model.tags)
        if folder.is_dir():
            assert f"epoch-{read_about(folder).epoch}" == model.name


def test_the_best_checkpoint_is_the_result(trained):
    _, result, _ = trained
    assert read_about(result.checkpoint).metrics == result.metrics
    _, about = load_checkpoint(result.checkpoint)
    assert about.classes == ["rectangle", "ellipse", "triangle"]


def test_evaluation_over_the_cluster_repeats_the_figures(trained, tmp_path):
    job, result, _ = trained
    events, results = [], tmp_path / "results.json"
    figures = evaluate_checkpoint(result.checkpoint, job, events.append, results=results)
    assert events[-1] == ItemsDone("images evaluated", 11, 11)
    assert figures["metrics"] == pytest.approx(result.metrics, abs=1e-6)
    assert figures["fps"] > 0
    assert figures["images"] == 11
    truth, rows = Path(job.data.val.annotations), as_rows(json.loads(results.read_text()))
    ids = [image["id"] for image in json.loads(truth.read_text())["images"]]
    again = evaluate_detections(truth, rows, ids, official=True)
    assert figures["metrics"] == pytest.approx(again.metrics, rel=0, abs=1e-12)


def test_images_without_annotations_are_for_results_only(trained, tmp_path):
    job, result, _ = trained
    content = json.loads(Path(job.data.val.annotations).read_text())
    del content["annotations"]
    listed = tmp_path / "image_info.json"
    listed.write_text(json.dumps(content))
    job = derive(JobConfig, job, [f"data.val.annotations={listed}", "cluster.workers=0"])
    with pytest.raises(DataError, match=r"info\.json: no annotations.*--results"):
        evaluate_checkpoint(result.checkpoint, job, [].append)


def test_a_model_is_looked_up_and_loaded_by_alias(trained):
    job, result, _ = trained
    expected, _ = load_checkpoint(result.checkpoint)
    for model in (
        "models:/shapes@champion",
        "models:/shapes/2",
        f"runs:/{result.run_id}",
        str(result.checkpoint),
    ):  # fmt: skip
        loaded = models.load(model, store_of(job))
        assert loaded.about.metrics == result.metrics
        for key, value in expected.state_dict().items():
            assert torch.equal(value, loaded.detector.state_dict()[key])


def test_the_registry_lists_versions_and_points_aliases(trained):
    job, result, _ = trained
    listed = models.list_versions(store_of(job))
    assert [(v.name, v.version) for v in listed] == [("shapes", 2), ("shapes", 1)]
    assert float(listed[0].tags["AP"]) == pytest.approx(result.metrics["AP"], rel=1e-5, abs=1e-9)
    assert models.set_alias(store_of(job), "shapes", 1, "staging") is None
    assert models.set_alias(store_of(job), "shapes", 2, "staging") == 1
    assert models.find(store_of(job), "shapes", "staging").version == 2
    with pytest.raises(models.RegistryError, match=r"only `jobs.registry promote` and"):
        models.set_alias(store_of(job), "shapes", 2, "champion")
    for alias in ("v1", "LATEST", "7", "a b"):
        with pytest.raises(ValueError, match=f"alias '{alias}'"):
            models.set_alias(store_of(job), "shapes", 1, alias)


def test_the_registered_model_predicts_as_pyfunc_without_pickle(trained, monkeypatch):
    job, _, _ = trained
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    store_of(job).require_answer()
    import mlflow

    model = mlflow.pyfunc.load_model("models:/shapes@champion")
    image = next(Path(job.data.val.images).iterdir())
    (objects,) = model.predict([image.read_bytes()])
    assert objects.boxes
    assert len(objects.boxes) == len(objects.scores)
    assert len(objects.boxes) == len(objects.classes) == len(objects.edge_std)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/shape@champion", r"shape: no such model; did you mean 'shapes'\?"),
        ("models:/shapes@champoin", r"shapes@champoin: no such alias; did you mean 'champion'\?"),
        ("models:/shapes/9", "shapes version 9: no such version; there are: 2, 1"),
        ("models:/shapes", r"expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("runs:/0123", "runs:/0123: no such run"),
        ("ftp://somewhere", "expected a checkpoint folder"),
        ("no/such/folder", "no such folder; expected a checkpoint folder"),
    ],
)
def test_models_that_do_not_exist_are_named_with_a_suggestion(trained, model, message):
    with pytest.raises(models.RegistryError, match=message):
        models.load(model, store_of(trained[0]))


def test_a_run_name_that_exists_is_refused(trained):
    with pytest.raises(StorageError, match=r"run 'first' exists .* --resume, or choose another"):
        train.train(trained[0], "first", resume=False, watch=lambda _: None)


def test_a_run_that_does_not_exist_cannot_be_resumed(trained):
    with pytest.raises(StorageError, match=r"run 'frist': nothing to resume .* mean 'first'\?"):
        train.train(trained[0], "frist", resume=True, watch=lambda _: None)


def test_a_run_is_not_resumed_with_another_configuration(trained, tiny_file):
    job = job_of(tiny_file, trained[0].storage.root, "loss.qfl.beta=1.5")
    with pytest.raises(
        ConfigError, match=r"another configuration \(loss\.qfl\.beta 2\.0 -> 1\.5\)"
    ):
        train.train(job, "first", resume=True, watch=lambda _: None)


def test_a_section_that_came_or_went_is_a_change_of_configuration(tmp_path):
    with_shapes = load_config("configs/demo.yaml")
    without = load_config("configs/demo.yaml", ["data.shapes=null"])
    for number, (first, second) in enumerate(((with_shapes, without), (without, with_shapes))):
        noted = tmp_path / f"{number}.yaml"
        metadata.require_same(noted, first, "run")
        metadata.require_same(noted, first, "run")
        with pytest.raises(ConfigError, match=r"another configuration \(data\.shapes"):
            metadata.require_same(noted, second, "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.use_gpu=true", "1 workers need 1 GPUs, but the cluster has 0"),
        ("cluster.workers=64", "64 workers need 64 CPUs, but the cluster has 2"),
        ("cluster={workers: 2, use_gpu: true}", "2 workers need 2 GPUs"),
        ("data.batch=7", "7 images cannot be shared equally by 2 workers"),
    ],
)
def test_what_the_cluster_cannot_give_is_said_at_once(tiny_file, tmp_path, override, message):
    started = time.monotonic()
    with pytest.raises(ValueError, match=message):
        train.train(job_of(tiny_file, tmp_path, override), "x", resume=False, watch=lambda _: None)
    assert time.monotonic() - started < 5
    assert not (tmp_path / "runs").exists()


def test_a_tracking_server_that_is_not_there_is_named(tiny_file, tmp_path):
    started = time.monotonic()
    job = job_of(tiny_file, tmp_path, "tracking.uri=http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9: no MLflow store answers"):
        train.train(job, "x", resume=False, watch=lambda _: None)
    assert time.monotonic() - started < 20
    assert not (tmp_path / "runs").exists()


@pytest.mark.chaos
def test_a_killed_worker_changes_no_digit(trained, tiny_file, tmp_path):
    """SIGKILL of a training process in the second epoch: Ray restarts from the checkpoint."""
    _, result, _ = trained
    events = []
    victim = threading.Event()

    def watch(event):
        events.append(event)
        if isinstance(event, EpochEvaluated) and event.epoch == 1 and not victim.is_set():
            victim.set()
            os.kill(training_processes()[0], signal.SIGKILL)

    again = train.train(job_of(tiny_file, tmp_path), "killed", resume=False, watch=watch)
    assert any(isinstance(event, WorkerFailed) for event in events)
    for one, other in zip(checkpoints(result), checkpoints(again), strict=True):
        same_weights(one, other)
    client = store_of(job_of(tiny_file, tmp_path)).client
    steps = [m.step for m in history(client, again.run_id, "loss")]
    assert steps == sorted(set(steps))
    assert len(history(client, again.run_id, "AP")) == 3
    figures = client.get_run(again.run_id).data.metrics
    assert figures["restarts"] == 1
    assert 0 < figures["lost_minutes"] < 2
    assert len(client.search_runs([client.get_run(again.run_id).info.experiment_id])) == 1


def training_processes():
    """Return the pids of Ray's training workers on this machine."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "RayTrainWorker" in command:
            pids.append(int(folder.name))
    return sorted(pids)


def checkpoints(result):
    """Return the last checkpoint of a run, whatever Ray called its folder."""
    folders = [path.parent for path in (result.checkpoint.parent).glob("*/about.json")]
    return [max(folders, key=lambda folder: read_about(folder).step)]


def same_weights(one, other):
    assert read_about(one).step == read_about(other).step
    weights, others = (load_checkpoint(folder)[0].state_dict() for folder in (one, other))
    for key, value in weights.items():
        assert torch.equal(value, others[key]), key


def test_a_nan_ends_the_job_with_one_line(tiny_file, tmp_path, caplog):
    job = job_of(tiny_file, tmp_path, "optim.lr=1e30", "optim.name=sgd", "schedule.name=step",
                 "schedule.warmup_steps=0", "model.reg_max=2", "cluster.workers=1")  # fmt: skip
    with pytest.raises(
        launch.JobFailedError, match=r"step \d: NaN or infinity, first in"
    ) as caught:
        train.train(job, "nan", resume=False, watch=lambda _: None)
    assert ".jpg" in str(caught.value)
    assert "\n" not in str(caught.value)
    saved = tmp_path / "runs" / "nan" / "non_finite"
    assert {p.name for p in saved.iterdir()} >= {"config.yaml", "batch-rank0.pt"}
    run_id = json.loads((tmp_path / "runs" / "nan" / "run.json").read_text())["run_id"]
    assert store_of(job).client.get_run(run_id).info.status == "FAILED"
    assert "warning: train: edges beyond the regression range of model.reg_max 2" in caplog.text


@pytest.mark.slow
@pytest.mark.real_data
def test_coco128_trains_through_the_true_pipeline_at_320_px(real_data, tmp_path):
    images = real_data / "coco128" / "images"
    content = json.loads((images.parent / "annotations" / "instances.json").read_text())
    crowded = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    annotated = {a["image_id"] for a in content["annotations"]}
    # Crowds, images without objects, and others: 24 in all.
    order = sorted(content["images"], key=lambda i: (i["id"] not in crowded, i["id"] in annotated))
    content["images"] = order[:24]
    chosen = {image["id"] for image in content["images"]}
    assert chosen - annotated
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    (tmp_path / "some.json").write_text(json.dumps(content))
    split = f"{{images: {images}, annotations: {tmp_path}/some.json}}"
    job = load_job(
        "configs/coco128.yaml",
        [f"storage.root={tmp_path}", f"data.train={split}", f"data.val={split}",
         "schedule.epochs=2", "data.batch=4", "tracking.every_steps=1"],
    )  # fmt: skip
    assert (job.data.short_side, job.data.long_side) == (320, 533)
    events = []
    result = train.train(job, "coco", resume=False, watch=events.append)
    (data,) = [event for event in events if isinstance(event, DataDescribed)]
    assert data.findings[-1].startswith("train: classes without boxes: ")
    losses = [event.metrics["loss"] for event in events if isinstance(event, StepsDone)]
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    facts = store_of(job).client.get_run(result.run_id).data.tags
    assert int(facts["data.train.dropped.crowd boxes"]) >= 1
    assert int(facts["data.train.images"]) == len(chosen & annotated) < 24
    assert int(facts["data.val.images"]) == 24


def test_a_tracking_store_that_dies_does_not_hide_why_a_job_ends(tiny_file, tmp_path, monkeypatch):
    from mlflow.exceptions import MlflowException

    from gfl_platform.tracking.run import RunTracker

    job = job_of(tiny_file, tmp_path)
    tracker = RunTracker(store_of(job), tmp_path, metadata.describe(job, "dying"))

    def fail(*_args, **_options):
        raise MlflowException("server gone")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.log_batch", fail)
        tracker.handle(SpeedMeasured(3.0, {"batch": 1}))
        tracker.flush()
        assert store_of(job).client.get_run(tracker.run_id).data.metrics == {}
    with pytest.raises(RuntimeError, match="the reason"), tracker:
        raise RuntimeError("the reason")
    run = store_of(job).client.get_run(tracker.run_id)
    assert run.data.metrics == {"fps": 3.0}
    assert run.info.status == "FAILED"


def test_an_evaluation_that_was_logged_in_part_is_completed(tiny_file, tmp_path, monkeypatch):
    """The store takes the model of an epoch, and is gone before the epoch's metrics."""
    from mlflow.exceptions import MlflowException

    from gfl_platform.tracking.run import RunTracker

    job = job_of(tiny_file, tmp_path)
    client = store_of(job).client
    event = EpochEvaluated(step=5, epoch=1, metrics={"AP": 0.5}, uri="x")
    refused = []

    def fail(*_args, metrics, **_options):
        refused.append({metric.key: metric.value for metric in metrics})
        raise MlflowException("server gone")

    with RunTracker(store_of(job), tmp_path, metadata.describe(job, "partial")) as tracker:
        experiment = client.get_run(tracker.run_id).info.experiment_id
        with monkeypatch.context() as patch:
            patch.setattr("mlflow.MlflowClient.log_batch", fail)
            tracker.handle(event)
            tracker.flush()
        assert refused
        assert all(metrics == {"AP": 0.5} for metrics in refused)
        (model,) = client.search_logged_models([experiment])
        assert (model.name, model.metrics or []) == ("epoch-1", [])
        tracker.handle(replace(event, epoch=2, step=10, metrics={"AP": 0.6}))
        tracker.handle(event)  # as after an interruption
    points = history(client, tracker.run_id, "AP")
    assert [(m.step, m.value) for m in points] == [(5, 0.5), (10, 0.6)]
    models = client.search_logged_models([experiment])
    assert {m.name: m.metrics[0].value for m in models} == {"epoch-1": 0.5, "epoch-2": 0.6}
