"""Statistics over the trials of a sweep: points over their seeds, ranking, Pareto front, cost.

Only finished trials are compared: the figures of a stopped trial belong to fewer epochs.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from gfl_platform.config import RangeConfig
from gfl_platform.sweeps.formatting import distinct, factor, identity, is_number
from gfl_platform.sweeps.trials import Point, SweepResults, Trial, direction

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

METRICS = ("AP", "AP50", "AP75", "fps")
"""Metrics that are summarised for every point, besides the objectives."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a figure over seeds; one seed has no deviation."""

    mean: float
    sd: float | None
    seeds: int


@dataclass(frozen=True)
class PointSummary:
    """The finished trials of one point.

    Attributes:
        default: Whether the point is that of the configuration itself.
        figures: Spread over the seeds by metric; a metric that no trial has is missing.
        lost: Number of the point's trials that diverged or failed and are in no figure.
    """

    point: Point
    default: bool
    trials: tuple[Trial, ...]
    figures: dict[str, Spread]
    lost: int

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the finished trials."""
        return tuple(sorted({trial.seed for trial in self.trials}))


def by_seed(trials: pd.DataFrame, metric: str, groups: Sequence[str] = ("point",)) -> pd.DataFrame:
    """Return a metric of the finished trials, with a row for each point and a column for each seed.

    Trials of one point with the same seed are averaged. NaN stands where there is no figure.

    Args:
        trials: The trials, as `SweepResults.frame` gives them.
        metric: Name of the metric.
        groups: Names of the columns whose combinations have the rows.
    """
    finished = trials[trials["state"] == "finished"].reindex(columns=[*groups, "seed", metric])
    return finished.groupby([*groups, "seed"])[metric].mean().unstack("seed")


def spread(figures: pd.Series) -> Spread | None:
    """Return the spread of a point's figures, one for each seed; None if all of them are NaN."""
    known = figures.dropna()
    if known.empty:
        return None
    sd = float(known.std()) if len(known) > 1 else None
    return Spread(float(known.mean()), sd, len(known))


def summarize(results: SweepResults) -> list[PointSummary]:
    """Return the points that have a finished trial, in the order of their start."""
    frame = results.frame()
    default = identity(results.defaults)
    lost = frame["point"][frame["state"].isin(("nan", "failed"))].value_counts()
    metrics = dict.fromkeys((*results.sweep.objectives, *METRICS))
    tables = {metric: by_seed(frame, metric) for metric in metrics}
    summaries = []
    for name, rows in frame[frame["state"] == "finished"].groupby("point", sort=False):
        trials = tuple(results.trials[row] for row in rows.index)
        spreads = {metric: spread(table.loc[name]) for metric, table in tables.items()}
        figures = {metric: figure for metric, figure in spreads.items() if figure}
        summaries.append(
            PointSummary(trials[0].point, name == default, trials, figures, int(lost.get(name, 0)))
        )
    return summaries


def seed_count(point: PointSummary) -> str:
    """Return how many seeds a point has, and how many of its trials are in no figure."""
    lost = f"; {point.lost} diverged or failed" if point.lost else ""
    return f"{len(point.seeds)}{lost}"


def ranking(results: SweepResults, points: Sequence[PointSummary]) -> list[PointSummary]:
    """Return the points that have the first objective by its mean, the best first.

    Once some points have several seeds, those of one seed come after them: the best of many single
    draws is a lucky one.
    """
    objective = results.sweep.objectives[0]

    def key(point: PointSummary) -> tuple[bool, float]:
        figure = point.figures[objective]
        return figure.seeds == 1, -direction(objective) * figure.mean

    return sorted((point for point in points if objective in point.figures), key=key)


def pareto_front(points: Sequence[PointSummary]) -> list[PointSummary]:
    """Return the points that no other beats in both mean AP and mean FPS, the fastest last."""
    known = [point for point in points if {"AP", "fps"} <= point.figures.keys()]
    pairs = [(point.figures["AP"].mean, point.figures["fps"].mean) for point in known]
    means = pd.DataFrame(pairs, columns=["AP", "fps"])
    front = []
    for row, mean in means.sort_values(["AP", "fps"], ascending=False).iterrows():
        better = (means >= mean).all(axis="columns") & (means != mean).any(axis="columns")
        if not better.any():
            front.append(known[row])
    return front


@dataclass(frozen=True)
class Cost:
    """What a sweep used; `epochs` are those of the search.

    Attributes:
        states: Number of trials by how they ended.
        device_hours: Hours of all trials, times the devices that each held.
        full_epochs: Epochs of the search if every trial had gone to its last one.
        saved: Share of `full_epochs` that the scheduler spared by stopping trials early.
    """

    states: dict[str, int]
    device_hours: float
    epochs: int
    full_epochs: int
    saved: float
    finalist_trials: int
    finalist_epochs: int
    finalist_device_hours: float


def cost(results: SweepResults) -> Cost:
    """Add up what the trials used, those that failed included."""
    frame = results.frame()
    search = frame[frame["stage"] == "search"]
    finalists = frame[frame["stage"] == "finalists"]
    stopped = search[search["state"] == "stopped early"]
    full_epochs = int(search["full_epochs"].sum())
    spared = int((stopped["full_epochs"] - stopped["epochs"]).sum())
    return Cost(
        states=frame["state"].value_counts(sort=False).to_dict(),
        device_hours=float(frame["device_seconds"].sum()) / 3600,
        epochs=int(search["epochs"].sum()),
        full_epochs=full_epochs,
        saved=spared / full_epochs if full_epochs else 0.0,
        finalist_trials=len(finalists),
        finalist_epochs=int(finalists["epochs"].sum()),
        finalist_device_hours=float(finalists["device_seconds"].sum()) / 3600,
    )


@dataclass(frozen=True)
class Identical:
    """Trials of one seed whose curves are the same bit for bit, though their `keys` differ."""

    seed: int
    keys: tuple[str, ...]
    trials: tuple[Trial, ...]


def identical_trials(results: SweepResults) -> list[Identical]:
    """Return groups of finished trials with one seed and one curve, but different points.

    Curves that never leave zero are no evidence and are left out.
    """
    groups: dict[tuple[int, str], list[Trial]] = defaultdict(list)
    for trial in results.trials:
        if trial.state == "finished" and any(value for _, value in trial.curve):
            groups[trial.seed, repr(trial.curve)].append(trial)
    identical = []
    for (seed, _), trials in groups.items():
        keys = differing_keys([trial.point for trial in trials])
        if keys:
            identical.append(Identical(seed, keys, tuple(trials)))
    return identical


def differing_keys(points: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the keys that do not have the same value in all of the points."""
    keys = dict.fromkeys(key for point in points for key in point)
    return tuple(key for key in keys if len(distinct(point.get(key) for point in points)) > 1)


FEWEST_TRIALS = 4
"""Finished trials that an importance needs at least."""


def parameter_importance(results: SweepResults) -> dict[str, float] | None:
    """Return the share of the first objective's variance by key, the greatest first.

    Shares add up to 1; a key with one value in all finished trials has 0.

    Returns:
        None when fewer than four trials finished, or when their figures are all alike.
    """
    objective = results.sweep.objectives[0]
    frame = results.frame()
    figures = frame[objective][frame["state"] == "finished"].dropna()
    points = [results.trials[row].point for row in figures.index]
    varied = differing_keys(points)
    if len(points) < FEWEST_TRIALS or figures.nunique() < 2 or not varied:
        return None
    columns = {
        key: _encode(ranges, [point.get(key) for point in points])
        for key, ranges in results.sweep.space.items()
        if key in varied
    }
    shares = dict.fromkeys(results.sweep.space, 0.0) | _evaluate(columns, figures.tolist())
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def _encode(ranges: RangeConfig, values: Sequence[Any]) -> tuple[list[Any], "BaseDistribution"]:
    """Return the values of a key and their distribution in the form that Optuna takes.

    A list of numbers becomes their ranks: an order, without the gaps' widths as weights. Any other
    list becomes texts, because Optuna takes True for 1.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if ranges.bounds and all(map(is_number, values)):
        # The default is trained, too, and may be beyond the range.
        low, high = min(*values, ranges.bounds[0]), max(*values, ranges.bounds[1])
        if ranges.int_uniform and all(float(value).is_integer() for value in values):
            return [int(value) for value in values], IntDistribution(int(low), int(high))
        log = ranges.log_uniform is not None and low > 0
        return [float(value) for value in values], FloatDistribution(low, high, log=log)
    names = [identity(value) for value in distinct(values)]
    if all(map(is_number, values)):
        ranks = [names.index(identity(value)) for value in values]
        return ranks, IntDistribution(0, len(names) - 1)
    return [identity(value) for value in values], CategoricalDistribution(names)


def _evaluate(
    columns: dict[str, tuple[list[Any], "BaseDistribution"]], figures: Sequence[float]
) -> dict[str, float]:
    """Return each key's share of the variance of the figures (fANOVA)."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    distributions = {key: distribution for key, (_, distribution) in columns.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study()
        for row, figure in enumerate(figures):
            params = {key: values[row] for key, (values, _) in columns.items()}
            trial = optuna.create_trial(params=params, distributions=distributions, value=figure)
            study.add_trial(trial)
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


@dataclass(frozen=True)
class PublishedComparison:
    """One row of the paper's table, and our point; figures by metric as printed: AP 40.2.

    The paper's data and ours are not the same, so what compares are the differences from the
    reference, the same row in both.

    Attributes:
        ours: Means over the seeds; empty when no training of the point finished.
        our_difference: Differences from the reference, paired over `seeds` seeds.
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
    names = [identity({**results.defaults, **row.at}) for row in published.rows]
    default = identity(results.defaults)
    first = names.index(default) if default in names else 0
    reference = published.rows[first].figures
    frame = results.frame()
    metrics = dict.fromkeys(metric for row in published.rows for metric in row.figures)
    tables = {metric: factor(metric) * by_seed(frame, metric).reindex(names) for metric in metrics}
    comparisons = []
    for number, row in enumerate(published.rows):
        ours = {metric: tables[metric].iloc[number].dropna() for metric in row.figures}
        pairs = {
            metric: (figures - tables[metric].iloc[first]).dropna()
            for metric, figures in ours.items()
        }
        comparisons.append(
            PublishedComparison(
                point=row.at,
                reference=number == first,
                paper=row.figures,
                ours=_means(ours),
                paper_difference={
                    metric: figure - reference[metric]
                    for metric, figure in row.figures.items()
                    if metric in reference
                },
                our_difference=_means(pairs),
                seeds=max(map(len, pairs.values()), default=0),
            )
        )
    return comparisons


def _means(figures: Mapping[str, pd.Series]) -> dict[str, float]:
    return {metric: float(series.mean()) for metric, series in figures.items() if len(series)}
