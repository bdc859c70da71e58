"""COCO average precision of detections.

hotcoco measures. pycocotools, many times slower, is the reference for tests.
Shapes: N detections, T IoU thresholds, R recall thresholds, K classes, A area ranges, M limits on
the detections of an image.
"""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import numpy.typing as npt

from gfl.config.schema import Config
from gfl.data.coco import is_ignored, object_area
from gfl.data.split import Split
from gfl.structures import Rows

Floats = npt.NDArray[np.float64]

IOU_THRESHOLDS = tuple(f"{percent / 100:.2f}" for percent in range(50, 100, 5))

CERTAIN = 0.3
"""Smallest score of the detections that `score_images` counts."""

NO_GROUND_TRUTH = -1.0
"""COCO's value of a statistic without ground truth, such as APl without a large object."""


@dataclass(frozen=True)
class Evaluation:
    """COCO's statistics, `NO_GROUND_TRUTH` where there is none.

    Attributes:
        metrics: Statistics in COCO's order: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100 (one
            for each limit on the detections of an image), ARs, ARm, ARl.
        ap_by_iou: AP at each IoU threshold, "0.50" to "0.95".
        ap_by_class: AP of each class, by name.
    """

    metrics: dict[str, float]
    ap_by_iou: dict[str, float]
    ap_by_class: dict[str, float]


def evaluate_split(
    split: Split, rows: Rows, config: Config, *, official: bool = False
) -> Evaluation:
    """Measure detections on all images of `split`; see `evaluate_detections`."""
    limits = config.evaluation.max_detections
    return evaluate_detections(
        numbered_truth(split), rows, split.numbers, limits, official=official
    )


def evaluate_detections(
    truth: Path | Mapping[str, Any],
    rows: Rows,
    image_ids: Sequence[int],
    max_detections: Sequence[int] = (1, 10, 100),
    *,
    official: bool = False,
) -> Evaluation:
    """Measure detections on some images of a COCO dataset.

    Args:
        truth: The dataset: its JSON file, or the content of one.
        rows: The detections, (N, 7): `gfl.structures.Rows`, or with the ids of `truth` in place of
            numbers and labels. Equal scores are ordered by image, and within an image by row.
        image_ids: Ids of the images to measure.
        max_detections: Limits on the detections of an image and class. Each limit has an AR of its
            own; all other statistics use the largest limit.
        official: Whether to measure with pycocotools instead of hotcoco.
    """
    content = _ground_truth(truth)
    names = {category["id"]: category["name"] for category in content["categories"]}
    limits = sorted(max_detections)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluator = (_pycocotools if official else _hotcoco)(content, rows)
        _match(evaluator, image_ids, limits)
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    return _summarize(precision, recall, [names[key] for key in sorted(names)], limits)


def match_split(split: Split, rows: Rows, config: Config) -> list[dict[str, Any] | None]:
    """Return the matches of detections and objects of `split`: COCO's `evalImgs`."""
    matches: list[dict[str, Any] | None] = match_with_hotcoco(split, rows, config).eval_imgs
    return matches


def match_with_hotcoco(split: Split, rows: Rows, config: Config) -> Any:
    """Return hotcoco's `COCOeval` of detections in `split`, after its matching.

    It numbers annotations from 1 in the order of `numbered_truth`, and detections in that of
    `rows`.
    """
    evaluator = _hotcoco(_ground_truth(numbered_truth(split)), rows)
    _match(evaluator, split.numbers, sorted(config.evaluation.max_detections))
    return evaluator


def score_images(split: Split, rows: Rows, config: Config) -> Floats:
    """Return the F1 score of every image of `split`, (I,), for its certain detections.

    A detection is correct at an IoU of 0.5. An image without objects and detections has 1.
    """
    evaluator = match_with_hotcoco(split, rows[rows[:, 5] >= CERTAIN], config)
    summaries = evaluator.image_diagnostics(iou_thr=0.5)["img_summary"]
    f1 = [summaries[image]["f1"] if image in summaries else 1.0 for image in split.numbers]
    return np.array(f1)


def _match(evaluator: Any, image_ids: Sequence[int], limits: Sequence[int]) -> None:
    evaluator.params.imgIds = list(image_ids)
    evaluator.params.maxDets = list(limits)
    evaluator.evaluate()


def numbered_truth(split: Split) -> dict[str, Any]:
    """Return COCO's ground truth of `split`, with numbers of images and labels in place of ids."""
    truth = split.truth
    number_of = dict(zip(split.image_ids, split.numbers, strict=True))
    label_of = {category: label for label, category in enumerate(split.category_ids)}
    numbers = [number_of.get(identity) for identity in truth.image_ids]
    labels = [label_of.get(identity) for identity, _ in truth.categories]
    columns = (truth.objects[name].tolist() for name in ("image", "category", "bbox", "area"))
    return {
        "images": [{"id": number} for number in split.numbers],
        "categories": [{"id": n, "name": name} for n, name in enumerate(split.classes)],
        "annotations": [
            {
                "image_id": numbers[image],
                "category_id": labels[category],
                "bbox": box,
                "area": area,
                "iscrowd": int(ignored > 0),
            }
            for image, category, box, area, ignored in zip(
                *columns, truth.objects["ignored"].tolist(), strict=True
            )
            if numbers[image] is not None
        ],
    }


def _content(truth: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    return json.loads(truth.read_bytes()) if isinstance(truth, Path) else truth


def _ground_truth(truth: Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a COCO dataset that counts, in a form that both evaluators accept.

    pycocotools needs areas and mistakes a match with the id 0 for none; hotcoco refuses
    segmentations and image sizes of unexpected forms. An object with `ignore` is one of a crowd.
    """
    content = _content(truth)
    annotations = []
    for number, entry in enumerate(content.get("annotations", ()), start=1):
        kept = {key: entry[key] for key in ("image_id", "category_id", "bbox")}
        kept |= {"id": number, "area": object_area(entry)}
        annotations.append(kept | {"iscrowd": int(is_ignored(entry))})
    return {
        "images": [{"id": image["id"]} for image in content["images"]],
        "categories": [{key: c[key] for key in ("id", "name")} for c in content["categories"]],
        "annotations": annotations,
    }


def _hotcoco(truth: dict[str, Any], rows: Rows) -> Any:
    dataset = hotcoco.COCO(truth)
    return hotcoco.COCOeval(dataset, dataset.load_res(rows), "bbox")


def _pycocotools(truth: dict[str, Any], rows: Rows) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset, results = COCO(), COCO()
    dataset.dataset = truth
    # pycocotools' own `loadRes` fails without any detection.
    results.dataset = truth | {
        "annotations": [
            {
                "id": number,
                "image_id": int(image),
                "category_id": int(category),
                "bbox": box,
                "score": score,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, (image, *box, score, category) in enumerate(rows.tolist(), start=1)
        ]
    }
    dataset.createIndex()
    results.createIndex()
    return COCOeval(dataset, results, "bbox")


def _summarize(
    precision: Floats, recall: Floats, classes: Sequence[str], limits: Sequence[int]
) -> Evaluation:
    """Return COCO's averages of precision and recall.

    Args:
        precision: Precision, (T, R, K, A, M); -1 where there is no ground truth.
        recall: Recall, (T, K, A, M); -1 where there is no ground truth.
        classes: Names of the K classes.
        limits: The M limits, the largest last.
    """
    ap, ar = precision[..., -1], recall[..., -1]
    everything = ap[..., 0]  # (T, R, K)
    ap_by_iou = dict(zip(IOU_THRESHOLDS, map(_mean, everything), strict=True))
    areas = tuple(enumerate("sml", start=1))  # area 0 is the range of all sizes
    metrics = {
        "AP": _mean(everything), "AP50": ap_by_iou["0.50"], "AP75": ap_by_iou["0.75"],
        **{f"AP{size}": _mean(ap[..., area]) for area, size in areas},
        **{f"AR{limit}": _mean(recall[:, :, 0, m]) for m, limit in enumerate(limits)},
        **{f"AR{size}": _mean(ar[..., area]) for area, size in areas},
    }  # fmt: skip
    by_class = map(_mean, np.moveaxis(everything, -1, 0))
    return Evaluation(metrics, ap_by_iou, dict(zip(classes, by_class, strict=True)))


def _mean(values: Floats) -> float:
    present = values[values > -1]
    return float(present.mean()) if present.size else NO_GROUND_TRUTH


def format_statistic(value: float, spec: str = ".4f") -> str:
    """Return an AP or AR as text in the format `spec`; a dash without ground truth."""
    return "-" if value == NO_GROUND_TRUTH else format(value, spec)
