"""A sweep from start to end: the search, the finalists' other seeds, the report."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

from gfl.config.loader import derive, reproducible
from gfl_platform.cluster import resources
from gfl_platform.cluster.event_queue import pumped
from gfl_platform.cluster.events import Event, FolderWritten
from gfl_platform.cluster.resources import START_TIMEOUT, Workers, most_resources
from gfl_platform.config import BudgetConfig, JobConfig, SweepConfig
from gfl_platform.registry import models
from gfl_platform.storage.storage import RunFolder, Storage
from gfl_platform.sweeps.analysis.verdicts import analyse
from gfl_platform.sweeps.formatting import identity
from gfl_platform.sweeps.recorder import EndOfTrials, Recorder
from gfl_platform.sweeps.search import BudgetStopper, DrawnTrials, EarlyStopping, ListedTrials
from gfl_platform.sweeps.space import (
    check_data,
    check_sweep,
    default_point,
    grid_points,
    sweep_of,
    trial_job,
)
from gfl_platform.sweeps.trial import Train, TrialSettings, run_trial, train_with_ray
from gfl_platform.sweeps.trials import (
    ENDED,
    EPOCHS_KEY,
    Planned,
    Point,
    SweepResults,
    Trial,
    direction,
    finalist_name,
    trial_name,
)
from gfl_platform.tracking.client import Store, TrackingError
from gfl_platform.tracking.metadata import describe, require_same
from gfl_platform.tracking.run import RunTracker
from gfl_platform.training.sources import fetch_sources

CHALLENGER = "challenger"


def register_best(results: SweepResults, model: str) -> int:
    """Register the best point's best trial as a version of `model`; return the version.

    A trial is registered once. Its version gets the alias `challenger`.

    Raises:
        ValueError: no trial finished.
    """
    trial = analyse(results).best_trial
    if not trial:
        raise ValueError(f"--register {model}: no trial of sweep '{results.name}' finished")
    if not trial.run_id:
        raise TrackingError(f"--register {model}: no store has answered yet; --resume tries again")
    assert trial.checkpoint
    ap, fps = trial.figures["AP"], trial.figures["fps"]
    facts = models.figures_of_version(ap, fps, trial.protocol)
    store = Store(results.job.tracking, Storage(results.job.storage))
    checkpoint = store.storage.cache.local(trial.checkpoint)
    version = models.register_once(store, model, checkpoint, trial.run_id, facts)
    models.set_alias(store, model, version, CHALLENGER)
    return version


CONFIG_FILE = "sweep.yaml"

REPORT_FOLDER = "report"

MAY_CHANGE = ("sweep.budget.", "sweep.concurrency")
"""Keys that a resumed sweep may change."""

NO_TIMEOUT_S = 10**8
"""Timeout passed to Ray, in seconds, for workers that may wait as long as they need to."""

UNKNOWN_SIZE = 16
"""Trials that run at once on a cluster that may grow to an unknown size."""


@dataclass(frozen=True)
class _Sweep:
    """A sweep while it runs."""

    job: JobConfig
    folder: RunFolder
    workers: Workers
    recorder: Recorder
    train: Train

    @property
    def config(self) -> SweepConfig:
        """The section `sweep:`."""
        return sweep_of(self.job)

    @property
    def known(self) -> list[Trial]:
        """All trials with a record, sorted by their ids."""
        return [trial for _, trial in sorted(self.recorder.trials.items())]

    def has_ended(self, planned: Planned) -> bool:
        """Return whether a planned trial has ended in this session or an earlier one."""
        trial = self.recorder.trials.get(planned.id)
        return trial is not None and trial.state in ENDED


def run_sweep(
    job: JobConfig,
    name: str,
    *,
    resume: bool,
    watch: Callable[[Trial, Event], None],
    train: Train = train_with_ray,
) -> SweepResults:
    """Run the sweep that `job` describes, or continue it, and write its report.

    Each event of a trial is given to `watch` together with the trial.

    Raises:
        ValueError: the sweep, dataset, cluster or MLflow store cannot be used.
        KeyboardInterrupt: the sweep was interrupted, and can be resumed.
    """
    check_sweep(job)
    storage = Storage(job.storage)
    store = Store(job.tracking, storage)
    folder, workers = _prepare(job, store, name, resume=resume)
    with (
        storage.held(folder, resume=resume) as place,
        RunTracker(store, folder, describe(job, name)) as tracker,
    ):
        parent = tracker.require_run()
        devices = workers.count * (1 if workers.use_gpu else workers.cpus)
        recorder = Recorder(job, store, name, folder / "trials", parent, devices, watch)
        sweep = _Sweep(job, place.below("trials"), workers, recorder, train)
        storage.share_state(folder)
        try:
            _search(sweep)
            _train_finalists(sweep)
            recorder.discard_checkpoints()
        finally:
            recorder.close()
        device = "GPU" if workers.use_gpu else "CPU"
        results = SweepResults(name, job, default_point(job), device, sweep.known)
        from gfl_platform.sweeps.analysis.report import write_report  # matplotlib takes a second

        write_report(results, folder / REPORT_FOLDER)
        tracker.handle(FolderWritten(str(folder / REPORT_FOLDER)))
    return results


def _prepare(job: JobConfig, store: Store, name: str, *, resume: bool) -> tuple[Path, Workers]:
    """Return the sweep's folder and a trial's workers; write nothing if that fails."""
    recipe, first = comparable(job), trial_job(job, {}, job.seed)
    folder = store.storage.find_run_folder(name, resume=resume, kind="sweeps")
    if resume:
        require_same(folder / CONFIG_FILE, recipe, "sweep", MAY_CHANGE)
    resources.connect()
    sweep = sweep_of(job)
    is_limited = sweep.budget.epochs is not None or sweep.budget.hours is not None
    stoppable = is_limited or sweep.scheduler.name != "none"
    workers = replace(resources.allot(first), stoppable=stoppable)
    if not resources.in_cluster():  # workers read the same files, so a mistake is found at once
        check_data(first, workers.count, sweep.objectives)
    store.require_answer()
    store.known_experiment()
    fetch_sources(first, store)
    if not resume:
        store.storage.open_run_folder(name, resume=False, kind="sweeps")
        require_same(folder / CONFIG_FILE, recipe, "sweep")
    return folder, workers


def comparable(job: JobConfig) -> JobConfig:
    """Return `job` without where it runs and its names, which a resumed sweep may change."""
    return derive(JobConfig, reproducible(job), []).model_copy(update={"sweep": job.sweep})


def _search(sweep: _Sweep) -> None:
    """Run all trials of the search that have not ended."""
    config, job = sweep.config, sweep.job
    known = [trial for trial in sweep.known if trial.stage == "search"]
    epochs = sum(trial.epochs for trial in known)
    at_once = min(concurrency(sweep), len(known) or 1)
    seconds = sum(trial.seconds for trial in known) / at_once
    last = inf if EPOCHS_KEY in config.space else job.schedule.epochs
    budget = BudgetStopper(config.budget, epochs, seconds, last)
    plan = sweep.recorder.plan
    searcher: ListedTrials | DrawnTrials
    if config.search.name == "grid":
        points = grid_points(config)
        seeds = 1 if config.finalists else config.seeds
        names = map(trial_name, count())
        planned = [
            Planned(next(names), point, job.seed + seed, "search")
            for seed in range(seeds)
            for point in points
        ]
        remaining = [trial for trial in planned if not sweep.has_ended(trial)]
        searcher = ListedTrials(remaining, plan, budget.used_up)
    else:
        searcher = DrawnTrials(
            job, known, free_names(sweep.folder.path, trial_name), plan, budget.used_up
        )
    stops_early = config.scheduler.name != "none"
    scheduler = EarlyStopping(config, job.schedule.epochs, known) if stops_early else None
    _run(sweep, searcher, scheduler, budget)


def _train_finalists(sweep: _Sweep) -> None:
    """Train the best points, and the default, with all seeds."""
    planned = [trial for trial in _finalists(sweep) if not sweep.has_ended(trial)]
    if planned:
        unlimited = BudgetStopper(BudgetConfig(), 0, 0.0, inf)
        trials = ListedTrials(planned, sweep.recorder.plan, unlimited.used_up)
        _run(sweep, trials, None, unlimited)


def _finalists(sweep: _Sweep) -> list[Planned]:
    """Return the trials of the best points and the default with all seeds, ended ones included."""
    config, job = sweep.config, sweep.job
    if config.seeds == 1 or (config.search.name == "grid" and config.finalists is None):
        return []
    objective = config.objectives[0]
    searched = [trial for trial in sweep.known if trial.stage == "search"]
    finished = [trial for trial in searched if trial.state == "finished"]
    finished.sort(key=lambda trial: -direction(objective) * trial.figures[objective])
    points = _distinct([trial.point for trial in finished])[: config.finalists]
    default = default_point(job)  # what every verdict compares with
    points = _distinct([*points, *(trial.point for trial in searched if trial.point == default)])
    known = {
        (identity(trial.point), trial.seed): trial.id
        for trial in sweep.known
        if trial.stage == "finalists" or trial.state in ("finished", "nan")
    }
    free = free_names(sweep.folder.path, finalist_name)
    return [
        Planned(known.get((identity(point), seed)) or next(free), point, seed, "finalists")
        for point in points
        for seed in range(job.seed, job.seed + config.seeds)
    ]


def free_names(folder: Path, name_of: Callable[[int], str]) -> Iterator[str]:
    """Return ids that no trial has in `folder`, not even one whose record is damaged."""
    return (name for name in map(name_of, count()) if not (folder / name).exists())


def _distinct(points: list[Point]) -> list[Point]:
    return list({identity(point): point for point in points}.values())


def concurrency(sweep: _Sweep) -> int:
    """Return how many trials run at once: as many as fit, or `sweep.concurrency` if it is less."""
    import ray

    most, workers = most_resources(ray.cluster_resources())[0], sweep.workers
    fits = most["CPU"] / (workers.count * workers.cpus)
    if workers.use_gpu:
        fits = min(fits, most["GPU"] / workers.count)
    limit = sweep_of(sweep.job).concurrency
    if fits == inf:
        return limit or UNKNOWN_SIZE
    fits = max(1, int(fits))
    return min(fits, limit or fits)


def _driver_resources(trials: int) -> dict[str, float]:
    """Return the resources of a trial's driver: no CPU, because its workers need all of them.

    Ray Tune refuses an empty request. On a cluster of our own the request lets `trials` drivers run
    at once and no more: otherwise Ray Tune starts a process for each trial in advance, even if the
    trial then reuses the process of the trial before.
    """
    import ray

    shared = resources.in_cluster()
    return {"memory": float(1 << 20) if shared else ray.cluster_resources()["memory"] // trials}


def _run(sweep: _Sweep, searcher: Any, scheduler: Any, budget: BudgetStopper) -> None:
    """Run the trials that `searcher` gives."""
    os.environ.update(
        TUNE_DISABLE_SIGINT_HANDLER="1",  # Ctrl-C ends the job: Ray Tune has no state to save
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        RAY_AIR_NEW_OUTPUT="0",  # the new output is printed in spite of verbose=0
        TUNE_PRINT_ALL_TRIAL_ERRORS="0",
    )
    from ray import tune

    with sweep.folder.storage.scratch_folder() as scratch, pumped(sweep.recorder.handle) as events:
        # A trial fits into the cluster, and may wait until other trials or jobs have ended.
        environment = {START_TIMEOUT: os.environ.get(START_TIMEOUT, str(NO_TIMEOUT_S))}
        settings = TrialSettings(
            sweep.job, sweep.folder, sweep.workers, events, sweep.train, environment
        )
        tune.run(
            tune.with_parameters(run_trial, settings=settings),
            name="tune",
            **sweep.folder.storage.ray_options(scratch),
            resources_per_trial=tune.PlacementGroupFactory([_driver_resources(concurrency(sweep))]),
            num_samples=-1,
            search_alg=searcher,
            scheduler=scheduler,
            stop=budget,
            callbacks=[EndOfTrials(events, budget.used_up)],
            max_concurrent_trials=concurrency(sweep),
            max_failures=sweep.job.cluster.max_failures,
            raise_on_failed_trial=False,
            reuse_actors=not sweep.workers.stoppable,  # a stopped training goes on for a moment
            verbose=0,
        )
    sweep.recorder.end_running("out of budget")
