"""Live progress of a training, an evaluation or a sweep on the console."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

from rich.live import Live

from gfl_platform.cluster.events import (
    DataDescribed,
    EpochEvaluated,
    Event,
    ItemsDone,
    StepsDone,
    TagsSet,
    TrialEnded,
    Waiting,
    WorkerFailed,
    WorkersStarted,
)
from gfl_platform.sweeps.formatting import point_label
from gfl_platform.sweeps.trials import Trial
from jobs.console.cli import console

LOSSES = ("qfl", "focal", "centerness", "giou", "dfl", "ld")
"""Shown where a training has them."""

PLAIN_LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal to redraw."""


class Progress:
    """Shows a training: one line that is redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._last_line = 0.0
        self._quality = ""
        self._digests: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            self._live.update("waiting for the workers to start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def expect(self, digests: Mapping[str, str]) -> None:
        """Tell of data and weights with other digests than these, "data.train.digest" and so on."""
        self._digests = digests

    def show(self, event: Event) -> None:
        """Show an event of a training."""
        match event:
            case Waiting(reason=reason):
                self._show_line(reason, always=True)
            case WorkersStarted(count=count):
                if self._live:
                    self._live.update(f"{count} workers have started")
            case DataDescribed(facts=facts):
                self._compare({f"data.{key}": fact for key, fact in facts.items()})
            case TagsSet(tags=tags):
                self._compare(tags)
            case StepsDone():
                self._show_steps(event)
            case EpochEvaluated(epoch=epoch, metrics=metrics):
                self._quality = f"  AP {metrics['AP']:.3f}"
                console.print(f"epoch {epoch}: AP {metrics['AP']:.4f}  AP50 {metrics['AP50']:.4f}")
            case ItemsDone(work=work, done=done, total=total):
                self._show_line(f"{done} of {total} {work}")
            case WorkerFailed(rank=rank, reason=reason, final=False):
                console.print(
                    f"worker {rank} stopped ({reason}); going on from the last checkpoint"
                )

    def _compare(self, now: Mapping[str, Any]) -> None:
        """Tell where `now` has other digests than expected."""
        for key, then in self._digests.items():
            if key in now and now[key] != then:
                line = f"not as it was then: {key} {then} -> {now[key]}"
                console.print(line, soft_wrap=True)

    def _show_steps(self, event: StepsDone) -> None:
        metrics, left = event.metrics, event.seconds_left
        names = [name for name in ("loss", *LOSSES) if name in metrics]
        losses = "  ".join(f"{name} {metrics[name]:.3f}" for name in names)
        line = (
            f"epoch {event.epoch:.2f}  step {event.step}/{event.total_steps}  {losses}  "
            f"{metrics['images_per_second']:.1f} images/s{self._quality}  "
            f"ETA {left // 60:.0f} min {left % 60:02.0f} s"
        )
        self._show_line(line)

    def _show_line(self, line: str, *, always: bool = False) -> None:
        """Show a line of progress; where no terminal redraws it, `always` or now and then."""
        if self._live:
            self._live.update(line)
        elif always or time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            console.print(line, soft_wrap=True)


class SweepProgress(Progress):
    """Shows a sweep."""

    def __init__(self) -> None:
        super().__init__()
        self._trials: dict[str, Trial] = {}
        self._epochs: dict[str, float] = {}

    def show_trial(self, trial: Trial, event: Event) -> None:
        """Show what happened to a trial."""
        self._trials[trial.id] = trial
        match event:
            case StepsDone(epoch=epoch):
                self._epochs[trial.id] = epoch
            case Waiting(reason=reason):
                console.print(f"{_name(trial)}: {reason}")
            case WorkerFailed(reason=reason, final=False):
                console.print(f"{_name(trial)}: a worker stopped ({reason}); going on")
            case TrialEnded():
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
