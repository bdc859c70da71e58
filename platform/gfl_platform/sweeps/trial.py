"""A trial of a sweep: one training, driven by Ray Tune, run by Ray Train."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gfl.files import write_atomically
from gfl_platform.cluster.event_queue import Events
from gfl_platform.cluster.events import TrialOutcome, TrialStarted
from gfl_platform.cluster.launch import DivergedError, JobFailedError, one_line
from gfl_platform.cluster.resources import Workers
from gfl_platform.config import JobConfig
from gfl_platform.storage.files import read_rebuildable
from gfl_platform.storage.storage import RunFolder
from gfl_platform.sweeps.space import trial_job
from gfl_platform.tracking.client import Store
from gfl_platform.training import fit
from gfl_platform.training.sources import fetch_sources

logger = logging.getLogger(__name__)

OUTCOME_FILE = "outcome.json"
"""File in a trial's folder once it has ended. A trial that is started again sends this outcome
instead of training, unless it failed."""

Train = Callable[[JobConfig, RunFolder, Workers, Events], TrialOutcome]
"""A function that trains a configuration in a folder, sends its epochs, and returns the outcome."""


@dataclass(frozen=True)
class TrialSettings:
    """Settings that all trials of a sweep have in common.

    `folder` holds the trials' folders, `events` lead to the sweep's driver, which passes on its
    `environment` variables.
    """

    job: JobConfig
    folder: RunFolder
    workers: Workers
    events: Events
    train: Train
    environment: dict[str, str]


def run_trial(planned: dict[str, Any], settings: TrialSettings) -> None:
    """Run a `Planned` trial to its end, or send its outcome again; a trainable of Ray Tune.

    Ray Tune tries a failed trial again. So only a lost process fails a trial for Ray Tune, and a
    training that fails is an outcome.
    """
    import ray
    from ray import tune

    os.environ.update(settings.environment)
    folder = settings.folder.below(planned["id"])
    job = trial_job(settings.job, planned["point"], planned["seed"])
    events = Events(settings.events.queue, planned["id"])
    events.tell(TrialStarted(planned))
    record = read_rebuildable(folder.path / OUTCOME_FILE)
    if record.get("state", "failed") == "failed":
        folder.path.mkdir(parents=True, exist_ok=True)
        record = asdict(_train(settings, job, folder, events))
        write_atomically(folder.path / OUTCOME_FILE, json.dumps(record) + "\n")
    outcome = TrialOutcome(**record)
    ray.get(events.tell(outcome))  # it arrives before Ray Tune reports the end
    tune.report({**outcome.figures, "epoch": outcome.epochs, "final": outcome.state})


def _train(
    settings: TrialSettings, job: JobConfig, folder: RunFolder, events: Events
) -> TrialOutcome:
    try:
        return settings.train(job, folder, settings.workers, events)
    except DivergedError as error:
        return TrialOutcome("nan", str(error))
    except (JobFailedError, ValueError) as error:
        return TrialOutcome("failed", str(error))
    except Exception as error:  # a bug fails this trial, and Ray Tune does not repeat it
        logger.exception("trial failed")
        return TrialOutcome("failed", one_line(error))


def train_with_ray(
    job: JobConfig, folder: RunFolder, workers: Workers, events: Events
) -> TrialOutcome:
    """Train on `workers`; continue from the latest checkpoint in `folder` if there is one."""
    from ray.tune.integration.ray_train import TuneReportCallback

    sources = fetch_sources(job, Store(job.tracking, folder.storage))
    callbacks = [TuneReportCallback()] if workers.stoppable else []
    result = fit.run(fit.Training(job, sources, workers, folder), events, callbacks)
    speed = {"fps": result.fps, "latency_ms": 1000 / result.fps}
    return TrialOutcome(
        "finished",
        figures={**result.metrics, **speed},
        epochs=result.epochs,
        checkpoint=result.checkpoint,
        protocol=result.protocol,
    )
