"""Everything that the detections of a model on a split tell about it: `analyse(...)`.

Shapes: N detections that count, I images, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gfl.analysis.edges import EdgeErrors, EdgeIntervals, conformal_intervals, edge_errors
from gfl.analysis.error_types import ErrorTypes, error_types, kinds_of_errors
from gfl.analysis.matches import Matches, match_detections
from gfl.analysis.thresholds import Goal, WorkingPoint, working_points
from gfl.config.schema import Config
from gfl.data.split import Split
from gfl.evaluation.coco_eval import (
    CERTAIN,
    Evaluation,
    evaluate_split,
    match_with_hotcoco,
    score_images,
)
from gfl.structures import Rows

Floats = npt.NDArray[np.float64]

OBJECT_COUNTS = ((0, "no object"), (1, "1 object"), (5, "2 to 5"), (20, "6 to 20"))
"""Largest number of objects of an image in a slice, and the slice's name."""

MORE_OBJECTS = "more than 20"
"""Name of the slice of images with more objects."""


@dataclass(frozen=True)
class Reliability:
    """How often detections are correct beside what their scores say.

    Attributes:
        score: Mean score in each tenth of the scores that has detections.
        correct: Share of correct detections (IoU 0.5) in each of them.
        count: Number of detections in each of them.
        error: Expected calibration error: mean distance of both, weighted by the counts.
    """

    score: Floats
    correct: Floats
    count: npt.NDArray[np.int64]
    error: float


@dataclass(frozen=True)
class Analysis:
    """What a model does on a split; matches are at an IoU of 0.5.

    Attributes:
        evaluation: COCO's statistics.
        matches: Detections and objects, matched.
        kinds: Kind of every wrong detection, empty for a correct one, (N,).
        errors: Number and cost of each kind of errors.
        confusion: Number of objects of a class (row) that detections with a score of at least
            `CERTAIN` take for a class (column), (C + 1, C + 1). The last row counts detections
            without an object, the last column objects without a detection.
        reliability: Scores beside shares of correct detections.
        edges: Errors and sigmas of the edges of correct detections.
        intervals: Conformal intervals from all of these edges.
        best_f1: The score at which to cut each class for its best F1.
        image_f1: F1 of every image for detections with a score of at least `CERTAIN`, (I,).
        slices: COCO's statistics of groups of images, by what they are grouped by and group.
    """

    evaluation: Evaluation
    matches: Matches
    kinds: npt.NDArray[np.str_]
    errors: ErrorTypes
    confusion: npt.NDArray[np.uint64]
    reliability: Reliability
    edges: EdgeErrors
    intervals: EdgeIntervals
    best_f1: dict[str, WorkingPoint | None]
    image_f1: Floats
    slices: dict[str, dict[str, dict[str, float]]]

    @property
    def worst_images(self) -> npt.NDArray[np.int64]:
        """Positions of the images in the split, those with the lowest F1 first."""
        return np.argsort(self.image_f1, kind="stable")


def analyse(
    split: Split,
    rows: Rows,
    edge_std: Floats,
    config: Config,
    groups: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> Analysis:
    """Return what the detections of a model in `split` tell about it.

    Args:
        split: The images and their objects.
        rows: The detections of all images, (M, 7).
        edge_std: Standard deviation of the edges of each detection in px, (M, 4).
        config: The configuration of the evaluation.
        groups: Numbers of images by what they are grouped by and group, besides the number of
            objects.
    """
    evaluator = match_with_hotcoco(split, rows, config)
    matches = match_detections(split, rows, config)
    edges = edge_errors(matches, edge_std)
    return Analysis(
        evaluation=evaluate_split(split, rows, config),
        matches=matches,
        kinds=kinds_of_errors(matches),
        errors=error_types(evaluator),
        confusion=evaluator.confusion_matrix(iou_thr=matches.iou, min_score=CERTAIN)["matrix"],
        reliability=_reliability(evaluator.calibration()),
        edges=edges,
        intervals=conformal_intervals(edges.ratio),
        best_f1=working_points(matches, split.classes, Goal()),
        image_f1=score_images(split, rows, config),
        slices=_slices(
            evaluator, {"objects in the image": by_object_count(split), **(groups or {})}
        ),
    )


def by_object_count(split: Split) -> dict[str, list[int]]:
    """Return the numbers of images by how many objects they have."""
    groups: dict[str, list[int]] = {}
    for number, record in zip(split.numbers, split.records, strict=True):
        count = len(record.labels)
        name = next((name for most, name in OBJECT_COUNTS if count <= most), MORE_OBJECTS)
        groups.setdefault(name, []).append(number)
    names = [name for _, name in OBJECT_COUNTS] + [MORE_OBJECTS]
    return {name: groups[name] for name in names if name in groups}


def _slices(
    evaluator: Any, groups: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, dict[str, dict[str, float]]]:
    slices = {}
    for what, members in groups.items():
        statistics = evaluator.slice_by({name: list(images) for name, images in members.items()})
        slices[what] = {
            name: {
                key: value for key, value in statistics[name].items() if isinstance(value, float)
            }
            | {"images": float(len(images))}
            for name, images in members.items()
        }
    return slices


def _reliability(calibration: Mapping[str, Any]) -> Reliability:
    """Return hotcoco's calibration as columns."""
    bins = [tenth for tenth in calibration["bins"] if tenth["count"]]
    return Reliability(
        score=np.array([tenth["avg_confidence"] for tenth in bins]),
        correct=np.array([tenth["avg_accuracy"] for tenth in bins]),
        count=np.array([tenth["count"] for tenth in bins], np.int64),
        error=float(calibration["ece"]),
    )
