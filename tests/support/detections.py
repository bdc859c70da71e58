"""COCO's result records as arrays, and their AP."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from gfl.config.schema import Config
from gfl.data.split import Split
from gfl.evaluation.coco_eval import evaluate_split
from gfl.structures import Rows


def as_rows(records: Iterable[dict[str, Any]]) -> Rows:
    """Return COCO's result records as `evaluate_detections` takes them."""
    rows = [[d["image_id"], *d["bbox"], d["score"], d["category_id"]] for d in records]
    return np.array(rows, dtype=float).reshape(-1, 7)


def rows_on(split: Split, records: Iterable[dict[str, Any]]) -> Rows:
    """Return COCO's result records of images in `split` as `gfl.structures.Rows`."""
    number_of = dict(zip(split.image_ids, split.numbers, strict=True))
    numbered = (
        record
        | {
            "image_id": number_of[record["image_id"]],
            "category_id": split.category_ids.index(record["category_id"]),
        }
        for record in records
    )
    return as_rows(numbered)


def average_precision(split: Split, detections: list[dict[str, Any]]) -> float:
    """Return the AP of COCO detection records on all images of `split`."""
    return evaluate_split(split, rows_on(split, detections), Config()).metrics["AP"]
