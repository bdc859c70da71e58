"""`JobConfig`: a `gfl.Config` and where and how to run it."""

import re
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gfl.config.loader import JOB_SECTIONS, derive, load_schema
from gfl.config.schema import Config, Count, Positive, Section, SplitConfig

_REAL = ((int, float), "numbers")  # a boolean is neither, and no text is read as a number


class RangeConfig(Section):
    """The values that a sweep tries for one key, in one of five forms."""

    model_config = ConfigDict(strict=False)  # a list is taken for a tuple

    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Each of these values."""
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """The same; the searchers that draw treat it alike."""
    uniform: tuple[float, float] | None = None
    """Between two numbers."""
    log_uniform: tuple[float, float] | None = None
    """Between two positive numbers, uniform in the logarithm."""
    int_uniform: tuple[int, int] | None = None
    """Integers between two, both included."""

    @field_validator("uniform", "log_uniform", "int_uniform", mode="before")
    @classmethod
    def _two_bounds(cls, bounds: Any, field: ValidationInfo) -> Any:
        if bounds is None:
            return None
        kinds, what = ((int,), "integers") if field.field_name == "int_uniform" else _REAL
        least = 0.0 if field.field_name == "log_uniform" else -inf
        two = isinstance(bounds, list | tuple) and len(bounds) == 2
        if not two or any(type(end) not in kinds for end in bounds):
            raise ValueError(f"got {bounds!r}: expected two {what}, [lowest, highest]")
        if not least < bounds[0] < bounds[1] < inf:
            positive = "positive " if least == 0 else ""
            raise ValueError(f"got {bounds!r}: expected {positive}bounds, [lowest, highest]")
        return bounds

    @model_validator(mode="after")
    def _one_form(self) -> "RangeConfig":
        if sum(value is not None for _, value in self) != 1:
            raise ValueError(f"expected one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values, or None of a continuous or integer range."""
        return self.grid or self.choice

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends of a range, or None of a list of values."""
        return self.uniform or self.log_uniform or self.int_uniform


def _dotted(space: Any) -> Any:
    """Return a space with dotted keys, which the command line's overrides nest; the last wins."""
    if not isinstance(space, dict):
        return space
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            flat |= {f"{key}.{below}": inner for below, inner in _dotted(value).items()}
        elif not isinstance(value, dict | RangeConfig):
            raise ValueError(
                f"sweep.space: {key}: got {value!r}: expected a range, such as {{grid: [1, 2]}}"
            )
        else:
            flat[key] = value
    return flat


class SearchConfig(Section):
    """Which points of the space a sweep tries, and in which order."""

    name: Literal["grid", "random", "tpe"] = "grid"
    """All of them; drawn at random; or drawn by Optuna's TPE, which learns from those before."""
    seed: Count = 0
    """Of what is drawn."""


class SchedulerConfig(Section):
    """Which trials a sweep stops before their last epoch."""

    name: Literal["none", "asha", "median"] = "none"
    """None; by successive halving (ASHA, Li et al., 2020); or those below the median of others."""
    grace_epochs: Positive = 1
    """No trial is stopped before."""
    reduction: Annotated[float, Field(gt=1)] = 3
    """Of ASHA: one of so many trials goes on from each rung; rungs are at its powers."""


class BudgetConfig(Section):
    """The most that a sweep's search may use; what runs then is stopped."""

    trials: Positive | None = None
    """Points drawn; a grid has all of its own."""
    epochs: Positive | None = None
    """Trained by all trials together."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Of wall time."""


class PublishedRow(Section):
    """What a paper reports for one point."""

    at: dict[str, Any]
    """Values of swept keys."""
    figures: dict[str, float]
    """By the names of our metrics, as the paper prints them: AP 40.2."""


class PublishedConfig(Section):
    """A paper's figures for the points of a sweep, printed beside ours."""

    source: str
    rows: tuple[PublishedRow, ...]


Objective = Literal["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "fps", "latency_ms"]


class SweepConfig(Section):
    """A search over keys of the configuration; the resources of a trial are those of `cluster`."""

    space: Annotated[dict[str, RangeConfig], BeforeValidator(_dotted), Field(min_length=1)]
    """Keys, dotted or nested, and the values to try."""
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    objectives: tuple[Objective, ...] = ("AP",)
    """What is searched for, all at once; trials are stopped by the first. Lower latency is better,
    more of any other."""
    seeds: Positive = 1
    """Trainings of a point: with `seed`, `seed` + 1 and so on."""
    finalists: Positive | None = None
    """Points that are trained with all seeds, the best after the search; by default all points."""
    concurrency: Positive | None = None
    """Trials at once; by default as many as fit."""
    budget: BudgetConfig = BudgetConfig()
    published: PublishedConfig | None = None


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
