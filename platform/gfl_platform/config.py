"""`JobConfig`: a `gfl.Config`, and where and how a job runs with it."""

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
from gfl_platform.redaction import require_no_credentials

_NUMBERS = ((int, float), "numbers")  # Exact types, because a boolean is an `int` to Python.


class RangeConfig(Section):
    """The values that a sweep tries for one key, in one of four forms."""

    model_config = ConfigDict(strict=False)  # YAML has lists where the fields are tuples.

    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """A list of values: a grid search tries each of them, the other searches draw from them."""
    uniform: tuple[float, float] | None = None
    """Lowest and highest of a range of numbers."""
    log_uniform: tuple[float, float] | None = None
    """Lowest and highest of a range of positive numbers, drawn uniformly in the logarithm."""
    int_uniform: tuple[int, int] | None = None
    """Lowest and highest of a range of integers, both included."""

    @field_validator("uniform", "log_uniform", "int_uniform", mode="before")
    @classmethod
    def _two_bounds(cls, bounds: Any, field: ValidationInfo) -> Any:
        if bounds is None:
            return None
        types, name = ((int,), "integers") if field.field_name == "int_uniform" else _NUMBERS
        limit = 0.0 if field.field_name == "log_uniform" else -inf
        is_pair = isinstance(bounds, list | tuple) and len(bounds) == 2
        if not is_pair or any(type(bound) not in types for bound in bounds):
            raise ValueError(f"got {bounds!r}: expected two {name}, [lowest, highest]")
        if not limit < bounds[0] < bounds[1] < inf:
            positive = "positive " if limit == 0 else ""
            raise ValueError(f"got {bounds!r}: expected {positive}bounds, [lowest, highest]")
        return bounds

    @model_validator(mode="after")
    def _one_form(self) -> "RangeConfig":
        if sum(value is not None for _, value in self) != 1:
            raise ValueError(f"expected one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The values of a list, None for a range."""
        return self.grid

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest of a range, None for a list of values."""
        return self.uniform or self.log_uniform or self.int_uniform


def _dotted(space: Any) -> Any:
    """Return a space with dotted keys; of two ranges for one key the last one counts.

    Overrides on the command line arrive as nested mappings.
    """
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
    """The order in which a sweep tries the points of its space."""

    name: Literal["grid", "random", "tpe"] = "grid"
    """`grid` tries all points, `random` draws them, and `tpe` draws them with Optuna's TPE, which
    learns from the points before."""
    seed: Count = 0
    """Seed of the draws."""


class SchedulerConfig(Section):
    """The rule by which a sweep stops trials before their last epoch."""

    name: Literal["none", "asha", "median"] = "none"
    """`none` stops no trial, `asha` halves them successively (ASHA, Li et al., 2020), and `median`
    stops those below the median of the others."""
    grace_epochs: Positive = 1
    """Epochs before which no trial is stopped."""
    reduction: Annotated[float, Field(gt=1)] = 3
    """ASHA's reduction factor: one of so many trials continues after each rung, and the rungs are
    at its powers, in epochs."""


class BudgetConfig(Section):
    """Limits of a sweep's search; when one is reached, the running trials are stopped."""

    trials: Positive | None = None
    """Number of points that are drawn; a grid search tries all of its points."""
    epochs: Positive | None = None
    """Epochs of all trials together."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of wall time."""


class PublishedRow(Section):
    """The figures that a paper reports for one point."""

    at: dict[str, Any]
    """Values of the swept keys."""
    figures: dict[str, float]
    """Figures by the names of our metrics, in the paper's unit: AP 40.2."""


class PublishedConfig(Section):
    """A paper's figures for the points of a sweep, which the report prints beside ours."""

    source: str
    """Name of the paper and its table."""
    rows: tuple[PublishedRow, ...]
    """One row per point."""


Objective = Literal["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "fps", "latency_ms"]


class SweepConfig(Section):
    """A search over keys of the configuration; each trial uses the resources of `cluster`."""

    space: Annotated[dict[str, RangeConfig], BeforeValidator(_dotted), Field(min_length=1)]
    """Keys, dotted or nested, and the values to try."""
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    objectives: tuple[Objective, ...] = ("AP",)
    """Metrics to optimise together: latency is minimised, every other one maximised. The scheduler
    and the finalists go by the first one."""
    seeds: Positive = 1
    """Number of trainings of a point, with `seed`, `seed` + 1 and so on."""
    finalists: Positive | None = None
    """Number of points that are trained with all seeds: the best of the search; by default all."""
    concurrency: Positive | None = None
    """Number of trials at the same time; by default as many as the cluster has room for."""
    budget: BudgetConfig = BudgetConfig()
    published: PublishedConfig | None = None


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


def require_alias(alias: str) -> str:
    """Return `alias` if MLflow accepts it; `latest`, `v1` and numbers mean versions to MLflow.

    Raises:
        ValueError: MLflow does not accept it.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", alias):
        raise ValueError(f"alias '{alias}': expected letters, digits, '-' and '_'")
    if re.fullmatch(r"latest|v?\d+", alias, re.IGNORECASE):
        raise ValueError(f"alias '{alias}' means a version; choose another, such as champion")
    return alias


ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]

Alias = Annotated[str, AfterValidator(require_alias)]


def _require_workers(value: Any) -> Any:
    """Return a number of processes, or the lowest and the highest number."""
    counts = value if isinstance(value, list | tuple) else (value,)
    if value is None:
        return None
    if all(type(count) is int and count >= 0 for count in counts):
        if value in counts:
            return value
        if len(counts) == 2 and 0 < counts[0] <= counts[1]:
            return tuple(counts)
    raise ValueError(f"cluster.workers: got {value}: expected a number of processes or [min, max]")


class RunConfig(Section):
    """The run's identity."""

    name: Name | None = None
    """Unique name of the run; by default the configuration file's name and the time."""
    accept_changes: bool = False
    """Whether a run is continued although its data, code, packages or workers are not what they
    were, so that its numbers are not those of an uninterrupted one."""


class ClusterConfig(Section):
    """The resources of the Ray cluster that a job uses."""

    workers: Annotated[int | tuple[int, int] | None, BeforeValidator(_require_workers)] = None
    """Number of training processes; by default one for each GPU of the cluster, or 2 on a cluster
    without GPUs. With `[min, max]` it follows the number of nodes during the training, and the
    result is the same as with `max`. With 0 an evaluation or a benchmark needs no cluster: it runs
    in the job's own process."""
    resize_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between two checks for new nodes, with `workers: [min, max]`."""
    use_gpu: bool | None = None
    """Whether each worker uses a GPU; by default if the cluster has one."""
    cpus_per_worker: Positive = 1
    """CPUs that each worker reserves, and threads that PyTorch uses in it."""
    max_failures: Count = 3
    """How often a training continues from its last checkpoint after losing a worker or a node."""


class StorageConfig(Section):
    """The place of runs, checkpoints and the embedded tracking store."""

    root: str = "outputs"
    """A folder that all nodes see, or `s3://BUCKET/PREFIX`."""
    keep_checkpoints: Positive = 2
    """Number of checkpoints to keep: those with the best AP. The latest one is kept, too."""
    checkpoint_steps: Positive | None = None
    """Steps between two checkpoints within an epoch; every epoch ends with one in any case."""
    cache: str = "~/.cache/gfl"
    """Folder on every node for copies of files on S3."""
    cache_gb: Annotated[float, Field(gt=0)] = 500.0
    """Size of these copies together, in GB (1e9 bytes)."""


class TrackingConfig(Section):
    """The MLflow store, and what is logged there."""

    uri: str | None = None
    """URI of the store; by default MLFLOW_TRACKING_URI, else a SQLite file under `storage.root`."""
    experiment: str = "gfl"
    """Name of the experiment; it is created if it does not exist."""
    unreachable: Literal["fail", "spool"] = "fail"
    """What a training does if the store does not answer at its start: `fail` stops it, `spool`
    keeps the events in `spool.db` in the run's folder until the store answers. A store that dies
    later never stops a training."""
    every_steps: Annotated[int, Field(gt=0, le=100)] = 10
    """Steps between two reports of the losses, and at most until a NaN is noticed."""


class GateConfig(Section):
    """The requirements that a version has to meet to become champion."""

    ap_margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Least difference of its AP to the champion's, both in 0 to 1; with 0 they may be equal."""
    compare: bool = True
    """Whether it is compared with the champion, which must have the same classes."""
    fps_floor: Annotated[float, Field(ge=0)] = 0.0
    """Least number of frames per second."""
    val: SplitConfig | None = None
    """Images of the comparison; by default those on which the version was evaluated in training."""
    ap_tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """Largest difference between the AP that is measured again and the one that was logged."""
    draws: Positive = 1000
    """Number of draws of the bootstrap over images, for the interval of the difference in AP."""


class RegistryConfig(Section):
    """The registration of a trained model."""

    name: ModelName | None = None
    """Name under which the trained model is registered; by default it is not registered."""
    alias: Alias | None = None
    """Alias that points at the new version afterwards; `champion` only if it passes the gate."""
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _alias_has_model(self) -> "RegistryConfig":
        if self.alias and not self.name:
            raise ValueError(f"registry.alias: '{self.alias}' of which model? set registry.name")
        return self


class JobConfig(Config):
    """All sections of a job's configuration file."""

    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
    sweep: SweepConfig | None = None

    @model_validator(mode="after")
    def _no_credentials(self) -> "JobConfig":
        _require_no_credentials("", self.model_dump(mode="json"))
        return self

    @model_validator(mode="after")
    def _elastic_workers_fit(self) -> "JobConfig":
        if isinstance(self.cluster.workers, tuple):
            workers = f"cluster.workers: {list(self.cluster.workers)}"
            if self.model.backbone.sync_norm:
                raise ValueError(
                    f"{workers}: BatchNorm cannot be synchronised over workers that come and go; "
                    "set model.backbone.sync_norm=false, or one number"
                )
            if self.sweep:
                raise ValueError(
                    f"{workers}: trials of a sweep have a fixed number; set one number"
                )
        return self


def _require_no_credentials(key: str, value: Any) -> None:
    """Check all texts of a configuration; only MLflow's URI may hold a password."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _require_no_credentials(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, list):
        for inner in value:
            _require_no_credentials(key, inner)
    elif isinstance(value, str) and key != "tracking.uri":
        require_no_credentials(key, value)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a configuration file with all its sections; see `gfl.load_config`."""
    return load_schema(JobConfig, path, overrides)


def job_of(overrides: Sequence[str]) -> JobConfig:
    """Return the configuration of a job without a configuration file.

    Only the overrides of sections that say where and how a job runs are applied. The others belong
    to the configuration in the model's checkpoint; here only their sections are checked.
    """
    for word in overrides:
        section = word.split(".")[0].split("=")[0]
        if section not in JobConfig.model_fields:
            derive(JobConfig, Config(), [word])  # raises, with a suggestion
    where = [word for word in overrides if word.split(".")[0].split("=")[0] in JOB_SECTIONS]
    return derive(JobConfig, Config(), where)
