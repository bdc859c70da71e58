"""The progress of a sweep: a line for every trial that ends, and one of those that run."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from gfl_platform.sweeps.formatting import point_label
from gfl_platform.sweeps.trials import Trial
from jobs.console.cli import Progress, console


class SweepProgress(Progress):
    """Shows a sweep."""

    def __init__(self) -> None:
        super().__init__()
        self._trials: dict[str, Trial] = {}
        self._epochs: dict[str, float] = {}

    def show_trial(self, trial: Trial, event: Mapping[str, Any]) -> None:
        """Show what happened to a trial."""
        self._trials[trial.id] = trial
        match event["kind"]:
            case "steps":
                self._epochs[trial.id] = event["epoch"]
            case "failure" if not event["final"]:
                console.print(f"{_name(trial)}: a worker stopped ({event['reason']}); going on")
            case "ended":
                console.print(f"{_name(trial)}: {_end(trial)}", soft_wrap=True)
        self._show_line(self._summary())

    def _summary(self) -> str:
        counts = Counter(trial.state for trial in self._trials.values())
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        running = "  ".join(
            f"{trial.id}: epoch {self._epochs.get(trial.id, 0.0):.2f}{_quality(trial)}"
            for trial in self._trials.values()
            if trial.state == "running"
        )
        return f"{states}   {running}"


def _name(trial: Trial) -> str:
    return f"trial {trial.id}  {point_label(trial.point)}  seed {trial.seed}"


def _quality(trial: Trial) -> str:
    return f" ({trial.curve[-1][1]:.3f})" if trial.curve else ""


def _end(trial: Trial) -> str:
    if trial.cause:
        return f"{trial.state} ({trial.cause})"
    ap = f", AP {trial.figures['AP']:.4f}" if "AP" in trial.figures else ""
    return f"{trial.state} after {trial.epochs} epochs{ap}, {trial.seconds:.0f} s"
