"""The driver of a sweep records every trial in its folder and in an MLflow run of its own."""

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
from gfl_platform.storage.lease import term_of
from gfl_platform.storage.s3 import S3Error
from gfl_platform.sweeps.formatting import point_label
from gfl_platform.sweeps.space import trial_job
from gfl_platform.sweeps.trials import Planned, Trial, read_trial, write_planned, write_trial
from gfl_platform.tracking.client import Store
from gfl_platform.tracking.metadata import describe, read_run_file
from gfl_platform.tracking.run import RunTracker, settle
from gfl_platform.tracking.spool import is_settled

logger = logging.getLogger(__name__)

RUN_STATUS = {"finished": "FINISHED", "failed": "FAILED", "nan": "FAILED"}
"""MLflow's status for the end of a trial; all other ends are KILLED, as in Optuna's integration."""

DISCARDED = ("stopped early", "nan")
"""States of trials whose checkpoints are deleted after the search."""


class Recorder:
    """Records what happens to the trials of a sweep."""

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
        """Read the records of earlier sessions.

        Args:
            job: Configuration of the sweep.
            store: MLflow store that the trials are logged to.
            name: Name of the sweep.
            folder: Folder with the trials' folders.
            parent: MLflow run of the sweep.
            devices: Number of GPUs or CPUs that a trial holds.
            watch: Called with a trial and each of its events, after the event was recorded.
        """
        self._job, self._name, self._folder = job, name, folder
        self._store = store
        self._parent, self._devices, self._watch = parent, devices, watch
        records = [read_trial(path) for path in sorted(folder.glob("*"))]
        self.trials = {trial.id: trial for trial in records if trial}
        self._trackers: dict[str, RunTracker] = {}
        self._since: dict[str, float] = {}
        for trial in self.trials.values():
            if trial.state != "running" and not is_settled(folder / trial.id):
                settle(store, folder / trial.id)
                trial.run_id = read_run_file(folder / trial.id).get("run_id")
        self._watched = job.sweep.objectives[0] if job.sweep else "AP"

    def plan(self, planned: Planned) -> None:
        """Record a trial before it starts: from then on its id is taken."""
        write_planned(self._folder / planned.id, planned)
        self._write(self.trials.setdefault(planned.id, Trial(**vars(planned))))

    def handle(self, event: Event) -> None:
        """Record an event of a trial."""
        assert isinstance(event, OfTrial)
        self._handle(event.trial, event.event)

    def _handle(self, name: str, event: Event) -> None:
        match event:
            case TrialStarted(planned=planned):
                self._start(planned)
            case TrialEnded(planned=planned) if planned and name not in self._trackers:
                self._start(planned)
        if name not in self._trackers:
            return  # a stopped training goes on sending events until its processes are gone
        trial = self.trials[name]
        match event:
            case EpochEvaluated():
                self._add_epoch(trial, event)
            case TrialOutcome():
                self._set_outcome(trial, event)
            case WorkersStarted():  # the time before was spent waiting for resources
                self._since.setdefault(name, time.monotonic())
            case TrialEnded():
                self._end(trial, event)
            case StepsDone() | CheckpointStored() | DataDescribed() | WorkerFailed():
                self._trackers[name].handle(event)
        self._watch(trial, event)

    def close(self) -> None:
        """Close the runs of trials that an interruption left running."""
        for name, tracker in self._trackers.items():  # all of them before any waits for MLflow
            self._add_seconds(self.trials[name])
            self._write(self.trials[name])
            tracker.handle(RunEnded("KILLED"))
        while self._trackers:
            self._trackers.popitem()[1].close()

    def end_running(self, state: TrialState) -> None:
        """Record the end of the search for trials that Ray Tune stopped without a callback."""
        for name in list(self._trackers):
            self._handle(name, TrialEnded(state))
        for trial in self.trials.values():
            if trial.state == "running":  # planned but never started
                trial.state = state
                self._write(trial)

    def discard_checkpoints(self) -> None:
        """Delete the checkpoints of trials that were stopped."""
        for trial in self.trials.values():
            if trial.state in DISCARDED and trial.checkpoint:
                folder, storage = self._folder / trial.id, self._store.storage
                with suppress(S3Error):  # what is left only takes space
                    for name in filter(term_of, storage.folders_in(folder)):
                        storage.discard(folder / name)
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
            run_name = f"{self._name}-{name} {point_label(trial.point)} seed={trial.seed}"
            folder.mkdir(parents=True, exist_ok=True)
            # MLflow answered when the sweep's own run was opened, so an outage is temporary.
            self._trackers[name] = RunTracker(
                self._store, folder, describe(job, run_name, tags), may_be_away=True
            )
        trial.run_id = self._trackers[name].run_id
        self._write(trial)

    def _add_epoch(self, trial: Trial, event: EpochEvaluated) -> None:
        metrics = event.metrics
        if event.epoch > trial.epochs:
            watched = self._watched if self._watched in metrics else "AP"
            trial.curve.append((event.epoch, metrics[watched]))
        if metrics["AP"] >= trial.figures.get("AP", -1.0):
            trial.figures, trial.checkpoint = dict(metrics), event.uri
        self._add_seconds(trial)
        self._write(trial)
        self._trackers[trial.id].handle(event)

    def _set_outcome(self, trial: Trial, outcome: TrialOutcome) -> None:
        trial.state, trial.cause = outcome.state, outcome.cause
        if outcome.state == "finished":
            trial.figures, trial.checkpoint = dict(outcome.figures), outcome.checkpoint
            trial.protocol = dict(outcome.protocol)
            fps = trial.figures["fps"]
            self._trackers[trial.id].handle(SpeedMeasured(fps, trial.protocol))

    def _end(self, trial: Trial, event: TrialEnded) -> None:
        if trial.state == "running":  # it sent no outcome
            trial.state, trial.cause = event.state, event.cause
        self._add_seconds(trial)
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
        """Write a trial's record here, and to S3 where a driver on another machine reads it."""
        folder = self._folder / trial.id
        write_trial(folder, trial)
        try:
            self._store.storage.share_state(folder)
        except S3Error as error:  # S3 may answer again at the trial's next event
            logger.warning("%s", error)

    def _add_seconds(self, trial: Trial) -> None:
        """Add the time since the trial's last event to its seconds."""
        now = time.monotonic()
        trial.seconds += now - self._since.get(trial.id, now)
        self._since[trial.id] = now


class EndOfTrials(Callback):
    """Sends the recorder what only Ray Tune knows: that a trial has ended, and why."""

    def __init__(self, events: Events, out_of_budget: Callable[[], bool]) -> None:
        self._events, self._out_of_budget = events, out_of_budget

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Send the end of a trial that finished or was stopped."""
        self._send(trial, "out of budget" if self._out_of_budget() else "stopped early")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Send the end of a trial whose process was lost too often."""
        lines = Path(trial.error_file).read_text().split("\n") if trial.error_file else []
        reasons = [line for line in lines if line and not line.startswith(" ")]
        self._send(trial, "failed", reasons[-1] if reasons else "its process was lost")

    def _send(self, trial: Any, state: TrialState, cause: str | None = None) -> None:
        planned = dict(trial.config)
        self._events.tell(OfTrial(planned["id"], TrialEnded(state, cause, planned)))
