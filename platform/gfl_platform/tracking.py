"""MLflow runs: the driver's process opens one, writes to it and closes it.

Besides, only `registry` writes to a run: the model. Nothing here is called by a training process.
Importing MLflow costs seconds, so it is imported where it is used.
"""

import importlib.metadata
import logging
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gfl.configfile import flatten
from gfl_platform.config import JobConfig
from gfl_platform.events import Event
from gfl_platform.storage import read_json, storage_root, write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
"""Beside the checkpoints: which MLflow run they belong to, for a job that resumes."""

CONFIG_FILE, PACKAGES_FILE = "config.yaml", "packages.txt"
"""Among the artifacts of a run: how it was configured, and what it ran with."""

COMMIT = "git.commit"
RESTARTS = "restarts"
"""Tag: how often a run went on after it had lost a worker, a node or its driver."""

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "hotcoco", "numpy", "safetensors")

# A dead server would otherwise hold up a call for minutes, and every small file show a bar.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class TrackingError(ValueError):
    """A tracking store that cannot be used."""


def tracking_uri(job: JobConfig) -> str:
    """Return the URI configured, or MLFLOW_TRACKING_URI, else a SQLite file under storage.root."""
    chosen = job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or f"sqlite:///{storage_root(job) / 'mlflow.db'}"


def connect(job: JobConfig) -> "MlflowClient":
    """Return a client of the job's tracking store and registry; make them MLflow's current ones.

    Raises:
        TrackingError: a store that does not answer.
    """
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(job)
    storage_root(job).mkdir(parents=True, exist_ok=True)
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
    try:
        client = mlflow.MlflowClient()
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        reason = str(error).partition(" failed with ")[0].splitlines()[0]
        raise TrackingError(
            f"{uri}: no MLflow store answers ({reason}); start it, or set tracking.uri or "
            "MLFLOW_TRACKING_URI"
        ) from error
    return client


class RunTracker:
    """One MLflow run from its opening to its end; calls that fail are kept and tried again."""

    def __init__(
        self, job: JobConfig, name: str, folder: Path, tags: Mapping[str, str] | None = None
    ) -> None:
        """Open a run called `name`, or go on in the one that `folder` belongs to.

        Args:
            job: Logged as parameters and as a file.
            name: Of a new run.
            folder: The run's folder; remembers the MLflow run.
            tags: Of a new run.
        """
        self.client = connect(job)
        self._job = job
        self._waiting: list[Event] = []
        known = read_json(folder / RUN_FILE)
        if known:
            self.run_id: str = known["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
            self._count_restart()
        else:
            self.run_id = self._create(name, tags or {})
            write_atomically(folder / RUN_FILE, f'{{"run_id": "{self.run_id}"}}\n')
            self._describe()
        self._experiment: str = self.client.get_run(self.run_id).info.experiment_id
        self._last_step = self._steps_logged()

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the run: FINISHED, or what an exception makes of it."""
        # Ray turns SIGTERM, which `ray job stop` sends, into SystemExit.
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def handle(self, event: Event) -> None:
        """Log what `event` tells, after those that could not be logged before."""
        # MLflow keeps one of two metrics that are alike to the millisecond: trying again is safe.
        self._waiting.append(event | {"time_ms": int(time.time() * 1000)})
        self._flush()

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED; never raises, lest it hide why a job ended."""
        self._waiting.append({"kind": "end", "status": status})
        self._flush()
        if self._waiting:
            logger.warning("tracking: %d events could not be logged", len(self._waiting))

    def _flush(self) -> None:
        from mlflow.exceptions import MlflowException

        while self._waiting:
            try:
                self._log(self._waiting[0])
            except (MlflowException, OSError) as error:
                logger.warning("tracking: %s; will try again", str(error).splitlines()[0])
                return
            self._waiting.pop(0)

    def _metrics(self, event: Event, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        step, at = event.get("step", 0), event["time_ms"]
        found = [Metric(key, value, at, step) for key, value in values.items()]
        self.client.log_batch(self.run_id, metrics=found)

    def _tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def _count_restart(self) -> None:
        before = int(self.client.get_run(self.run_id).data.tags.get(RESTARTS, 0))
        self._tag({RESTARTS: str(before + 1)})

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        experiment = self.client.get_experiment_by_name(self._job.tracking.experiment)
        if experiment is None:
            embedded = tracking_uri(self._job).startswith("sqlite:")
            location = (storage_root(self._job) / "artifacts").as_uri() if embedded else None
            identity = self.client.create_experiment(self._job.tracking.experiment, location)
        else:
            identity = experiment.experiment_id
        return self.client.create_run(identity, run_name=name, tags=dict(tags)).info.run_id

    def _describe(self) -> None:
        """Log the configuration, the code's state and the packages."""
        from mlflow.entities import Param

        values = self._job.model_dump(mode="json")
        params = [Param(key, str(value)) for key, value in flatten(values).items()]
        self.client.log_batch(self.run_id, params=params)
        self.client.log_text(self.run_id, yaml.safe_dump(values, sort_keys=False), CONFIG_FILE)
        commit, changed, diff = git_state()
        self._tag({COMMIT: commit, "git.changed": changed or "nothing"})
        if diff:
            self.client.log_text(self.run_id, diff, "git.diff")
        versions = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
        self.client.log_text(self.run_id, "\n".join(versions) + "\n", PACKAGES_FILE)

    def _log(self, event: Event) -> None:
        match event["kind"]:
            case "steps" if event["step"] > self._last_step:
                self._metrics(event, {**event["metrics"], "epoch": event["epoch"]})
                self._last_step = event["step"]
            case "checkpoint":
                self._log_checkpoint(event)
            case "data":
                self._tag({f"data.{key}": str(value) for key, value in event["facts"].items()})
            case "result":
                self._metrics(event, {"fps": event["fps"]})
                self._tag({f"fps.{key}": str(value) for key, value in event["protocol"].items()})
                self._tag_deleted_checkpoints()
            case "failure" if not event["final"]:
                self._count_restart()
            case "discarded":
                self._tag_deleted_checkpoints(all_of_them=True)
            case "folder":
                folder = event["path"]
                self.client.log_artifacts(self.run_id, str(folder), folder.name)
            case "tags":
                self._tag(event["tags"])
            case "end":
                self.client.set_terminated(self.run_id, event["status"])

    def _log_checkpoint(self, event: Event) -> None:
        """Log an epoch's evaluation, and its checkpoint as a model that stays where it is.

        What was logged before an interruption, whole or in part, is not logged twice.
        """
        import mlflow

        name = f"epoch-{event['epoch']}"
        model = next((model for model in self._models() if model.name == name), None)
        if model is None:
            model = mlflow.create_external_model(
                name=name,
                source_run_id=self.run_id,
                tags={"uri": event["uri"]},
                experiment_id=self._experiment,
            )
        logged = {metric.key for metric in model.metrics or []}
        for key in event["metrics"].keys() - logged:
            value, step, at = event["metrics"][key], event["step"], event["time_ms"]
            # Of a model, hence of its run, too.
            self.client.log_metric(self.run_id, key, value, at, step, model_id=model.model_id)

    def _tag_deleted_checkpoints(self, *, all_of_them: bool = False) -> None:
        """Mark the models of checkpoints that gave way to better ones."""
        for model in self._models():
            uri = model.tags.get("uri")
            if uri and (all_of_them or not Path(uri).is_dir()):
                self.client.set_logged_model_tags(model.model_id, {"deleted": "true"})

    def _models(self) -> list[Any]:
        found = self.client.search_logged_models(
            [self._experiment], filter_string=f"source_run_id = '{self.run_id}'"
        )
        return list(found)

    def _steps_logged(self) -> int:
        history = self.client.get_metric_history(self.run_id, "loss")
        return max((metric.step for metric in history), default=0)


def log_file(job: JobConfig, run_id: str, path: Path) -> None:
    """Store a file among the artifacts of a run, which may have ended."""
    connect(job).log_artifact(run_id, str(path))


def git_state() -> tuple[str, str, str]:
    """Return the code's commit (`unknown` outside a repository), changed files and their diff."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[2]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        changed = ", ".join(line[3:] for line in git("status", "--porcelain").splitlines())
        return git("rev-parse", "HEAD").strip(), changed, git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", "", ""
