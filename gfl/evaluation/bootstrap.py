"""Better, or luckier? The difference between two detectors' AP, by a paired bootstrap over images.

Images are drawn with replacement, the same for both (Efron, 1979). hotcoco's `compare` counts an
image that was drawn twice only once, which makes its intervals a fifth too narrow.
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
DRAWS_AT_ONCE = 50


@dataclass(frozen=True)
class Gain:
    """AP of a detector less another's on the same images, in 0 to 1.

    Attributes:
        ap: The difference.
        low: Lower end of its interval.
        high: Upper end.
        by_class: The difference for each class that has objects, by name.
    """

    ap: float
    low: float
    high: float
    by_class: dict[str, float]

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class _Class:
    """All detections of one class, best first, and how many objects each image has."""

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
    confidence: float = 0.95,
    seed: int = 0,
) -> Gain:
    """Return by how much the AP of detections `rows` exceeds that of `baseline`, and how surely.

    Args:
        split: The images of both, and their ground truths.
        rows: Detections, (N, 7), as `gfl.structures.Rows` says.
        baseline: Those of the other detector.
        config: Its section `evaluation` counts.
        draws: How often images are drawn.
        confidence: Of the interval, the percentiles of the differences drawn.
        seed: Of the draws.
    """
    order = {record.image_id: place for place, record in enumerate(split.records)}
    both = [_by_class(match_split(split, found, config), order) for found in (rows, baseline)]
    once = [_ap_by_class(each, np.ones((1, len(order)))) for each in both]
    names = dict(zip(split.category_ids, split.classes, strict=True))
    by_class = {
        names[category]: float(once[0][category][0] - once[1][category][0])
        for category in sorted(once[0])
        if np.isfinite(once[0][category][0])
    }
    generator = np.random.default_rng(seed)
    differences: list[Floats] = []
    for start in range(0, draws, DRAWS_AT_ONCE):
        count = min(DRAWS_AT_ONCE, draws - start)
        weights = generator.multinomial(len(order), np.full(len(order), 1 / len(order)), count)
        drawn = [_mean_ap(_ap_by_class(each, weights.astype(float))) for each in both]
        differences.append(drawn[0] - drawn[1])
    tail = 50 * (1 - confidence)
    low, high = np.nanpercentile(np.concatenate(differences), [tail, 100 - tail])
    ap = float((_mean_ap(once[0]) - _mean_ap(once[1]))[0])
    return Gain(ap, float(low), float(high), by_class)


def _by_class(
    matches: Iterable[Mapping[str, Any] | None], order: Mapping[int, int]
) -> dict[int, _Class]:
    """Gather what COCO's evaluator says of each image and class, over all sizes of objects."""
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for match in matches:
        if match is not None and match["aRng"][1] >= 1e10 and match["aRng"][0] == 0:
            found[match["category_id"]].append(match)
    classes = {}
    for category, parts in found.items():
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
    """Return every class's AP, (S,), with images weighted by `weights`, (S, I); NaN: no objects."""
    return {category: _class_ap(each, weights) for category, each in classes.items()}


def _class_ap(found: _Class, weights: Floats) -> Floats:
    """Return the AP over 101 recalls and all thresholds, as pycocotools interpolates it."""
    objects = weights @ found.objects  # (S,)
    total = np.zeros(len(weights))
    of_detections = weights[:, found.images]  # (S, D)
    for hits, counted in zip(found.hits, found.counted, strict=True):
        places = np.flatnonzero(hits)
        true = np.cumsum(of_detections[:, places], axis=1)  # (S, hits)
        said = np.cumsum(of_detections * counted, axis=1)[:, places]
        precision = true / (said + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = true / objects[:, None]
        reached = np.searchsorted(RECALLS, recall, side="right")
        total += (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
    return np.where(objects > 0, total / (len(found.hits) * len(RECALLS)), np.nan)


def _mean_ap(by_class: Mapping[int, Floats]) -> Floats:
    """Return the mean over the classes that have objects, (S,)."""
    together = np.stack(list(by_class.values()))
    present = np.isfinite(together)
    return np.where(present, together, 0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
