"""What happens in a job, as its processes tell its driver: one frozen dataclass per kind.

    match event:
        case StepsDone(step=step, metrics=metrics):
            ...

Events travel through `event_queue` and wait for MLflow as JSON (`to_json`, `from_json`).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal


def now_ms() -> int:
    """Return the time in milliseconds since the epoch."""
    return int(time.time() * 1000)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a job.

    Attributes:
        time_ms: The time at which it happened, in milliseconds since the epoch. Two events that
            differ in nothing else are equal.
    """

    time_ms: int = field(default_factory=now_ms, compare=False)


TrialState = Literal["finished", "stopped early", "failed", "nan", "out of budget"]
"""How a trial ended: `stopped early` by the scheduler, `out of budget` with the sweep."""

Watcher = Callable[[Event], None]
"""A function that is called with every event while a job runs, and shows it."""


@dataclass(frozen=True)
class Waiting(Event):
    """The workers cannot start until an autoscaler adds nodes; the reason is one line."""

    reason: str


@dataclass(frozen=True)
class WorkersStarted(Event):
    """The workers of a training have started, for the first time or again.

    Attributes:
        count: Number of training processes.
        nodes: Number of nodes of the cluster.
    """

    count: int
    nodes: int


@dataclass(frozen=True)
class DataDescribed(Event):
    """The workers have read the data.

    Attributes:
        facts: Digest and number of images of each split, and what was left out of it.
        findings: Suspicious properties of the data, one sentence each.
    """

    facts: Mapping[str, str | int]
    findings: list[str]


@dataclass(frozen=True)
class StepsDone(Event):
    """Some steps have been trained since the report before.

    Attributes:
        step: Number of steps done.
        total_steps: Number of steps of the whole training.
        epoch: Epochs done, with fraction.
        seconds_left: Estimated seconds until all steps are done, evaluations not counted.
        metrics: Losses and rates, averaged over the steps.
        repeated: Whether this is told again after a restart, in case the driver missed it.
    """

    step: int
    total_steps: int
    epoch: float
    seconds_left: float
    metrics: Mapping[str, float]
    repeated: bool = False


@dataclass(frozen=True)
class CheckpointStored(Event):
    """A worker has written a checkpoint to storage.

    Attributes:
        step: Number of steps done at the checkpoint.
        metrics: Seconds that writing took, and seconds that training waited.
    """

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint within an epoch can be continued from.

    Attributes:
        step: Number of steps done.
        epoch: Number of epochs done.
        uri: Folder of the checkpoint, a path or `s3://...`.
    """

    step: int
    epoch: int
    uri: str


@dataclass(frozen=True)
class EpochEvaluated(Event):
    """An epoch has been trained and evaluated, and its checkpoint is in storage.

    Attributes:
        step: Number of steps done.
        epoch: Number of epochs done.
        metrics: COCO statistics.
        uri: Folder of the checkpoint, a path or `s3://...`; empty while it is not known.
        repeated: Whether this is told again after a restart, in case the driver missed it.
    """

    step: int
    epoch: int
    metrics: Mapping[str, float]
    uri: str = ""
    repeated: bool = False


@dataclass(frozen=True)
class CheckpointDamaged(Event):
    """A checkpoint cannot be continued from, so an older one is used; the reason is one line."""

    reason: str


@dataclass(frozen=True)
class WorkerFailed(Event):
    """A worker stopped.

    Attributes:
        rank: Rank of the worker.
        reason: Why it stopped, in one line.
        final: Whether the training ends with it.
        restarts: How often the run has been started again, this time included.
    """

    rank: int
    reason: str
    final: bool
    restarts: int | None = None


@dataclass(frozen=True)
class ItemsDone(Event):
    """A job has done some of its items.

    Attributes:
        work: The items and what was done to them: `images evaluated`.
        done: Number of items done.
        total: Number of all items.
    """

    work: str
    done: int
    total: int


@dataclass(frozen=True)
class RunOpened(Event):
    """A driver begins an MLflow run.

    Attributes:
        name: Name of the run.
        tags: Tags of the run.
        params: Parameters of the run: the whole configuration.
        texts: Contents of text files by their names.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class RunReopened(Event):
    """Another driver continues an MLflow run, which was started again `restarts` times."""

    restarts: int


@dataclass(frozen=True)
class TagsSet(Event):
    """The driver knows further tags of the run."""

    tags: Mapping[str, str]


@dataclass(frozen=True)
class SpeedMeasured(Event):
    """A training is done, and its model's frames per second are measured under a protocol."""

    fps: float
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class OutagesCounted(Event):
    """A run has lost time again.

    Attributes:
        step: Number of steps done.
        metrics: Number of restarts, and minutes without a step.
    """

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class FolderWritten(Event):
    """The driver has written a folder, at `path`, that belongs to the run's artifacts."""

    path: str


@dataclass(frozen=True)
class CheckpointsDiscarded(Event):
    """All checkpoints of the run are going to be deleted."""


@dataclass(frozen=True)
class RunEnded(Event):
    """The run has ended with a status in MLflow's words: FINISHED, FAILED or KILLED."""

    status: str


@dataclass(frozen=True)
class TrialStarted(Event):
    """A trial of a sweep has started, first or again, with the fields of the sweep's `Planned`."""

    planned: Mapping[str, Any]


@dataclass(frozen=True)
class TrialOutcome(Event):
    """A trial of a sweep has ended by itself.

    Attributes:
        state: How it ended: `finished`, `failed` or `nan`.
        cause: Why it did not finish.
        figures: Metrics of a finished trial.
        epochs: Number of epochs that a finished trial has trained.
        checkpoint: Folder of the best checkpoint of a finished trial.
        protocol: How the FPS of a finished trial were measured.
    """

    state: TrialState
    cause: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 0
    checkpoint: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialEnded(Event):
    """Ray Tune has ended a trial.

    Attributes:
        state: State of the trial if it has told no outcome of its own.
        cause: Why it failed.
        planned: Fields of the sweep's `Planned`, where they are known.
    """

    state: TrialState
    cause: str | None = None
    planned: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Unknown(Event):
    """An event of a kind, called `name`, that only another version of this program knows."""

    name: str


@dataclass(frozen=True)
class OfTrial(Event):
    """An event of the sweep's trial that is called `trial`."""

    trial: str
    event: Event


KINDS: dict[str, type[Event]] = {
    "waiting": Waiting,
    "workers": WorkersStarted,
    "data": DataDescribed,
    "steps": StepsDone,
    "stored": CheckpointStored,
    "saved": CheckpointSaved,
    "checkpoint": EpochEvaluated,
    "damaged": CheckpointDamaged,
    "failure": WorkerFailed,
    "items": ItemsDone,
    "opened": RunOpened,
    "reopened": RunReopened,
    "tags": TagsSet,
    "result": SpeedMeasured,
    "outage": OutagesCounted,
    "folder": FolderWritten,
    "discarded": CheckpointsDiscarded,
    "end": RunEnded,
    "started": TrialStarted,
    "outcome": TrialOutcome,
    "ended": TrialEnded,
    "unknown": Unknown,
}
"""The kinds of events by their names in JSON, which files of runs keep: they may not change."""

NAMES = {kind: name for name, kind in KINDS.items()}


def name_of(event: Event) -> str:
    """Return the name of an event's kind in JSON."""
    return NAMES[type(event)]


def to_json(event: Event) -> dict[str, Any]:
    """Return an event as a JSON object: the name of its `kind`, and its attributes."""
    return {"kind": name_of(event), **vars(event)}


def from_json(record: Mapping[str, Any]) -> Event:
    """Return the event of a JSON object.

    Keys that the kind no longer has are left out, and an unknown kind is `Unknown`.

    Raises:
        TypeError: attributes are missing.
    """
    kind = KINDS.get(record["kind"])
    if kind is None:
        return Unknown(record["kind"])
    names = {attribute.name for attribute in fields(kind)}
    return kind(**{name: value for name, value in record.items() if name in names})
