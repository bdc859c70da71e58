"""The MLflow store of a job: which one it is, whether it answers, and its client.

A `Store` is made once per command and handed down. Importing MLflow takes seconds, so it is
imported when the client is used for the first time:

    store = Store(job.tracking, Storage(job.storage))
    store.client.get_run(run_id)
"""

import logging
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfl_platform.config import TrackingConfig
from gfl_platform.redaction import redact
from gfl_platform.storage.storage import Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

MLFLOW_SETTINGS = {
    # A dead server would otherwise block a call for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    # Every small file would otherwise show a progress bar.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Environment variables of MLflow; those that the user has set stay."""

SERVERS_OF_DATABASES = ("postgresql", "mysql")
"""Schemes of databases that may be down, and whose drivers know `connect_timeout`."""

DATABASES = ("sqlite", "mssql", *SERVERS_OF_DATABASES)
"""Schemes of stores that are used without a server of MLflow."""


class TrackingError(ValueError):
    """A tracking store cannot be used."""


class Store:
    """MLflow's tracking store and model registry, as one job uses them.

    Attributes:
        storage: Where the job's files lie; without another URI, the embedded store lies there, too.
        chosen_uri: URI in the configuration or in MLFLOW_TRACKING_URI, if there is one.
        uri: URI of the store: the chosen one, else a SQLite file below the storage's root.
        experiment: Name of the experiment of new runs.
        may_be_away: Whether a training may start while the store does not answer.
    """

    def __init__(self, config: TrackingConfig, storage: Storage) -> None:
        self.storage = storage
        self.chosen_uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = self.chosen_uri or f"sqlite:///{storage.root / 'mlflow.db'}"
        self.experiment = config.experiment
        self.may_be_away = config.unreachable == "spool"
        self._client: MlflowClient | None = None

    @property
    def shown_uri(self) -> str:
        """URI of the store without its password."""
        return redact(self.uri)

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client; the store becomes the one of MLflow's functions without a client.

        Raises:
            TrackingError: the store does not answer, when the client is used for the first time.
        """
        if self._client is None:
            self.require_answer()
        assert self._client
        _make_current(self.uri)
        return self._client

    def artifact(self, run_id: str, name: str, scratch: Path) -> Path:
        """Return a file of a run, fetched to `scratch` unless the store has moved with its files.

        Raises:
            MlflowException, OSError: there is no such file.
        """
        client = self.client
        if folder := self.storage.moved(client.get_run(run_id).info.artifact_uri):
            return folder / name
        return Path(client.download_artifacts(run_id, name, str(scratch)))

    def require_answer(self) -> None:
        """Check that the store answers.

        Raises:
            TrackingError: it does not, or would lie in the cache of this machine.
        """
        self._require_place()
        try:
            client = self._client or self._open()
            client.search_experiments(max_results=1)
        except Exception as error:  # MLflow, SQLAlchemy and Alembic raise many types.
            reason = reason_of(error).partition(" failed with ")[0]
            raise TrackingError(
                f"{self.shown_uri}: no MLflow store answers ({reason}); {_way_out(reason)}"
            ) from error
        self._client = client

    def require_ready(self) -> None:
        """Check that a run can begin: its experiment is not deleted, if the store answers.

        Raises:
            TrackingError: the experiment is deleted, or the store does not answer, and has to.
        """
        self._require_place()
        try:
            self.require_answer()
        except TrackingError:
            if not self.may_be_away:
                raise
        else:
            self.known_experiment()

    def _require_place(self) -> None:
        """Refuse a store that would be lost with the head: runs are on S3, and no store is named.

        Raises:
            TrackingError: it is such a store.
        """
        if self.storage.is_remote and not self.chosen_uri:
            raise TrackingError(
                f"storage.root: '{self.storage.location}' is on S3, but no MLflow store is named: "
                f"the only one would be a file in this machine's cache ({self.storage.root}); set "
                "tracking.uri or MLFLOW_TRACKING_URI to an MLflow server"
            )

    def known_experiment(self) -> "Experiment | None":
        """Return the experiment, None if it does not exist yet.

        Raises:
            TrackingError: it is deleted.
        """
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment and experiment.lifecycle_stage == "deleted":
            raise self.deleted_experiment(experiment)
        return experiment

    def find_experiment(self) -> str:
        """Return the identifier of the experiment, which is created if it does not exist.

        Raises:
            TrackingError: it is deleted.
        """
        if experiment := self.known_experiment():
            return str(experiment.experiment_id)
        # A database without a server has no place for artifacts: MLflow would use ./mlruns.
        embedded = self.uri.startswith(DATABASES)
        location = (self.storage.root / "artifacts").as_uri() if embedded else None
        return str(self.client.create_experiment(self.experiment, location))

    def deleted_experiment(self, experiment: "Experiment") -> TrackingError:
        """Return the error that says that an experiment is deleted, and the way out."""
        command = self.command(f"experiments restore --experiment-id {experiment.experiment_id}")
        return TrackingError(
            f"the experiment '{experiment.name}' is deleted in {self.shown_uri}; restore it "
            f"({command}), or set tracking.experiment to another name for a new run"
        )

    def command(self, words: str) -> str:
        """Return a command of MLflow that works on this store, without the store's password."""
        return f"MLFLOW_TRACKING_URI={shlex.quote(self.shown_uri)} mlflow {words}"

    def _open(self) -> "MlflowClient":
        """Return a client; whether a server answers is not checked yet.

        Raises:
            ConnectionError: a database does not answer.
        """
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        import mlflow

        if self.uri.startswith(SERVERS_OF_DATABASES):
            _require_database(self.uri)
        self.storage.root.mkdir(parents=True, exist_ok=True)
        for package in ("alembic", "mlflow"):  # They report every migration and registration.
            logging.getLogger(package).setLevel(logging.WARNING)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # It reports every attempt.
        _make_current(self.uri)
        return mlflow.MlflowClient()


def _way_out(reason: str) -> str:
    """Return what a user can do about a store that does not answer for `reason`."""
    if "database is locked" in reason:
        return "end the process that holds the file, such as another job, or try again later"
    if any(words in reason for words in ("not a database", "malformed")):
        return "the file is damaged: restore it from a backup, or move it away to begin a new one"
    return (
        "start it, set tracking.uri or MLFLOW_TRACKING_URI, or let a training keep its figures "
        "until one does with tracking.unreachable=spool"
    )


def reason_of(error: Exception) -> str:
    """Return the first line of an error without passwords, and without SQLAlchemy's class."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return redact(re.sub(r"^\([\w.]+\) ", "", line))


def on_all_pages(search: Callable[[str | None], Any]) -> list[Any]:
    """Return the results of all pages of a search.

    Args:
        search: Function of the page's token that returns the page.
    """
    page = search(None)
    results = list(page)
    while page.token:
        page = search(page.token)
        results += page
    return results


def _make_current(uri: str) -> None:
    """Let MLflow's functions without a client use the store at `uri`."""
    import mlflow

    if mlflow.get_tracking_uri() == uri and mlflow.get_registry_uri() == uri:
        return
    chosen_by_user = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    # MLflow puts the URI into the environment, where the next job would find it.
    if chosen_by_user is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = chosen_by_user


def _require_database(uri: str) -> None:
    """Connect once, because MLflow would try for two minutes."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": 10})
    try:
        engine.connect().close()
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise ConnectionError(str(error).splitlines()[0]) from error
    finally:
        engine.dispose()
