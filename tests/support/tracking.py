"""What MLflow holds of a run, fetched so that a test cannot compare nothing with nothing."""

from gfl_platform.storage.storage import Storage
from gfl_platform.tracking.client import Store


def store_of(job):
    """Return the store of a job's configuration."""
    return Store(job.tracking, Storage(job.storage))


def history(client, run_id, metric):
    """Return all points of a metric of a run, MLflow's `Metric` entities, never an empty list.

    Raises:
        AssertionError: the run has no such metric; the message names those it has.
    """
    points = client.get_metric_history(run_id, metric)
    logged = sorted(client.get_run(run_id).data.metrics)
    assert points, f"run {run_id} has no metric {metric!r}; logged: {', '.join(logged) or 'none'}"
    return points
