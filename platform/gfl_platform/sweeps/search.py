"""Which trials a sweep runs, and which it stops early.

Ray Tune asks a searcher for one trial after the other. A trial has an id of ours, so that after any
interruption the same trial goes on in the same folder and the same MLflow run. Ray Tune's own state
is never read again: all that a sweep knows is in the records of its trials (`trials.py`).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import inf
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from ray.tune import Stopper
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from gfl.config.loader import ConfigError
from gfl_platform.config import BudgetConfig, JobConfig, RangeConfig, SweepConfig
from gfl_platform.sweeps.formatting import identity
from gfl_platform.sweeps.space import default_point, sweep_of, trial_job
from gfl_platform.sweeps.trials import ENDED, Planned, Point, Trial, direction

logger = logging.getLogger(__name__)

REFUSALS = 1000
"""Points drawn in a row that the schema may refuse before the search gives up."""


class Trials(Searcher):
    """Gives Ray Tune one trial after the other, until none or no budget is left."""

    def __init__(self, plan: Callable[[Planned], None], used_up: Callable[[], bool]) -> None:
        """Create a searcher.

        Args:
            plan: Records a trial before any of its processes starts, so that its id is taken.
            used_up: Returns whether the budget is used up.
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
        """Return the next trial, which Ray Tune calls `trial_id`, or None at the end."""
        raise NotImplementedError


class ListedTrials(Trials):
    """Searcher that gives Ray Tune a fixed list of trials, in order."""

    def __init__(
        self,
        trials: Iterable[Planned],
        plan: Callable[[Planned], None],
        used_up: Callable[[], bool],
    ) -> None:
        super().__init__(plan, used_up)
        self._remaining = iter(trials)

    def next_trial(self, trial_id: str) -> Planned | None:
        """Return the first trial that remains."""
        return next(self._remaining, None)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: no trial of a list depends on another's result."""


class DrawnTrials(Trials):
    """Points that Optuna draws, learning from the trials before.

    The study of a resumed sweep is built from the records of its trials: finished trials have their
    figures, stopped ones count as pruned, and those that were running come first. A new sweep
    starts with the default point.
    """

    def __init__(
        self,
        job: JobConfig,
        known: Sequence[Trial],
        names: Iterator[str],
        plan: Callable[[Planned], None],
        used_up: Callable[[], bool],
    ) -> None:
        """Build the study from the `known` trials of earlier sessions; `names` are further ids."""
        super().__init__(plan, used_up)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._job, self._sweep = job, sweep_of(job)
        self._ranges = {key: _distribution(values) for key, values in self._sweep.space.items()}
        self._study = self._create_study(known)
        unfinished = [trial for trial in known if trial.state not in ENDED]
        first_points = [trial.point for trial in unfinished] if known else [default_point(job)]
        for point in first_points:
            params = _params(self._sweep, point)
            if params.keys() == self._sweep.space.keys():  # else the default is outside the range
                self._study.enqueue_trial(params)
        new = islice(names, max(0, (self._sweep.budget.trials or 0) - len(known)))
        self._names = chain([trial.id for trial in unfinished], new)
        self._running: dict[str, optuna.Trial] = {}

    def next_trial(self, trial_id: str) -> Planned | None:
        """Draw a point that the schema allows."""
        name = next(self._names, None)
        if name is None:
            return None
        refusal: ConfigError | None = None
        for _ in range(REFUSALS):
            trial = self._study.ask(self._ranges)
            point = {
                key: _value(values, trial.params[key]) for key, values in self._sweep.space.items()
            }
            try:
                trial_job(self._job, point, self._job.seed)
            except ConfigError as error:  # a width between the multiples of 8, say
                refusal = error
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            self._running[trial_id] = trial
            return Planned(name, point, self._job.seed, "search")
        logger.warning(
            "warning: of %d points drawn in a row none is allowed: %s", REFUSALS, refusal
        )
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record an epoch, which counts if the trial is stopped after it."""
        objective = self._sweep.objectives[0]
        if len(self._sweep.objectives) == 1 and "final" not in result and objective in result:
            self._running[trial_id].report(result[objective], result["epoch"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record how a trial ended."""
        trial = self._running.pop(trial_id)
        result = result or {}
        if result.get("final") == "finished":
            self._study.tell(trial, [result[name] for name in self._sweep.objectives])
        elif error or "final" in result:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _create_study(self, known: Sequence[Trial]) -> optuna.Study:
        search = self._sweep.search
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        study = optuna.create_study(
            sampler=samplers[search.name](seed=search.seed + len(known)),
            directions=[
                "maximize" if direction(name) > 0 else "minimize" for name in self._sweep.objectives
            ],
        )
        study.add_trials([self._as_optuna(trial) for trial in known if trial.state in ENDED])
        return study

    def _as_optuna(self, trial: Trial) -> optuna.trial.FrozenTrial:
        states = {"finished": TrialState.COMPLETE, "nan": TrialState.FAIL}
        finished = trial.state == "finished"
        objectives = self._sweep.objectives
        return optuna.trial.create_trial(
            state=states.get(trial.state, TrialState.PRUNED),
            params=_params(self._sweep, trial.point),
            distributions=self._ranges,
            values=[trial.figures[name] for name in objectives] if finished else None,
            intermediate_values=dict(trial.curve) if len(objectives) == 1 else None,
        )


def _distribution(values: RangeConfig) -> BaseDistribution:
    if values.values is not None:
        return CategoricalDistribution(range(len(values.values)))
    if values.int_uniform:
        return IntDistribution(*values.int_uniform)
    assert values.bounds is not None
    return FloatDistribution(*values.bounds, log=values.log_uniform is not None)


def _value(values: RangeConfig, param: Any) -> Any:
    """Return the value for Optuna's parameter; a real number is rounded to six digits."""
    if values.values is not None:
        return values.values[param]
    if values.int_uniform:
        return param
    assert values.bounds is not None
    low, high = values.bounds
    return min(max(float(f"{param:.6g}"), low), high)


def _params(sweep: SweepConfig, point: Point) -> dict[str, Any]:
    """Return Optuna's parameters of a point, without keys whose value is outside their range."""
    params = {}
    for key, values in sweep.space.items():
        value = point[key]
        if values.values is None:
            assert values.bounds is not None
            if isinstance(value, int | float) and values.bounds[0] <= value <= values.bounds[1]:
                params[key] = value
        else:
            identities = [identity(listed) for listed in values.values]
            if identity(value) in identities:
                params[key] = identities.index(identity(value))
    return params


@dataclass(frozen=True)
class _TrialId:
    """A trial as Ray Tune's schedulers see it: our id, which is the same in every session."""

    trial_id: str


class EarlyStopping(FIFOScheduler):
    """One of Ray Tune's schedulers, which also knows the trials before an interruption."""

    def __init__(self, sweep: SweepConfig, epochs: int, known: Iterable[Trial]) -> None:
        """Create the scheduler that `sweep.scheduler` names.

        Args:
            sweep: The section `sweep:`.
            epochs: Epochs of a whole training; a trial that has them is never stopped.
            known: Trials of earlier sessions, whose curves count in comparisons.
        """
        super().__init__()
        self._epochs = epochs
        self._objective = sweep.objectives[0]
        self._inner = _scheduler(sweep, epochs)
        for trial in known:
            for epoch, value in trial.curve:
                if epoch < epochs:
                    result = {"epoch": epoch, self._objective: value}
                    # The results of a completed trial are recorded without a decision on it.
                    self._inner.on_trial_add(None, _TrialId(trial.id))
                    self._inner.on_trial_complete(None, _TrialId(trial.id), result)

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Add a trial that starts."""
        super().on_trial_add(controller, trial)
        self._inner.on_trial_add(None, _TrialId(trial.config["id"]))

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial goes on after an epoch."""
        # A checkpoint within an epoch, of a drained node, has no figures.
        if "final" in result or self._objective not in result or result["epoch"] >= self._epochs:
            return TrialScheduler.CONTINUE
        return str(self._inner.on_trial_result(None, _TrialId(trial.config["id"]), result))


def _scheduler(sweep: SweepConfig, epochs: int) -> TrialScheduler:
    settings = sweep.scheduler
    objective = sweep.objectives[0]
    options = {
        "time_attr": "epoch",
        "metric": objective,
        "mode": "max" if direction(objective) > 0 else "min",
        "grace_period": min(settings.grace_epochs, epochs),
    }
    if settings.name == "asha":
        return ASHAScheduler(max_t=epochs, reduction_factor=settings.reduction, **options)
    # A trial never yields to another: a paused one would start again.
    return MedianStoppingRule(min_time_slice=inf, **options)


class BudgetStopper(Stopper):
    """Ends the search when its epochs or hours are used up."""

    def __init__(
        self, budget: BudgetConfig, epochs_used: int, seconds_used: float, last_epoch: float
    ) -> None:
        """Create a stopper.

        Args:
            budget: The section `sweep.budget:`.
            epochs_used: Epochs trained in earlier sessions.
            seconds_used: Wall time of earlier sessions.
            last_epoch: Last epoch of a whole training; a trial that has reached it is not stopped.
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
        """Return whether nothing of the budget is left."""
        epochs = self._budget.epochs
        return (epochs is not None and self._epochs >= epochs) or self.stop_all()

    def stop_all(self) -> bool:
        """Return whether the time is up, which ends trials in the middle of an epoch."""
        hours = self._budget.hours
        return hours is not None and time.monotonic() - self._started >= hours * 3600
