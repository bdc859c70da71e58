"""Evaluation of a detector: the detections of all workers, gathered, measured once."""

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
    tell: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Return the COCO statistics over `split`, the same on every worker.

    Args:
        detector: Its mode is left as it was.
        split: The images and their ground truths.
        loader: This worker's share of them (`EvaluationBatches`).
        device: Where the detector is.
        tell: Is told after every batch how many images this worker has done.
    """
    rows = gather(detect(detector, split, loader, device, tell))
    metrics = [{} if rows is None else evaluate_split(split, rows, detector.config).metrics]
    if dist.is_initialized():
        dist.broadcast_object_list(metrics, src=0)
    return metrics[0]


def detect(
    detector: Detector,
    split: Split,
    loader: DataLoader[Batch],
    device: torch.device,
    tell: Callable[[int], None] | None = None,
) -> Rows:
    """Return the detections of this worker's share of `split`, as `coco_rows` has them."""
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
        for image, found in zip(images, predictions, strict=True):
            parts.append(coco_rows(found, split.records[image].image_id, split.category_ids))
        done += len(images)
        if tell is not None:
            tell(done)
    return np.concatenate(parts)


def gather(rows: Rows) -> Rows | None:
    """Return the detections of all workers on rank 0, in the order of image ids, None elsewhere."""
    parts: list[Rows] | None = [rows]
    if dist.is_initialized():
        parts = [rows] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(rows, parts)
    if parts is None:
        return None
    together = np.concatenate(parts)
    # Which worker had which image must not show. Within an image the order stays: it decides
    # between equal scores.
    return together[np.argsort(together[:, 0], kind="stable")]
