"""Working thresholds: closed cases, and the definition as a loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfl.analysis.matches import Matches
from gfl.analysis.thresholds import (
    Goal,
    curve_of,
    parse_goal,
    working_point,
    working_points,
)


def matches_of(scored, objects):
    """Return matches of one class from (score, is correct) and the number of objects."""
    found = np.cumsum([correct for _, correct in scored]) - 1
    return Matches(
        iou=0.5,
        detection=np.arange(len(scored)),
        image=np.zeros(len(scored), np.int64),
        label=np.zeros(len(scored), np.int64),
        score=np.array([score for score, _ in scored], float),
        box=np.zeros((len(scored), 4)),
        match=np.array(
            [place if correct else -1 for place, (_, correct) in zip(found, scored, strict=True)],
            np.int64,
        ),
        object_image=np.zeros(objects, np.int64),
        object_label=np.zeros(objects, np.int64),
        object_box=np.zeros((objects, 4)),
    )


FOUR = matches_of([(0.9, True), (0.8, False), (0.8, True), (0.3, False)], objects=4)


def test_equal_scores_are_kept_or_cut_together():
    curve = curve_of(FOUR, 0)
    assert curve.score.tolist() == [0.9, 0.8, 0.3]
    assert curve.precision.tolist() == pytest.approx([1, 2 / 3, 2 / 4])
    assert curve.recall.tolist() == pytest.approx([1 / 4, 2 / 4, 2 / 4])
    assert curve.f1.tolist() == pytest.approx([0.4, 4 / 7, 0.5])


def test_each_goal_has_its_point():
    curve = curve_of(FOUR, 0)
    assert working_point(curve, Goal()).score == 0.8
    assert working_point(curve, Goal("precision", 0.9)).score == 0.9
    assert working_point(curve, Goal("precision", 0.5)).score == 0.8  # 0.3 has no more recall
    assert working_point(curve, Goal("recall", 0.25)).score == 0.9
    assert working_point(curve, Goal("recall", 0.6)) is None


def test_a_class_without_objects_or_detections_has_no_point():
    nothing, unfound = matches_of([(0.9, False)], 0), matches_of([], 3)
    assert working_points(nothing, ["a"], Goal()) == {"a": None}
    assert working_points(unfound, ["a", "b"], Goal()) == {"a": None, "b": None}


detections = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12)


@given(detections, st.integers(0, 3), st.sampled_from([0.2, 0.5, 0.9]))
def test_points_are_those_of_a_loop_over_the_scores(scored, unfound, share):
    scored = [(score / 5, correct) for score, correct in scored]
    objects = sum(correct for _, correct in scored) + unfound
    curve = curve_of(matches_of(scored, objects), 0)
    rows = []
    for score in sorted({score for score, _ in scored}, reverse=True):
        kept = [correct for value, correct in scored if value >= score]
        precision, recall = sum(kept) / len(kept), sum(kept) / max(objects, 1)
        f1 = 2 * sum(kept) / (len(kept) + objects)
        rows.append((score, precision, recall, f1))
    for kind, gained, bounded in (("precision", 2, 1), ("recall", 1, 2), ("f1", 3, None)):
        allowed = [r for r in rows if (r[3] > 0 if bounded is None else r[bounded] >= share)]
        expected = max(allowed, key=lambda r: r[gained]) if allowed and objects else None
        point = working_point(curve, Goal(kind, share))
        assert (point is None) == (expected is None)
        if point is not None:
            assert tuple(vars(point).values()) == pytest.approx(expected)


def test_goals_are_read():
    assert parse_goal("best_f1") == Goal()
    assert parse_goal("precision=0.9") == Goal("precision", 0.9)
    for wrong in ("f1", "precision", "recall=2", "recall=x", "best_f1=3"):
        with pytest.raises(ValueError, match="expected best_f1, precision=SHARE or recall=SHARE"):
            parse_goal(wrong)
