"""One training on Ray: what its workers are given, and the best checkpoint that they leave."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, UserCallback

from gfl.config.loader import config_hash, dump_config, reproducible
from gfl.config.schema import Config
from gfl_platform.cluster import launch, resources
from gfl_platform.cluster.event_queue import Events
from gfl_platform.config import JobConfig
from gfl_platform.storage.s3 import S3Error, is_remote
from gfl_platform.storage.storage import Storage
from gfl_platform.training.worker import train_worker

logger = logging.getLogger(__name__)

RAY_FOLDER = "ray"
"""In a run's: the checkpoints, and what Ray notes of them."""


def run(
    job: JobConfig,
    sources: dict[str, Path | None],
    workers: resources.Workers,
    folder: Path,
    events: Events,
    callbacks: Sequence[UserCallback] = (),
) -> tuple[dict[str, Any], str, dict[str, float]]:
    """Train in `folder`, from the latest checkpoint there if there is one.

    Args:
        job: What to train.
        sources: What `fetch_sources` returned.
        workers: What to run on.
        folder: Of the run.
        events: Is told what happens.
        callbacks: Of Ray's training controller.

    Returns:
        What rank 0 measured at the end, and where the best checkpoint lies, with its metrics.

    Raises:
        JobFailedError: training stopped.
    """
    config, storage = reproducible(job), Storage(job.storage)
    result = launch.run_workers(
        train_worker,
        {
            "config": dump_config(config),
            "weights": _for_workers(storage, sources["weights"], job.model.pretrained),
            "teacher": _for_workers(storage, sources["teacher"], None),
            "folder": str(folder),
            "report_every": job.tracking.every_steps,
            "checkpoint_every": job.storage.checkpoint_steps,
            "shares": workers.count,
            "cache": storage.cache,
        },
        workers,
        events,
        [HashCheck(config), *callbacks],
        max_failures=job.cluster.max_failures,
        resize_seconds=job.cluster.resize_seconds,
        name=RAY_FOLDER,
        **storage.ray_options(folder),
        checkpoint_config=CheckpointConfig(
            num_to_keep=job.storage.keep_checkpoints, checkpoint_score_attribute="AP"
        ),
    )
    kept = [result.checkpoint, *(each for each, _ in result.best_checkpoints)]
    discard_others(storage, folder / RAY_FOLDER, kept)
    epochs = result.return_value["epochs"]
    if epochs < job.schedule.epochs:
        patience = job.schedule.patience
        logger.info("stopped after epoch %d: AP has not risen for %d epochs", epochs, patience)
    measured = [pair for pair in result.best_checkpoints if "AP" in pair[1]]
    # Of two that are alike the later: the first may be damaged, and its epoch trained again.
    best, facts = max(measured, key=lambda pair: (pair[1]["AP"], pair[0].path))
    return result.return_value, launch.uri_of(best), facts["metrics"]


def discard_others(storage: Storage, folder: Path, kept: Sequence[Any]) -> None:
    """Delete checkpoints in `folder` that Ray did not keep: killed workers left them.

    Args:
        storage: Where nodes see the folder.
        folder: Of a training that has ended.
        kept: The latest, from which the run would go on, and the best.
    """
    names = {Path(checkpoint.path).name for checkpoint in kept}
    with suppress(OSError, S3Error):  # they only take room
        for name in storage.folders_in(folder):
            if name.startswith("checkpoint_") and name not in names:
                storage.discard(folder / name)


def _for_workers(storage: Storage, path: Path | None, origin: str | None) -> str | None:
    """Return from where workers take what lies at `path`: each from S3 if it is from there."""
    if path is None or (origin and is_remote(origin)):
        return origin
    return storage.shared(path)


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
                raise launch.JobFailedError(
                    f"worker {rank} trains the configuration {facts['config_hash'][:12]}, not "
                    f"{self._expected[:12]}: its figures would be another's; are all nodes' "
                    "packages the same?"
                )
