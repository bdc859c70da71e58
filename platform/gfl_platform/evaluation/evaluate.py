"""Evaluation of a checkpoint on a Ray cluster: AP by all workers together, FPS by the first."""

import json
from pathlib import Path
from typing import Any

from gfl.config.loader import dump_config, reproducible
from gfl.rows import coco_records
from gfl_platform.cluster import launch
from gfl_platform.cluster.events import Watcher, pumped
from gfl_platform.config import JobConfig
from gfl_platform.storage.runs import (
    cache_of,
    ray_storage,
    scratch_folder,
    shared,
    write_atomically,
)


def evaluate_checkpoint(
    checkpoint: Path,
    job: JobConfig,
    watch: Watcher,
    *,
    official: bool = False,
    results: Path | None = None,
) -> dict[str, Any]:
    """Return the `Evaluation` of a checkpoint on `job.data.val`, `fps`, `protocol`, `detections`.

    Args:
        checkpoint: Its folder.
        job: How to evaluate, and where.
        watch: Is told how far it is.
        official: Measure with pycocotools.
        results: File for the detections, in the format that COCO's evaluation server takes.

    Raises:
        ValueError: a checkpoint, dataset or cluster that cannot be used.
        JobFailedError: a worker stopped.
    """
    launch.connect()
    settings = {
        "config": dump_config(reproducible(job)),
        "checkpoint": shared(job, checkpoint),
        "cache": cache_of(job),
        "official": official,
        "results": results is not None,
    }
    workers = launch.allot(job)
    with scratch_folder(job) as scratch, pumped(watch) as events:
        result = launch.run_workers(
            _evaluate, settings, workers, events, **ray_storage(job, scratch)
        )
    figures: dict[str, Any] = result.return_value
    if results:
        write_atomically(results, json.dumps(coco_records(figures["detections"])) + "\n")
    return figures


def _evaluate(settings: dict[str, Any]) -> dict[str, Any]:
    from gfl_platform.evaluation_worker import evaluate_worker  # which needs torch

    return evaluate_worker(settings)
