"""Matches of detections and objects: COCO's, in every case that it treats apart."""

import numpy as np
import pytest

from gfl.analysis.matches import match_detections
from gfl.config.schema import Config
from tests.support.splits import split_of

SPLIT = split_of(
    [
        (1, 3, (0, 0, 10, 10), 0),
        (1, 7, (20, 20, 50, 50), 1),
        (2, 7, (20, 20, 50, 50), 0),
    ],
    images=2,
)
ROWS = np.array(
    [
        [0, 0, 0, 10, 9.5, 0.9, 0],  # on the first object
        [0, 25, 25, 10, 10, 0.8, 1],  # on the ignored one
        [0, 1, 1, 10, 10, 0.7, 0],  # a duplicate
        [1, 20, 20, 50, 50, 0.6, 0],  # of another class
        [1, 20, 20, 50, 26, 0.5, 1],  # at an IoU of 0.52
    ]
)


def test_what_counts_is_matched_once():
    matches = match_detections(SPLIT, ROWS, Config())
    assert matches.detection.tolist() == [0, 2, 3, 4]
    assert matches.match.tolist() == [0, -1, -1, 1]
    assert matches.correct.tolist() == [True, False, False, True]
    assert matches.missed.tolist() == []
    assert matches.image.tolist() == [0, 0, 1, 1]
    assert matches.label.tolist() == [0, 0, 0, 1]
    assert matches.object_image.tolist() == [0, 1]
    assert matches.object_label.tolist() == [0, 1]
    assert matches.box[0].tolist() == [0, 0, 10, 9.5]
    assert matches.object_box[1].tolist() == [20, 20, 70, 70]


def test_a_larger_iou_matches_less():
    matches = match_detections(SPLIT, ROWS, Config(), iou=0.55)
    assert matches.match.tolist() == [0, -1, -1, -1]
    assert matches.missed.tolist() == [1]


def test_without_detections_every_object_is_missed():
    matches = match_detections(SPLIT, np.empty((0, 7)), Config())
    assert len(matches.detection) == 0
    assert matches.missed.tolist() == [0, 1]


@pytest.mark.parametrize("limit", [1, 2])
def test_detections_beyond_the_limit_of_an_image_do_not_count(limit):
    config = Config().model_copy(
        update={"evaluation": Config().evaluation.model_copy(update={"max_detections": (limit,)})}
    )
    rows = np.array([[0, 0, 0, 10, 10, score, 0] for score in (0.9, 0.8, 0.7)])
    assert len(match_detections(SPLIT, rows, config).detection) == limit
