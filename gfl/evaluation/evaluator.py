"""Evaluation of a detector: all workers detect, and rank 0 measures the gathered detections."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from gfl.config.schema import Config
from gfl.data.dataset import Batch
from gfl.data.split import ImageRecord, Split, Window
from gfl.data.tiles import TileRecords
from gfl.evaluation.coco_eval import evaluate_split
from gfl.model.detector import Detector, folded
from gfl.model.tile_merge import merge_tiles
from gfl.structures import Predictions, Rows, coco_rows


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
    parts = [np.empty((0, 7))]
    for image, predictions in predict_split(detector, loader, device, progress):
        parts.append(coco_rows(predictions, split.numbers[image]))
    return np.concatenate(parts)


def predict_split(
    detector: Detector,
    loader: DataLoader[Batch],
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Predictions]]:
    """Yield the index of each of this worker's images in its split, and its detections.

    The detections of tiles are merged to those of whole images.

    Args:
        detector: The detector, whose mode does not change.
        loader: Loads this worker's images (`EvaluationBatches`).
        device: Device of the detector.
        progress: Called with the number of images that are done, after every batch.
    """
    detector = folded(detector)
    records = loader.dataset.records  # type: ignore[attr-defined]
    whole = _WholeImages(records, detector.config)
    done = 0
    for batch in loader:
        moved = batch.to(device)
        sizes = moved.targets.sizes
        predictions = detector.predict(
            detector.normalize(moved.pixels, sizes), sizes, moved.original_sizes
        )
        for sample, detections in zip(batch.images.tolist(), predictions, strict=True):
            complete = whole.add(sample, detections)
            if complete is not None:
                yield complete
                done += 1
        if progress is not None:
            progress(done)


class _WholeImages:
    """The detections of images from those of their tiles, which follow each other."""

    def __init__(self, records: Sequence[ImageRecord], config: Config) -> None:
        self._records = records
        self._settings = config.postprocess
        self._waiting: list[Predictions] = []
        self._windows: list[Window] = []

    def add(self, sample: int, detections: Predictions) -> tuple[int, Predictions] | None:
        """Return the index and the detections of the image that a sample completes, if it does.

        Args:
            sample: Index of an image or a tile in the records.
            detections: Its detections.
        """
        if not isinstance(self._records, TileRecords):
            return sample, detections
        tile = self._records.tile(sample)
        self._waiting.append(detections.cpu())
        self._windows.append(tile.window)
        if len(self._waiting) < self._records.counts[tile.image]:
            return None
        windows = torch.tensor(self._windows)
        merged = merge_tiles(self._waiting, windows, tile.image_size, self._settings)
        self._waiting, self._windows = [], []
        return tile.image, merged


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
