"""Delivery: the events in a run's spool are logged to MLflow, in their order and once."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, assert_never

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_TAG_VAL_LENGTH,
)

from gfl.files import write_atomically
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
    name_of,
)
from gfl_platform.storage.files import StorageError
from gfl_platform.storage.storage import is_there
from gfl_platform.tracking.client import Store, TrackingError, on_all_pages, reason_of
from gfl_platform.tracking.metadata import IDENTITY, PROTOCOL, RUN_FILE, read_run_file
from gfl_platform.tracking.spool import Spool

logger = logging.getLogger(__name__)

Logged = (
    StepsDone | CheckpointStored | EpochEvaluated | DataDescribed | WorkerFailed | OutagesCounted
    | RunOpened | RunReopened | TagsSet | SpeedMeasured | FolderWritten | CheckpointsDiscarded
    | RunEnded
)  # fmt: skip
"""Types of the events that are logged; the others only concern the display."""

RESTARTS = "restarts"
"""Tag of a run: how often it continued after the loss of a worker, a node or its driver."""

PROBE = "probe"
"""Tag that is set for a moment, to see whether the store takes anything."""

BATCH = 100
"""Number of events that are taken from the spool together."""

LONGEST_DELAY = 60.0
"""Longest pause between two attempts to reach the store, in seconds."""

REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
"""Error codes of a store that may mean that it will never take an event.

BAD_REQUEST also stands for many temporary errors of a database: it is read-only, for example.
"""


class RefusedError(Exception):
    """An event cannot be logged now, while others can."""


class Delivery:
    """Logs the events in the spool of one run.

    Attributes:
        run_id: The MLflow run, None before the store has answered.
    """

    def __init__(self, store: Store, folder: Path, spool: Spool) -> None:
        """Read which MLflow run it is; nothing is logged yet.

        Args:
            store: Where to log.
            folder: The run's folder.
            spool: The run's spool.

        Raises:
            TrackingError: the run is in a store that was chosen, and none is chosen now, or the
                file that says so is damaged and cannot be rebuilt.
        """
        self._store, self._folder, self._spool = store, folder, spool
        self.run_id = self._read_run_file()
        self._delay, self._try_at = 0.0, 0.0
        self._last_reason = ""

    def _read_run_file(self) -> str | None:
        """Return the run's identifier in MLflow; rebuild the file that holds it if it is damaged.

        Raises:
            TrackingError: see `__init__`.
        """
        path, name = self._folder / RUN_FILE, self._folder.name
        try:
            facts = read_run_file(self._folder)
        except TrackingError as error:
            facts = self._spool.notes()
            if "run_id" not in facts:
                raise
            logger.warning("warning: %s; it is rebuilt from %s", error, self._spool.path)
            path.rename(path.with_name(f"{RUN_FILE}.damaged-{time.time_ns() // 1_000_000}"))
            write_atomically(path, json.dumps(facts) + "\n")
        self._spool.note(facts)
        if "store" in facts and not self._store.chosen_uri:
            raise TrackingError(
                f"run '{name}' is kept in {facts['store']}: set tracking.uri or "
                "MLFLOW_TRACKING_URI to it"
            )
        run_id = facts.get("run_id")
        if run_id is None and self._store.chosen_uri:
            self._note(store=self._store.shown_uri)
        return run_id

    def _note(self, **facts: str) -> None:
        """Add facts to the run's `RUN_FILE`, and to the spool, from which it can be rebuilt."""
        known = read_run_file(self._folder) | facts
        write_atomically(self._folder / RUN_FILE, json.dumps(known) + "\n")
        self._spool.note(known)

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
        """Log the events that wait, oldest first, until one fails; this never pauses.

        Why it failed is said once, until it fails for another reason.
        """
        try:
            while waiting := self._spool.first(BATCH):
                for group in _together(waiting):
                    self._log_or_refuse(group)
        except Exception as error:  # The store and the place of its artifacts raise many types.
            self._delay = min(max(2 * self._delay, 1.0), LONGEST_DELAY)
            self._try_at = time.monotonic() + self._delay
            if self._spool.replace_if_damaged(error):
                return
            reason = reason_of(error)
            if reason != self._last_reason:
                logger.warning("tracking: %s; %d events wait", reason, len(self._spool))
            self._last_reason = reason
        else:
            self._delay, self._last_reason = 0.0, ""

    def require_run(self) -> str:
        """Return the identifier of the MLflow run.

        Raises:
            TrackingError: there is no run, because the store has not taken its first event yet.
        """
        if self.run_id is None:
            reason = self._last_reason or f"{self._store.shown_uri}: no MLflow store answers"
            raise TrackingError(reason)
        return self.run_id

    def last_step(self, metric: str) -> int:
        """Return the last step at which a metric of the run was logged, 0 if it never was.

        Raises:
            TrackingError: the store does not answer, or there is no run yet.
        """
        history = self.client.get_metric_history(self.require_run(), metric)
        return max((point.step for point in history), default=0)

    def _log_or_refuse(self, events: Mapping[int, Event]) -> None:
        """Log events, by their numbers in the queue; note those that the store refuses for good.

        Raises:
            Exception: the store takes nothing now, so that the events have to wait.
        """
        for is_last in (False, True):  # A broken connection may look like a refusal, once.
            try:
                self._log(list(events.values()))
            except Exception as error:
                if not self._is_refusal(error):
                    raise
                if len(events) > 1:
                    for number, event in events.items():
                        self._log_or_refuse({number: event})
                elif is_last:
                    ((number, event),) = events.items()
                    self._refuse(number, f"{name_of(event)}: {reason_of(error)}")
                else:
                    continue
            else:
                self._spool.remove(max(events))
            return

    def _refuse(self, number: int, reason: str) -> None:
        self._spool.refuse(number, reason)
        logger.warning(
            "tracking: not logged: %s; it is kept in %s, and `jobs.status --deliver` and --resume "
            "try it again",
            reason,
            self._spool.path,
        )

    def _is_refusal(self, error: Exception) -> bool:
        """Return whether an error concerns an event, and not the state of the store.

        Raises:
            Exception: the store takes nothing now.
        """
        if isinstance(error, RefusedError):
            return True
        is_of_store = isinstance(error, TrackingError | StorageError | OSError)
        is_of_event = (
            isinstance(error, AttributeError | TypeError | ValueError | LookupError)
            and not is_of_store
        )
        may_be_final = is_of_event or getattr(error, "error_code", None) in REFUSALS
        if self.run_id is None or not may_be_final:
            return False
        self._require_active()
        # A store that takes another tag refuses only what was to be logged.
        self.client.set_tag(self.run_id, PROBE, str(time.time_ns()))
        self.client.delete_tag(self.run_id, PROBE)
        return True

    def _require_active(self) -> None:
        """Check that the run exists and is not deleted.

        Raises:
            TrackingError: it does not exist, or is deleted; the message says the way out.
        """
        name, uri = f"MLflow run {self.run_id}", self._store.shown_uri
        try:
            info = self.client.get_run(self.run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise TrackingError(
                f"{name} is not in {uri}; set tracking.uri to the store that has it, or restore "
                "that store's database"
            ) from error
        if info.lifecycle_stage != "deleted":
            return
        experiment = self.client.get_experiment(info.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            raise self._store.deleted_experiment(experiment)
        command = self._store.command(f"runs restore --run-id {self.run_id}")
        raise TrackingError(f"{name} is deleted in {uri}; restore it: {command}")

    def _metrics(self, rows: Iterable[tuple[Event, int, Mapping[str, float]]]) -> None:
        """Log metrics, given as tuples of their event, their step and their values.

        MLflow keeps one of two metrics with the same millisecond, step and value, so that another
        attempt does no harm.
        """
        metrics = [
            Metric(key, value, event.time_ms, step)
            for event, step, values in rows
            for key, value in values.items()
        ]
        for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            part = metrics[start : start + MAX_METRICS_PER_BATCH]
            self.client.log_batch(self._run, metrics=part)

    def _tag(self, tags: Mapping[str, str]) -> None:
        tags = capped(tags, MAX_TAG_VAL_LENGTH)
        self.client.log_batch(self._run, tags=[RunTag(k, v) for k, v in tags.items()])

    @property
    def _run(self) -> str:
        return self.require_run()  # It exists, because `RunOpened` is the first event.

    def _open(self, event: RunOpened) -> None:
        """Create the run that `event` describes, unless an interrupted attempt has created it."""
        if self.run_id is None:
            self.run_id = self._create(event)
            self._note(run_id=self.run_id)
        self._store.storage.share_state(self._folder)
        params = capped(event.params, MAX_PARAM_VAL_LENGTH)
        self.client.log_batch(self._run, params=[Param(k, v) for k, v in params.items()])
        for file, text in event.texts.items():
            self.client.log_text(self._run, valid(text), file)

    def _create(self, event: RunOpened) -> str:
        """Return the MLflow run that `event` describes, which is created if there is none.

        MLflow's client asks again if an answer was lost, which creates another run.
        """
        experiment = self._store.find_experiment()
        same = f"tags.`{IDENTITY}` = '{event.tags[IDENTITY]}'"
        tags = capped(event.tags, MAX_TAG_VAL_LENGTH)
        if not self.client.search_runs([experiment], filter_string=same):
            self.client.create_run(
                experiment, start_time=event.time_ms, run_name=event.name, tags=tags
            )
        first, *doubles = self.client.search_runs([experiment], filter_string=same)
        for double in doubles:
            self.client.delete_run(double.info.run_id)
        return str(first.info.run_id)

    def _log(self, events: list[Event]) -> None:
        """Log one event, or several reports of steps that follow each other."""
        event = events[0]
        if not isinstance(event, Logged):
            raise RefusedError("it is damaged, or of another version of this program")
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
        if not folder.is_dir():
            raise RefusedError(f"{folder} is gone")
        self.client.log_artifacts(self._run, str(folder), folder.name)

    def _log_checkpoint(self, event: EpochEvaluated) -> None:
        """Log the metrics of an epoch, and its checkpoint as an external model without a copy.

        Metrics that were logged before an interruption are not logged twice.
        """
        name = f"epoch-{event.epoch}"
        if not self._models(name):
            mlflow.create_external_model(
                name=name,
                source_run_id=self._run,
                tags={"uri": event.uri},
                experiment_id=self._experiment(),
            )
        model, *doubles = self._models(name)
        for double in doubles:  # An answer was lost, so MLflow's client has asked again.
            self.client.delete_logged_model(double.model_id)
        if model.tags.get("uri") != event.uri:  # The epoch was trained again.
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

    def _models(self, name: str | None = None) -> list[Any]:
        """Return the external models of the run, or those called `name`."""
        experiments, which = [self._experiment()], f"source_run_id = '{self._run}'"
        if name:
            which += f" AND name = '{name}'"
        return on_all_pages(
            lambda token: self.client.search_logged_models(experiments, which, page_token=token)
        )


def capped(values: Mapping[str, str], longest: int) -> dict[str, str]:
    """Return texts as every store takes them: at most `longest` characters, all of them valid."""
    texts = {key: valid(text) for key, text in values.items()}
    return {
        key: text if len(text) <= longest else text[: longest - 1] + "…"
        for key, text in texts.items()
    }


def valid(text: str) -> str:
    """Return a text without characters that PostgreSQL or UTF-8 do not have."""
    return str(text).replace("\0", "\ufffd").encode(errors="replace").decode()


def _together(waiting: Mapping[int, Event]) -> Iterator[dict[int, Event]]:
    """Yield groups of events by their numbers: successive steps together, others alone."""
    for is_steps, group in groupby(waiting.items(), lambda item: isinstance(item[1], StepsDone)):
        items = list(group)
        yield from [dict(items)] if is_steps else ({number: event} for number, event in items)
