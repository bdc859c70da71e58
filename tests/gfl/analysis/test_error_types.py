"""TIDE's kinds of errors: a case of each, and hotcoco's counts on random scenes."""

from collections import Counter

import numpy as np
import pytest

from gfl.analysis.error_types import KINDS, error_types, kinds_of_errors
from gfl.analysis.matches import match_detections
from gfl.config.schema import Config
from gfl.evaluation.coco_eval import match_with_hotcoco
from tests.support.splits import split_of

# Two objects of class a, one of class b, each far from the others.
ONE, TWO, OTHER = (0, 0, 20, 20), (100, 0, 20, 20), (200, 0, 20, 20)
SPLIT = split_of([(1, 3, ONE, 0), (1, 3, TWO, 0), (1, 7, OTHER, 0)], images=1)


@pytest.mark.parametrize(
    ("kind", "box", "label"),
    [
        ("Loc", (10, 0, 20, 20), 0),  # IoU 1/3 with its own class
        ("Cls", OTHER, 0),
        ("Dupe", (1, 0, 20, 20), 0),
        ("Bkg", (300, 300, 20, 20), 0),
        ("Both", (210, 0, 20, 20), 0),  # IoU 1/3 with another class
    ],
)
def test_a_case_of_each_kind(kind, box, label):
    rows = np.array([[0, *ONE, 0.9, 0], [0, *box, 0.8, label]], float)
    found = kinds_of_errors(match_detections(SPLIT, rows, Config()))
    assert found.tolist() == ["", kind]
    errors = error_types(match_with_hotcoco(SPLIT, rows, Config()))
    assert {name: n for name, n in errors.count.items() if name != "Miss"} == Counter(
        {kind: 1} | dict.fromkeys(set(KINDS) - {kind, "Miss"}, 0)
    )
    # What no correction of Cls or Loc would find is missed.
    assert errors.count["Miss"] == 2 - (kind == "Cls")


def test_the_gain_of_a_kind_is_the_ap_without_it():
    """Class a: one of two objects found, and the first detection is of the background."""
    rows = np.array([[0, 300, 300, 20, 20, 0.9, 0], [0, *ONE, 0.8, 0]], float)
    errors = error_types(match_with_hotcoco(SPLIT, rows, Config()))
    # Recall points 0, 0.01, ... 0.5 are reached: 51 of 101, at precision 1/2, or 1 without it.
    assert errors.ap == pytest.approx(51 / 101 / 2 / 2)
    assert errors.gain["Bkg"] == pytest.approx(51 / 101 / 2 - errors.ap)


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_hotcoco(seed):
    generator = np.random.default_rng(seed)
    truth, rows = [], []
    for image in range(1, 9):
        for _ in range(generator.integers(0, 5)):
            box = [*generator.uniform(0, 60, 2), *generator.uniform(10, 40, 2)]
            truth.append((image, int(generator.choice([3, 7])), box, 0))
            for _ in range(generator.integers(0, 4)):
                moved = np.add(box, generator.normal(0, 5, 4)).tolist()
                rows.append([image - 1, *moved, generator.random(), generator.integers(2)])
    split, rows = split_of(truth, images=8), np.array(rows)
    kinds = Counter(kinds_of_errors(match_detections(split, rows, Config())).tolist())
    expected = error_types(match_with_hotcoco(split, rows, Config())).count
    assert {kind: kinds[kind] for kind in KINDS if kind != "Miss"} == {
        kind: count for kind, count in expected.items() if kind != "Miss"
    }
