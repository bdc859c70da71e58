"""What a cluster can have at most: what it has, or what its autoscaler may add."""

import importlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any

import yaml

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
    import ray

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
