"""What the driver of a sweep notes: every trial in its folder and in its own MLflow run."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.tune import Callback

from gfl.config.loader import config_hash
from gfl_platform.cluster.event_queue import Events
from gfl_platform.cluster.events import (
    CheckpointsDiscarded,
    CheckpointStored,
    DataDescribed,
    EpochEvaluated,
    Event,
    OfTrial,
    RunEnded,
    SpeedMeasured,
    StepsDone,
    TagsSet,
    TrialEnded,
    TrialOutcome,
    TrialStarted,
    TrialState,
    WorkerFailed,
    WorkersStarted,
)
from gfl_platform.config import JobConfig
from gfl_platform.storage.files import read_json
from gfl_platform.storage.s3 import S3Error
from gfl_platform.sweeps.formatting import point_label
from gfl_platform.sweeps.space import trial_job
from gfl_platform.sweeps.trials import Planned, Trial, read_trial, write_trial
from gfl_platform.tracking.client import Store
from gfl_platform.tracking.metadata import describe
from gfl_platform.tracking.run import RunTracker, settle
from gfl_platform.tracking.spool import RUN_FILE, backlog
from gfl_platform.training.fit import RAY_FOLDER

logger = logging.getLogger(__name__)

RUN_STATUS = {"finished": "FINISHED", "failed": "FAILED", "nan": "FAILED"}
"""How MLflow calls a trial's end; one that was stopped is KILLED, as in Optuna's integration."""


DISCARDED = ("stopped early", "nan")
"""Ends of trials whose checkpoints nobody will want."""


class Recorder:
    """Hears of all trials; `watch` is told of each one that changed, after it was noted."""

    def __init__(
        self,
        job: JobConfig,
        store: Store,
        name: str,
        folder: Path,
        parent: str,
        devices: int,
        watch: Callable[[Trial, Event], None],
    ) -> None:
        """Take up the trials noted in `folder`.

        Args:
            job: The sweep's configuration.
            store: Where trials are logged.
            name: The sweep's.
            folder: Of the trials.
            parent: The sweep's MLflow run.
            devices: That a trial holds.
            watch: Is told of a trial and what happened to it.
        """
        self._job, self._name, self._folder = job, name, folder
        self._store = store
        self._parent, self._devices, self._watch = parent, devices, watch
        found = [read_trial(path) for path in sorted(folder.glob("*"))]
        self.trials = {trial.id: trial for trial in found if trial}
        self._trackers: dict[str, RunTracker] = {}
        self._since: dict[str, float] = {}
        for trial in self.trials.values():
            if trial.state != "running" and backlog(folder / trial.id):  # the store was away
                settle(store, folder / trial.id)
                trial.run_id = read_json(folder / trial.id / RUN_FILE).get("run_id")
        self._watched = job.sweep.objectives[0] if job.sweep else "AP"

    def plan(self, planned: Planned) -> None:
        """Note a trial before it starts: from then on its identity is taken."""
        trial = self.trials.setdefault(planned.id, Trial(**vars(planned)))
        self._write(trial)

    def handle(self, event: Event) -> None:
        """Note an event of a trial."""
        assert isinstance(event, OfTrial)
        self._handle(event.trial, event.event)

    def _handle(self, name: str, event: Event) -> None:
        match event:
            case TrialStarted(planned=planned):
                self._start(planned)
            case TrialEnded(planned=planned) if planned and name not in self._trackers:
                self._start(planned)
        if name not in self._trackers:
            return  # a training that was stopped still speaks until its processes are gone
        trial = self.trials[name]
        match event:
            case EpochEvaluated():
                self._note_epoch(trial, event)
            case TrialOutcome():
                self._note_outcome(trial, event)
            case WorkersStarted():  # time spent waiting for room is nobody's
                self._since.setdefault(name, time.monotonic())
            case TrialEnded():
                self._end(trial, event)
            case StepsDone() | CheckpointStored() | DataDescribed() | WorkerFailed():
                self._trackers[name].handle(event)
        self._watch(trial, event)

    def close(self) -> None:
        """Close the runs of trials that an interruption left running."""
        for name, tracker in self._trackers.items():  # all, before any waits for a store
            self._tick(self.trials[name])
            self._write(self.trials[name])
            tracker.handle(RunEnded("KILLED"))
        while self._trackers:
            self._trackers.popitem()[1].close()

    def end_running(self, state: TrialState) -> None:
        """Note that the search is over for trials that Ray Tune stopped without a word."""
        for name in list(self._trackers):
            self._handle(name, TrialEnded(state))
        for trial in self.trials.values():
            if trial.state == "running":  # planned, and never started
                trial.state = state
                self._write(trial)

    def discard_checkpoints(self) -> None:
        """Delete the checkpoints of trials that were stopped."""
        for trial in self.trials.values():
            if trial.state in DISCARDED and trial.checkpoint:
                with suppress(S3Error):  # they only take room
                    self._store.storage.discard(self._folder / trial.id / RAY_FOLDER)
                trial.checkpoint = None
                self._write(trial)

    def _start(self, planned: Mapping[str, Any]) -> None:
        name = planned["id"]
        folder = self._folder / name
        trial = self.trials.setdefault(name, Trial(**planned))
        trial.state, trial.cause = "running", None
        job = trial_job(self._job, trial.point, trial.seed)
        trial.config_hash, trial.devices = config_hash(job), self._devices
        if name not in self._trackers:
            tags = {
                "mlflow.parentRunId": self._parent,
                "sweep.stage": trial.stage,
                "config.hash": trial.config_hash,
            }
            called = f"{self._name}-{name} {point_label(trial.point)} seed={trial.seed}"
            folder.mkdir(parents=True, exist_ok=True)
            # The sweep's own run was opened: a store that is away by now will be back.
            self._trackers[name] = RunTracker(
                self._store, folder, describe(job, called, tags), may_be_away=True
            )
        trial.run_id = self._trackers[name].run_id
        self._write(trial)

    def _note_epoch(self, trial: Trial, event: EpochEvaluated) -> None:
        metrics = event.metrics
        if event.epoch > trial.epochs:
            watched = self._watched if self._watched in metrics else "AP"
            trial.curve.append((event.epoch, metrics[watched]))
        if metrics["AP"] >= trial.figures.get("AP", -1.0):
            trial.figures, trial.checkpoint = dict(metrics), event.uri
        self._tick(trial)
        self._write(trial)
        self._trackers[trial.id].handle(event)

    def _note_outcome(self, trial: Trial, outcome: TrialOutcome) -> None:
        trial.state, trial.cause = outcome.state, outcome.cause
        if outcome.state == "finished":
            trial.figures, trial.checkpoint = dict(outcome.figures), outcome.checkpoint
            trial.protocol = dict(outcome.protocol)
            fps = trial.figures["fps"]
            self._trackers[trial.id].handle(SpeedMeasured(fps, trial.protocol))

    def _end(self, trial: Trial, event: TrialEnded) -> None:
        if trial.state == "running":  # it gave no outcome of its own
            trial.state, trial.cause = event.state, event.cause
        self._tick(trial)
        self._since.pop(trial.id, None)
        tracker = self._trackers.pop(trial.id)
        tags = {"sweep.state": trial.state, "sweep.cause": trial.cause or ""}
        tracker.handle(TagsSet(tags))
        if trial.state in DISCARDED:
            tracker.handle(CheckpointsDiscarded())
        tracker.close(RUN_STATUS.get(trial.state, "KILLED"))
        trial.run_id = tracker.run_id
        self._write(trial)

    def _write(self, trial: Trial) -> None:
        """Note a trial here, and where another driver would look."""
        folder = self._folder / trial.id
        write_trial(folder, trial)
        try:
            self._store.storage.share_state(folder)
        except S3Error as error:  # the next time it is noted, S3 may be back
            logger.warning("%s", error)

    def _tick(self, trial: Trial) -> None:
        """Add the time since the last event to what the trial has taken."""
        now = time.monotonic()
        trial.seconds += now - self._since.get(trial.id, now)
        self._since[trial.id] = now


class EndOfTrials(Callback):
    """Tells the recorder what only Ray Tune knows: that a trial has ended, and who ended it."""

    def __init__(self, events: Events, out_of_budget: Callable[[], bool]) -> None:
        self._events, self._out_of_budget = events, out_of_budget

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of a trial that finished or was stopped."""
        self._tell(trial, "out of budget" if self._out_of_budget() else "stopped early")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Tell of a trial that failed without giving a reason: its process was lost, too often."""
        told = Path(trial.error_file).read_text().split("\n") if trial.error_file else []
        reasons = [line for line in told if line and not line.startswith(" ")]
        self._tell(trial, "failed", reasons[-1] if reasons else "its process was lost")

    def _tell(self, trial: Any, state: TrialState, cause: str | None = None) -> None:
        planned = dict(trial.config)
        self._events.tell(OfTrial(planned["id"], TrialEnded(state, cause, planned)))
