"""MLflow runs: the driver's process opens one, notes what happens, and closes it.

Opening and closing may wait for MLflow; noting never does, for a thread delivers what is noted.
Nothing here is called by a training process. Importing MLflow costs seconds, so it is imported
where it is used.
"""

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

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
from gfl_platform.tracking.spool import (
    RESTARTS,
    SPOOL_FILE,
    Delivery,
    Logged,
    Spool,
    note,
    require_store,
)
from gfl_platform.tracking.status import note_killed

logger = logging.getLogger(__name__)

LOGGED = {"step": "loss", "stored": "checkpoint_seconds", "evaluated": "AP"}
"""Metrics that tell these numbers of a run that another machine has noted."""


class RunTracker:
    """One MLflow run from its opening to its end, through a spool: a dead server loses nothing."""

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
        self._folder, self._store = folder, store
        require_store(store, folder)
        if not (store.may_be_away if may_be_away is None else may_be_away):
            store.require_answer()
        self._spool = Spool(folder / SPOOL_FILE)
        self._delivery = Delivery(store, folder)
        if self.run_id is None and store.chosen_uri:
            note(folder, store=store.shown_uri)
        if self.run_id is None and not self._spool:
            self._spool.add(opened)
        else:
            if self._spool.is_new:
                self._learn_what_is_logged()
            with self._spool.transaction():
                self._spool.add(RunReopened(self._spool.count(RESTARTS)))
        self._delivery.deliver()
        self._asked: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        # At its end the process waits for no such thread: what is noted is safe.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the run: FINISHED, or what an exception makes of it."""
        # Ray turns SIGTERM, which `ray job stop` sends, into SystemExit.
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    @property
    def run_id(self) -> str | None:
        """The MLflow run; none before a store has answered."""
        return self._delivery.run_id

    def require_run(self) -> str:
        """Return the MLflow run, with what was noted of it, if the store answers.

        Raises:
            TrackingError: no store has answered yet, so there is none.
        """
        self.flush()
        return self._delivery.require_run()

    def handle(self, event: Event) -> None:
        """Note `event`; it is logged when a store answers, and outlives this process until then.

        Steps and epochs that were noted before an interruption are not noted again.
        """
        if not isinstance(event, Logged):
            return
        with self._on_a_full_device(), self._spool.transaction():
            if not self._is_new(event):
                return
            if isinstance(event, WorkerFailed) and not event.final:
                event = replace(event, restarts=self._spool.count(RESTARTS))
            self._spool.add(event)
        self._asked.put(self._delivery.deliver)

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
        """Wait until all that was noted is logged, or has been tried in vain."""
        done = threading.Event()
        self._asked.put(self._delivery.deliver_all)
        self._asked.put(done.set)
        while self._thread.is_alive() and not done.wait(1):
            pass

    def _work(self) -> None:
        """Do what is asked for, in the thread."""
        for task in iter(self._asked.get, None):
            try:
                task()
            except Exception:  # what is not logged is still noted
                logger.exception("tracking: %s", self._spool.path)

    def _learn_what_is_logged(self) -> None:
        """Where another machine noted the run before: its last numbers are those in the store."""
        try:
            for number, metric in LOGGED.items():
                self._spool.raise_to(number, self._delivery.last_step(metric))
        except Exception as error:  # as `Delivery` has it
            logger.warning("tracking: %s; steps may be logged twice", reason_of(error))

    def close(self, status: str | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED; wait until that is logged or tried in vain.

        Without a status its end has been noted.

        Hides nothing of why a job ended: only an interruption comes of it, and loses no event.
        """
        if status:
            self.handle(RunEnded(status))
        try:
            self.flush()
        finally:
            self._asked.put(None)
        with self._on_a_full_device():
            if left := len(self._spool):
                logger.warning(
                    "tracking: %d events wait in %s; they are logged when the run goes on with "
                    "--resume, or by `python -m jobs.status %s storage.root=%s tracking.uri=%s "
                    "--deliver`",
                    left,
                    self._spool.path,
                    self._folder.name,
                    self._store.storage.location,
                    self._store.shown_uri,
                )
            self._delivery.spool.close()
            self._spool.close()

    @contextmanager
    def _on_a_full_device(self) -> Iterator[None]:
        """Let nothing but a warning come of a spool that cannot be written."""
        try:
            yield
        except sqlite3.Error as error:
            logger.warning("tracking: %s: %s; not noted", self._spool.path, error)


def settle(store: Store, folder: Path) -> None:
    """Log what waits of a run that has no driver any more; what was killed is then KILLED.

    Args:
        store: Where to log.
        folder: The run's, held by the caller.

    Raises:
        TrackingError: no store answers, or it is not the run's.
    """
    require_store(store, folder)
    store.require_answer()
    delivery = Delivery(store, folder)
    if note_killed(folder):
        delivery.spool.add(RunEnded("KILLED"))
    delivery.deliver_all()
