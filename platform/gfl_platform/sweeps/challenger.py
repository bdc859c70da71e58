"""The best trial of a sweep as a registered model, which the gate may make champion."""

from gfl_platform import registration
from gfl_platform.registry import models
from gfl_platform.storage.runs import cache_of
from gfl_platform.sweeps.analysis.analysis import analyse
from gfl_platform.sweeps.trials import SweepResults
from gfl_platform.tracking.client import TrackingError

CHALLENGER = "challenger"


def register_best(results: SweepResults, model: str) -> int:
    """Register the best point's best trial as a version of `model`, once; return the version.

    It gets the alias `challenger`.

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
    facts = registration.figures_of_version(ap, fps, trial.protocol)
    checkpoint = cache_of(results.job).local(trial.checkpoint)
    version = registration.register_once(results.job, model, checkpoint, trial.run_id, facts)
    models.set_alias(results.job, model, version, CHALLENGER)
    return version
