"""Evaluation of a checkpoint on a Ray cluster: AP by all workers together, FPS by the first."""

from pathlib import Path
from typing import Any

from gfl.checkpoint import load_checkpoint
from gfl.configfile import dump_config, parse_config, reproducible
from gfl.data import render_shapes
from gfl.data.coco import read_coco, require_same_classes
from gfl.detector import place
from gfl.engine import build_evaluation_loader
from gfl.evaluation import evaluate
from gfl.speed import measure_fps
from gfl.trainer import worker_rank
from gfl_platform import cluster
from gfl_platform.config import JobConfig
from gfl_platform.events import Watcher
from gfl_platform.storage import scratch_folder


def evaluate_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluate this worker's share; return what all of them found together."""
    config = parse_config(settings["config"], "job")
    device = cluster.worker_device()
    detector, about = load_checkpoint(Path(settings["checkpoint"]), config)
    place(detector, device)
    render_shapes(config)
    split = read_coco(config.data.val, config.model.num_classes, training=False)
    require_same_classes("the model", about.classes, str(split.annotations), split.classes)
    rank, world = worker_rank()

    def tell(images: int) -> None:
        total = len(split.records)
        done = {"kind": "evaluated", "images": min(images * world, total), "total": total}
        settings["queue"].add.remote(done)

    loader = build_evaluation_loader(config, split, device)
    metrics = evaluate(detector, split, loader, device, tell if rank == 0 else None)
    if rank != 0:
        return {}
    fps, protocol = measure_fps(detector, split, config, device)
    return {"metrics": metrics, "fps": fps, "protocol": protocol, "images": len(split.records)}


def evaluate_checkpoint(checkpoint: Path, job: JobConfig, watch: Watcher) -> dict[str, Any]:
    """Return the COCO `metrics` of a checkpoint on `job.data.val`, its `fps` and their `protocol`.

    `watch` is told how far it is.

    Raises:
        ValueError: a checkpoint, dataset or cluster that cannot be used.
        JobFailedError: a worker stopped.
    """
    cluster.connect()
    settings = {"config": dump_config(reproducible(job)), "checkpoint": str(checkpoint.resolve())}
    with scratch_folder(job) as scratch:
        result = cluster.run_workers(
            evaluate_worker, settings, cluster.allot(job), watch, storage_path=str(scratch)
        )
    return result.return_value
