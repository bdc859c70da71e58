"""What a sweep's data must be."""

import numpy as np

from gfl.config.loader import ConfigError
from gfl.data import load_splits
from gfl.data.samplers import share_of_batch
from gfl.evaluation.coco_eval import evaluate_split
from gfl_platform.config import JobConfig
from gfl_platform.storage.runs import cache_of
from gfl_platform.sweeps.trials import AT_THE_END


def check_data(job: JobConfig, workers: int, objectives: tuple[str, ...]) -> None:
    """Refuse data that cannot be used, or objectives that they cannot have.

    Args:
        job: A trial's configuration.
        workers: Of a trial.
        objectives: Of the sweep; without any large objects, say, there is no AP of these.

    Raises:
        ValueError: what is wrong, where, and what to do.
    """
    share_of_batch(job, workers)
    val = load_splits(cache_of(job).localized(job))[1]
    nothing = np.empty((0, 7))
    metrics = dict.fromkeys(AT_THE_END, 0.0) | evaluate_split(val, nothing, job).metrics
    for name in objectives:
        if metrics.get(name, -1.0) < 0:
            raise ConfigError(
                f"sweep.objectives: {name} is never reported: {val.annotations} has no such "
                "objects, or evaluation.max_detections leaves it out"
            )
