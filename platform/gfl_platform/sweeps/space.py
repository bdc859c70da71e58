"""The points of a sweep, checked against the schema, and the configuration of a trial."""

import itertools
import json
import logging
import math
from typing import Any

import numpy as np

from gfl.config.loader import JOB_SECTIONS, ConfigError, derive
from gfl.data.samplers import shard_size
from gfl.data.split import load_splits
from gfl.evaluation.coco_eval import evaluate_split
from gfl_platform.config import JobConfig, RangeConfig, SweepConfig
from gfl_platform.storage.storage import Storage
from gfl_platform.sweeps.trials import AT_THE_END, Point

logger = logging.getLogger(__name__)

ORIGIN = "sweep.space"


def check_data(job: JobConfig, workers: int, objectives: tuple[str, ...]) -> None:
    """Refuse data that cannot be used, or that cannot have the objectives: APl, say.

    Args:
        job: Configuration of a trial.
        workers: Number of workers of a trial.
        objectives: Objectives of the sweep.

    Raises:
        ValueError: the message says what is wrong, where, and what to do.
    """
    shard_size(job, workers)
    val = load_splits(Storage(job.storage).cache.localized(job))[1]
    no_detections = np.empty((0, 7))
    metrics = dict.fromkeys(AT_THE_END, 0.0) | evaluate_split(val, no_detections, job).metrics
    for name in objectives:
        if metrics.get(name, -1.0) < 0:
            raise ConfigError(
                f"sweep.objectives: {name} is never reported: {val.annotations} has no such "
                "objects, or evaluation.max_detections leaves it out"
            )


def sweep_of(job: JobConfig) -> SweepConfig:
    """Return the `sweep:` section.

    Raises:
        ConfigError: the configuration has no such section.
    """
    if job.sweep is None:
        raise ConfigError("no sweep: section; see configs/sweeps/ for examples")
    return job.sweep


def trial_job(job: JobConfig, point: Point, seed: int) -> JobConfig:
    """Return the configuration of the training at `point`.

    It has one worker, unless `cluster` says more, and keeps its best and its latest checkpoint.

    Raises:
        ConfigError: the schema does not allow the values, alone or together.
    """
    values = {
        "seed": seed,
        **point,
        "cluster.workers": job.cluster.workers or 1,
        "storage.keep_checkpoints": 1,
        "storage.checkpoint_steps": None,  # Ray Tune decides after whole epochs
    }
    plain = job.model_copy(update={"sweep": None, "registry": type(job.registry)()})
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return derive(JobConfig, plain, overrides, ORIGIN)


def default_point(job: JobConfig) -> Point:
    """Return the values that the configuration itself has for the swept keys."""

    def look_up(key: str) -> Any:
        values: Any = job.model_dump(mode="json")
        for name in key.split("."):
            values = values.get(name) if isinstance(values, dict) else None
        return values

    return {key: look_up(key) for key in sweep_of(job).space}


def grid_points(sweep: SweepConfig) -> list[Point]:
    """Return all points of a finite space, the last key changing fastest."""
    lists = [ranges.values or () for ranges in sweep.space.values()]
    return [dict(zip(sweep.space, values, strict=True)) for values in itertools.product(*lists)]


def check_sweep(job: JobConfig) -> None:
    """Refuse a sweep that cannot be run, and warn of settings that may surprise.

    Raises:
        ConfigError: the message says what is wrong, where, and what to do.
    """
    sweep = sweep_of(job)
    _check_settings(sweep)
    for key, values in sweep.space.items():
        _check_range(job, key, values)
    if sweep.search.name == "grid":
        for point in grid_points(sweep):
            trial_job(job, point, job.seed)  # raises where values do not go together
    if set(sweep.objectives) & set(AT_THE_END) and sweep.concurrency != 1:
        logger.warning(
            "warning: sweep.objectives: speed is measured while other trials run; where they share "
            "CPUs, set sweep.concurrency=1"
        )
    for key, default in default_point(job).items():
        if not _contains(sweep.space[key], default):
            logger.warning(
                "warning: sweep.space: %s is %s by default, which is outside the range: the "
                "report cannot compare with it",
                key,
                json.dumps(default),
            )


def _check_settings(sweep: SweepConfig) -> None:
    lists = [ranges.values for ranges in sweep.space.values()]
    if sweep.search.name == "grid":
        if None in lists:
            key = list(sweep.space)[lists.index(None)]
            raise ConfigError(
                f"sweep.space: {key} is no list of values, so there is no grid: set "
                "sweep.search.name=tpe or random, or list them"
            )
        if sweep.budget.trials:
            raise ConfigError(
                "sweep.budget.trials: a grid trains all of its points; set sweep.search.name=random"
            )
    elif sweep.budget.trials is None:
        raise ConfigError(f"sweep.budget.trials: how many points shall {sweep.search.name} draw?")
    if None not in lists and math.prod(len(values or ()) for values in lists) == 1:
        raise ConfigError(
            "sweep.space has one point only; list more values, or train it with jobs.train"
        )
    if not sweep.objectives:
        raise ConfigError("sweep.objectives: empty; name at least one metric, such as [AP]")
    if sweep.scheduler.name != "none" and sweep.objectives[0] in AT_THE_END:
        raise ConfigError(
            f"sweep.objectives: {sweep.scheduler.name} stops trials by the first objective, but "
            f"{sweep.objectives[0]} is never reported before the end; put AP first"
        )
    if len(set(sweep.objectives)) < len(sweep.objectives):
        raise ConfigError(f"sweep.objectives: {', '.join(sweep.objectives)}: one is repeated")
    if sweep.scheduler.name != "none" and "schedule.epochs" in sweep.space:
        raise ConfigError(
            "sweep.space: trials of different schedule.epochs cannot be stopped by comparison; "
            "set sweep.scheduler.name=none"
        )
    if sweep.finalists and sweep.seeds == 1:
        raise ConfigError("sweep.finalists: finalists get more seeds; set sweep.seeds=2 or more")
    if "seed" in sweep.space and sweep.seeds > 1:
        raise ConfigError("sweep.space: seed is swept already; set sweep.seeds=1")
    for row in sweep.published.rows if sweep.published else ():
        for key in row.at.keys() - sweep.space.keys():
            raise ConfigError(f"sweep.published: {key} is not in sweep.space")


def _check_range(job: JobConfig, key: str, values: RangeConfig) -> None:
    """Refuse a key that the configuration lacks, or values that the key cannot have."""
    if key.split(".")[0] in JOB_SECTIONS:
        raise ConfigError(f"{ORIGIN}: {key} says how a job runs, and changes no result; remove it")
    listed = values.values or ()
    if len({json.dumps(value) for value in listed}) < len(listed):
        raise ConfigError(f"{ORIGIN}: {key}: a value is repeated in {json.dumps(listed)}")
    plain = job.model_copy(update={"sweep": None})
    for value in values.values or values.bounds or ():
        try:
            derive(JobConfig, plain, [f"{key}={json.dumps(value)}"], ORIGIN)
        except ConfigError as error:
            if "valid integer" in str(error) and values.bounds:
                raise ConfigError(f"{ORIGIN}: {key} takes integers: use int_uniform") from error
            # A list may hold a value that is allowed together with another key's value only.
            if values.bounds or f"{key}:" in str(error) or "unknown key" in str(error):
                raise


def _contains(values: RangeConfig, default: Any) -> bool:
    if values.bounds is not None:
        low, high = values.bounds
        return isinstance(default, int | float) and low <= default <= high
    return any(value == default for value in values.values or ())
