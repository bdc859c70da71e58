"""The difference between two detectors' AP and its interval, by a paired bootstrap over images.

The same images are drawn with replacement for both detectors (Efron, 1979). hotcoco's `compare`
counts an image that was drawn twice only once, which makes its intervals a fifth too narrow.

Shapes: D detections, T IoU thresholds, I images, S draws.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gfl.config.schema import Config
from gfl.data.split import Split
from gfl.evaluation.coco_eval import Floats, match_split
from gfl.structures import Rows

RECALLS = np.linspace(0, 1, 101)
"""Recalls at which COCO reads the precision."""

DRAWS_AT_ONCE = 50
"""Draws that are computed together."""

CONFIDENCE = 0.95
"""Confidence of the interval of a difference."""

SEED = 0
"""Seed of the draws: the same detections have the same interval."""


@dataclass(frozen=True)
class Gain:
    """The difference between the AP (0 to 1) of two detectors on the same images.

    Attributes:
        ap: Difference of the AP.
        low: Lower end of the difference's interval.
        high: Upper end of the difference's interval.
        by_class: Difference of the AP of each class that has objects, by name.
    """

    ap: float
    low: float
    high: float
    by_class: dict[str, float]

    @property
    def is_noise(self) -> bool:
        """Whether the interval includes zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class _Class:
    """All detections of one class, best first, and the number of objects in each image."""

    images: npt.NDArray[np.intp]  # (D,)
    hits: npt.NDArray[np.bool_]  # (T, D)
    counted: npt.NDArray[np.bool_]  # (T, D): neither in a crowd nor too many
    objects: Floats  # (I,)


def measure_gain(
    split: Split,
    rows: Rows,
    baseline: Rows,
    config: Config,
    *,
    draws: int = 1000,
) -> Gain:
    """Return the difference of the AP of two detectors, with its interval.

    Args:
        split: The images of both detectors, and their ground truths.
        rows: Detections of the one detector, (N, 7), as `gfl.structures.Rows` describes.
        baseline: Detections of the other detector, whose AP is subtracted.
        config: The configuration, whose section `evaluation` counts.
        draws: Number of draws; the interval lies between percentiles of them.
    """
    order = {number: place for place, number in enumerate(split.numbers)}
    both = [
        _by_class(match_split(split, detections, config), order) for detections in (rows, baseline)
    ]
    measured = [_ap_by_class(classes, np.ones((1, len(order)))) for classes in both]
    by_class = {
        split.classes[label]: float(measured[0][label][0] - measured[1][label][0])
        for label in sorted(measured[0])
        if np.isfinite(measured[0][label][0])
    }
    generator = np.random.default_rng(SEED)
    differences: list[Floats] = []
    for start in range(0, draws, DRAWS_AT_ONCE):
        count = min(DRAWS_AT_ONCE, draws - start)
        weights = generator.multinomial(len(order), np.full(len(order), 1 / len(order)), count)
        drawn = [_mean_ap(_ap_by_class(classes, weights.astype(float))) for classes in both]
        differences.append(drawn[0] - drawn[1])
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(np.concatenate(differences), [tail, 100 - tail])
    ap = float((_mean_ap(measured[0]) - _mean_ap(measured[1]))[0])
    return Gain(ap, float(low), float(high), by_class)


def _by_class(
    matches: Iterable[Mapping[str, Any] | None], order: Mapping[int, int]
) -> dict[int, _Class]:
    """Return the matches of all images by class, for objects of all sizes.

    Args:
        matches: Results of COCO's evaluator for each image, class and range of sizes.
        order: Index of each image by its number.
    """
    by_category: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for match in matches:
        if match is not None and match["aRng"][1] >= 1e10 and match["aRng"][0] == 0:
            by_category[match["category_id"]].append(match)
    classes = {}
    for category, parts in by_category.items():
        parts.sort(key=lambda part: order[part["image_id"]])
        scores = np.concatenate([part["dtScores"] for part in parts])
        best_first = np.argsort(-scores, kind="stable")
        matched, ignored = (
            np.concatenate(
                [np.array(part[key], bool).reshape(10, len(part["dtScores"])) for part in parts],
                axis=1,
            )[:, best_first]
            for key in ("dtMatched", "dtIgnore")
        )
        images = np.repeat(
            [order[part["image_id"]] for part in parts], [len(part["dtScores"]) for part in parts]
        )
        objects = np.zeros(len(order))
        for part in parts:
            objects[order[part["image_id"]]] = len(part["gtIgnore"]) - sum(part["gtIgnore"])
        classes[category] = _Class(images[best_first], matched & ~ignored, ~ignored, objects)
    return classes


def _ap_by_class(classes: Mapping[int, _Class], weights: Floats) -> dict[int, Floats]:
    """Return every class's AP, (S,), with images weighted by `weights` (S, I).

    A class without objects has NaN.
    """
    return {category: _class_ap(matches, weights) for category, matches in classes.items()}


def _class_ap(matches: _Class, weights: Floats) -> Floats:
    """Return the AP (S,) over 101 recalls and all thresholds, interpolated as in pycocotools."""
    objects = weights @ matches.objects  # (S,)
    total = np.zeros(len(weights))
    detection_weights = weights[:, matches.images]  # (S, D)
    for hits, counted in zip(matches.hits, matches.counted, strict=True):
        places = np.flatnonzero(hits)
        true = np.cumsum(detection_weights[:, places], axis=1)  # (S, hits)
        detected = np.cumsum(detection_weights * counted, axis=1)[:, places]
        precision = true / (detected + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = true / objects[:, None]
        reached = np.searchsorted(RECALLS, recall, side="right")
        total += (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
    return np.where(objects > 0, total / (len(matches.hits) * len(RECALLS)), np.nan)


def _mean_ap(by_class: Mapping[int, Floats]) -> Floats:
    """Return the mean AP (S,) over the classes that have objects."""
    together = np.stack(list(by_class.values()))
    present = np.isfinite(together)
    return np.where(present, together, 0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
