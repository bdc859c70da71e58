"""COCO's result records as arrays, and their AP."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from gfl.config.schema import Config
from gfl.data.split import Split
from gfl.evaluation.coco_eval import evaluate_split
from gfl.structures import Rows


def as_rows(records: Iterable[dict[str, Any]]) -> Rows:
    """Return COCO's result records as `gfl.evaluation.coco_eval` takes them."""
    rows = [[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in records]
    return np.array(rows, dtype=float).reshape(-1, 7)


def average_precision(split: Split, detections: list[dict[str, Any]]) -> float:
    """Return the AP of COCO detection records on all images of `split`."""
    rows = [[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in detections]
    measured = evaluate_split(split, np.array(rows, dtype=float), Config())
    return measured.metrics["AP"]
