"""Whether other values than the default's are better: paired over seeds, with an interval.

Two trainings with one seed see the same images in the same order from the same initial weights, so
their difference varies less than either figure does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, nan
from statistics import fmean
from typing import Any

import pandas as pd

from gfl.evaluation import protocol
from gfl_platform.sweeps.analysis.statistics import (
    Cost,
    Identical,
    PointSummary,
    PublishedComparison,
    by_seed,
    compare_published,
    cost,
    identical_trials,
    parameter_importance,
    pareto_front,
    ranking,
    summarize,
)
from gfl_platform.sweeps.formatting import (
    axis_name,
    identity,
    label,
    point_label,
    shown,
    unit_of_difference,
)
from gfl_platform.sweeps.trials import SweepResults, Trial, direction

CONFIDENCE = 0.95
"""Family-wise confidence: of all intervals of one verdict together."""


class Kind(StrEnum):
    """What can be said of a default, or of another value against it."""

    BEST = "best"
    BETTER = "better than the default"
    WORSE = "worse than the default"
    NOISE = "within noise of the default"
    TOO_FEW = "too few seeds to say"
    UNTRIED = "the default was not tried"
    UNFINISHED = "no training with the default finished"
    ALONE = "nothing to compare with"


@dataclass(frozen=True)
class Comparison:
    """A value of a key, or a whole point, against the default.

    Attributes:
        differences: Value minus default by seed, averaged over the settings of the other keys that
            finished with both.
        interval: Interval of the mean difference; None when there are fewer than two seeds.
    """

    value: Any
    name: str
    differences: dict[int, float]
    interval: tuple[float, float] | None
    kind: Kind

    @property
    def mean(self) -> float:
        """Mean difference over the seeds."""
        return fmean(self.differences.values())


@dataclass(frozen=True)
class Verdict:
    """What a sweep says of the default of a key, or of all keys when whole points are compared.

    Attributes:
        text: The verdict with the value, the difference and its interval.
        comparisons: Comparisons of all values that have a pair, the best first.
    """

    keys: tuple[str, ...]
    default: str
    kind: Kind
    text: str
    comparisons: tuple[Comparison, ...] = ()


def judge(results: SweepResults) -> list[Verdict]:
    """Return a verdict on each key that has a list of values, then one on the default as a whole.

    The last verdict compares the best point with the default, all keys together. It also stands for
    the keys with a range, as no two of their trials share a value. A sweep of one list has none.
    """
    space = results.sweep.space
    listed = [key for key, ranges in space.items() if ranges.values is not None]
    verdicts = [_judge_key(results, key) for key in listed]
    if len(space) > len(listed) or len(space) > 1:
        verdicts.append(_judge_best(results))
    return verdicts


def t_interval(differences: Sequence[float], comparisons: int = 1) -> tuple[float, float]:
    """Return Student's interval of a mean, at `CONFIDENCE` for a family of comparisons.

    Args:
        differences: At least two differences.
        comparisons: Number of comparisons in the family (Bonferroni).
    """
    from scipy import stats

    mean = fmean(differences)
    quantile = 1 - (1 - CONFIDENCE) / (2 * comparisons)
    margin = stats.t.ppf(quantile, len(differences) - 1) * stats.sem(differences)
    return mean - float(margin), mean + float(margin)


def _judge_key(results: SweepResults, key: str) -> Verdict:
    default = results.defaults.get(key)
    subject = (key,), label(default)
    trials = results.frame().assign(
        value=[identity(trial.point.get(key)) for trial in results.trials],
        setting=[identity({**trial.point, key: None}) for trial in results.trials],
    )
    finished = [trial for trial in results.trials if trial.state == "finished"]
    values = {identity(trial.point.get(key)): trial.point.get(key) for trial in finished}
    if identity(default) not in values:
        tried = identity(default) in set(trials["value"])
        kind = Kind.UNFINISHED if tried else Kind.UNTRIED
        return Verdict(*subject, kind, kind)
    others = [value for name, value in values.items() if name != identity(default)]
    if not others:
        text = f"{Kind.ALONE}: no training with another value finished"
        return Verdict(*subject, Kind.ALONE, text)
    named = [(value, label(value)) for value in others]
    comparisons = _compare(results, trials, default, named)
    return Verdict(*subject, *_conclude(results, comparisons, len(others)), comparisons)


def _judge_best(results: SweepResults) -> Verdict:
    subject = tuple(results.sweep.space), point_label(results.defaults)
    trials = results.frame()
    points = ranking(results, summarize(results))
    others = [(p.point, point_label(p.point)) for p in points if not p.default]
    if len(others) == len(points):
        tried = identity(results.defaults) in set(trials["point"])
        kind = Kind.UNFINISHED if tried else Kind.UNTRIED
        return Verdict(*subject, kind, kind)
    if not others:
        return Verdict(*subject, Kind.ALONE, f"{Kind.ALONE}: no other point finished")
    trials = trials.assign(value=trials["point"], setting="")
    comparisons = _compare(results, trials, results.defaults, others)
    if points[0].default:
        return Verdict(*subject, *_conclude(results, comparisons, len(others)), comparisons)
    best = next((entry for entry in comparisons if entry.value is points[0].point), None)
    if not best:
        text = f"{Kind.TOO_FEW}: the best point shares none"
        return Verdict(*subject, Kind.TOO_FEW, text, comparisons)
    text = f"{best.kind}: {describe(best, results.sweep.objectives[0])}"
    return Verdict(*subject, best.kind, text, comparisons)


def _mean_differences(differences: pd.DataFrame) -> pd.Series:
    """Return the mean difference by seed, each over the same settings of the other keys.

    Of settings with different seeds those count that have the most: a seed that is averaged over
    other settings than the next would add their difference to that of the seeds.

    Args:
        differences: Value minus default, with a row for each setting of the other keys and a column
            for each seed; NaN where a pair is missing.
    """
    is_paired = differences.notna()
    # Sorted by the number of settings, of which `max` takes the first that has the most seeds.
    seeds = max(is_paired.value_counts().index, key=sum)
    return differences[(is_paired == list(seeds)).all(axis="columns")].mean().dropna()


def _compare(
    results: SweepResults, trials: pd.DataFrame, default: Any, others: Sequence[tuple[Any, str]]
) -> tuple[Comparison, ...]:
    """Return the comparisons of the values that have a pair with the default, the best first.

    Args:
        results: The sweep.
        trials: The trials with two more columns: `value`, the identity of what is compared, and
            `setting`, the identity of all else.
        default: The default value.
        others: Each other value and its name.
    """
    objective = results.sweep.objectives[0]
    figures = by_seed(trials, objective, ["value", "setting"])
    of_default = figures.loc[identity(default)]
    pairs = [_mean_differences(figures.loc[identity(value)] - of_default) for value, _ in others]
    family = sum(len(paired) > 1 for paired in pairs)
    sign = direction(objective)
    comparisons = []
    for (value, name), paired in zip(others, pairs, strict=True):
        if paired.empty:
            continue
        interval = t_interval(paired.tolist(), family) if len(paired) > 1 else None
        kind = _kind_of(interval, sign)
        comparisons.append(Comparison(value, name, paired.to_dict(), interval, kind))
    return tuple(sorted(comparisons, key=lambda comparison: -sign * comparison.mean))


def _kind_of(interval: tuple[float, float] | None, sign: int) -> Kind:
    """Return what the interval of a difference says of a metric with this `direction`."""
    if interval is None:
        return Kind.TOO_FEW
    low, high = sorted(sign * end for end in interval)
    if low > 0:
        return Kind.BETTER
    return Kind.WORSE if high < 0 else Kind.NOISE


def _conclude(
    results: SweepResults, comparisons: Sequence[Comparison], others: int
) -> tuple[Kind, str]:
    """Return the verdict of comparisons, the best first, with `others` values, and its text."""
    objective = results.sweep.objectives[0]
    if not comparisons:
        text = "no two trainings with one seed differ in this alone"
        return Kind.TOO_FEW, f"{Kind.TOO_FEW}: {text}"
    better = next((entry for entry in comparisons if entry.kind is Kind.BETTER), None)
    if better:
        return Kind.BETTER, f"{Kind.BETTER}: {describe(better, objective)}"
    # The best of those that cannot be told from the default decides.
    undecided = (entry for entry in comparisons if entry.kind is not Kind.WORSE)
    nearest = next(undecided, comparisons[0])
    missing = others - sum(entry.interval is not None for entry in comparisons)
    rest = f"; {missing} of {others} others have too few seeds" if missing else ""
    text = describe(nearest, objective)
    if nearest.kind is Kind.WORSE and not rest:
        return Kind.BEST, f"{Kind.BEST}: no other is near; the nearest, {text}"
    if nearest.kind is Kind.NOISE:
        return Kind.NOISE, f"{Kind.NOISE}: {text}{rest}"
    return Kind.TOO_FEW, f"{Kind.TOO_FEW}: {text}"


def describe(comparison: Comparison, objective: str) -> str:
    """Return a comparison for a reader: `2.5 by +0.42 [+0.10, +0.74] AP points, 3 seeds`."""
    seeds = len(comparison.differences)
    interval = ""
    if comparison.interval:
        low, high = (shown(objective, end, sign=True) for end in comparison.interval)
        interval = f" [{low}, {high}]"
    difference = shown(objective, comparison.mean, sign=True)
    plural = "s" if seeds > 1 else ""
    unit = unit_of_difference(objective)
    return f"{comparison.name} by {difference}{interval} {unit}, {seeds} seed{plural}"


@dataclass(frozen=True)
class Analysis:
    """All statistics of a sweep.

    Attributes:
        results: The sweep and its trials.
        points: Points with a finished trial, the best first; those without the objective last.
        ranked: How many of `points` have the objective.
        verdicts: Verdicts on the defaults.
        importance: Share of the variance by key, or None when there are too few trials.
        front: Points that no other beats in both AP and FPS.
        cost: What the sweep used.
        identical: Groups of trials that should differ and do not.
        published: The paper's rows beside our points.
        unfinished: Trials that are in no comparison.
    """

    results: SweepResults
    points: list[PointSummary]
    ranked: int
    verdicts: list[Verdict]
    importance: dict[str, float] | None
    front: list[PointSummary]
    cost: Cost
    identical: list[Identical]
    published: list[PublishedComparison]
    unfinished: list[Trial]

    @property
    def objective(self) -> str:
        """The first objective."""
        return self.results.sweep.objectives[0]

    @property
    def best(self) -> PointSummary | None:
        """The point with the best mean of the first objective."""
        return self.points[0] if self.ranked else None

    @property
    def best_trial(self) -> Trial | None:
        """The best trial of the best point."""
        if not self.best:
            return None
        sign, objective = direction(self.objective), self.objective
        trials = [
            trial for trial in self.best.trials if isfinite(trial.figures.get(objective, nan))
        ]
        return max(trials, key=lambda trial: sign * trial.figures[objective])


def analyse(results: SweepResults) -> Analysis:
    """Compute all statistics of a sweep."""
    points = summarize(results)
    ranked = ranking(results, points)
    objective = results.sweep.objectives[0]
    rest = [point for point in points if objective not in point.figures]
    return Analysis(
        results=results,
        points=[*ranked, *rest],
        ranked=len(ranked),
        verdicts=judge(results),
        importance=parameter_importance(results),
        front=pareto_front(points),
        cost=cost(results),
        identical=identical_trials(results),
        published=compare_published(results),
        unfinished=[trial for trial in results.trials if trial.state != "finished"],
    )


def warnings_of(analysis: Analysis) -> list[str]:
    """Return what a reader has to know before believing a figure, one sentence each."""
    warnings = []
    running = analysis.cost.states.get("running", 0)
    if running:
        warnings.append(f"{running} of the trials had not ended when this was written.")
    if not analysis.points:
        warnings.append("No trial has finished: nothing can be compared.")
    elif max(len(point.seeds) for point in analysis.points) == 1:
        warnings.append("Every point has one seed: differences may be chance; set sweep.seeds.")
    elif analysis.best and len(analysis.best.seeds) == 1:
        warnings.append("The best point has one seed.")
    if analysis.points and not analysis.ranked:
        warnings.append(f"No finished trial has the objective, {axis_name(analysis.objective)}.")
    for group in analysis.identical:
        points = " and ".join(point_label(trial.point) for trial in group.trials[:3])
        more = f" and {len(group.trials) - 3} more" if len(group.trials) > 3 else ""
        warnings.append(
            f"Trainings with seed {group.seed} are identical bit for bit at {points}{more}: "
            f"has {', '.join(group.keys)} any effect?"
        )
    protocols = [trial.protocol for trial in analysis.results.trials if trial.protocol]
    changes = {
        change for other in protocols for change in protocol.differences(protocols[0], other)
    }
    if changes:
        warnings.append(f"FPS do not compare where protocols differ: {', '.join(sorted(changes))}.")
    return warnings


def cost_line(analysis: Analysis) -> str:
    """Return what the sweep used, and what stopping early saved, in one line."""
    cost, device = analysis.cost, analysis.results.device
    line = (
        f"{cost.device_hours:.3g} {device}-hours; the search trained {cost.epochs} of "
        f"{cost.full_epochs} epochs"
    )
    if cost.saved:
        line += f", stopping early saved {cost.saved:.0%} of them"
    if cost.finalist_trials:
        line += (
            f"; finalists: {cost.finalist_trials} trials, {cost.finalist_epochs} epochs, "
            f"{cost.finalist_device_hours:.3g} {device}-hours of these"
        )
    return line


def figure_of(item: PointSummary | Trial, metric: str) -> str:
    """Return a figure of a point, mean ± sd, or of a trial; a dash if it has none."""
    if isinstance(item, Trial):
        return shown(metric, item.figures[metric]) if metric in item.figures else "-"
    spread = item.figures.get(metric)
    if not spread:
        return "-"
    deviation = f" ± {shown(metric, spread.sd)}" if spread.sd is not None else ""
    return f"{shown(metric, spread.mean)}{deviation}"
