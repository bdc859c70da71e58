"""Evaluation of a detector: all workers detect, and rank 0 measures the gathered detections."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from gfl.data.dataset import Batch
from gfl.data.split import Split
from gfl.evaluation.coco_eval import evaluate_split
from gfl.model.detector import Detector, folded
from gfl.structures import Rows, coco_rows


def evaluate(
    detector: Detector,
    split: Split,
    loader: DataLoader[Batch],
    device: torch.device,
) -> dict[str, float]:
    """Return the COCO statistics over `split`, the same on every worker.

    Args:
        detector: The detector, whose mode does not change.
        split: The images and their ground truths.
        loader: Loads this worker's images (`EvaluationBatches`).
        device: Device of the detector.
    """
    rows = gather(detect(detector, split, loader, device))
    metrics = [{} if rows is None else evaluate_split(split, rows, detector.config).metrics]
    if dist.is_initialized():
        dist.broadcast_object_list(metrics, src=0)
    return metrics[0]


def detect(
    detector: Detector,
    split: Split,
    loader: DataLoader[Batch],
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Rows:
    """Return the detections in this worker's images of `split`, (N, 7) as in `coco_rows`."""
    detector = folded(detector)
    parts = [np.empty((0, 7))]
    done = 0
    for batch in loader:
        images = batch.images.tolist()
        moved = batch.to(device)
        sizes = moved.targets.sizes
        predictions = detector.predict(
            detector.normalize(moved.pixels, sizes), sizes, moved.original_sizes
        )
        for image, detections in zip(images, predictions, strict=True):
            parts.append(coco_rows(detections, split.numbers[image]))
        done += len(images)
        if progress is not None:
            progress(done)
    return np.concatenate(parts)


def gather(rows: Rows) -> Rows | None:
    """Return the detections of all workers on rank 0, ordered by image; None elsewhere."""
    parts: list[Rows] | None = [rows]
    if dist.is_initialized():
        parts = [rows] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(rows, parts)
    if parts is None:
        return None
    together = np.concatenate(parts)
    # The order must not depend on which worker had which image. The sort is stable, because the
    # order within an image decides between equal scores.
    return together[np.argsort(together[:, 0], kind="stable")]
