"""Which trials a sweep runs: those of a list, or points that Optuna draws.

Ray Tune asks for one trial after the other. The identity of a trial is ours, so that after any
interruption the same trial goes on in the same folder and the same MLflow run, whatever Tune
remembers: all that a sweep knows is in its trials' own files (`results.py`).
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune import Stopper
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher

from gfl.config.loader import ConfigError
from gfl_platform.config import BudgetConfig, RangeConfig, SweepConfig
from gfl_platform.sweeps.trials import ENDED, Planned, Point, Trial, trial_name

logger = logging.getLogger(__name__)

MINIMISED = ("latency_ms",)

REFUSALS = 1000
"""Points in a row that may be drawn and not be allowed by the schema."""


class Trials(Searcher):
    """Gives Tune trials until there are no more, or no budget for them; tells of each one first."""

    def __init__(
        self, plan: Callable[[Planned], None], used_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Give trials.

        Args:
            plan: Notes a trial before any of its processes starts: its identity is taken then.
            used_up: Whether the budget is.
        """
        super().__init__()
        self._plan, self._used_up = plan, used_up

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's configuration."""
        planned = None if self._used_up() else self.next_trial(trial_id)
        if planned is None:
            return Searcher.FINISHED
        self._plan(planned)
        return vars(planned)

    def next_trial(self, trial_id: str) -> Planned | None:
        """Return the next trial, which Tune calls `trial_id`, if there is one."""
        raise NotImplementedError


class ListedTrials(Trials):
    """The trials of a list, in its order."""

    def __init__(self, trials: Sequence[Planned], *noted: Any) -> None:
        super().__init__(*noted)
        self._left = list(trials)

    def next_trial(self, trial_id: str) -> Planned | None:
        """Return the first that is left."""
        return self._left.pop(0) if self._left else None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing depends on it."""


class DrawnTrials(Trials):
    """Points that Optuna draws, from what it knows of those before.

    A resumed study is made from the trials' records: the finished ones with their figures, the
    stopped ones as pruned; those that were running come first. A new one starts with the default.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        default: Point,
        seed: int,
        known: Sequence[Trial],
        check: Callable[[Point], object],
        *noted: Any,
    ) -> None:
        """Draw points.

        Args:
            sweep: Its section.
            default: What the configuration says.
            seed: Of the trainings.
            known: Trials of sessions before.
            check: Raises `ConfigError` of a point that the schema does not allow.
            noted: As of `Trials`.
        """
        import optuna

        super().__init__(*noted)
        self._check, self._states = check, optuna.trial.TrialState
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._seed = sweep, seed
        self._ranges = {key: _distribution(values) for key, values in sweep.space.items()}
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self._study = optuna.create_study(
            sampler=samplers[sweep.search.name](seed=sweep.search.seed + len(known)),
            directions=[
                "minimize" if name in MINIMISED else "maximize" for name in sweep.objectives
            ],
        )
        for trial in known:
            if trial.state in ENDED:
                self._study.add_trial(self._as_optuna(trial))
        unfinished = [trial for trial in known if trial.state not in ENDED]
        self._unfinished = [trial.id for trial in unfinished]
        first = [trial.point for trial in unfinished] if known else [default]
        for point in first:
            params = _params(sweep, point)
            if params.keys() == sweep.space.keys():  # else the default is outside the range
                self._study.enqueue_trial(params)
        self._numbers = iter(range(len(known), sweep.budget.trials or 0))
        self._asked: dict[str, Any] = {}

    def next_trial(self, trial_id: str) -> Planned | None:
        """Draw a point."""
        name = self._unfinished.pop(0) if self._unfinished else self._next_name()
        if name is None:
            return None
        for _ in range(REFUSALS):
            asked = self._study.ask(self._ranges)
            point = {key: _value(self._sweep.space[key], asked.params[key]) for key in self._ranges}
            try:
                self._check(point)
            except ConfigError as error:  # a width between the multiples of 8, say
                refused = error
                self._study.tell(asked, state=self._states.FAIL)
                continue
            self._asked[trial_id] = asked
            return Planned(name, point, self._seed, "search")
        logger.warning(
            "warning: of %d points drawn in a row none is allowed: %s", REFUSALS, refused
        )
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note an epoch, which counts if the trial is stopped after it."""
        objective = self._sweep.objectives[0]
        if len(self._sweep.objectives) == 1 and "final" not in result and objective in result:
            self._asked[trial_id].report(result[objective], result["epoch"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Note how a trial ended."""
        asked = self._asked.pop(trial_id)
        result = result or {}
        if result.get("final") == "finished":
            self._study.tell(asked, [result[name] for name in self._sweep.objectives])
        elif error or "final" in result:
            self._study.tell(asked, state=self._states.FAIL)
        else:
            self._study.tell(asked, state=self._states.PRUNED)

    def _next_name(self) -> str | None:
        number = next(self._numbers, None)
        return None if number is None else trial_name(number)

    def _as_optuna(self, trial: Trial) -> Any:
        import optuna

        states = {"finished": self._states.COMPLETE, "nan": self._states.FAIL}
        done = trial.state == "finished"
        single = len(self._sweep.objectives) == 1
        return optuna.trial.create_trial(
            state=states.get(trial.state, self._states.PRUNED),
            params=_params(self._sweep, trial.point),
            distributions=self._ranges,
            values=[trial.figures[name] for name in self._sweep.objectives] if done else None,
            intermediate_values=dict(trial.curve) if single else None,
        )


def _distribution(values: RangeConfig) -> Any:
    from optuna import distributions as d

    if values.values is not None:
        return d.CategoricalDistribution(range(len(values.values)))
    if values.int_uniform:
        return d.IntDistribution(*values.int_uniform)
    assert values.bounds is not None
    return d.FloatDistribution(*values.bounds, log=values.log_uniform is not None)


def _value(values: RangeConfig, drawn: Any) -> Any:
    """Return the value that Optuna's `drawn` stands for; six digits of a real number suffice."""
    if values.values is not None:
        return values.values[drawn]
    if values.int_uniform:
        return drawn
    assert values.bounds is not None
    low, high = values.bounds
    return min(max(float(f"{drawn:.6g}"), low), high)


def _params(sweep: SweepConfig, point: Point) -> dict[str, Any]:
    """Return Optuna's parameters of a point, without keys whose value is outside their range."""
    params = {}
    for key, values in sweep.space.items():
        value = point[key]
        if values.values is None:
            assert values.bounds is not None
            if isinstance(value, int | float) and values.bounds[0] <= value <= values.bounds[1]:
                params[key] = value
        elif value in values.values:
            params[key] = [json.dumps(v) for v in values.values].index(
                json.dumps(next(v for v in values.values if v == value))
            )
    return params


@dataclass(frozen=True)
class _Known:
    """What Tune's schedulers look at of a trial: here our identity, the same in any session."""

    trial_id: str


class PatientMedian(MedianStoppingRule):
    """Tune's median stopping, which here never pauses a trial: a paused one would start again."""

    def _on_insufficient_samples(self, controller: Any, trial: Any, epoch: float) -> str:
        return TrialScheduler.CONTINUE


class EarlyStopping(FIFOScheduler):
    """One of Tune's schedulers, told of the trials before an interruption: its rungs are kept."""

    def __init__(self, sweep: SweepConfig, epochs: int, known: Iterable[Trial]) -> None:
        """Stop trials as `sweep.scheduler` says.

        Args:
            sweep: Its section.
            epochs: Of a whole training; a trial that has them is never stopped.
            known: Trials of sessions before; what they reached is replayed.
        """
        super().__init__()
        self._epochs = epochs
        self._inner = _scheduler(sweep, epochs)
        self._added: set[str] = set()
        self._objective = sweep.objectives[0]
        for trial in known:
            seen = _Known(trial.id)
            self._add(seen)
            for epoch, value in trial.curve:
                if epoch < epochs:
                    result = {"epoch": epoch, self._objective: value}
                    self._inner.on_trial_result(None, seen, result)
            getattr(self._inner, "_stopped_trials", set()).clear()  # the decisions are history

    def _add(self, trial: _Known) -> None:
        if trial.trial_id not in self._added:
            self._added.add(trial.trial_id)
            self._inner.on_trial_add(None, trial)

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Tell of a trial that starts."""
        super().on_trial_add(controller, trial)
        self._add(_Known(trial.config["id"]))

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial goes on after an epoch."""
        # A checkpoint within an epoch, of a drained node, has no figures.
        if "final" in result or self._objective not in result or result["epoch"] >= self._epochs:
            return TrialScheduler.CONTINUE
        return str(self._inner.on_trial_result(controller, _Known(trial.config["id"]), result))


def _scheduler(sweep: SweepConfig, epochs: int) -> TrialScheduler:
    settings = sweep.scheduler
    objective = sweep.objectives[0]
    options = {
        "time_attr": "epoch",
        "metric": objective,
        "mode": "min" if objective in MINIMISED else "max",
        "grace_period": min(settings.grace_epochs, epochs),
    }
    if settings.name == "asha":
        return ASHAScheduler(max_t=epochs, reduction_factor=settings.reduction, **options)
    return PatientMedian(**options)


class BudgetStopper(Stopper):
    """Ends the search when its epochs or hours are used up."""

    def __init__(
        self, budget: BudgetConfig, epochs_used: int, seconds_used: float, last_epoch: float
    ) -> None:
        """Stop trials as `budget` says.

        Args:
            budget: The section.
            epochs_used: By sessions before.
            seconds_used: Of wall time.
            last_epoch: Of a whole training; one that has come so far is not stopped.
        """
        self._budget = budget
        self._epochs = epochs_used
        self._started = time.monotonic() - seconds_used
        self._last_epoch = last_epoch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Count an epoch; return whether its trial stops there."""
        if "final" in result or "AP" not in result:
            return False
        self._epochs += 1
        return self.used_up() and result["epoch"] < self._last_epoch

    def used_up(self) -> bool:
        """Return whether nothing is left."""
        epochs = self._budget.epochs
        return (epochs is not None and self._epochs >= epochs) or self.stop_all()

    def stop_all(self) -> bool:
        """Return whether time is up: that ends trials in the middle of an epoch."""
        hours = self._budget.hours
        return hours is not None and time.monotonic() - self._started >= hours * 3600
