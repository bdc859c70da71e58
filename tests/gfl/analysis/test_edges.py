"""Errors of edges, their calibration, and intervals that cover what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfl.analysis.edges import (
    EdgeErrors,
    calibrate,
    conformal_intervals,
    coverage,
    edge_errors,
)
from gfl.analysis.matches import match_detections
from gfl.config.schema import Config
from tests.support.splits import split_of


def errors_of(error, sigma):
    """Return detections of one class with these errors and sigmas, (N, 4)."""
    count = len(error)
    zeros = np.zeros(count, np.int64)
    return EdgeErrors(np.asarray(error), np.asarray(sigma), zeros, np.arange(count), zeros + 1.0)


def test_errors_are_those_of_correct_detections():
    split = split_of([(1, 3, (10, 20, 30, 40), 0)], images=1)
    rows = np.array([[0, 50, 50, 9, 9, 0.9, 0], [0, 11, 18, 30, 43, 0.8, 0]])
    edge_std = np.array([[9.0, 9, 9, 9], [1, 2, 3, 4]])
    errors = edge_errors(match_detections(split, rows, Config()), edge_std)
    assert errors.error.tolist() == [[1, -2, 1, 1]]
    assert errors.sigma.tolist() == [[1, 2, 3, 4]]
    assert errors.area.tolist() == [1200]
    assert errors.ratio.tolist() == [[1, 1, 1 / 3, 1 / 4]]


def test_the_quantile_is_the_one_of_split_conformal_prediction():
    """Of 9 ratios, rank ceil(10 * level) is the bound; ten per cent need the largest."""
    intervals = conformal_intervals(np.arange(1.0, 10.0), levels=(0.5, 0.8, 0.9, 0.95))
    assert [intervals.width(level) for level in (0.5, 0.8, 0.9)] == [5, 8, 9]
    assert intervals.width(0.95) == float("inf")
    with pytest.raises(ValueError, match=r"edge interval of 0\.85"):
        intervals.width(0.85)


@given(st.integers(1, 60), st.integers(50, 99))
def test_a_new_edge_is_covered_as_often_as_promised(count, percent):
    """Of count + 1 exchangeable ratios, any may be the new one: the share covered is exact."""
    ratios = np.random.default_rng(count).permutation(np.arange(count + 1.0))
    level = percent / 100
    covered = [
        ratios[new] <= conformal_intervals(np.delete(ratios, new), (level,)).width(level)
        for new in range(count + 1)
    ]
    assert np.mean(covered) >= level - 1e-12
    assert np.mean(covered) <= level + 1 / (count + 1) + 1e-12 or count < 1 / (1 - level)


def test_coverage_on_other_images_is_near_the_level():
    """Errors that are no multiple of a normal one, with sigmas that are wrong by a factor."""
    generator = np.random.default_rng(3)
    sigma = generator.uniform(0.5, 20, (4000, 4))
    errors = errors_of(sigma * generator.laplace(0, 0.3, (4000, 4)), sigma)
    shares = []
    for _ in range(50):
        half = generator.permutation(4000) < 2000
        intervals = conformal_intervals(errors.select(half).ratio)
        shares.append(coverage(intervals, errors.select(~half), 0.9))
    assert 0.88 < min(shares) <= max(shares) < 0.92


def test_calibration_of_sigmas_that_are_right_and_of_constant_ones():
    generator = np.random.default_rng(4)
    sigma = generator.uniform(1, 9, (5000, 4))
    right = calibrate(errors_of(sigma * generator.normal(size=(5000, 4)), sigma))
    assert right.edges == 20000
    assert right.error == pytest.approx(right.sigma, rel=0.02)
    assert 0.3 < right.rank_correlation < 0.6
    constant = calibrate(errors_of(sigma, np.ones((5000, 4))))
    assert np.isnan(constant.rank_correlation)
    assert np.isnan(calibrate(errors_of(np.empty((0, 4)), np.empty((0, 4)))).error)
