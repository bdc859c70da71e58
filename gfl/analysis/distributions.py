"""Examples of learned edge distributions: narrow, wide, with two peaks, cut at `reg_max`.

Shapes: N detections, R bins.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SECOND_PEAK = 0.4
"""Smallest height of a second peak, as a share of the highest."""

LAST_BIN = 0.1
"""Smallest probability of the last bin of a distribution that `reg_max` cuts."""

FORMS = {
    "narrow": "the edge is certain",
    "wide": "the edge is uncertain",
    "two peaks": "the edge is at one of two places",
    "cut at reg_max": "the edge may lie beyond the last bin",
}


@dataclass(frozen=True)
class Example:
    """An edge: position of its detection, and of the edge among left, top, right, bottom."""

    detection: int
    edge: int


def examples(distributions: Floats, count: int) -> dict[str, list[Example]]:
    """Return the clearest examples of each form, at most one of each detection.

    Args:
        distributions: Probabilities of the bins of every edge, (N, 4, R).
        count: Largest number of examples of each form.
    """
    bins = np.arange(distributions.shape[2])
    mean = distributions @ bins
    spread = np.sqrt(np.maximum(distributions @ bins**2 - mean**2, 0))  # (N, 4)
    second, last = second_peak(distributions), distributions[..., -1]
    # The sum of a distribution cut at the end tells nothing else, and wide ones may have two peaks.
    is_cut, has_two = last >= LAST_BIN, second >= SECOND_PEAK
    single = ~is_cut & ~has_two
    order = {
        "narrow": np.where(single, -spread, -np.inf),
        "wide": np.where(single, spread, -np.inf),
        "two peaks": np.where(has_two & ~is_cut, second, -np.inf),
        "cut at reg_max": np.where(is_cut, last, -np.inf),
    }
    return {form: _best(merit, count) for form, merit in order.items()}


def second_peak(distributions: Floats) -> Floats:
    """Return the height of the second highest peak as a share of the highest, (N, 4).

    Peaks are bins that are higher than both neighbours, and not next to each other.
    """
    padded = np.pad(distributions, ((0, 0), (0, 0), (1, 1)))
    middle = padded[..., 1:-1]
    is_peak = (middle > padded[..., :-2]) & (middle >= padded[..., 2:])
    heights = np.sort(np.where(is_peak, middle, 0), axis=2)
    return heights[..., -2] / heights[..., -1]


def _best(merit: Floats, count: int) -> list[Example]:
    """Return the edges with the largest merits that are finite, one of each detection."""
    edge = merit.argmax(axis=1)
    best = merit.max(axis=1)
    order = np.argsort(-best, kind="stable")[:count]
    return [Example(int(n), int(edge[n])) for n in order if np.isfinite(best[n])]
