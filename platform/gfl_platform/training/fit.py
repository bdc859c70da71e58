"""One training on Ray: the settings of its workers, and the best checkpoint that it leaves."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, UserCallback

from gfl.config.loader import config_hash, dump_config, reproducible
from gfl.config.schema import Config
from gfl_platform.cluster import launch, resources
from gfl_platform.cluster.event_queue import Events
from gfl_platform.cluster.events import EpochEvaluated
from gfl_platform.config import JobConfig
from gfl_platform.provenance import git_state
from gfl_platform.storage.lease import checkpoints_folder, term_of
from gfl_platform.storage.s3 import S3Error, copy_folder, is_remote, list_objects
from gfl_platform.storage.storage import RunFolder, Storage
from gfl_platform.training.ray_snapshot import SNAPSHOT_FILE, mend_snapshot
from gfl_platform.training.sources import CHECKSUM
from gfl_platform.training.worker import train_worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """A training that has ended.

    Attributes:
        checkpoint: Folder of the checkpoint with the best AP, a path or `s3://...`.
        metrics: COCO statistics of that checkpoint.
        fps: Frames per second of the last weights.
        protocol: How `fps` was measured.
        epochs: Number of epochs trained.
    """

    checkpoint: str
    metrics: dict[str, float]
    fps: float
    protocol: dict[str, Any]
    epochs: int


@dataclass(frozen=True)
class Training:
    """A training before it begins or continues.

    Attributes:
        job: Its configuration.
        sources: Weights to start from, as `fetch_sources` returns them.
        workers: The processes and devices to train on.
        folder: Folder of the run, which this job holds.
    """

    job: JobConfig
    sources: dict[str, Path | None]
    workers: resources.Workers
    folder: RunFolder


def run(training: Training, events: Events, callbacks: Sequence[UserCallback] = ()) -> FitResult:
    """Train, and continue from the latest checkpoint in the run's folder if there is one.

    Args:
        training: The training.
        events: The way to the driver.
        callbacks: Further callbacks of Ray's training controller.

    Raises:
        JobFailedError: the training stopped.
    """
    job, sources, workers, folder = (
        training.job, training.sources, training.workers, training.folder
    )  # fmt: skip
    config, storage = reproducible(job), folder.storage
    inherit_checkpoints(folder)
    mend_snapshot(storage, folder.checkpoints)
    kept_ones = CheckpointConfig(
        num_to_keep=job.storage.keep_checkpoints, checkpoint_score_attribute="AP"
    )
    result = launch.run_workers(
        train_worker,
        {
            "config": dump_config(config),
            "weights": _for_workers(storage, sources["weights"], job.model.pretrained),
            "teacher": _for_workers(storage, sources["teacher"], None),
            "folder": str(folder.path),
            "report_every": job.tracking.every_steps,
            "checkpoint_every": job.storage.checkpoint_steps,
            "shards": workers.count,
            "accept_changes": job.run.accept_changes,
            "commit": git_state()[0],
            "cache": storage.cache,
        },
        workers,
        events,
        launch.RunOptions(
            {
                **storage.ray_options(folder.path),
                "name": folder.checkpoints.name,
                "checkpoint_config": kept_ones,
            },
            [HashCheck(config), *callbacks],
            job.cluster.max_failures,
            job.cluster.resize_seconds,
        ),
    )
    kept = [result.checkpoint, *(checkpoint for checkpoint, _ in result.best_checkpoints)]
    discard_others(folder, kept)
    summary = result.return_value
    epochs = summary["epochs"]
    if epochs < job.schedule.epochs:
        patience = job.schedule.patience
        logger.info("stopped after epoch %d: AP has not risen for %d epochs", epochs, patience)
    evaluated = [pair for pair in result.best_checkpoints if "AP" in pair[1]]
    if folder.term > 1:  # MLflow knows some of them by the folder of an earlier term.
        for checkpoint, facts in sorted(evaluated, key=lambda pair: pair[1]["step"]):
            uri = launch.uri_of(checkpoint)
            events.tell(EpochEvaluated(facts["step"], facts["epoch"], facts["metrics"], uri))
    # Of two with the same AP the later: the first may be damaged, and its epoch trained again.
    best, facts = max(evaluated, key=lambda pair: (pair[1]["AP"], pair[0].path))
    return FitResult(
        launch.uri_of(best), facts["metrics"], summary["fps"], summary["protocol"], epochs
    )


def inherit_checkpoints(folder: RunFolder) -> None:
    """Begin a term of a run's lease with copies of the checkpoints of the term before.

    The job that had that term may be alive, and go on to write and delete in its own folder.
    """
    storage = folder.storage
    if not storage.is_remote:
        return
    keys = list_objects(storage.location_of(folder.path))
    terms = {term_of(key.split("/")[0]) for key in keys} - {0}
    # The list is copied last, so a folder without one may be half a copy.
    complete = {t for t in terms if f"{checkpoints_folder(t)}/{SNAPSHOT_FILE}" in keys}
    earlier = [term for term in complete or terms if term < folder.term]
    if earlier and folder.term not in complete:
        source = folder.path / checkpoints_folder(max(earlier))
        target = storage.location_of(folder.checkpoints)
        copy_folder(storage.location_of(source), target, last=SNAPSHOT_FILE)


def discard_others(folder: RunFolder, kept: Sequence[Any]) -> None:
    """Delete checkpoints of killed workers, which Ray did not keep, and those of earlier terms.

    Args:
        folder: Folder of a training that has ended.
        kept: The latest checkpoint, from which the run could continue, and the best ones.
    """
    storage, names = folder.storage, {Path(checkpoint.path).name for checkpoint in kept}
    with suppress(OSError, S3Error):  # They only take room.
        for name in storage.folders_in(folder.checkpoints):
            if name.startswith("checkpoint_") and name not in names:
                storage.discard(folder.checkpoints / name)
        for name in storage.folders_in(folder.path):
            if 0 < term_of(name) < folder.term:
                storage.discard(folder.path / name)


def _for_workers(storage: Storage, path: Path | None, origin: str | None) -> str | None:
    """Return the location from which every worker can read the file or folder at `path`.

    Args:
        storage: The storage that all nodes see.
        path: The file or folder on this node; None if there is none.
        origin: Where it was fetched from; workers read from S3 themselves.
    """
    if path is None or (origin and is_remote(origin)):
        return origin and origin.partition(CHECKSUM)[0]
    return storage.shared(path)


class HashCheck(UserCallback):
    """Ends a training in which a worker trains another configuration than it was given."""

    def __init__(self, config: Config) -> None:
        self._expected = config_hash(config)

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Compare the hash of every worker's configuration with the expected one.

        Raises:
            JobFailedError: they differ.
        """
        for rank, facts in enumerate(metrics):
            if facts["config_hash"] != self._expected:
                raise launch.JobFailedError(
                    f"worker {rank} trains the configuration {facts['config_hash'][:12]}, not "
                    f"{self._expected[:12]}: its figures would be another's; are all nodes' "
                    "packages the same?"
                )
