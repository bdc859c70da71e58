"""What a sweep found: its trials, each a JSON file in its own folder, and what they have in common.

sweeps/NAME/            the sweep's folder, under the storage's root
    sweep.yaml          its configuration
    run.json            its MLflow run
    trials/ID/          a trial's folder: trial.json, run.json, its checkpoints
    report/             report.html and pictures
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gfl_platform.config import JobConfig, SweepConfig
from gfl_platform.storage.files import read_json, write_atomically

ENDED = ("finished", "stopped early", "nan")
"""States in which a resumed sweep leaves a trial; it goes on with all others if the budget lets it,
and tries `failed` ones again."""


TRIAL_FILE = "trial.json"

AT_THE_END = ("fps", "latency_ms")
"""Objectives that a trial reports once; all others it reports after every epoch."""

State = Literal["running", "finished", "stopped early", "failed", "nan", "out of budget"]

Stage = Literal["search", "finalists"]

Point = dict[str, Any]
"""Values of the swept keys."""


@dataclass
class Trial:
    """A training of a sweep.

    Attributes:
        id: The same after any restart.
        point: Values of the swept keys.
        seed: Of the training.
        stage: `search`, or `finalists`: other seeds of the best points and of the default.
        state: How it ended: `stopped early` by the scheduler, `out of budget` with the sweep.
        cause: Why it failed.
        curve: Epochs done and the sweep's `watched` metric, in their order.
        figures: Of the checkpoint with the best AP: the COCO statistics; of a finished trial `fps`
            and `latency_ms`, too.
        seconds: From the first word of its workers, in all attempts.
        devices: GPUs, or CPUs of a cluster without, that it held.
        config_hash: Of its effective configuration.
        run_id: Its MLflow run.
        checkpoint: Folder of the checkpoint with the best AP, where all nodes see it.
        protocol: How FPS was measured.
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
        """Epochs trained and evaluated."""
        return self.curve[-1][0] if self.curve else 0


@dataclass(frozen=True)
class SweepResults:
    """All that the report is made from.

    Attributes:
        name: Of the sweep.
        job: Its configuration; `job.sweep` says what was asked.
        defaults: Values of the swept keys in `job` itself.
        device: What `Trial.devices` counts: `GPU` or `CPU`.
        trials: In the order of their start.
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
        """The metric that is followed over epochs: the first objective, or AP."""
        first = self.sweep.objectives[0]
        return "AP" if first in AT_THE_END else first

    @property
    def epochs(self) -> int:
        """Of a whole training; a trial that sweeps `schedule.epochs` has its own."""
        return self.job.schedule.epochs


def write_trial(folder: Path, trial: Trial) -> None:
    """Note what is known of `trial` in its folder."""
    write_atomically(folder / TRIAL_FILE, json.dumps(asdict(trial), indent=1) + "\n")


def read_trial(folder: Path) -> Trial | None:
    """Return the trial noted in a folder, or None."""
    values = read_json(folder / TRIAL_FILE)
    if not values:
        return None
    values["curve"] = [(epoch, ap) for epoch, ap in values["curve"]]
    return Trial(**values)


@dataclass(frozen=True)
class Planned:
    """A trial to run; its fields are the `config` of Tune's trial."""

    id: str
    point: Point
    seed: int
    stage: Stage


def trial_name(number: int) -> str:
    """Return the identity of the trial with this number."""
    return f"{number:03d}"


def finalist_name(number: int) -> str:
    """Return the identity of the finalists' trial with this number."""
    return f"f{number:03d}"
