r"""How far edges lie from the truth, and how well the learned distributions tell it.

A distribution over an edge's position has a standard deviation sigma (`edge_std`). It is a good
measure of uncertainty if large errors come with large sigmas (rank correlation), and if errors are
as large as sigmas say (calibration).

Split-conformal prediction (Vovk et al., 2005; Lei et al., JASA 2018) makes intervals of it that
hold without an assumption on the distributions. Over n edges of held-out images, the ratio
|error| / sigma has the quantile q at rank ceil((n + 1) * level). A new edge lies within q * sigma
of its prediction with at least that probability, if its image is like the held-out ones.

Shapes: N detections that match an object; edges are left, top, right, bottom.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np
import numpy.typing as npt

from gfl.analysis.matches import Matches

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LEVELS = tuple(percent / 100 for percent in range(50, 100))
"""Probabilities for which intervals are kept."""

SMALLEST_SIGMA_PX = 1e-3
"""Sigma below which an edge counts as this uncertain, so that ratios stay finite."""


@dataclass(frozen=True)
class EdgeErrors:
    """Edges of correct detections, beside the truth.

    Attributes:
        error: Predicted minus true position in px, (N, 4).
        sigma: Standard deviation of the learned distribution in px, (N, 4).
        label: Class of every detection, (N,).
        image: Number of every detection's image, (N,).
        area: Area of every detection's object in px, (N,).
    """

    error: Floats
    sigma: Floats
    label: Integers
    image: Integers
    area: Floats

    def __len__(self) -> int:
        return len(self.error)

    @property
    def ratio(self) -> Floats:
        """Size of the error in sigmas, (N, 4)."""
        return np.abs(self.error) / np.maximum(self.sigma, SMALLEST_SIGMA_PX)

    def select(self, keep: npt.NDArray[np.bool_]) -> "EdgeErrors":
        """Return the detections under the mask `keep`, (N,)."""
        return EdgeErrors(*(column[keep] for column in vars(self).values()))


def edge_errors(matches: Matches, edge_std: Floats) -> EdgeErrors:
    """Return the edges of correct detections.

    Args:
        matches: The matches.
        edge_std: Standard deviation of the edges of all detections in px, (M, 4), in the order of
            their rows.
    """
    correct = matches.correct
    truth = matches.object_box[matches.match[correct]]
    sides = truth[:, 2:] - truth[:, :2]
    return EdgeErrors(
        error=matches.box[correct] - truth,
        sigma=edge_std[matches.detection[correct]],
        label=matches.label[correct],
        image=matches.image[correct],
        area=sides.prod(axis=1),
    )


@dataclass(frozen=True)
class Calibration:
    """Errors beside sigmas for a group of edges.

    Attributes:
        edges: Number of edges.
        error: Root of the mean squared error in px.
        sigma: Root of the mean squared sigma in px.
        rank_correlation: Spearman's correlation of |error| and sigma; NaN if either is constant.
    """

    edges: int
    error: float
    sigma: float
    rank_correlation: float


def calibrate(errors: EdgeErrors) -> Calibration:
    """Return how well the sigmas of some detections tell their errors."""
    from scipy.stats import spearmanr

    size, sigma = np.abs(errors.error).ravel(), errors.sigma.ravel()
    constant = not size.size or np.ptp(size) == 0 or np.ptp(sigma) == 0
    return Calibration(
        edges=size.size,
        error=float(np.sqrt(np.mean(size**2))) if size.size else float("nan"),
        sigma=float(np.sqrt(np.mean(sigma**2))) if size.size else float("nan"),
        rank_correlation=float("nan") if constant else float(spearmanr(size, sigma).statistic),
    )


@dataclass(frozen=True)
class EdgeIntervals:
    """Conformal intervals of edges: an edge lies within `quantiles[level]` sigmas.

    Attributes:
        edges: Number of edges that the quantiles come from.
        quantiles: Sigmas on either side of an edge, by level; infinite where too few edges were
            held out to promise the level.
    """

    edges: int
    quantiles: Mapping[float, float]

    def width(self, level: float) -> float:
        """Return the number of sigmas on either side of an edge for a probability.

        Raises:
            ValueError: No interval is kept for the probability.
        """
        kept = {round(known, 2): quantile for known, quantile in self.quantiles.items()}
        if round(level, 4) not in kept:
            raise ValueError(
                f"edge interval of {level!r}: expected a multiple of 0.01 from {min(kept):.2f} to "
                f"{max(kept):.2f}"
            )
        return kept[round(level, 4)]


def conformal_intervals(ratios: Floats, levels: Sequence[float] = LEVELS) -> EdgeIntervals:
    """Return intervals from the ratios |error| / sigma of held-out edges, of any shape."""
    ordered = np.sort(ratios, axis=None)
    count = ordered.size
    ranks = {level: ceil(round((count + 1) * level, 9)) for level in levels}
    return EdgeIntervals(
        edges=count,
        quantiles={
            level: float(ordered[rank - 1]) if 1 <= rank <= count else inf
            for level, rank in ranks.items()
        },
    )


def coverage(intervals: EdgeIntervals, errors: EdgeErrors, level: float) -> float:
    """Return the share of edges that lie within their intervals."""
    return float((errors.ratio <= intervals.width(level)).mean())


@dataclass(frozen=True)
class IntervalCheck:
    """Intervals that were made from half of the images and tried on the other half, many times.

    Attributes:
        coverage: Mean share of edges within their intervals.
        lowest: Smallest share of any half.
        highest: Largest share of any half.
        width_px: Median width of an interval in px.
        unscaled_px: Width of an interval in px that is the same for every edge, without sigmas.
    """

    coverage: float
    lowest: float
    highest: float
    width_px: float
    unscaled_px: float


def interval_check(
    errors: EdgeErrors, level: float, halves: int = 200, seed: int = 0
) -> IntervalCheck | None:
    """Return what intervals of a probability cover on images that did not make them.

    None with too few images or edges to promise the probability.
    """
    images = np.unique(errors.image)
    generator = np.random.default_rng(seed)
    shares, quantiles, unscaled = [], [], []
    for _ in range(halves):
        chosen = generator.permutation(images)[: len(images) // 2]
        half = np.isin(errors.image, chosen)
        if half.all() or not half.any():
            return None
        intervals = conformal_intervals(errors.select(half).ratio, (level,))
        if intervals.width(level) == inf:
            return None
        shares.append(coverage(intervals, errors.select(~half), level))
        quantiles.append(intervals.width(level))
        sizes = np.abs(errors.select(half).error)
        unscaled.append(conformal_intervals(sizes, (level,)).width(level))
    width = 2 * np.median(np.maximum(errors.sigma, SMALLEST_SIGMA_PX)) * np.mean(quantiles)
    return IntervalCheck(
        coverage=float(np.mean(shares)),
        lowest=min(shares),
        highest=max(shares),
        width_px=float(width),
        unscaled_px=float(2 * np.mean(unscaled)),
    )
