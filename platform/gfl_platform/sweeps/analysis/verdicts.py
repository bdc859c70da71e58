"""Whether other values than the default's are better: paired over seeds, with an interval.

Two trainings with one seed see the same images in the same order from the same initial weights, so
their difference varies less than either figure does.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, nan, sqrt
from typing import Any, Final, Literal

from gfl.evaluation.protocol import differences
from gfl_platform.sweeps.analysis.statistics import (
    Cost,
    Identical,
    PointSummary,
    PublishedComparison,
    by_seed,
    compare_published,
    cost,
    direction,
    identical_trials,
    parameter_importance,
    pareto_front,
    ranking,
    spread,
    summarize,
    unfinished,
)
from gfl_platform.sweeps.formatting import (
    axis_name,
    identity,
    label,
    point_label,
    shown,
    unit_of_difference,
)
from gfl_platform.sweeps.trials import SweepResults, Trial

CONFIDENCE = 0.95
"""Family-wise: of all intervals of one verdict together."""

Kind = Literal[
    "best",
    "better than the default",
    "worse than the default",
    "within noise of the default",
    "too few seeds to say",
    "the default was not tried",
    "no training with the default finished",
    "nothing to compare with",
]

BEST: Final = "best"

BETTER: Final = "better than the default"

WORSE: Final = "worse than the default"

NOISE: Final = "within noise of the default"

TOO_FEW: Final = "too few seeds to say"

UNTRIED: Final = "the default was not tried"

UNFINISHED: Final = "no training with the default finished"

ALONE: Final = "nothing to compare with"


@dataclass(frozen=True)
class Comparison:
    """A value, or a point, against the default.

    Attributes:
        value: Of the key, or of all keys by their name.
        name: The value for a reader.
        differences: By seed, value minus default, averaged over the settings of the other keys
            that finished with both.
        interval: Of the mean difference; None of fewer than two seeds.
        kind: What the interval says.
    """

    value: Any
    name: str
    differences: dict[int, float]
    interval: tuple[float, float] | None
    kind: Kind

    @property
    def mean(self) -> float:
        """Mean difference over the seeds."""
        return fsum(self.differences.values()) / len(self.differences)


@dataclass(frozen=True)
class Verdict:
    """What a sweep says of a key's default.

    Attributes:
        keys: One key, or all when whole points are compared.
        default: Its value, for a reader.
        kind: The verdict; `best` says that every other value is worse than the default.
        text: The same with the value, the difference and its interval.
        comparisons: Those that have a pair, the best first.
    """

    keys: tuple[str, ...]
    default: str
    kind: Kind
    text: str
    comparisons: tuple[Comparison, ...] = ()


def judge(results: SweepResults) -> list[Verdict]:
    """Return a verdict on each key that has a list of values, then one on the default as a whole.

    The second compares the best point with the default, all keys together. It stands for the keys
    with a range, too: no two of their trials share a value. A sweep of one list goes without.
    """
    space = results.sweep.space
    listed = [key for key, values in space.items() if values.values is not None]
    verdicts = [_judge_key(results, key) for key in listed]
    if len(space) > len(listed) or len(space) > 1:
        verdicts.append(_judge_best(results))
    return verdicts


def t_interval(differences: Sequence[float], comparisons: int = 1) -> tuple[float, float]:
    """Return Student's interval of a mean, at `CONFIDENCE` for so many comparisons together.

    Args:
        differences: At least two.
        comparisons: Of the family (Bonferroni).
    """
    from scipy.stats import t

    found = spread(differences)
    assert found is not None
    assert found.sd is not None
    quantile = 1 - (1 - CONFIDENCE) / (2 * comparisons)
    reach = float(t.ppf(quantile, found.seeds - 1)) * found.sd / sqrt(found.seeds)
    return found.mean - reach, found.mean + reach


def _judge_key(results: SweepResults, key: str) -> Verdict:
    default = results.defaults.get(key)
    verdict = (key,), label(default)
    cells = _cells(results, key)
    mine = cells.pop(identity(default), None)
    if mine is None:
        tried = {identity(trial.point.get(key)) for trial in results.trials}
        missing: Kind = UNFINISHED if identity(default) in tried else UNTRIED
        return Verdict(*verdict, missing, missing)
    if not cells:
        return Verdict(*verdict, ALONE, f"{ALONE}: no training with another value finished")
    values = {identity(trial.point.get(key)): trial.point.get(key) for trial in results.trials}
    paired = {name: _differences(cell, mine) for name, cell in cells.items()}
    found = _compare(
        results, [(values[name], label(values[name]), pairs) for name, pairs in paired.items()]
    )
    return Verdict(*verdict, *_conclude(results, found, len(cells)), found)


def _judge_best(results: SweepResults) -> Verdict:
    verdict = tuple(results.sweep.space), point_label(results.defaults)
    points = ranking(results, summarize(results))
    default = next((point for point in points if point.default), None)
    if default is None:
        tried = {identity(trial.point) for trial in results.trials}
        missing: Kind = UNFINISHED if identity(results.defaults) in tried else UNTRIED
        return Verdict(*verdict, missing, missing)
    objective = results.sweep.objectives[0]
    mine = by_seed(default.trials, objective)
    pairs = [
        (point.point, point_label(point.point), _minus(by_seed(point.trials, objective), mine))
        for point in points
        if point is not default
    ]
    found = _compare(results, pairs)
    if not pairs:
        return Verdict(*verdict, ALONE, f"{ALONE}: no other point finished")
    if points[0] is default:
        return Verdict(*verdict, *_conclude(results, found, len(pairs)), found)
    best = [each for each in found if each.value is points[0].point]
    if not best:
        return Verdict(*verdict, TOO_FEW, f"{TOO_FEW}: the best point shares none", found)
    kind = best[0].kind
    return Verdict(*verdict, kind, f"{kind}: {describe(best[0], objective)}", found)


def _cells(results: SweepResults, key: str) -> dict[str, dict[tuple[str, int], float]]:
    """Return the first objective by value, then by setting of the other keys and seed."""
    groups: dict[str, dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in results.trials:
        if trial.state == "finished":
            rest = {name: value for name, value in trial.point.items() if name != key}
            groups[identity(trial.point.get(key))][identity(rest)].append(trial)
    objective = results.sweep.objectives[0]
    return {
        value: {
            (setting, seed): figure
            for setting, trials in settings.items()
            for seed, figure in by_seed(trials, objective).items()
        }
        for value, settings in groups.items()
    }


def _differences(
    cell: Mapping[tuple[str, int], float], default: Mapping[tuple[str, int], float]
) -> dict[int, float]:
    """Return the mean difference by seed, each over the same settings of the other keys.

    Of settings with different seeds those count that have the most: a seed that is averaged over
    other settings than the next would add their difference to that of the seeds.
    """
    settings: dict[str, dict[int, float]] = defaultdict(dict)
    for setting, seed in cell.keys() & default.keys():
        settings[setting][seed] = cell[setting, seed] - default[setting, seed]
    groups = defaultdict(list)
    for pairs in settings.values():
        groups[tuple(sorted(pairs))].append(pairs)
    seeds = max(groups, key=lambda each: (len(each), len(groups[each])), default=())
    return {
        seed: fsum(pairs[seed] for pairs in groups[seeds]) / len(groups[seeds]) for seed in seeds
    }


def _minus(figures: Mapping[int, float], default: Mapping[int, float]) -> dict[int, float]:
    return {seed: figures[seed] - default[seed] for seed in sorted(figures.keys() & default.keys())}


def _compare(
    results: SweepResults, paired: Iterable[tuple[Any, str, dict[int, float]]]
) -> tuple[Comparison, ...]:
    found = [each for each in paired if each[-1]]
    family = sum(len(gains) > 1 for *_, gains in found)
    sign = direction(results.sweep.objectives[0])
    comparisons = []
    for value, name, gains in found:
        interval: tuple[float, float] | None = None
        kind: Kind = TOO_FEW
        if len(gains) > 1:
            interval = low, high = t_interval(list(gains.values()), family)
            ahead, behind = (low > 0, high < 0) if sign > 0 else (high < 0, low > 0)
            kind = BETTER if ahead else WORSE if behind else NOISE
        comparisons.append(Comparison(value, name, gains, interval, kind))
    return tuple(sorted(comparisons, key=lambda each: -sign * each.mean))


def _conclude(results: SweepResults, found: Sequence[Comparison], others: int) -> tuple[Kind, str]:
    """Return the verdict of comparisons, the best first, of `others` values."""
    objective = results.sweep.objectives[0]
    if not found:
        return TOO_FEW, f"{TOO_FEW}: no two trainings with one seed differ in this alone"
    known = [each for each in found if each.interval]
    rest = f"; {others - len(known)} of {others} others have too few seeds" * (len(known) < others)
    for each in found:
        if each.kind == BETTER:
            return BETTER, f"{BETTER}: {describe(each, objective)}"
    # What is ahead of all that can be told from the default decides.
    nearest = next((each for each in found if each.kind in (NOISE, TOO_FEW)), found[0])
    if nearest.kind == WORSE and not rest:
        return BEST, f"{BEST}: no other is near; the nearest, {describe(nearest, objective)}"
    if nearest.kind == NOISE:
        return NOISE, f"{NOISE}: {describe(nearest, objective)}{rest}"
    return TOO_FEW, f"{TOO_FEW}: {describe(nearest, objective)}"


def describe(found: Comparison, objective: str) -> str:
    """Return a comparison for a reader: `2.5 by +0.42 [+0.10, +0.74] AP points, 3 seeds`."""
    seeds = len(found.differences)
    interval = ""
    if found.interval:
        low, high = (shown(objective, end, sign=True) for end in found.interval)
        interval = f" [{low}, {high}]"
    difference = shown(objective, found.mean, sign=True)
    plural = "s" if seeds > 1 else ""
    unit = unit_of_difference(objective)
    return f"{found.name} by {difference}{interval} {unit}, {seeds} seed{plural}"


@dataclass(frozen=True)
class Analysis:
    """A sweep's trials and what they say.

    Attributes:
        results: The trials.
        points: Those with a finished trial, the best first; those without the objective last.
        ranked: How many of them have the objective.
        verdicts: On the defaults.
        importance: Share of variance by key, or None of too few trials.
        front: Points that no other beats in AP and FPS.
        cost: Of the sweep.
        identical: Trials that should differ and do not.
        published: A paper's rows.
        unfinished: Trials that count for nothing else.
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
        """The best of that point's trials."""
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
        unfinished=unfinished(results),
    )


def warnings_of(found: Analysis) -> list[str]:
    """Return what a reader is to know before believing a figure, a sentence each."""
    said = []
    running = found.cost.states.get("running", 0)
    if running:
        said.append(f"{running} of the trials had not ended when this was written.")
    if not found.points:
        said.append("No trial has finished: nothing can be compared.")
    elif max(len(point.seeds) for point in found.points) == 1:
        said.append("Every point has one seed: differences may be chance; set sweep.seeds.")
    elif found.best and len(found.best.seeds) == 1:
        said.append("The best point has one seed.")
    if found.points and not found.ranked:
        said.append(f"No finished trial has the objective, {axis_name(found.objective)}.")
    for group in found.identical:
        points = " and ".join(point_label(trial.point) for trial in group.trials[:3])
        more = f" and {len(group.trials) - 3} more" if len(group.trials) > 3 else ""
        keys = ", ".join(group.keys)
        said.append(
            f"Trainings with seed {group.seed} are identical bit for bit at {points}{more}: "
            f"has {keys} any effect?"
        )
    protocols = [trial.protocol for trial in found.results.trials if trial.protocol]
    if differing := {each for other in protocols for each in differences(protocols[0], other)}:
        said.append(f"FPS do not compare where protocols differ: {', '.join(sorted(differing))}.")
    return said


def cost_line(found: Analysis) -> str:
    """Return what the sweep used, and what stopping early saved, in one line."""
    cost, device = found.cost, found.results.device
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
    found = item.figures.get(metric)
    if not found:
        return "-"
    spread = f" ± {shown(metric, found.sd)}" if found.sd is not None else ""
    return f"{shown(metric, found.mean)}{spread}"
