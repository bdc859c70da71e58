"""The driver of a training: checks, workers, MLflow run, registration of the best checkpoint."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException

from gfl.config.loader import ConfigError, reproducible
from gfl.data.samplers import shard_size
from gfl.data.split import load_splits
from gfl.train.optimizer import scaled_lr
from gfl_platform.cluster import resources
from gfl_platform.cluster.event_queue import pumped
from gfl_platform.cluster.events import (
    CheckpointDamaged,
    DataDescribed,
    Event,
    OutagesCounted,
    SpeedMeasured,
    StepsDone,
    TagsSet,
    Watcher,
)
from gfl_platform.config import JobConfig
from gfl_platform.registry import models
from gfl_platform.registry.gate import promote
from gfl_platform.registry.history import Decision
from gfl_platform.registry.model_card import lineage
from gfl_platform.storage.storage import Storage
from gfl_platform.tracking import client
from gfl_platform.tracking.client import Store
from gfl_platform.tracking.metadata import CONFIG_FILE, describe, require_same
from gfl_platform.tracking.run import RunTracker
from gfl_platform.tracking.status import StatusFile
from gfl_platform.training.fit import Training, run
from gfl_platform.training.sources import fetch_sources

logger = logging.getLogger(__name__)

LOCATIONS = ("data.train.", "data.val.", "data.shapes.folder", "loss.distillation.teacher")
"""Beginnings of the keys that say where data lies, which a resumed run may change."""


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        run_id: The MLflow run; None if no store has answered yet.
        checkpoint: Folder of the checkpoint with the best AP.
        metrics: COCO statistics of that checkpoint.
        fps: Frames per second of the last weights, which hold for all checkpoints.
        seconds: Wall time in seconds, including start of the workers and registration.
        version: Version of the registered model, if the configuration names a model.
        decision: Decision of the gate, if the model was proposed as champion.
    """

    run_id: str | None
    checkpoint: Path
    metrics: dict[str, float]
    fps: float
    seconds: float
    version: int | None
    decision: Decision | None


def train(job: JobConfig, name: str, *, resume: bool, watch: Watcher) -> TrainingResult:
    """Train, and register the model if the configuration names one.

    Args:
        job: The configuration.
        name: Name of the run.
        resume: Whether to continue the run of that name; else the name must be new.
        watch: Shows events.

    Raises:
        ValueError: the configuration, dataset, cluster or tracking store cannot be used.
        JobFailedError: the training stopped.
    """
    started = time.perf_counter()
    config, storage = reproducible(job), Storage(job.storage)
    if resume and config.optim.compile and not job.run.accept_changes:
        raise ConfigError(
            "optim.compile: compiled code depends on the sizes of the images before it, so a "
            "resumed run has other digits than an uninterrupted one; go on all the same with "
            "--accept-changes"
        )
    store = Store(job.tracking, storage)
    if not resources.in_cluster():
        # Workers on this machine see the same files, so errors in the data are found here.
        load_splits(storage.cache.localized(config))
    resources.connect()
    workers = resources.allot(job)
    shard_size(config, workers.count)
    store.require_ready()  # before anything is written
    sources = fetch_sources(job, store)
    logger.info("learning rate %g for %d images a step", scaled_lr(config), config.data.batch)
    folder = storage.open_run_folder(name, resume=resume)
    # What moved is another place in the configuration; the workers compare its content.
    require_same(folder / CONFIG_FILE, config, "run", LOCATIONS)
    origins = lineage(config, workers, sources)
    with (
        storage.held(folder, resume=resume) as place,
        RunTracker(store, folder, describe(job, name, origins)) as tracker,
        StatusFile(folder, workers.count, resources.node_count()) as status,
    ):
        storage.share_state(folder)
        watch(TagsSet(origins))
        with pumped(event_handler(tracker, status, watch)) as events:
            result = run(Training(job, sources, workers, place), events)
        checkpoint = storage.cache.local(result.checkpoint)  # a copy if it is on S3
        tracker.handle(SpeedMeasured(result.fps, result.protocol))
        version = None
        if model := job.registry.name:
            figures = models.figures_of_version(result.metrics["AP"], result.fps, result.protocol)
            version = _register(store, model, checkpoint, tracker, figures)
    decision = None
    if version is not None and job.registry.alias:
        decision = _point(job, store, version, job.registry.alias, watch)
    return TrainingResult(
        run_id=tracker.run_id,
        checkpoint=checkpoint,
        metrics=result.metrics,
        fps=result.fps,
        seconds=time.perf_counter() - started,
        version=version,
        decision=decision,
    )


def event_handler(tracker: RunTracker, status: StatusFile, watch: Watcher) -> Watcher:
    """Return the function that logs, notes and shows every event of a training.

    Args:
        tracker: The training's MLflow run.
        status: The file that says where the training stands.
        watch: Shows the events.
    """

    def handle(event: Event) -> None:
        match event:
            case DataDescribed(findings=findings):
                for finding in findings:  # nobody sees what workers log
                    logger.warning("warning: %s; jobs.inspect shows more", finding)
            case CheckpointDamaged(reason=reason):
                logger.warning("warning: %s; going on from the one before", reason)
        tracker.handle(event)
        outages = status.outages
        status.handle(event)
        if status.outages != outages:
            step = event.step if isinstance(event, StepsDone) else 0
            tracker.handle(OutagesCounted(step, status.outages))
        watch(event)

    return handle


def _register(
    store: Store,
    model: str,
    checkpoint: Path,
    tracker: RunTracker,
    figures: dict[str, float | str],
) -> int:
    """Register the best checkpoint of a training; return the version.

    Raises:
        TrackingError: the tracking store or the storage of its artifacts does not answer.
    """
    try:
        return models.register_once(store, model, checkpoint, tracker.require_run(), figures)
    except (MlflowException, OSError, client.TrackingError) as error:
        raise client.TrackingError(
            f"model {model}: not registered ({client.reason_of(error)}); the training is done "
            "and its checkpoints are kept: --resume registers it"
        ) from error


def _point(
    job: JobConfig, store: Store, version: int, alias: str, watch: Watcher
) -> Decision | None:
    """Set an alias of a version; return the decision of the gate if the alias is `champion`."""
    model = job.registry.name
    assert model
    store.require_answer()  # It answered long ago, when the training began.
    if alias == "champion":
        return promote(job, store, model, version, watch)
    models.set_alias(store, model, version, alias)
    return None
