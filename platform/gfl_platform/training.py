"""Training on a Ray cluster: `gfl.engine.fit` in workers, reports in MLflow, checkpoints stored."""

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from gfl.config import Config
from gfl.configfile import (
    ConfigError,
    ConfigT,
    config_hash,
    dump_config,
    flatten,
    load_schema,
    parse_config,
    reproducible,
)
from gfl.data import load_splits
from gfl.data.loading import share_of_batch
from gfl.detector import Detector
from gfl.engine import EpochReport, StepReport, fit
from gfl.findings import find_cheaply
from gfl.optim import scaled_lr
from gfl.pretrained import load_weights
from gfl.speed import measure_fps, protocol_hash
from gfl_platform import cluster, registry, tracking
from gfl_platform.card import lineage
from gfl_platform.config import JobConfig
from gfl_platform.events import Event, Events, Watcher, pumped
from gfl_platform.gate import promote
from gfl_platform.storage import fetch_model, fetch_weights, open_run_folder, write_atomically
from gfl_platform.tracking import CONFIG_FILE
from gfl_platform.trail import Decision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        run_id: The MLflow run.
        checkpoint: Folder of the checkpoint with the best AP.
        metrics: COCO statistics of that checkpoint.
        fps: Frames per second of the last weights (the same for all).
        seconds: Wall time, start of the workers and registration included.
        version: Of the registered model, if the configuration names one.
        decision: Of the gate, if the configuration wants it as champion.
    """

    run_id: str
    checkpoint: Path
    metrics: dict[str, float]
    fps: float
    seconds: float
    version: int | None
    decision: Decision | None


class WorkerListener:
    """Reports what a worker's `fit` does: steps to the driver, epochs with checkpoints to Ray."""

    def __init__(self, events: Events) -> None:
        import ray.train

        self._events = events
        self._is_first = ray.train.get_context().get_world_rank() == 0

    def on_steps(self, report: StepReport) -> None:
        """Tell the driver; without waiting."""
        if self._is_first:
            self._events.tell({"kind": "steps", **vars(report)})

    def on_epoch(self, report: EpochReport) -> None:
        """Hand over the checkpoint of rank 0."""
        import ray.train

        facts = {"epoch": report.epoch, "step": report.step, "metrics": report.metrics}
        facts["AP"] = report.metrics["AP"]  # what Ray keeps checkpoints by
        facts["config_hash"] = config_hash(report.config)
        with tempfile.TemporaryDirectory(prefix="gfl-checkpoint-") as folder:
            checkpoint = None
            if self._is_first:
                report.save(Path(folder))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(facts, checkpoint=checkpoint)


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in one process of the cluster; return what rank 0 measured at the end."""
    import ray.train

    config = parse_config(settings["config"], "job")
    events = settings["events"]
    device = cluster.worker_device()
    splits = load_splits(config)
    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        names = ("train", "val")
        facts: dict[str, str | int] = {
            f"{n}.digest": split.digest for n, split in zip(names, splits, strict=True)
        }
        facts |= {f"{n}.images": len(s.records) for n, s in zip(names, splits, strict=True)}
        facts |= {f"train.dropped.{why}": count for why, count in splits[0].dropped.items()}
        findings = [str(finding) for finding in find_cheaply(config, splits[0])]
        events.tell({"kind": "data", "facts": facts, "findings": findings})
    restored = ray.train.get_checkpoint()
    options = {
        "device": device,
        "failure_folder": Path(settings["folder"]) / "non_finite",
        "teacher": settings["teacher"],
        "report_every": settings["report_every"],
    }
    if restored is None:
        weights = settings["weights"]
        trainer = fit(config, splits, WorkerListener(events), weights=weights, **options)
    else:
        with restored.as_directory() as folder:
            trainer = fit(config, splits, WorkerListener(events), resume=Path(folder), **options)
    if rank != 0:
        return {}
    fps, protocol = measure_fps(trainer.model, splits[1], config, device)
    return {"fps": fps, "protocol": protocol, "epochs": trainer.epochs_done}


class HashCheck(UserCallback):
    """Ends a training whose workers train another configuration than they were given."""

    def __init__(self, config: Config) -> None:
        self._expected = config_hash(config)

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Compare what every worker says that it trains with."""
        for rank, facts in enumerate(metrics):
            if facts["config_hash"] != self._expected:
                raise cluster.JobFailedError(
                    f"worker {rank} trains the configuration {facts['config_hash'][:12]}, not "
                    f"{self._expected[:12]}: its figures would be another's; are all nodes' "
                    "packages the same?"
                )


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
    tracking.connect(job)  # before anything is written
    sources = fetch_sources(job)
    logger.info("learning rate %g for %d images a step", scaled_lr(config), config.data.batch)
    folder = open_run_folder(job, name, resume=resume)
    require_same(folder / CONFIG_FILE, config, "run")
    with tracking.RunTracker(job, name, folder) as tracker:

        def handle(event: Event) -> None:
            for finding in event.get("findings", ()):  # what workers log, nobody sees
                logger.warning("warning: %s; jobs.inspect shows more", finding)
            tracker.handle(event)
            watch(event)

        tracker.handle({"kind": "tags", "tags": lineage(config, workers, sources)})
        with pumped(handle) as events:
            measured, checkpoint, metrics = run(job, sources, workers, folder, events)
        fps = measured["fps"]
        tracker.handle({"kind": "result", **measured})
        version = None
        if model := job.registry.name:
            facts = {
                "AP": metrics["AP"],
                "fps": fps,
                "protocol": protocol_hash(measured["protocol"]),
                "data": measured["protocol"]["annotations"][:12],
            }
            version = registry.register(job, model, checkpoint, tracker.run_id, facts)
    decision = None
    if version is not None and job.registry.alias:
        decision = _point(job, version, job.registry.alias, watch)
    seconds = time.perf_counter() - started
    return TrainingResult(tracker.run_id, checkpoint, metrics, fps, seconds, version, decision)


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
