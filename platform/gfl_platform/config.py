"""`JobConfig`: a `gfl.Config` and where and how to run it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gfl.config.loader import JOB_SECTIONS, derive, load_schema
from gfl.config.schema import Config, Count, Positive, Section, SplitConfig
from gfl_platform.sweeps.schema import SweepConfig

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


def _require_workers(value: Any) -> Any:
    """Return a number of processes, or the least and the most."""
    ends = value if isinstance(value, list | tuple) else (value,)
    if value is None:
        return None
    if all(type(end) is int and end > 0 for end in ends):
        if value in ends:
            return value
        if len(ends) == 2 and ends[0] <= ends[1]:
            return tuple(ends)
    raise ValueError(f"cluster.workers: got {value}: expected a number of processes or [min, max]")


class RunConfig(Section):
    """The run's identity."""

    name: Name | None = None
    """Unique name of the run; by default the configuration file's and the time."""


class ClusterConfig(Section):
    """What a job asks of the Ray cluster."""

    workers: Annotated[int | tuple[int, int] | None, BeforeValidator(_require_workers)] = None
    """Training processes; by default one for each GPU of the cluster, or 2 on a cluster without.
    `[min, max]`: as many as there are nodes for at the time, with the same result as with max."""
    resize_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Between looks for nodes that more workers could use, with `workers: [min, max]`."""
    use_gpu: bool | None = None
    """Whether each worker takes a GPU; by default if the cluster has one."""
    cpus_per_worker: Positive = 1
    max_failures: Count = 3
    """How often training goes on from its last checkpoint after losing a worker or a node."""


class StorageConfig(Section):
    """Where runs, checkpoints and the embedded tracking store are kept."""

    root: str = "outputs"
    """A folder that all nodes see, or `s3://BUCKET/PREFIX`."""
    keep_checkpoints: Positive = 2
    """The best by AP; the latest is kept besides."""
    checkpoint_steps: Positive | None = None
    """Steps between checkpoints within an epoch, which ends with one in any case."""
    cache: str = "~/.cache/gfl"
    """On every node: copies of what is read from S3."""
    cache_gb: Annotated[float, Field(gt=0)] = 500.0
    """The most that these copies may take."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """By default MLFLOW_TRACKING_URI, else a SQLite file under `storage.root`."""
    experiment: str = "gfl"
    unreachable: Literal["fail", "spool"] = "fail"
    """Where no store answers when a training starts: stop, or keep what would be logged in
    `spool.db` beside the run until one does. One that dies later never stops a training."""
    every_steps: Annotated[int, Field(gt=0, le=100)] = 10
    """Steps between logged losses, and the most a NaN stays unnoticed."""


class GateConfig(Section):
    """What a version must show before it becomes champion."""

    ap_margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """By how much its AP, in 0 to 1, must exceed the champion's; 0: it may be the same."""
    compare: bool = True
    """Whether the champion's AP counts; not where it knows other classes, or is lost."""
    fps_floor: Annotated[float, Field(ge=0)] = 0.0
    """The least frames per second."""
    val: SplitConfig | None = None
    """The images that decide; by default those that the version was evaluated on in training."""
    ap_tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """By how much the AP measured again may differ from the one that was logged."""
    draws: Positive = 1000
    """Of the bootstrap over images that gives the interval of the difference in AP."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of that interval."""


class RegistryConfig(Section):
    """The model registry."""

    name: ModelName | None = None
    """Registers the trained model under this name."""
    alias: Alias | None = None
    """Points this alias at the new version; `champion` only if it passes the gate."""
    gate: GateConfig = GateConfig()

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
    sweep: SweepConfig | None = None

    @model_validator(mode="after")
    def _elastic_workers_fit(self) -> "JobConfig":
        if isinstance(self.cluster.workers, tuple):
            asked = f"cluster.workers: {list(self.cluster.workers)}"
            if self.model.backbone.sync_norm:
                raise ValueError(
                    f"{asked}: BatchNorm cannot be synchronised over workers that come and go; set "
                    "model.backbone.sync_norm=false, or one number"
                )
            if self.sweep:
                raise ValueError(f"{asked}: trials of a sweep have a fixed number; set one number")
        return self


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
