"""What the trials of a sweep say together: points over their seeds, the best, the cost.

Only finished trials are compared: the figures of one that was stopped are those of fewer epochs.
"""

import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt
from typing import TYPE_CHECKING, Any

from gfl.evaluation.coco_eval import NO_GROUND_TRUTH
from gfl_platform.config import RangeConfig
from gfl_platform.sweeps.formatting import distinct, identity, is_number
from gfl_platform.sweeps.trials import Point, SweepResults, Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
from gfl_platform.sweeps.formatting import factor

METRICS = ("AP", "AP50", "AP75", "fps")
"""Summarised of every point, besides the objectives."""

EPOCHS_KEY = "schedule.epochs"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean and sample standard deviation, which one seed does not have."""

    mean: float
    sd: float | None
    seeds: int


@dataclass(frozen=True)
class PointSummary:
    """The finished trials of a point.

    Attributes:
        point: Values of the swept keys.
        default: Whether they are those of the configuration itself.
        trials: All of its finished trials.
        figures: By metric; one that no trial has is missing.
        lost: Trials of it that diverged or failed, and are in no figure.
    """

    point: Point
    default: bool
    trials: tuple[Trial, ...]
    figures: dict[str, Spread]
    lost: int = 0

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the finished trials."""
        return tuple(sorted({trial.seed for trial in self.trials}))


def spread(values: Iterable[float]) -> Spread | None:
    """Return the mean and the sample standard deviation, or None of no values."""
    found = list(values)
    if not found:
        return None
    mean = fsum(found) / len(found)
    if len(found) == 1:
        return Spread(mean, None, 1)
    squares = fsum((value - mean) ** 2 for value in found)
    return Spread(mean, sqrt(squares / (len(found) - 1)), len(found))


def by_seed(trials: Iterable[Trial], metric: str) -> dict[int, float]:
    """Return a figure by seed; trials with the same seed are averaged.

    NaN is left out, and so is an AP or AR without any ground truth.
    """
    found = defaultdict(list)
    for trial in trials:
        value = trial.figures.get(metric)
        if value is not None and isfinite(value) and value != NO_GROUND_TRUTH:
            found[trial.seed].append(value)
    return {seed: fsum(values) / len(values) for seed, values in sorted(found.items())}


def summarize(results: SweepResults) -> list[PointSummary]:
    """Return the points with a finished trial, in the order of their start."""
    groups: dict[str, list[Trial]] = defaultdict(list)
    lost: Counter[str] = Counter()
    for trial in results.trials:
        if trial.state == "finished":
            groups[identity(trial.point)].append(trial)
        lost[identity(trial.point)] += trial.state in ("nan", "failed")
    default = identity(results.defaults)
    metrics = dict.fromkeys((*results.sweep.objectives, *METRICS))
    summaries = []
    for name, trials in groups.items():
        spreads = {metric: spread(by_seed(trials, metric).values()) for metric in metrics}
        figures = {metric: found for metric, found in spreads.items() if found}
        summaries.append(
            PointSummary(trials[0].point, name == default, tuple(trials), figures, lost[name])
        )
    return summaries


def seed_count(point: PointSummary) -> str:
    """Return how many seeds a point has, and how many of its trials are in no figure."""
    lost = f"; {point.lost} diverged or failed" if point.lost else ""
    return f"{len(point.seeds)}{lost}"


def unfinished(results: SweepResults) -> list[Trial]:
    """Return the trials that are left out of every comparison."""
    return [trial for trial in results.trials if trial.state != "finished"]


def direction(metric: str) -> int:
    """Return 1 for a figure of which more is better, else -1."""
    return -1 if metric == "latency_ms" else 1


def ranking(results: SweepResults, points: Sequence[PointSummary]) -> list[PointSummary]:
    """Return the points by the mean of the first objective, the best first.

    Once some have several seeds, those of one seed come after them: the best of many single draws
    is a lucky one.
    """
    objective = results.sweep.objectives[0]
    known = [point for point in points if objective in point.figures]

    def key(point: PointSummary) -> tuple[bool, float]:
        found = point.figures[objective]
        return found.seeds == 1, -direction(objective) * found.mean

    return sorted(known, key=key)


def pareto_front(points: Sequence[PointSummary]) -> list[PointSummary]:
    """Return the points that no other beats in both mean AP and mean FPS, the fastest last."""
    known = [point for point in points if {"AP", "fps"} <= set(point.figures)]
    ordered = sorted(known, key=lambda p: (-p.figures["AP"].mean, -p.figures["fps"].mean))
    front: list[PointSummary] = []
    for point in ordered:
        last = front[-1].figures if front else None
        ap, fps = point.figures["AP"].mean, point.figures["fps"].mean
        if not last or fps > last["fps"].mean or (last["AP"].mean, last["fps"].mean) == (ap, fps):
            front.append(point)
    return front


@dataclass(frozen=True)
class Cost:
    """What a sweep used.

    Attributes:
        states: Trials by how they ended.
        device_hours: Of all trials.
        epochs: Trained by the search.
        full_epochs: What the search would have trained, had every trial gone to its last epoch.
        saved: Share of `full_epochs` that the scheduler spared, by stopping trials early.
        finalist_trials: Trials of other seeds of the best points.
        finalist_epochs: Trained by them.
        finalist_device_hours: Of them, within `device_hours`.
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

    def full(trial: Trial) -> int:
        return int(trial.point.get(EPOCHS_KEY, results.epochs))

    def hours(trials: Iterable[Trial]) -> float:
        return fsum(trial.seconds * trial.devices for trial in trials) / 3600

    search = [trial for trial in results.trials if trial.stage == "search"]
    finalists = [trial for trial in results.trials if trial.stage == "finalists"]
    stopped = [trial for trial in search if trial.state == "stopped early"]
    full_epochs = sum(map(full, search))
    spared = sum(full(trial) - trial.epochs for trial in stopped)
    return Cost(
        states=dict(Counter(trial.state for trial in results.trials)),
        device_hours=hours(results.trials),
        epochs=sum(trial.epochs for trial in search),
        full_epochs=full_epochs,
        saved=spared / full_epochs if full_epochs else 0.0,
        finalist_trials=len(finalists),
        finalist_epochs=sum(trial.epochs for trial in finalists),
        finalist_device_hours=hours(finalists),
    )


@dataclass(frozen=True)
class Identical:
    """Trials of different points whose curves are the same bit for bit.

    Attributes:
        seed: Of all of them.
        keys: In which they differ, and which had no effect.
        trials: At least two.
    """

    seed: int
    keys: tuple[str, ...]
    trials: tuple[Trial, ...]


def identical_trials(results: SweepResults) -> list[Identical]:
    """Return groups of finished trials with one seed and one curve, but different points.

    Curves that never leave zero are no evidence and are left out.
    """
    groups: dict[Any, list[Trial]] = defaultdict(list)
    for trial in results.trials:
        if trial.state == "finished" and any(ap for _, ap in trial.curve):
            curve = tuple((epoch, float(ap).hex()) for epoch, ap in trial.curve)
            groups[trial.seed, curve].append(trial)
    found = []
    for (seed, _), trials in groups.items():
        keys = differing_keys([trial.point for trial in trials])
        if keys:
            found.append(Identical(seed, keys, tuple(trials)))
    return found


def differing_keys(points: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the keys that do not have the same value in all of the points."""
    keys = dict.fromkeys(key for point in points for key in point)
    return tuple(key for key in keys if len(distinct(point.get(key) for point in points)) > 1)


FEWEST_TRIALS = 4


def parameter_importance(results: SweepResults) -> dict[str, float] | None:
    """Return the share of the first objective's variance by key, the greatest first.

    Shares add up to 1; a key with one value in all finished trials has 0.

    Returns:
        None when fewer than four trials finished, or when their figures are all alike.
    """
    objective = results.sweep.objectives[0]
    trials = [trial for trial in results.trials if trial.state == "finished"]
    trials = [trial for trial in trials if isfinite(trial.figures.get(objective, float("nan")))]
    figures = [trial.figures[objective] for trial in trials]
    columns = {key: [trial.point.get(key) for trial in trials] for key in results.sweep.space}
    varied = {key: values for key, values in columns.items() if len(distinct(values)) > 1}
    if len(trials) < FEWEST_TRIALS or len(set(figures)) < 2 or not varied:
        return None
    encoded = {key: _encode(results.sweep.space[key], values) for key, values in varied.items()}
    found = dict.fromkeys(columns, 0.0) | _evaluate(encoded, figures, direction(objective))
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _encode(asked: RangeConfig, values: Sequence[Any]) -> tuple[list[Any], "BaseDistribution"]:
    """Return values and their distribution as Optuna takes them.

    A list of numbers becomes their ranks: an order, without the gaps' widths as weights. Any other
    list becomes texts, for to Optuna True is 1.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if asked.bounds and all(map(is_number, values)):
        # The default is trained, too, and may be beyond the range.
        low, high = min(*values, asked.bounds[0]), max(*values, asked.bounds[1])
        if asked.int_uniform and all(float(value).is_integer() for value in values):
            return [int(value) for value in values], IntDistribution(int(low), int(high))
        log = asked.log_uniform is not None and low > 0
        return [float(value) for value in values], FloatDistribution(low, high, log=log)
    names = [identity(value) for value in distinct(values)]
    if all(map(is_number, values)):
        return [names.index(identity(v)) for v in values], IntDistribution(0, len(names) - 1)
    return [identity(value) for value in values], CategoricalDistribution(names)


def _evaluate(
    encoded: dict[str, tuple[list[Any], "BaseDistribution"]], figures: Sequence[float], sign: int
) -> dict[str, float]:
    logging.getLogger("optuna").setLevel(logging.WARNING)
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    distributions = {key: distribution for key, (_, distribution) in encoded.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize" if sign > 0 else "minimize")
        for number, value in enumerate(figures):
            params = {key: values[number] for key, (values, _) in encoded.items()}
            trial = optuna.create_trial(params=params, distributions=distributions, value=value)
            study.add_trial(trial)
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


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
