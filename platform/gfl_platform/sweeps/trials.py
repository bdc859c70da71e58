"""The trials of a sweep: what is recorded of each, and where.

sweeps/NAME/            the sweep's folder, under the storage's root
    sweep.yaml          its configuration
    run.json            its MLflow run
    trials/ID/          a trial's folder: planned.json, trial.json, run.json, its checkpoints
    report/             report.html and pictures
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from gfl.evaluation.coco_eval import NO_GROUND_TRUTH
from gfl.files import write_atomically
from gfl_platform.config import JobConfig, SweepConfig
from gfl_platform.storage.files import read_json, read_rebuildable
from gfl_platform.sweeps.formatting import identity

logger = logging.getLogger(__name__)

ENDED = ("finished", "stopped early", "nan")
"""States that a resumed sweep leaves as they are. It continues all other trials if the budget
allows, and tries `failed` ones again."""

TRIAL_FILE = "trial.json"

PLANNED_FILE = "planned.json"
"""File in a trial's folder from which a damaged `TRIAL_FILE` is rebuilt."""

EPOCHS_KEY = "schedule.epochs"

AT_THE_END = ("fps", "latency_ms")
"""Objectives that a trial reports once, at its end; all others are reported after every epoch."""

MINIMISED = ("latency_ms",)


def direction(metric: str) -> int:
    """Return 1 for a metric of which more is better, else -1."""
    return -1 if metric in MINIMISED else 1


State = Literal["running", "finished", "stopped early", "failed", "nan", "out of budget"]

Stage = Literal["search", "finalists"]

Point = dict[str, Any]
"""Values of the swept keys."""


@dataclass
class Trial:
    """One training of a sweep.

    Attributes:
        id: Name of the trial, which stays the same after any restart.
        point: Values of the swept keys.
        seed: Seed of the training.
        stage: `search`, or `finalists`: other seeds of the best points and of the default.
        state: How the trial ended: `stopped early` by the scheduler, `out of budget` together with
            the sweep.
        cause: Why the trial failed.
        curve: Pairs of an epoch and the sweep's `watched` metric after it, in order.
        figures: COCO statistics of the checkpoint with the best AP; a finished trial has `fps` and
            `latency_ms`, too.
        seconds: Time from the first event of its workers, summed over all attempts.
        devices: Number of GPUs that the trial held, or of CPUs on a cluster without GPUs.
        config_hash: Hash of the effective configuration.
        run_id: The trial's MLflow run.
        checkpoint: Folder of the checkpoint with the best AP, where all nodes see it.
        protocol: Conditions under which FPS was measured.
    """

    id: str
    point: Point
    seed: int
    stage: Stage = "search"
    state: State = "running"
    cause: str | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    devices: int = 1
    config_hash: str = ""
    run_id: str | None = None
    checkpoint: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """Number of epochs trained and evaluated."""
        return self.curve[-1][0] if self.curve else 0


@dataclass(frozen=True)
class SweepResults:
    """A sweep and its trials: all that the report is made from.

    Attributes:
        name: Name of the sweep.
        job: Configuration of the sweep, with its section `sweep:`.
        defaults: Values of the swept keys in `job` itself.
        device: What `Trial.devices` counts: `GPU` or `CPU`.
        trials: The trials in the order of their start.
    """

    name: str
    job: JobConfig
    defaults: Point
    device: str
    trials: list[Trial]

    @property
    def sweep(self) -> SweepConfig:
        """The `sweep:` section."""
        assert self.job.sweep is not None
        return self.job.sweep

    @property
    def watched(self) -> str:
        """Metric whose curve over the epochs is recorded: the first objective, or AP."""
        first = self.sweep.objectives[0]
        return "AP" if first in AT_THE_END else first

    @property
    def epochs(self) -> int:
        """Number of epochs of a whole training, unless `schedule.epochs` itself is swept."""
        return self.job.schedule.epochs

    def frame(self) -> pd.DataFrame:
        """Return the trials as a table with one row each, in their order.

        Columns are `point` (the identity of the trial's point), `seed`, `stage`, `state`,
        `device_seconds`, `epochs`, `full_epochs` (the epochs of a whole training), and one column
        for each metric that a trial has or that is an objective. A figure is NaN where the trial
        has none, where it is not finite, and where it is an AP or AR without any ground truth.
        """
        names = [*self.sweep.objectives, *(name for trial in self.trials for name in trial.figures)]
        metrics = list(dict.fromkeys(names))
        figures = pd.DataFrame(
            [trial.figures for trial in self.trials], columns=metrics, dtype=float
        ).replace([np.inf, -np.inf, NO_GROUND_TRUTH], np.nan)
        return figures.assign(
            point=[identity(trial.point) for trial in self.trials],
            seed=[trial.seed for trial in self.trials],
            stage=[trial.stage for trial in self.trials],
            state=[trial.state for trial in self.trials],
            device_seconds=[trial.seconds * trial.devices for trial in self.trials],
            epochs=[trial.epochs for trial in self.trials],
            full_epochs=[trial.point.get(EPOCHS_KEY, self.epochs) for trial in self.trials],
        )


def write_trial(folder: Path, trial: Trial) -> None:
    """Write the record of `trial` into its folder."""
    write_atomically(folder / TRIAL_FILE, json.dumps(asdict(trial), indent=1) + "\n")


def read_trial(folder: Path) -> Trial | None:
    """Return the trial whose record is in a folder, or None if there is no record.

    A damaged record is rebuilt, with a warning, as that of a trial to run. If the trial had
    ended, it sends its outcome again instead of training (see `run_trial`).
    """
    path = folder / TRIAL_FILE
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        record["curve"] = [(epoch, value) for epoch, value in record["curve"]]
        return Trial(**record)
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        plan = read_rebuildable(folder / PLANNED_FILE)
        if not plan:
            logger.warning("warning: %s is damaged (%s); it counts as no trial", path, reason)
            return None
        logger.warning(
            "warning: %s is damaged (%s); it is rebuilt from %s, without the trial's curve so far",
            path,
            reason,
            PLANNED_FILE,
        )
        return Trial(**plan)


@dataclass(frozen=True)
class Planned:
    """A trial to run; its fields are the `config` of Ray Tune's trial."""

    id: str
    point: Point
    seed: int
    stage: Stage


def write_planned(folder: Path, planned: Planned) -> None:
    """Write what `read_trial` needs if the trial's record is damaged later."""
    write_atomically(folder / PLANNED_FILE, json.dumps(asdict(planned)) + "\n")


def trial_name(number: int) -> str:
    """Return the id of a trial of the search."""
    return f"{number:03d}"


def finalist_name(number: int) -> str:
    """Return the id of a trial of the finalists."""
    return f"f{number:03d}"
