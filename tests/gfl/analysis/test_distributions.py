"""Forms of edge distributions."""

import numpy as np

from gfl.analysis.distributions import Example, examples, second_peak

NARROW = [0, 0.1, 0.8, 0.1, 0, 0]
WIDE = [0.1, 0.2, 0.3, 0.3, 0.1, 0]
TWO = [0, 0.5, 0.1, 0, 0.4, 0]
CUT = [0, 0, 0, 0.1, 0.3, 0.6]


def test_second_peaks():
    peaks = second_peak(np.array([[NARROW, WIDE, TWO, CUT]]))
    np.testing.assert_allclose(peaks, [[0, 0, 0.8, 0]])


def test_each_form_has_its_example():
    distributions = np.array([[NARROW, NARROW, NARROW, WIDE], [TWO, NARROW, NARROW, CUT]])
    assert examples(distributions, 3) == {
        "narrow": [Example(0, 0), Example(1, 1)],
        "wide": [Example(0, 3), Example(1, 1)],
        "two peaks": [Example(1, 0)],
        "cut at reg_max": [Example(1, 3)],
    }
