"""Which trials a sweep stops before their end: Ray Tune's schedulers, which survive a restart."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray.tune import Stopper
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from gfl_platform.sweeps.schema import BudgetConfig, SweepConfig
from gfl_platform.sweeps.search import MINIMISED
from gfl_platform.sweeps.trials import Trial


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
