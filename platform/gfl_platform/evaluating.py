"""Evaluation of a checkpoint on a Ray cluster: AP by all workers together, FPS by the first."""

import tempfile
from pathlib import Path
from typing import Any

from gfl.checkpoint import load_checkpoint
from gfl.config import dump_config, parse_config, reproducible
from gfl.data import render_shapes
from gfl.data.coco import read_coco
from gfl.engine import build_evaluation_loader, place, worker_rank
from gfl.evaluation import evaluate
from gfl.speed import measure_fps
from gfl_platform import cluster
from gfl_platform.config import JobConfig


def evaluate_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluate this worker's share; return what all of them found together."""
    config = parse_config(settings["config"], "job")
    device = cluster.worker_device()
    detector, _ = load_checkpoint(Path(settings["checkpoint"]))
    place(detector, device)
    render_shapes(config)
    split = read_coco(config.data.val, config.model.num_classes, training=False)
    metrics = evaluate(detector, split, build_evaluation_loader(config, split, device), device)
    if worker_rank()[0] != 0:
        return {}
    fps, protocol = measure_fps(detector, split, config, device)
    return {"metrics": metrics, "fps": fps, "protocol": protocol, "images": len(split.records)}


def evaluate_checkpoint(checkpoint: Path, job: JobConfig) -> dict[str, Any]:
    """Return the COCO `metrics` of a checkpoint on `job.data.val`, its `fps` and their `protocol`.

    Raises:
        ValueError: a checkpoint, dataset or cluster that cannot be used.
        JobFailedError: a worker stopped.
    """
    cluster.connect()
    settings = {"config": dump_config(reproducible(job)), "checkpoint": str(checkpoint.resolve())}
    with tempfile.TemporaryDirectory(prefix="gfl-evaluation-") as scratch:
        result = cluster.run_workers(
            evaluate_worker, settings, cluster.allot(job), lambda _: None, storage_path=scratch
        )
    return result.return_value
