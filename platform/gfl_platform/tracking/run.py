"""The MLflow run of a training or a sweep, which its driver opens, fills with events and closes.

Opening and closing may wait for MLflow. `RunTracker.handle` never does: it adds the event to the
spool, and a thread logs it. No training process uses this module.
"""

import logging
import re
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean

from gfl_platform.cluster.events import (
    CheckpointStored,
    EpochEvaluated,
    Event,
    RunEnded,
    RunOpened,
    RunReopened,
    StepsDone,
    WorkerFailed,
)
from gfl_platform.tracking.client import Store, reason_of
from gfl_platform.tracking.delivery import RESTARTS, Delivery, Logged
from gfl_platform.tracking.spool import SPOOL_FILE, Spool
from gfl_platform.tracking.status import note_killed

logger = logging.getLogger(__name__)

LOGGED = {"step": "loss", "stored": "checkpoint_seconds", "evaluated": "AP"}
"""Counters of the spool, each with the metric whose last step it equals."""


class RunTracker:
    """One MLflow run from its opening to its end; its events wait in a spool for the store."""

    def __init__(
        self, store: Store, folder: Path, opened: RunOpened, *, may_be_away: bool | None = None
    ) -> None:
        """Open a run, or continue the one that `folder` belongs to.

        Args:
            store: Where to log.
            folder: The run's folder, in which the MLflow run and the events that wait are noted.
            opened: Description of a new run; see `metadata.describe`.
            may_be_away: Whether the store may answer later; by default as the store says.

        Raises:
            TrackingError: the store does not answer, and has to.
        """
        self._folder, self._store, self._opened = folder, store, opened
        self._spool = Spool(folder / SPOOL_FILE)
        self._delivery = Delivery(store, folder, self._spool)
        if not (store.may_be_away if may_be_away is None else may_be_away):
            store.require_answer()
        self._spool.recall_refused()
        if not self._add_opening():
            if self._spool.is_new:
                self._read_logged_steps()
            with self._spool.transaction():
                self._spool.add(RunReopened(self._spool.count(RESTARTS)))
        self._delivery.deliver()
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        # The process does not wait for this thread at its end, because the spool is a file.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the run as FINISHED, or as KILLED or FAILED after an exception."""
        # `ray job stop` sends SIGTERM, which Ray turns into SystemExit.
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    @property
    def run_id(self) -> str | None:
        """Identifier of the MLflow run, None before the store has answered."""
        return self._delivery.run_id

    def require_run(self) -> str:
        """Log the events that wait, and return the identifier of the MLflow run.

        Raises:
            TrackingError: there is no run, because the store has not answered yet.
        """
        self.flush()
        return self._delivery.require_run()

    def handle(self, event: Event) -> None:
        """Add an event to the spool, from which it is logged as soon as the store answers.

        Steps and epochs that were added before an interruption are not added again.
        """
        if not isinstance(event, Logged):
            return
        with self._on_a_full_device():
            try:
                self._note(event)
            except sqlite3.DatabaseError as error:
                if not self._spool.replace_if_damaged(error):
                    raise
                self._add_opening()
                self._note(event)
        self._tasks.put(self._delivery.deliver)

    def _add_opening(self) -> bool:
        """Add the event that creates the MLflow run, unless there is a run or the event waits."""
        if self.run_id or self._spool:
            return False
        self._spool.add(self._opened)
        return True

    def _note(self, event: Event) -> None:
        """Add an event to the spool if it is new."""
        with self._spool.transaction():
            if not self._is_new(event):
                return
            if isinstance(event, WorkerFailed) and not event.final:
                event = replace(event, restarts=self._spool.count(RESTARTS))
            if isinstance(event, StepsDone):
                event = replace(event, metrics=over_workers(event.metrics))
            self._spool.add(event)

    def _is_new(self, event: Event) -> bool:
        match event:
            case StepsDone(step=step):
                return self._spool.raise_to("step", step)
            case CheckpointStored(step=step):
                return self._spool.raise_to("stored", step)
            case EpochEvaluated(step=step, repeated=repeated):
                is_later = self._spool.raise_to("evaluated", step)
                # An epoch that was trained again has another checkpoint.
                return is_later or not repeated
            case _:
                return True

    def flush(self) -> None:
        """Wait until all events are logged, or an attempt has failed."""
        done = threading.Event()
        self._tasks.put(self._delivery.deliver_all)
        self._tasks.put(done.set)
        while self._thread.is_alive() and not done.wait(1):
            pass

    def _work(self) -> None:
        """Do the tasks of the queue, in the thread."""
        for task in iter(self._tasks.get, None):
            try:
                task()
            except Exception:  # The event stays in the spool.
                logger.exception("tracking: %s", self._spool.path)

    def _read_logged_steps(self) -> None:
        """Set the counters from the store, if the run was continued from another machine."""
        try:
            for number, metric in LOGGED.items():
                self._spool.raise_to(number, self._delivery.last_step(metric))
        except Exception as error:  # The store raises many types.
            logger.warning("tracking: %s; steps may be logged twice", reason_of(error))

    def close(self, status: str | None = None) -> None:
        """End the run, and wait until all events are logged or an attempt has failed.

        No error of the store is raised, so that the reason why a job ended stays visible.

        Args:
            status: FINISHED, FAILED or KILLED; None if a `RunEnded` has been handled already.
        """
        if status:
            self.handle(RunEnded(status))
        try:
            self.flush()
        finally:
            self._tasks.put(None)
        with self._on_a_full_device():
            if waiting := len(self._spool):
                name, place = self._folder.name, self._store.storage.location
                command = (
                    f", or by `python -m jobs.status {name} storage.root={place} "
                    f"tracking.uri={self._store.shown_uri} --deliver`"
                )
                logger.warning(
                    "tracking: %d events wait in %s; they are logged when the run goes on with "
                    "--resume%s",
                    waiting,
                    self._spool.path,
                    command if self._folder.parent.name == "runs" else "",
                )
            self._spool.close()

    @contextmanager
    def _on_a_full_device(self) -> Iterator[None]:
        """Warn if the spool cannot be written, instead of ending the job."""
        try:
            yield
        except sqlite3.Error as error:
            logger.warning("tracking: %s: %s; not noted", self._spool.path, error)


def over_workers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with the least, mean and greatest gauge of all workers instead of each one.

    Hundreds of workers would otherwise fill the spool and MLflow with their gauges.
    """
    result: dict[str, float] = {}
    gauges: dict[str, list[float]] = defaultdict(list)
    for name, value in metrics.items():
        if match := re.fullmatch(r"worker\d+\.(.+)", name):
            gauges[match[1]].append(value)
        else:
            result[name] = value
    for name, values in gauges.items():
        for kind, reduce in (("min", min), ("mean", fmean), ("max", max)):
            result[f"workers.{name}.{kind}"] = reduce(values)
    return result


def settle(store: Store, folder: Path) -> None:
    """Log the events that wait of a run without a driver; a killed run gets the status KILLED.

    Events that the store refused before are tried again.

    Args:
        store: Where to log.
        folder: The run's folder, which the caller has locked.

    Raises:
        TrackingError: the store does not answer, or it is not the store of the run.
    """
    spool = Spool(folder / SPOOL_FILE)
    delivery = Delivery(store, folder, spool)
    store.require_answer()
    spool.recall_refused()
    if note_killed(folder):
        spool.add(RunEnded("KILLED"))
    delivery.deliver_all()
    spool.close()
