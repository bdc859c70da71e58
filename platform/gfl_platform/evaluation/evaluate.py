"""Evaluation of a checkpoint on a Ray cluster.

`evaluate_checkpoint` runs in the driver and `evaluate_worker` in every worker. All workers detect
objects on their shards of the images; rank 0 computes AP from all detections and measures FPS.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gfl.checkpoint.snapshot import load_checkpoint
from gfl.config.loader import dump_config, parse_config, reproducible
from gfl.config.schema import Config
from gfl.data.split import Split, read_split, require_same_classes
from gfl.data.synthetic import render_shapes
from gfl.distributed import worker_rank
from gfl.errors import DataError
from gfl.evaluation.coco_eval import evaluate_split
from gfl.evaluation.evaluator import detect, gather
from gfl.evaluation.protocol import data_digest
from gfl.evaluation.speed import measure_fps
from gfl.files import write_atomically
from gfl.model.detector import Detector, place
from gfl.structures import coco_records
from gfl.train.engine import build_evaluation_loader
from gfl_platform.cluster import resources
from gfl_platform.cluster.events import ItemsDone, Watcher
from gfl_platform.config import JobConfig
from gfl_platform.evaluation.measure import run_measurement
from gfl_platform.storage.storage import Storage


def evaluate_checkpoint(
    checkpoint: Path,
    job: JobConfig,
    watch: Watcher,
    *,
    official: bool = False,
    results: Path | None = None,
) -> dict[str, Any]:
    """Measure AP and FPS of a checkpoint on the images `job.data.val`.

    Args:
        checkpoint: Folder of the checkpoint.
        job: Configuration of the evaluation, and of the cluster and storage to use.
        watch: Shows the progress.
        official: Whether to compute AP with pycocotools.
        results: File to write the detections to, in the format of COCO's evaluation server.

    Returns:
        The attributes of `Evaluation`, `fps`, its `protocol`, the number of `images`, the `digest`
        of the data, and all `detections`.

    Raises:
        ValueError: the checkpoint, dataset or cluster cannot be used.
        JobFailedError: a worker stopped.
    """
    storage = Storage(job.storage)
    settings = {
        "config": dump_config(reproducible(job)),
        "checkpoint": storage.shared(checkpoint),
        "cache": storage.cache,
        "official": official,
        "results": results is not None,
    }
    figures: dict[str, Any] = run_measurement(evaluate_worker, settings, job, storage, watch)
    ids = figures.pop("image_ids"), figures.pop("category_ids")
    if results:
        records = coco_records(figures["detections"], *ids)
        write_atomically(results, json.dumps(records) + "\n")
    return figures


@dataclass(frozen=True)
class Prepared:
    """What a worker needs to evaluate a checkpoint: its detector, and the images as local files."""

    detector: Detector
    split: Split
    config: Config
    device: torch.device


def prepare(settings: dict[str, Any]) -> Prepared:
    """Load a checkpoint and its images in one process of the cluster.

    Args:
        settings: `config`, `checkpoint`, `cache` and `device`.

    Raises:
        DataError: the images cannot be used, or have other classes than the model.
    """
    config = parse_config(settings["config"], "job")
    device = settings["device"] or resources.worker_device()
    cache = settings["cache"]
    config = cache.localized(config)
    detector, about = load_checkpoint(cache.local(settings["checkpoint"]), config)
    place(detector, device)
    render_shapes(config)
    split = read_split(config.data, "val", config.model.num_classes, about.classes)
    require_same_classes("the model", about.classes, str(split.annotations), split.classes)
    return Prepared(detector, split, config, device)


def progress_of(settings: dict[str, Any], split: Split) -> Callable[[int], None] | None:
    """Return the function that rank 0 calls to show its progress; None on other ranks."""
    rank, world = worker_rank()

    def tell_progress(images: int) -> None:
        total = len(split.records)
        settings["events"].tell(ItemsDone("images evaluated", min(images * world, total), total))

    return tell_progress if rank == 0 else None


def evaluate_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluate in one process of the cluster; return the figures of all on rank 0."""
    prepared = prepare(settings)
    detector, split = prepared.detector, prepared.split
    config, device = prepared.config, prepared.device
    if not settings["results"] and not any(len(record.labels) for record in split.records):
        raise DataError(
            f"{split.annotations}: no annotations, so nothing can be measured; write the "
            "detections with --results FILE"
        )
    loader = build_evaluation_loader(config, split, device)
    progress = progress_of(settings, split)
    detections = gather(detect(detector, split, loader, device, progress))
    if detections is None:
        return {}
    evaluation = evaluate_split(split, detections, config, official=settings["official"])
    fps, protocol = measure_fps(detector, split, config, device)
    return {
        **vars(evaluation),
        "fps": fps,
        "protocol": protocol,
        "images": len(split.records),
        "digest": data_digest(protocol),
        "detections": detections,
        "image_ids": sorted(split.image_ids),
        "category_ids": split.category_ids,
    }
