"""A paper's figures for the points of a sweep, beside ours."""

from collections.abc import Mapping
from dataclasses import dataclass

from gfl_platform.sweeps.analysis.statistics import PointSummary, by_seed, summarize
from gfl_platform.sweeps.formatting import factor, identity
from gfl_platform.sweeps.trials import Point, SweepResults


@dataclass(frozen=True)
class PublishedComparison:
    """A row of the paper's table, and our point.

    Figures are as printed: AP 40.2. The paper's data and ours are not the same, so what compares
    are the differences from the reference, the same row in both.

    Attributes:
        point: Values of the swept keys that the row names.
        reference: Whether the row is the one that differences are from.
        paper: Figures by metric.
        ours: Means over the seeds; empty when no training of the point finished.
        paper_difference: From the reference; of the reference itself 0.
        our_difference: The same, paired over seeds.
        seeds: Pairs in `our_difference`.
    """

    point: Point
    reference: bool
    paper: dict[str, float]
    ours: dict[str, float]
    paper_difference: dict[str, float]
    our_difference: dict[str, float]
    seeds: int


def compare_published(results: SweepResults) -> list[PublishedComparison]:
    """Return the paper's rows with our points; the default's row is the reference, or the first.

    A key that a row does not name has its default's value.
    """
    published = results.sweep.published
    if not published or not published.rows:
        return []
    points = {identity(point.point): point for point in summarize(results)}
    names = [identity({**results.defaults, **row.at}) for row in published.rows]
    default = identity(results.defaults)
    first = names.index(default) if default in names else 0
    reference, mine = published.rows[first], points.get(names[first])
    rows = []
    for number, (row, name) in enumerate(zip(published.rows, names, strict=True)):
        point = points.get(name)
        pairs = _differences(row.figures, point, mine)
        rows.append(
            PublishedComparison(
                point=row.at,
                reference=number == first,
                paper=row.figures,
                ours=_means(row.figures, point),
                paper_difference={
                    metric: value - reference.figures[metric]
                    for metric, value in row.figures.items()
                    if metric in reference.figures
                },
                our_difference={
                    metric: factor(metric) * sum(each.values()) / len(each)
                    for metric, each in pairs.items()
                },
                seeds=max(map(len, pairs.values()), default=0),
            )
        )
    return rows


def _means(metrics: Mapping[str, float], point: PointSummary | None) -> dict[str, float]:
    found = {metric: by_seed(point.trials, metric) if point else {} for metric in metrics}
    return {
        metric: factor(metric) * sum(values.values()) / len(values)
        for metric, values in found.items()
        if values
    }


def _differences(
    metrics: Mapping[str, float], point: PointSummary | None, reference: PointSummary | None
) -> dict[str, dict[int, float]]:
    """Return differences by metric and seed; a metric without a pair is missing."""
    if not point or not reference:
        return {}
    found = {}
    for metric in metrics:
        ours, theirs = by_seed(point.trials, metric), by_seed(reference.trials, metric)
        pairs = {seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()}
        if pairs:
            found[metric] = pairs
    return found
