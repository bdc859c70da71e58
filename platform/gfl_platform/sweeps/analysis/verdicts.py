"""Whether other values than the default's are better: paired over seeds, with an interval.

Two trainings with one seed see the same images in the same order from the same initial weights, so
their difference varies less than either figure does.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any, Final, Literal

from gfl_platform.sweeps.analysis.statistics import (
    by_seed,
    direction,
    ranking,
    spread,
    summarize,
)
from gfl_platform.sweeps.formatting import (
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
    family = sum(len(differences) > 1 for *_, differences in found)
    sign = direction(results.sweep.objectives[0])
    comparisons = []
    for value, name, differences in found:
        interval: tuple[float, float] | None = None
        kind: Kind = TOO_FEW
        if len(differences) > 1:
            interval = low, high = t_interval(list(differences.values()), family)
            ahead, behind = (low > 0, high < 0) if sign > 0 else (high < 0, low > 0)
            kind = BETTER if ahead else WORSE if behind else NOISE
        comparisons.append(Comparison(value, name, differences, interval, kind))
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
