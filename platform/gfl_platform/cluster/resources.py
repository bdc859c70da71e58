"""What a cluster can have at most: what it has, or what its autoscaler may add."""

import logging
import os
import threading
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

import ray

from gfl_platform.config import JobConfig

if TYPE_CHECKING:
    import torch
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

DEFAULT_CPU_WORKERS = 2


class ClusterError(ValueError):
    """A cluster that cannot be had, or lacks what the job asks for."""


@dataclass(frozen=True)
class Workers:
    """What a job runs on.

    Attributes:
        count: Training processes, at most.
        least: The fewest that it starts with.
        use_gpu: Whether each takes a GPU.
        cpus: CPUs of each.
        stoppable: Whether Ray Tune may stop the training, which costs two more processes: one that
            tells Tune of epochs, one that frees what a stopped training held.
    """

    count: int
    least: int
    use_gpu: bool
    cpus: int
    stoppable: bool = False

    @property
    def elastic(self) -> bool:
        """Whether the number follows the nodes that there are."""
        return self.least < self.count


def in_cluster() -> bool:
    """Return whether this process was started by, or pointed at, a running Ray cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect(*, verbose: bool = False, dashboard: bool = False) -> None:
    """Connect to the cluster this process belongs to, or start one on this machine.

    Args:
        verbose: Whether Ray tells what it does.
        dashboard: Whether a cluster that is started has a dashboard, on loopback. Where trainings
            are stopped from outside it must: Ray Train asks it whether to free what they held.

    Raises:
        ClusterError: a cluster that does not answer.
    """
    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray").setLevel(level)
    # Epochs end with a report, which waits for the controller's next look: every 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray will stop hiding GPUs from processes that ask for none; so do we, without its warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not in_cluster():  # one machine is not taken away in part: nothing is to be watched for
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    try:
        if in_cluster():
            ray.init(**options)
        else:
            ray.init(address="local", include_dashboard=dashboard, **options)
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ClusterError(
            f"Ray cluster {os.environ.get('RAY_ADDRESS', 'local')}: {error}; check RAY_ADDRESS"
        ) from error


def allot(job: JobConfig) -> Workers:
    """Return what the job runs on.

    Raises:
        ClusterError: the cluster has fewer CPUs or GPUs, nor can its autoscaler add them; said at
            once, for Ray would wait.
    """
    present = ray.cluster_resources()
    most, origin = most_resources(present)
    asked = job.cluster
    gpus = int(present.get("GPU", 0))
    has_gpus = gpus > 0 or 0 < most.get("GPU", 0) < inf
    use_gpu = has_gpus if asked.use_gpu is None else asked.use_gpu
    number = asked.workers or (max(gpus, 1) if use_gpu else DEFAULT_CPU_WORKERS)
    least, count = number if isinstance(number, tuple) else (number, number)
    workers = Workers(count, least, use_gpu, asked.cpus_per_worker)
    needed = {"CPU": least * workers.cpus, "GPU": least if use_gpu else 0}
    for kind, amount in needed.items():
        if amount > most.get(kind, 0):
            raise ClusterError(
                f"cluster.workers: {least} workers need {amount} {kind}s, but the cluster has "
                f"{most.get(kind, 0):.0f}{origin}; lower cluster.workers or add nodes"
            )
    return workers


def node_count() -> int:
    """Return how many nodes the cluster has."""
    return sum(node["Alive"] for node in ray.nodes())


def worker_device() -> "torch.device":
    """Return the device of the training process that this is."""
    import ray.train.torch

    return ray.train.torch.get_device()


AUTOSCALER_FILE = "~/ray_bootstrap_config.yaml"
"""On the head node, where drivers run: what `ray up` gave the autoscaler."""

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""How long Ray Train lets workers wait for room."""


def most_resources(present: Mapping[str, float]) -> tuple[Mapping[str, float], str]:
    """Return the most of every resource that the cluster can have, and words on where it says so.

    Args:
        present: What it has now; where there is no autoscaler, that is all.
    """
    file = Path(AUTOSCALER_FILE).expanduser()
    if "RAY_ADDRESS" in os.environ and file.is_file():
        most = of_autoscaler(yaml.safe_load(file.read_text()))
        kinds = {*most, *present}
        return (
            {kind: max(most.get(kind, 0), present.get(kind, 0)) for kind in kinds},
            f" at most ({file}, max_workers)",
        )
    if "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", ""):
        # KubeRay's autoscaler runs beside the head; nothing there tells of its limits.
        return dict.fromkeys(("CPU", "GPU"), inf), ""
    return present, ""


@contextmanager
def start_timeout(*, elastic: bool) -> Iterator[None]:
    """Tell Ray how long workers may take to find room; what the environment says comes first.

    Args:
        elastic: Whether Ray tries with another number of workers then.
    """
    present = ray.cluster_resources()
    if START_TIMEOUT in os.environ:
        yield
        return
    if elastic:  # Ray's picture of the cluster, which is renewed every 20 s, had a node too many
        os.environ[START_TIMEOUT] = "25"
    elif most_resources(present)[0] != present:  # a cloud takes minutes to start a node
        os.environ[START_TIMEOUT] = "1800"
    try:
        yield
    finally:
        os.environ.pop(START_TIMEOUT, None)


def of_autoscaler(definition: Mapping[str, Any]) -> dict[str, float]:
    """Return the most of every resource that a cluster's definition (`ray up`) allows."""
    types = definition["available_node_types"]
    kinds = {kind for each in types.values() for kind in each.get("resources", {})}
    return {kind: _most_of(kind, definition) for kind in kinds}


def _most_of(kind: str, definition: Mapping[str, Any]) -> float:
    types, head = definition["available_node_types"], definition["head_node_type"]
    left = definition.get("max_workers", 2)
    total = types[head].get("resources", {}).get(kind, 0)
    richest_first = sorted(types.values(), key=lambda each: -each.get("resources", {}).get(kind, 0))
    for each in richest_first:
        limit = 0 if each is types[head] else left
        nodes = min(left, each.get("max_workers", limit))
        total += nodes * each.get("resources", {}).get(kind, 0)
        left -= nodes
    return float(total)


@contextmanager
def imported_meanwhile(*modules: str) -> Iterator[None]:
    """Import modules in a thread while other processes are waited for."""

    def load() -> None:
        for module in modules:
            with suppress(Exception):  # whoever needs it is told
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
