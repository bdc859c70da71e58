"""Training on a Ray cluster: `gfl.engine.fit` in workers, reports in MLflow, checkpoints stored."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from gfl.configfile import (
    ConfigError,
    ConfigT,
    dump_config,
    flatten,
    load_schema,
    reproducible,
)
from gfl.data import load_splits
from gfl.data.loading import share_of_batch
from gfl.detector import Detector
from gfl.optim import scaled_lr
from gfl.pretrained import load_weights
from gfl.speed import protocol_hash
from gfl_platform import cluster, registry, store, tracking
from gfl_platform.card import lineage
from gfl_platform.config import JobConfig
from gfl_platform.description import CONFIG_FILE
from gfl_platform.events import Event, Events, Watcher, pumped
from gfl_platform.gate import promote
from gfl_platform.status import StatusFile
from gfl_platform.storage import (
    fetch_model,
    fetch_weights,
    held,
    open_run_folder,
    write_atomically,
)
from gfl_platform.trail import Decision
from gfl_platform.worker import HashCheck, train_worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        run_id: The MLflow run; none if no store has answered yet.
        checkpoint: Folder of the checkpoint with the best AP.
        metrics: COCO statistics of that checkpoint.
        fps: Frames per second of the last weights (the same for all).
        seconds: Wall time, start of the workers and registration included.
        version: Of the registered model, if the configuration names one.
        decision: Of the gate, if the configuration wants it as champion.
    """

    run_id: str | None
    checkpoint: Path
    metrics: dict[str, float]
    fps: float
    seconds: float
    version: int | None
    decision: Decision | None


def train(job: JobConfig, name: str, *, resume: bool, watch: Watcher) -> TrainingResult:
    """Train `job` as the run `name`, or go on with it; register the model if `job` names one.

    Raises:
        ValueError: a configuration, dataset, cluster or tracking store that cannot be used.
        JobFailedError: training stopped.
    """
    started = time.perf_counter()
    config = reproducible(job)
    if not cluster.in_cluster():
        load_splits(config)  # here workers see the same files: say at once what is wrong with them
    cluster.connect()
    workers = cluster.allot(job)
    share_of_batch(config, workers.count)
    if job.tracking.unreachable == "fail" or job.registry.name:
        store.connect(job)  # before anything is written
    sources = fetch_sources(job)
    logger.info("learning rate %g for %d images a step", scaled_lr(config), config.data.batch)
    folder = open_run_folder(job, name, resume=resume)
    require_same(folder / CONFIG_FILE, config, "run")
    with (
        held(folder),
        tracking.RunTracker(job, name, folder) as tracker,
        StatusFile(folder, workers.count, cluster.node_count()) as status,
    ):

        def handle(event: Event) -> None:
            for finding in event.get("findings", ()):  # what workers log, nobody sees
                logger.warning("warning: %s; jobs.inspect shows more", finding)
            tracker.handle(event)
            status.handle(event)
            watch(event)

        tracker.handle({"kind": "tags", "tags": lineage(config, workers, sources)})
        with pumped(handle) as events:
            measured, checkpoint, metrics = run(job, sources, workers, folder, events)
        fps = measured["fps"]
        tracker.handle({"kind": "result", **measured})
        version = None
        if model := job.registry.name:
            facts = figures_of_version(metrics["AP"], fps, measured["protocol"])
            version = registry.register(job, model, checkpoint, tracker.require_run(), facts)
    decision = None
    if version is not None and job.registry.alias:
        decision = _point(job, version, job.registry.alias, watch)
    seconds = time.perf_counter() - started
    return TrainingResult(tracker.run_id, checkpoint, metrics, fps, seconds, version, decision)


def figures_of_version(ap: float, fps: float, protocol: dict[str, Any]) -> dict[str, Any]:
    """Return what a registered version is listed with."""
    data = protocol["annotations"][:12]
    return {"AP": ap, "fps": fps, "protocol": protocol_hash(protocol), "data": data}


def _point(job: JobConfig, version: int, alias: str, watch: Watcher) -> Decision | None:
    """Point an alias at a version; `champion` only through the gate, whose decision is returned."""
    model = job.registry.name
    assert model
    if alias == "champion":
        return promote(job, model, version, watch)
    registry.set_alias(job, model, version, alias)
    return None


def fetch_sources(job: JobConfig) -> dict[str, Path | None]:
    """Return the weights to start from and the teacher's checkpoint, where all nodes see them.

    Raises:
        ValueError: what cannot be fetched or loaded; before anything is written for the run.
    """
    weights, backbone, distillation = None, job.model.backbone, job.loss.distillation
    if job.model.pretrained is not None:
        weights = fetch_weights(job, job.model.pretrained)
        if not cluster.in_cluster():  # where nodes' files may be elsewhere
            reset = job.model.reset_classifier
            load_weights(Detector(reproducible(job)), weights, reset_classifier=reset)
    elif backbone.frozen_stages >= 0 or backbone.norm_eval:
        logger.warning(
            "warning: model.pretrained is null, so frozen stages and fixed BatchNorm stay random; "
            "from scratch, set model.backbone.frozen_stages=-1 and model.backbone.norm_eval=false"
        )
    return {
        "weights": weights,
        "teacher": fetch_model(job, distillation.teacher) if distillation else None,
    }


def run(
    job: JobConfig,
    sources: dict[str, Path | None],
    workers: cluster.Workers,
    folder: Path,
    events: Events,
    callbacks: Sequence[UserCallback] = (),
) -> tuple[dict[str, Any], Path, dict[str, float]]:
    """Train in `folder`, from the latest checkpoint there if there is one.

    Args:
        job: What to train.
        sources: What `fetch_sources` returned.
        workers: What to run on.
        folder: Of the run.
        events: Is told what happens.
        callbacks: Of Ray's training controller.

    Returns:
        What rank 0 measured at the end, and the best checkpoint with its metrics.

    Raises:
        JobFailedError: training stopped.
    """
    from ray.train import CheckpointConfig, FailureConfig

    config = reproducible(job)
    result = cluster.run_workers(
        train_worker,
        {
            "config": dump_config(config),
            **sources,
            "folder": str(folder),
            "report_every": job.tracking.every_steps,
        },
        workers,
        events,
        [HashCheck(config), *callbacks],
        name="ray",
        storage_path=str(folder),
        failure_config=FailureConfig(
            max_failures=job.cluster.max_failures, controller_failure_limit=3
        ),
        checkpoint_config=CheckpointConfig(
            num_to_keep=job.storage.keep_checkpoints, checkpoint_score_attribute="AP"
        ),
    )
    epochs = result.return_value["epochs"]
    if epochs < job.schedule.epochs:
        patience = job.schedule.patience
        logger.info("stopped after epoch %d: AP has not risen for %d epochs", epochs, patience)
    best, facts = max(result.best_checkpoints, key=lambda pair: pair[1]["AP"])
    return result.return_value, Path(best.path), facts["metrics"]


def require_same(path: Path, config: ConfigT, what: str, free: Sequence[str] = ()) -> None:
    """Note the configuration of a new run; refuse to go on with another than the one noted.

    Args:
        path: Where it is noted.
        config: The present one.
        what: Is called so in the message.
        free: Beginnings of keys that may differ.

    Raises:
        ConfigError: names every key that differs.
    """
    if not path.exists():
        write_atomically(path, dump_config(config))
        return
    before = flatten(load_schema(type(config), path).model_dump(mode="json"))
    now = flatten(config.model_dump(mode="json"))
    changes = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(tuple(free))
    ]
    if changes:
        raise ConfigError(
            f"{path}: this {what} was started with another configuration ({', '.join(changes)}); "
            "resume it with the same, or start another run"
        )
    write_atomically(path, dump_config(config))
