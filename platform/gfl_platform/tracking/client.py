"""The MLflow store that a job writes to: which one, and whether it answers.

Importing MLflow costs seconds, so it is imported where it is used.
"""

import logging
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gfl_platform.config import JobConfig
from gfl_platform.storage.storage import Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

# A dead server would otherwise hold up a call for minutes, and every small file show a bar.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

DATABASES = ("postgresql", "mysql")
"""Whose drivers know `connect_timeout`."""


class TrackingError(ValueError):
    """A tracking store that cannot be used."""


def chosen_uri(job: JobConfig) -> str | None:
    """Return the URI configured, or MLFLOW_TRACKING_URI, if there is one."""
    return job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")


def tracking_uri(job: JobConfig) -> str:
    """Return the URI chosen, else that of a SQLite file under storage.root."""
    return chosen_uri(job) or f"sqlite:///{Storage(job.storage).root / 'mlflow.db'}"


def without_password(text: str) -> str:
    """Return a text that may be shown: a URI, or an error that holds some."""
    return re.sub(r"(://[^/:@\s]*:)[^/@\s]*@", r"\1***@", text)


def reason_of(error: Exception) -> str:
    """Return the first line of an error that may be shown; MLflow's hold the store's URI."""
    return without_password(next(iter(str(error).splitlines()), type(error).__name__))


def connect(job: JobConfig) -> "MlflowClient":
    """Return a client of the job's tracking store and registry; make them MLflow's current ones.

    Raises:
        TrackingError: a store that does not answer.
    """
    from mlflow.exceptions import MlflowException

    try:
        client = client_of(job)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        reason = reason_of(error).partition(" failed with ")[0]
        raise TrackingError(
            f"{without_password(tracking_uri(job))}: no MLflow store answers ({reason}); start it, "
            "set tracking.uri or MLFLOW_TRACKING_URI, or let a training keep its figures until one "
            "does with tracking.unreachable=spool"
        ) from error
    return client


def on_all_pages(search: Callable[[str | None], Any]) -> list[Any]:
    """Return all that MLflow finds; `search` takes the token of the page."""
    found: list[Any] = list(page := search(None))
    while page.token:
        found += (page := search(page.token))
    return found


def client_of(job: JobConfig) -> "MlflowClient":
    """Return the client; of a server, whether it answers or not.

    Raises:
        ConnectionError: of a database, if that does not answer.
    """
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    uri = tracking_uri(job)
    if uri.startswith(DATABASES):
        _require_database(uri)
    Storage(job.storage).root.mkdir(parents=True, exist_ok=True)
    for chatty in ("alembic", "mlflow"):  # tell of every migration and registration
        logging.getLogger(chatty).setLevel(logging.WARNING)
    chosen_by_user = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    # MLflow puts its URI into the environment, where the next job would find it.
    if chosen_by_user is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = chosen_by_user
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # tells of every attempt
    return mlflow.MlflowClient()


def _require_database(uri: str) -> None:
    """Connect once: MLflow would try for two minutes."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": 10})
    try:
        engine.connect().close()
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise ConnectionError(str(error).splitlines()[0]) from error
    finally:
        engine.dispose()
