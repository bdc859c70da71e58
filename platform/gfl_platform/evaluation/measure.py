"""The processes of a measurement: workers of a Ray cluster, or this process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gfl_platform.cluster import launch, resources
from gfl_platform.cluster.event_queue import pumped
from gfl_platform.cluster.events import Event, Watcher
from gfl_platform.config import JobConfig
from gfl_platform.storage.storage import Storage


@dataclass(frozen=True)
class _Direct:
    """The way to a driver that is the same process."""

    watch: Watcher

    def tell(self, event: Event) -> None:
        """Show an event."""
        self.watch(event)


def run_measurement(
    loop: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    job: JobConfig,
    storage: Storage,
    watch: Watcher,
) -> Any:
    """Run `loop` in the workers of the cluster; return what it returns on rank 0.

    With `cluster.workers: 0` it runs in this process, without Ray.

    Args:
        loop: The function that each worker runs. It finds `events` and `device` in its settings;
            the device is None where Ray knows it.
        settings: The settings of `loop`.
        job: Configuration of the cluster.
        storage: Where files lie.
        watch: Shows the events.

    Raises:
        ValueError: the cluster cannot be used; in this process also what `loop` raises.
        JobFailedError: a worker stopped.
    """
    if job.cluster.workers == 0:
        on_gpu = torch.cuda.is_available() and job.cluster.use_gpu is not False
        device = torch.device("cuda" if on_gpu else "cpu")
        return loop(settings | {"events": _Direct(watch), "device": device})
    resources.connect()
    workers = resources.allot(job)
    with storage.scratch_folder() as scratch, pumped(watch) as events:
        options = launch.RunOptions(storage.ray_options(scratch))
        result = launch.run_workers(loop, settings | {"device": None}, workers, events, options)
    return result.return_value
