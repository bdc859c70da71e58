"""What a Ray cluster has, what its autoscaler may add, and what a job takes of it."""

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
import yaml

from gfl_platform.config import JobConfig

DEFAULT_CPU_WORKERS = 2

AUTOSCALER_FILE = "~/ray_bootstrap_config.yaml"
"""File on the head node, where drivers run: the definition of the cluster, made by `ray up`."""

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Environment variable: seconds that Ray Train waits for enough resources to start workers."""


ANSWER_SECONDS = 5.0
"""Time for a connection to the cluster's address."""


class ClusterError(ValueError):
    """A cluster that does not answer, or lacks what the job needs."""


@dataclass(frozen=True)
class Workers:
    """The processes and devices that a job runs on.

    Attributes:
        count: Number of training processes, at most.
        least: Smallest number of training processes to start with.
        use_gpu: Whether each process takes a GPU.
        cpus: CPUs of each process.
        stoppable: Whether Ray Tune may stop the training, and hence has to hear of its epochs.
    """

    count: int
    least: int
    use_gpu: bool
    cpus: int
    stoppable: bool = False

    @property
    def elastic(self) -> bool:
        """Whether the number of processes follows the number of nodes."""
        return self.least < self.count

    @property
    def needs(self) -> dict[str, int]:
        """Resources to start with: numbers of CPUs and GPUs."""
        return {"CPU": self.least * self.cpus, "GPU": self.least if self.use_gpu else 0}


def in_cluster() -> bool:
    """Return whether this process was started by, or pointed at, a running Ray cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect() -> None:
    """Connect to the cluster this process belongs to, or start one on this machine.

    Raises:
        ClusterError: the cluster does not answer.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Epochs end with a report, which waits for the controller's next look: every 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray will stop hiding GPUs from processes that ask for none; so do we, without its warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not in_cluster():
        # No node of a single machine is drained, so there is nothing to watch for.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray Train asks the dashboard whether a training still runs. It listens on loopback, on
        # port 8265 or the next free one.
        options |= {"address": "local", "include_dashboard": True}
    elif address := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", os.environ["RAY_ADDRESS"]):
        _require_listener(address[1], int(address[2]))
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ClusterError(_reason(error)) from error


def _require_listener(host: str, port: int) -> None:
    """Check that a process listens at RAY_ADDRESS; Ray itself would try for a quarter of an hour.

    Raises:
        ClusterError: no process does.
    """
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no Ray cluster answers there ({error}); set "
            "it to the address of a cluster, or unset it to start one on this machine"
        ) from error


def _reason(error: Exception) -> str:
    """Return why Ray could not be used, with the environment variable to change if one is why."""
    text = " ".join(str(error).split())
    if in_cluster():
        return f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {text}"
    for name in ("RAY_TMPDIR", "TMPDIR", "HOME"):
        if (folder := os.environ.get(name)) and folder in text:
            return (
                f"{name}={folder}: Ray cannot use that folder ({text}); set {name} to one that "
                "exists, can be written, and has a short path"
            )
    return f"Ray cannot start on this machine: {text}"


def allot(job: JobConfig) -> Workers:
    """Return what the job runs on.

    Raises:
        ClusterError: the cluster has fewer CPUs or GPUs than the job needs, and no autoscaler that
            can add them; Ray itself would wait for ever.
    """
    if job.cluster.workers == 0:
        raise ClusterError(
            "cluster.workers: 0 is for evaluations and benchmarks, which then run in their own "
            "process; a training needs at least 1"
        )
    present = ray.cluster_resources()
    most, origin = most_resources(present)
    config = job.cluster
    gpus = int(present.get("GPU", 0))
    has_gpus = gpus > 0 or 0 < most.get("GPU", 0) < inf
    use_gpu = has_gpus if config.use_gpu is None else config.use_gpu
    number = config.workers or (max(gpus, 1) if use_gpu else DEFAULT_CPU_WORKERS)
    least, count = number if isinstance(number, tuple) else (number, number)
    workers = Workers(count, least, use_gpu, config.cpus_per_worker)
    for kind, amount in workers.needs.items():
        if amount > most.get(kind, 0):
            raise ClusterError(
                f"cluster.workers: {least} workers need {amount} {kind}s, but the cluster has "
                f"{most.get(kind, 0):.0f}{origin}; lower cluster.workers or add nodes"
            )
    return workers


def shortage(workers: Workers) -> str | None:
    """Return what the workers wait for, such as "waiting for 4 GPUs, the cluster has 2", or None.

    There is something to wait for where an autoscaler has yet to add nodes.
    """
    present = ray.cluster_resources()
    for kind, amount in reversed(workers.needs.items()):  # nodes with GPUs have CPUs, too
        if amount > present.get(kind, 0):
            return f"waiting for {amount} {kind}s, the cluster has {present.get(kind, 0):.0f}"
    return None


def node_count() -> int:
    """Return how many nodes the cluster has."""
    return sum(node["Alive"] for node in ray.nodes())


def worker_device() -> torch.device:
    """Return the device of the training process that calls this."""
    return ray.train.torch.get_device()


def most_resources(present: Mapping[str, float]) -> tuple[Mapping[str, float], str]:
    """Return the most of every resource that the cluster can have, and where that is written.

    Args:
        present: What the cluster has now; without an autoscaler, that is the most.
    """
    file = Path(AUTOSCALER_FILE).expanduser()
    if in_cluster() and file.is_file():
        most = of_autoscaler(yaml.safe_load(file.read_text()))
        kinds = {*most, *present}
        return (
            {kind: max(most.get(kind, 0), present.get(kind, 0)) for kind in kinds},
            f" at most ({file}, max_workers)",
        )
    if "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", ""):
        # KubeRay's autoscaler runs beside the head; nothing there tells its limits.
        return dict.fromkeys(("CPU", "GPU"), inf), ""
    return present, ""


@contextmanager
def start_timeout(*, elastic: bool) -> Iterator[None]:
    """Set how long Ray waits for resources to start workers, unless the environment sets it.

    Args:
        elastic: Whether Ray tries another number of workers after the timeout.
    """
    if START_TIMEOUT in os.environ:
        yield
        return
    present = ray.cluster_resources()
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
    kinds = {kind for node_type in types.values() for kind in node_type.get("resources", {})}
    return {kind: _most_of(kind, definition) for kind in kinds}


def _most_of(kind: str, definition: Mapping[str, Any]) -> float:
    types, head = definition["available_node_types"], definition["head_node_type"]
    nodes_left = definition.get("max_workers", 2)
    total = types[head].get("resources", {}).get(kind, 0)
    for node_type in sorted(types.values(), key=lambda t: -t.get("resources", {}).get(kind, 0)):
        limit = 0 if node_type is types[head] else nodes_left
        nodes = min(nodes_left, node_type.get("max_workers", limit))
        total += nodes * node_type.get("resources", {}).get(kind, 0)
        nodes_left -= nodes
    return float(total)
