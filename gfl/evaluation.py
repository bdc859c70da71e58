"""COCO average precision: predictions of all workers, gathered, evaluated once by pycocotools."""

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader

from gfl.data.coco import CocoSplit
from gfl.data.loading import Batch
from gfl.detector import Detector
from gfl.postprocess import Predictions

STATISTICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
"""The twelve numbers, in the order of pycocotools."""

Detection = dict[str, Any]
"""COCO's record: image_id, category_id, bbox (`xywh` in px), score."""


def evaluate(
    detector: Detector,
    split: CocoSplit,
    loader: DataLoader[Batch],
    device: torch.device,
    tell: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Return the twelve COCO statistics over `split`, the same on every worker.

    Args:
        detector: Its mode is left as it was.
        split: The images and their ground truths.
        loader: This worker's share of them (`EvaluationBatches`).
        device: Where the detector is.
        tell: Is told after every batch how many images this worker has done.
    """
    detections = gather(detect(detector, split, loader, device, tell))
    statistics = [coco_statistics(split, detections) if detections is not None else {}]
    if dist.is_initialized():
        dist.broadcast_object_list(statistics, src=0)
    return statistics[0]


def detect(
    detector: Detector,
    split: CocoSplit,
    loader: DataLoader[Batch],
    device: torch.device,
    tell: Callable[[int], None] | None = None,
) -> list[Detection]:
    """Return the detections of this worker's share of `split`."""
    detections: list[Detection] = []
    done = 0
    for batch in loader:
        images = batch.images.tolist()
        moved = batch.to(device)
        sizes = moved.targets.sizes
        predictions = detector.predict(
            detector.normalize(moved.pixels, sizes), sizes, moved.original_sizes
        )
        for image, found in zip(images, predictions, strict=True):
            detections += coco_records(found, split.records[image].image_id, split.category_ids)
        done += len(images)
        if tell is not None:
            tell(done)
    return detections


def coco_records(
    predictions: Predictions, image_id: int, category_ids: Sequence[int]
) -> list[Detection]:
    """Return `predictions` of one image as COCO detection records."""
    corner, far = predictions.boxes.split(2, dim=1)
    xywh = torch.cat([corner, far - corner], dim=1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in zip(
            xywh, predictions.scores.tolist(), predictions.labels.tolist(), strict=True
        )
    ]


def gather(detections: list[Detection]) -> list[Detection] | None:
    """Return the detections of all workers on rank 0, None elsewhere."""
    if not dist.is_initialized():
        return detections
    gathered: list[list[Detection]] | None = None
    if dist.get_rank() == 0:
        gathered = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(detections, gathered)
    return None if gathered is None else [d for part in gathered for d in part]


def coco_statistics(split: CocoSplit, detections: Sequence[Detection]) -> dict[str, float]:
    """Return the twelve statistics of `detections`; -1 where there is no ground truth."""
    ids = [record.image_id for record in split.records]
    return evaluate_detections(split.annotations, detections, ids)


def evaluate_detections(
    annotations: Path, detections: Sequence[Detection], image_ids: Sequence[int]
) -> dict[str, float]:
    """Return the twelve COCO box statistics of `detections` on `image_ids` of a COCO JSON file."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO(str(annotations))
        # pycocotools' own `loadRes` fails without any detection.
        found = COCO()
        found.dataset = {
            "images": truth.dataset["images"],
            "categories": truth.dataset["categories"],
            "annotations": [
                {**d, "id": number, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
                # Ties between scores go by order, which must not depend on the workers.
                for number, d in enumerate(sorted(detections, key=lambda d: d["image_id"]), start=1)
            ],
        }
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATISTICS, map(float, evaluation.stats), strict=True))
