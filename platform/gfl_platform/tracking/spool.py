"""The spool: events of a run wait in a file until they have been logged to MLflow.

`Spool` is the queue in the file, `Delivery` takes events from it and logs them. A driver that dies
or a store that does not answer loses no event, and none is logged twice.
"""

import json
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, assert_never

from gfl_platform.cluster.events import (
    CheckpointsDiscarded,
    CheckpointStored,
    DataDescribed,
    EpochEvaluated,
    Event,
    FolderWritten,
    OutagesCounted,
    RunEnded,
    RunOpened,
    RunReopened,
    SpeedMeasured,
    StepsDone,
    TagsSet,
    WorkerFailed,
    from_json,
    name_of,
    to_json,
)
from gfl_platform.storage.files import read_json, write_atomically
from gfl_platform.storage.storage import is_there
from gfl_platform.tracking.client import (
    Store,
    TrackingError,
    on_all_pages,
    reason_of,
)
from gfl_platform.tracking.metadata import IDENTITY, PROTOCOL

logger = logging.getLogger(__name__)

Logged = (
    StepsDone | CheckpointStored | EpochEvaluated | DataDescribed | WorkerFailed | OutagesCounted
    | RunOpened | RunReopened | TagsSet | SpeedMeasured | FolderWritten | CheckpointsDiscarded
    | RunEnded
)  # fmt: skip
"""Types of the events that are logged; the others only concern the display."""

SPOOL_FILE = "spool.db"
"""SQLite file in a run's folder that holds the spool."""

LIMIT = 100_000
"""Largest number of waiting events, about 40 MB; then the oldest reports of steps are dropped."""

LOCK_SECONDS = 60.0
"""Seconds to wait for the file's lock, which another thread holds while a slow disk writes."""


class Spool:
    """A queue of events and some counters in a file, used by one process.

    The thread that adds events and the thread that removes them have a `Spool` each.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        """Open or create the spool at `path`; `limit` is the largest number of waiting events."""
        self.path, self._limit = path, limit
        # Outside `transaction` every statement commits by itself; the threads take turns.
        self._db = sqlite3.connect(
            path, LOCK_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS events "
            "(id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, event TEXT)"
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value INT)")

    def __len__(self) -> int:
        (count,) = self._db.execute("SELECT count(*) FROM events").fetchone()
        return int(count)

    @property
    def is_new(self) -> bool:
        """Whether the spool has never held an event or a counter."""
        (count,) = self._db.execute("SELECT count(*) FROM numbers").fetchone()
        return not count and not len(self)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes of the context together, or none of them if it raises an exception."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def add(self, event: Event) -> None:
        """Append an event."""
        if len(self) >= self._limit:
            self._thin_out()
        row = (name_of(event), json.dumps(to_json(event)))
        self._db.execute("INSERT INTO events (kind, event) VALUES (?, ?)", row)

    def first(self, count: int) -> dict[int, Event]:
        """Return the oldest `count` events, by their numbers in the queue."""
        rows = self._db.execute("SELECT id, event FROM events ORDER BY id LIMIT ?", (count,))
        return {number: from_json(json.loads(event)) for number, event in rows}

    def remove(self, last: int) -> None:
        """Remove the events up to the one with the number `last`."""
        self._db.execute("DELETE FROM events WHERE id <= ?", (last,))

    def raise_to(self, name: str, value: int) -> bool:
        """Raise a counter to `value`, and return whether it was lower; a new counter is 0."""
        (before,) = self._db.execute(
            "SELECT coalesce(max(value), 0) FROM numbers WHERE name = ?", (name,)
        ).fetchone()
        if value > before:
            self._db.execute("REPLACE INTO numbers VALUES (?, ?)", (name, value))
        return bool(value > before)

    def count(self, name: str) -> int:
        """Increase a counter by one, and return it."""
        row = self._db.execute(
            "INSERT INTO numbers VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1 "
            "RETURNING value",
            (name,),
        ).fetchone()
        return int(row[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _thin_out(self) -> None:
        dropped = self._db.execute(
            "DELETE FROM events WHERE id IN "
            "(SELECT id FROM events WHERE kind = 'steps' ORDER BY id LIMIT ?)",
            (max(self._limit // 10, 1),),
        ).rowcount
        logger.warning("tracking: %s is full; %d reports of steps were dropped", self.path, dropped)


def backlog(folder: Path) -> int:
    """Return the number of events of a run that wait for MLflow; its driver may be running."""
    path = folder / SPOOL_FILE
    if not path.exists():
        return 0
    # Opened for writing, because SQLite has to roll back what a killed driver left half-written.
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True) as db:
        (count,) = db.execute("SELECT count(*) FROM events").fetchone()
    return int(count)


RUN_FILE = "run.json"
"""File in a run's folder that names its MLflow run and the store that the user chose for it."""

RESTARTS = "restarts"
"""Tag of a run: how often it continued after the loss of a worker, a node or its driver."""

BATCH = 100
"""Number of events that are taken from the spool together."""

METRICS_PER_CALL = 1000
"""MLflow's limit of metrics in one call."""

LONGEST_DELAY = 60.0
"""Longest pause between two attempts to reach the store, in seconds."""

REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
"""Error codes of a store that would not change with another attempt."""


class Delivery:
    """Logs the events in the spool of one run.

    Attributes:
        spool: The spool, as the delivering thread uses it.
        run_id: The MLflow run, None before the store has answered.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        """Open the spool; nothing is logged yet.

        Args:
            store: Where to log.
            folder: The run's folder.
        """
        self._store, self._folder = store, folder
        self.spool = Spool(folder / SPOOL_FILE)
        self.run_id: str | None = read_json(folder / RUN_FILE).get("run_id")
        self._delay, self._try_at = 0.0, 0.0

    @property
    def client(self) -> Any:
        """Client of the store, which has to answer when this is used for the first time."""
        return self._store.client

    def deliver(self) -> None:
        """Log the events that wait; after a failure this does nothing for a while.

        The pause doubles with every failure, up to `LONGEST_DELAY`.
        """
        if time.monotonic() >= self._try_at:
            self.deliver_all()

    def deliver_all(self) -> None:
        """Log the events that wait, oldest first, until one fails; this never pauses."""
        try:
            while waiting := self.spool.first(BATCH):
                for last, events in _together(waiting):
                    self._log_or_drop(events)
                    self.spool.remove(last)
        except Exception as error:  # The store and the place of its artifacts raise many types.
            self._delay = min(max(2 * self._delay, 1.0), LONGEST_DELAY)
            self._try_at = time.monotonic() + self._delay
            logger.warning("tracking: %s; %d events wait", reason_of(error), len(self.spool))
        else:
            self._delay = 0.0

    def require_run(self) -> str:
        """Return the identifier of the MLflow run.

        Raises:
            TrackingError: there is no run, because the store has not answered yet.
        """
        if self.run_id is None:
            raise TrackingError(f"{self._store.shown_uri}: no MLflow store answers")
        return self.run_id

    def last_step(self, metric: str) -> int:
        """Return the last step at which a metric of the run was logged, 0 if it never was.

        Raises:
            TrackingError: the store does not answer, or there is no run yet.
        """
        history = self.client.get_metric_history(self.require_run(), metric)
        return max((point.step for point in history), default=0)

    def _log_or_drop(self, events: list[Event]) -> None:
        """Log events; drop those that the store will never accept, which would block the rest."""
        from mlflow.exceptions import MlflowException

        for is_last in (False, True):  # A broken connection may look like a refusal, once.
            try:
                self._log(events)
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    raise
                if is_last:
                    if self.run_id:
                        # If the run is in another store, this raises, and nothing is dropped.
                        self.client.get_run(self.run_id)
                    kind = name_of(events[0])
                    logger.warning("tracking: %s; not logged: %s", reason_of(error), kind)
            else:
                return

    def _metrics(self, rows: Iterable[tuple[Event, int, Mapping[str, float]]]) -> None:
        """Log metrics, given as tuples of their event, their step and their values.

        MLflow keeps one of two metrics with the same millisecond, step and value, so that another
        attempt does no harm.
        """
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, event.time_ms, step)
            for event, step, values in rows
            for key, value in values.items()
        ]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            part = metrics[start : start + METRICS_PER_CALL]
            self.client.log_batch(self._run, metrics=part)

    def _tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self._run, tags=[RunTag(k, v) for k, v in tags.items()])

    @property
    def _run(self) -> str:
        return self.require_run()  # It exists, because `RunOpened` is the first event.

    def _open(self, event: RunOpened) -> None:
        """Create the run that `event` describes, unless an interrupted attempt has created it."""
        experiment = self._store.find_experiment()
        same = f"tags.`{IDENTITY}` = '{event.tags[IDENTITY]}'"
        runs = self.client.search_runs([experiment], filter_string=same, max_results=1)
        run = runs[0] if runs else self._create(experiment, event)
        self.run_id = run.info.run_id
        note(self._folder, run_id=self.run_id)
        self._store.storage.share_state(self._folder)
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in event.params.items()]
        self.client.log_batch(self._run, params=params)
        for file, text in event.texts.items():
            self.client.log_text(self._run, text, file)

    def _create(self, experiment: str, event: RunOpened) -> Any:
        return self.client.create_run(
            experiment, start_time=event.time_ms, run_name=event.name, tags=event.tags
        )

    def _log(self, events: list[Event]) -> None:
        """Log one event, or several reports of steps that follow each other."""
        event = events[0]
        if not isinstance(event, Logged):  # Another version of this program has added it.
            return
        match event:
            case StepsDone():
                steps = [report for report in events if isinstance(report, StepsDone)]
                self._metrics((s, s.step, {**s.metrics, "epoch": s.epoch}) for s in steps)
            case CheckpointStored(step=step, metrics=metrics):
                self._metrics([(event, step, metrics)])
            case OutagesCounted(step=step, metrics=metrics):
                self._metrics([(event, step, metrics)])
            case RunOpened():
                self._open(event)
            case RunReopened(restarts=restarts):
                self.client.update_run(self._run, status="RUNNING")
                self._tag({RESTARTS: str(restarts)})
            case EpochEvaluated():
                self._log_checkpoint(event)
            case DataDescribed(facts=facts):
                self._tag({f"data.{key}": str(value) for key, value in facts.items()})
            case SpeedMeasured(fps=fps, protocol=protocol):
                self._metrics([(event, 0, {"fps": fps})])
                tags = {f"fps.{key}": str(value) for key, value in protocol.items()}
                self._tag(tags | {PROTOCOL: json.dumps(protocol)})
                self._tag_deleted_checkpoints()
            case WorkerFailed(restarts=restarts):
                if restarts is not None:
                    self._tag({RESTARTS: str(restarts)})
            case CheckpointsDiscarded():
                self._tag_deleted_checkpoints(all_of_them=True)
            case FolderWritten(path=path):
                self._log_folder(Path(path))
            case TagsSet(tags=tags):
                self._tag(tags)
            case RunEnded(status=status):
                self.client.set_terminated(self._run, status)
            case _:
                assert_never(event)

    def _log_folder(self, folder: Path) -> None:
        if folder.is_dir():
            self.client.log_artifacts(self._run, str(folder), folder.name)
        else:  # Another attempt would fail, too.
            logger.warning("tracking: %s is gone; not logged: folder", folder)

    def _log_checkpoint(self, event: EpochEvaluated) -> None:
        """Log the metrics of an epoch, and its checkpoint as an external model without a copy.

        Metrics that were logged before an interruption are not logged twice.
        """
        import mlflow
        from mlflow.entities import Metric

        name = f"epoch-{event.epoch}"
        model = next((model for model in self._models() if model.name == name), None)
        if model is None:
            model = mlflow.create_external_model(
                name=name,
                source_run_id=self._run,
                tags={"uri": event.uri},
                experiment_id=self._experiment(),
            )
        elif model.tags.get("uri") != event.uri:  # The epoch was trained again.
            self.client.set_logged_model_tags(model.model_id, {"uri": event.uri})
        logged = {metric.key for metric in model.metrics or []}
        metrics = [
            Metric(key, value, event.time_ms, event.step, model_id=model.model_id)
            for key, value in event.metrics.items()
            if key not in logged
        ]
        # Metrics of a model are metrics of its run, too.
        self.client.log_batch(self._run, metrics=metrics)

    def _tag_deleted_checkpoints(self, *, all_of_them: bool = False) -> None:
        """Tag the models whose checkpoints are gone, or with `all_of_them` every model."""
        for model in self._models():
            uri = model.tags.get("uri")
            if uri and (all_of_them or not is_there(uri)):
                self.client.set_logged_model_tags(model.model_id, {"deleted": "true"})

    def _experiment(self) -> str:
        return str(self.client.get_run(self._run).info.experiment_id)

    def _models(self) -> list[Any]:
        experiments, of_run = [self._experiment()], f"source_run_id = '{self._run}'"
        return on_all_pages(
            lambda token: self.client.search_logged_models(experiments, of_run, page_token=token)
        )


def note(folder: Path, **facts: str) -> None:
    """Add facts to a run's `RUN_FILE`."""
    known = read_json(folder / RUN_FILE)
    write_atomically(folder / RUN_FILE, json.dumps(known | facts) + "\n")


def require_store(store: Store, folder: Path) -> None:
    """Check that a run with a chosen store does not continue in the default store.

    Raises:
        TrackingError: the run's store was chosen before, and none is chosen now.
    """
    chosen_before = read_json(folder / RUN_FILE).get("store")
    if chosen_before and not store.chosen_uri:
        raise TrackingError(
            f"run '{folder.name}' is kept in {chosen_before}: set tracking.uri or "
            "MLFLOW_TRACKING_URI to it"
        )


def _together(waiting: Mapping[int, Event]) -> Iterator[tuple[int, list[Event]]]:
    """Yield groups of events with their last number: successive steps together, others alone."""
    for is_steps, group in groupby(waiting.items(), lambda item: isinstance(item[1], StepsDone)):
        items = list(group)
        for part in [items] if is_steps else [[item] for item in items]:
            yield part[-1][0], [event for _, event in part]
