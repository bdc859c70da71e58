"""COCO average precision of detections.

hotcoco measures; pycocotools, many times slower, is the referee that must find the same.
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
from gfl.data.split import Split
from gfl.structures import Rows, coco_records

Floats = npt.NDArray[np.float64]

IOU_THRESHOLDS = tuple(f"{percent / 100:.2f}" for percent in range(50, 100, 5))


NO_GROUND_TRUTH = -1.0
"""COCO's value of a statistic over no ground truth: APl of images without a large object, say."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; `NO_GROUND_TRUTH` where there is none.

    Attributes:
        metrics: COCO's statistics in its order: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100
            (one for each limit on the detections of an image), ARs, ARm, ARl.
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
    ids = [record.image_id for record in split.records]
    limits = config.evaluation.max_detections
    return evaluate_detections(split.truth, rows, ids, limits, official=official)


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
        truth: The dataset: its JSON file, or what is in it.
        rows: The detections, (N, 7), as `gfl.structures.Rows` says. Between equal scores, of images
            that of the smaller id goes first, within an image the earlier row.
        image_ids: The images that count.
        max_detections: Of an image and class, the best so many count for the AR of this name, and
            for all else as many as the largest says.
        official: Measure with pycocotools.
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
    """Return which detections hit which objects of `split`: COCO's `evalImgs`."""
    evaluator = _hotcoco(_ground_truth(split.truth), rows)
    ids = [record.image_id for record in split.records]
    _match(evaluator, ids, sorted(config.evaluation.max_detections))
    matches: list[dict[str, Any] | None] = evaluator.eval_imgs
    return matches


def score_images(split: Split, rows: Rows, config: Config, min_score: float = 0.3) -> Floats:
    """Return the F1 score of every image of `split`, (I,), of detections with `min_score` or more.

    A detection is right at an IoU of 0.5. An image without objects and detections has 1.
    """
    evaluator = _hotcoco(_ground_truth(split.truth), rows[rows[:, 5] >= min_score])
    ids = [record.image_id for record in split.records]
    _match(evaluator, ids, sorted(config.evaluation.max_detections))
    found = evaluator.image_diagnostics(iou_thr=0.5)["img_summary"]
    return np.array([found[image]["f1"] if image in found else 1.0 for image in ids])


def _match(evaluator: Any, image_ids: Sequence[int], limits: Sequence[int]) -> None:
    evaluator.params.imgIds = list(image_ids)
    evaluator.params.maxDets = list(limits)
    evaluator.evaluate()


def _ground_truth(truth: Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return what counts of a COCO dataset, in the form that both evaluators understand alike.

    pycocotools needs areas and takes a match with the id 0 for none; hotcoco refuses segmentations
    and image sizes that are not as it expects them.
    """
    content = json.loads(truth.read_bytes()) if isinstance(truth, Path) else truth
    annotations = []
    for number, entry in enumerate(content.get("annotations", ()), start=1):
        area, (_, _, width, height) = entry.get("area"), entry["bbox"]
        kept = {key: entry[key] for key in ("image_id", "category_id", "bbox")}
        kept |= {"id": number, "area": width * height if area is None else area}
        annotations.append(kept | {"iscrowd": int(entry.get("iscrowd") or 0)})
    return {
        "images": [{"id": image["id"]} for image in content["images"]],
        "categories": [{key: c[key] for key in ("id", "name")} for c in content["categories"]],
        "annotations": annotations,
    }


def _hotcoco(truth: dict[str, Any], rows: Rows) -> Any:
    known = hotcoco.COCO(truth)
    return hotcoco.COCOeval(known, known.load_res(rows), "bbox")


def _pycocotools(truth: dict[str, Any], rows: Rows) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    known, found = COCO(), COCO()
    known.dataset = truth
    # pycocotools' own `loadRes` fails without any detection.
    found.dataset = truth | {
        "annotations": [
            record | {"id": number, "area": record["bbox"][2] * record["bbox"][3], "iscrowd": 0}
            for number, record in enumerate(coco_records(rows), start=1)
        ]
    }
    known.createIndex()
    found.createIndex()
    return COCOeval(known, found, "bbox")


def _summarize(
    precision: Floats, recall: Floats, classes: Sequence[str], limits: Sequence[int]
) -> Evaluation:
    """Average as COCO does.

    Args:
        precision: (T, R, K, A, M); -1 where there is no ground truth.
        recall: (T, K, A, M); likewise.
        classes: Their names.
        limits: The M limits, the largest last.
    """
    ap, ar = precision[..., -1], recall[..., -1]
    everything = ap[..., 0]  # (T, R, K)
    ap_by_iou = dict(zip(IOU_THRESHOLDS, map(_mean, everything), strict=True))
    areas = tuple(enumerate("sml", start=1))  # after the range of all sizes
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
    """Return an AP or AR for a reader: formatted as `spec` says, a dash without ground truth."""
    return "-" if value == NO_GROUND_TRUTH else format(value, spec)
