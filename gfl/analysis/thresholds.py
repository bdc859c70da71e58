"""Precision and recall over the score, and the score at which to cut each class.

Shapes: S distinct scores of a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gfl.analysis.matches import Integers, Matches

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Precision, recall and F1 of the detections of a class whose scores are at least `score`.

    Attributes:
        score: Distinct scores, descending, (S,).
        kept: Number of these detections, (S,).
        correct: Number of correct ones among them, (S,).
        objects: Number of objects of the class.
    """

    score: Floats
    kept: Integers
    correct: Integers
    objects: int

    @property
    def precision(self) -> Floats:
        """Share of the detections that are correct, (S,)."""
        return self.correct / self.kept

    @property
    def recall(self) -> Floats:
        """Share of the objects that are found, 0 without objects, (S,)."""
        return self.correct / max(self.objects, 1)

    @property
    def f1(self) -> Floats:
        """Harmonic mean of precision and recall, made from counts without rounding, (S,)."""
        return 2 * self.correct / (self.kept + self.objects)


@dataclass(frozen=True)
class WorkingPoint:
    """A score at which to cut a class, with precision, recall and F1 of what is kept."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Goal:
    """What a working point has to reach.

    Attributes:
        kind: `f1` for the best F1; `precision` for the most recall with at least that precision;
            `recall` for the most precision with at least that recall.
        value: Smallest precision or recall, 0 to 1; without a meaning for `f1`.
    """

    kind: Literal["f1", "precision", "recall"] = "f1"
    value: float = 0.0


def parse_goal(text: str) -> Goal:
    """Return the goal that `best_f1`, `precision=0.9` or `recall=0.9` names.

    Raises:
        ValueError: The text names none.
    """
    kind, separator, number = text.partition("=")
    if text == "best_f1":
        return Goal()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if kind not in ("precision", "recall") or not separator or not 0 < value <= 1:
        raise ValueError(
            f"thresholds {text!r}: expected best_f1, precision=SHARE or recall=SHARE, such as "
            "precision=0.9"
        )
    return Goal("precision" if kind == "precision" else "recall", value)


def curve_of(matches: Matches, label: int) -> Curve:
    """Return the curve of a class; detections of equal score are kept or cut together."""
    of_class = matches.label == label
    order = np.argsort(-matches.score[of_class], kind="stable")
    score = matches.score[of_class][order]
    correct = np.cumsum(matches.correct[of_class][order])
    last = np.append(score[1:] != score[:-1], True)[: len(score)]  # last of its equal scores
    objects = int((matches.object_label == label).sum())
    return Curve(
        score=score[last],
        kept=np.flatnonzero(last) + 1,
        correct=correct[last],
        objects=objects,
    )


def working_point(curve: Curve, goal: Goal) -> WorkingPoint | None:
    """Return the point of a curve that reaches `goal` best; None if none does.

    Of equal points, that of the highest score is taken.
    """
    f1 = curve.f1
    match goal.kind:
        case "f1":
            value, allowed = f1, f1 > 0
        case "precision":
            value, allowed = curve.recall, curve.precision >= goal.value
        case "recall":
            value, allowed = curve.precision, curve.recall >= goal.value
    if not curve.objects or not allowed.any():
        return None
    best = int(np.argmax(np.where(allowed, value, -1.0)))
    columns = (curve.score, curve.precision, curve.recall, f1)
    return WorkingPoint(*(float(column[best]) for column in columns))


def working_points(
    matches: Matches, classes: Sequence[str], goal: Goal
) -> dict[str, WorkingPoint | None]:
    """Return the working point of every class, None for a class that cannot reach the goal."""
    return {
        name: working_point(curve_of(matches, label), goal) for label, name in enumerate(classes)
    }
