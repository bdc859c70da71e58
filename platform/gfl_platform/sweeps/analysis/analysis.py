"""All that is said of a sweep, computed once for the report, the figures and the terminal."""

from dataclasses import dataclass
from math import isfinite, nan

from gfl.evaluation.protocol import differences
from gfl_platform.sweeps.analysis.statistics import (
    Cost,
    Identical,
    PointSummary,
    cost,
    direction,
    identical_trials,
    pareto_front,
    ranking,
    summarize,
    unfinished,
)
from gfl_platform.sweeps.analysis.verdicts import Verdict, judge
from gfl_platform.sweeps.formatting import axis_name, point_label, shown
from gfl_platform.sweeps.importance import parameter_importance
from gfl_platform.sweeps.published import PublishedComparison, compare_published
from gfl_platform.sweeps.trials import SweepResults, Trial


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
