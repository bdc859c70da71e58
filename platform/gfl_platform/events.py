"""What a job's processes tell its driver: a queue in a Ray actor.

Workers and the training controller only add; the driver drains, shows and logs. Neither a slow
tracking server nor a slow terminal ever holds up training.
"""

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
"""`kind` and what belongs to it: steps, checkpoint, data, evaluated, failure, result."""

Watcher = Callable[[Event], None]
"""Is told of every event while a job runs; shows it."""


class EventQueue:
    """An actor; lives with the driver."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def add(self, event: Event) -> None:
        """Append an event."""
        self._events.append(event)

    def drain(self) -> list[Event]:
        """Return all events since the last call, in the order of their arrival."""
        events, self._events = self._events, []
        return events


def start_event_queue() -> Any:
    """Return the handle of a new queue on this node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(EventQueue).options(num_cpus=0, scheduling_strategy=here).remote()
