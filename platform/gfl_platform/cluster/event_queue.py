"""The way from a job's processes to its driver: a queue of events in a Ray actor.

Workers and the training controller only add; the driver drains, shows and logs. Neither a slow
tracking server nor a slow terminal ever holds up training.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gfl_platform.cluster.events import Event, OfTrial, Watcher

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 0.5


class EventQueue:
    """A Ray actor that lives while a job runs."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def add(self, event: Event) -> None:
        """Append an event."""
        self._events.append(event)

    def drain(self) -> list[Event]:
        """Return all events since the last call, in the order of their arrival."""
        events, self._events = self._events, []
        return events


@dataclass(frozen=True)
class Events:
    """The way to a job's driver, for its other processes.

    Attributes:
        queue: Handle of the `EventQueue`.
        trial: The trial of a sweep that all events are about; None outside sweeps.
    """

    queue: Any
    trial: str | None = None

    def tell(self, event: Event) -> Any:
        """Send an event without waiting; return what to wait for until it has arrived."""
        return self.queue.add.remote(OfTrial(self.trial, event) if self.trial else event)


@contextmanager
def pumped(handle: Watcher) -> Iterator[Events]:
    """Hand all events to `handle` in a thread of its own, the last ones at the end."""
    events = Events(_start_queue())
    done = threading.Event()

    def drain() -> None:
        try:
            arrived = ray.get(events.queue.drain.remote())
        except RayError as error:  # which ends no training, and hides no error of it
            logger.warning("no more is heard of the job's processes: %s", str(error).split("\n")[0])
            done.set()
            return
        for event in arrived:
            _handle_or_log(handle, event)

    def pump() -> None:
        while not done.wait(DRAIN_SECONDS):
            drain()

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    try:
        yield events
    finally:
        done.set()
        thread.join()
        drain()
        ray.kill(events.queue)  # else it lives, and takes 1 % of a CPU, until the driver ends


def _handle_or_log(handle: Watcher, event: Event) -> None:
    try:
        handle(event)
    except Exception:  # whatever shows or logs a training must not end it
        logger.exception("an event of the job was not shown or logged")


def _start_queue() -> Any:
    """Return the handle of a new queue on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(EventQueue).options(num_cpus=0, scheduling_strategy=here).remote()
