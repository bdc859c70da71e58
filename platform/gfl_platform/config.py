"""`JobConfig`: a `gfl.Config` and where and how to run it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from gfl.config import Config, Count, Positive, Section
from gfl.configfile import JOB_SECTIONS, derive, load_schema

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


def require_alias(alias: str) -> str:
    """Return `alias` if MLflow can take it; it keeps `latest`, `v1` and numbers for versions.

    Raises:
        ValueError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", alias):
        raise ValueError(f"alias '{alias}': expected letters, digits, '-' and '_'")
    if re.fullmatch(r"latest|v?\d+", alias, re.IGNORECASE):
        raise ValueError(f"alias '{alias}' means a version; choose another, such as champion")
    return alias


ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
Alias = Annotated[str, AfterValidator(require_alias)]


class RunConfig(Section):
    """The run's identity."""

    name: Name | None = None
    """Unique name of the run; by default the configuration file's and the time."""


class ClusterConfig(Section):
    """What a job asks of the Ray cluster."""

    workers: Positive | None = None
    """Training processes; by default one for each GPU of the cluster, or 2 on a cluster without."""
    use_gpu: bool | None = None
    """Whether each worker takes a GPU; by default if the cluster has one."""
    cpus_per_worker: Positive = 1
    max_failures: Count = 3
    """How often training goes on from its last checkpoint after losing a worker or a node."""


class StorageConfig(Section):
    """Where runs, checkpoints and the embedded tracking store are kept."""

    root: str = "outputs"
    keep_checkpoints: Positive = 2
    """The best by AP; the latest is kept besides."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """By default MLFLOW_TRACKING_URI, else a SQLite file under `storage.root`."""
    experiment: str = "gfl"
    every_steps: Annotated[int, Field(gt=0, le=100)] = 10
    """Steps between logged losses, and the most a NaN stays unnoticed."""


class RegistryConfig(Section):
    """The model registry."""

    name: ModelName | None = None
    """Registers the trained model under this name."""
    alias: Alias | None = None
    """Points this alias at the new version."""

    @model_validator(mode="after")
    def _alias_has_model(self) -> "RegistryConfig":
        if self.alias and not self.name:
            raise ValueError(f"registry.alias: '{self.alias}' of which model? set registry.name")
        return self


class JobConfig(Config):
    """All that a job reads from its configuration file."""

    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a configuration file with all its sections; see `gfl.load_config`."""
    return load_schema(JobConfig, path, overrides)


def job_of(overrides: Sequence[str]) -> JobConfig:
    """Return where and how a job without a configuration file runs, as `overrides` say.

    Those of the model and its data are left for its checkpoint's configuration; here they are only
    checked to be keys.
    """
    for word in overrides:
        section = word.split(".")[0].split("=")[0]
        if section not in JobConfig.model_fields:
            derive(JobConfig, Config(), [word])  # raises, with a suggestion
    where = [word for word in overrides if word.split(".")[0].split("=")[0] in JOB_SECTIONS]
    return derive(JobConfig, Config(), where)
