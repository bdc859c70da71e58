"""A trial of a sweep: one training, driven by Ray Tune, run by Ray Train."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfl_platform.cluster.event_queue import Events
from gfl_platform.cluster.events import TrialOutcome, TrialStarted
from gfl_platform.cluster.launch import DivergedError, JobFailedError, one_line
from gfl_platform.cluster.resources import Workers
from gfl_platform.config import JobConfig
from gfl_platform.storage.files import read_json, write_atomically
from gfl_platform.storage.storage import Storage
from gfl_platform.sweeps.space import trial_job
from gfl_platform.tracking.client import Store
from gfl_platform.training import fit
from gfl_platform.training.sources import fetch_sources

logger = logging.getLogger(__name__)

OUTCOME_FILE = "outcome.json"
"""In a trial's folder once it has ended: one that is started again repeats it, unless it failed."""

Outcome = dict[str, Any]
"""`state`; if finished `figures`, `epochs`, `checkpoint` and `protocol`, if not the `cause`."""

Train = Callable[[JobConfig, Path, Workers, Events], Outcome]
"""Trains a configuration in a folder, tells of epochs, and returns how it went."""


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a sweep have in common.

    Attributes:
        job: The sweep's configuration.
        folder: Of the sweep's trials.
        workers: What each runs on.
        events: The way to the sweep's driver.
        train: What trains.
        environment: Variables of the sweep's driver that its trials' have, too.
    """

    job: JobConfig
    folder: Path
    workers: Workers
    events: Events
    train: Train
    environment: dict[str, str]


def run_trial(planned: dict[str, Any], settings: TrialSettings) -> None:
    """Run a `Planned` trial to its end, or repeat how it ended; a Tune trainable.

    A training that fails is no failure to Tune, which would try it again; a lost process is.
    """
    import ray
    from ray import tune

    os.environ.update(settings.environment)
    folder = settings.folder / planned["id"]
    job = trial_job(settings.job, planned["point"], planned["seed"])
    events = Events(settings.events.queue, planned["id"])
    events.tell(TrialStarted(planned))
    outcome = read_json(folder / OUTCOME_FILE)
    if outcome.get("state", "failed") == "failed":
        folder.mkdir(parents=True, exist_ok=True)
        outcome = _train(settings, job, folder, events)
        write_atomically(folder / OUTCOME_FILE, json.dumps(outcome) + "\n")
    ray.get(events.tell(TrialOutcome(**outcome)))  # before Tune can say that it ended
    final = {"epoch": outcome.get("epochs", 0), "final": outcome["state"]}
    tune.report({**outcome.get("figures", {}), **final})


def _train(settings: TrialSettings, job: JobConfig, folder: Path, events: Events) -> Outcome:
    try:
        return settings.train(job, folder, settings.workers, events)
    except DivergedError as error:
        return {"state": "nan", "cause": str(error)}
    except (JobFailedError, ValueError) as error:
        return {"state": "failed", "cause": str(error)}
    except Exception as error:  # a mistake of ours fails this trial, and Tune does not repeat it
        logger.exception("trial failed")
        return {"state": "failed", "cause": f"{type(error).__name__}: {one_line(error)}"}


def train_with_ray(job: JobConfig, folder: Path, workers: Workers, events: Events) -> Outcome:
    """Train on `workers`; go on from the latest checkpoint in `folder` if there is one."""
    from ray.tune.integration.ray_train import TuneReportCallback

    sources = fetch_sources(job, Store(job.tracking, Storage(job.storage)))
    callbacks = [TuneReportCallback()] if workers.stoppable else []
    result = fit.run(job, sources, workers, folder, events, callbacks)
    speed = {"fps": result.fps, "latency_ms": 1000 / result.fps}
    return {
        "state": "finished",
        "figures": {**result.metrics, **speed},
        "epochs": result.epochs,
        "checkpoint": result.checkpoint,
        "protocol": result.protocol,
    }
