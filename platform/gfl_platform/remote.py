"""Functions that are called in another process of the cluster."""

import logging
import logging.handlers
import queue
from collections.abc import Callable, Sequence
from typing import Any

from gfl_platform.cluster import root_cause


def call(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of the cluster; log here what it logs, raise what it raises."""
    import ray

    try:
        records = ray.get(ray.remote(_call_logged).remote(function, arguments))
    except ray.exceptions.RayTaskError as error:
        raise root_cause(error) from error
    for record in records:
        logging.getLogger(record.name).handle(record)


def _call_logged(
    function: Callable[..., None], arguments: Sequence[Any]
) -> list[logging.LogRecord]:
    kept: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(kept)
    ours = logging.getLogger("gfl")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        function(*arguments)
    finally:
        ours.removeHandler(handler)
    return [kept.get() for _ in range(kept.qsize())]
