"""The pre-flight check: nodes that train together must have the same code, packages and data."""

import hashlib
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import ray
import torch.distributed as dist

import gfl
import gfl_platform
from gfl.data.split import Split
from gfl.distributed import worker_rank
from gfl_platform.storage.s3 import S3UnavailableError

CLOCK_TOLERANCE = 60.0
"""Largest difference of clocks, in seconds: far more than NTP leaves, less than S3 accepts."""


LOCK = Path(gfl.__file__).parents[1] / "requirements.lock"
"""File of the exact versions, and their hashes, of all packages; it travels with the code."""


class DifferentNodesError(ValueError):
    """Nodes that cannot train together."""


@dataclass(frozen=True)
class NodeFacts:
    """What the pre-flight check compares, as a worker sees it on its node.

    Attributes:
        node: Name and address of the node.
        code: Digest of the sources of `gfl` and `gfl_platform`.
        versions: Versions of the packages named in `requirements.lock`, and its SHA-256.
        data: Digests of the data; empty if it could not be read.
        problem: Why the data could not be read; empty if it could.
        clock: Seconds since the epoch, read at the same moment on all nodes.
    """

    node: str
    code: str
    versions: dict[str, str]
    data: tuple[str, ...]
    problem: str
    clock: float


def same_on_all_nodes(load: Callable[[], tuple[Split, Split]]) -> tuple[Split, Split]:
    """Load the data on every worker, and check that all nodes have the same code and data.

    All workers must call this together.

    Args:
        load: Function that reads the data.

    Raises:
        DifferentNodesError: the nodes differ; all workers raise the same message.
        ValueError: the data cannot be read on any node.
        S3UnavailableError: S3 does not answer this worker at the moment.
    """
    _, world = worker_rank()
    if world == 1:
        return load()
    splits, problem = None, None
    try:
        splits = load()
    except S3UnavailableError:  # nodes do not differ in that: all start again
        raise
    except ValueError as error:
        problem = error
    dist.barrier()  # so that clocks are read at the same time
    data = tuple(split.digest for split in splits or ())
    nodes = [_facts(data, str(problem or ""))] * world
    dist.all_gather_object(nodes, nodes[0])
    if difference := find_difference(nodes):
        raise DifferentNodesError(difference)
    if splits is None:
        assert problem is not None
        raise problem
    return splits


def problem_of_any_worker(problem: str) -> str:
    """Return the problem of the first worker that has one, the same on all; empty if none has.

    All workers must call this together.
    """
    _, world = worker_rank()
    problems = [problem] * world
    if world > 1:
        dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def find_difference(nodes: Sequence[NodeFacts]) -> str | None:
    """Return in one line how one node differs from most others; None if all are the same."""
    healthy = [node for node in nodes if not node.problem]
    for node in nodes if healthy else ():
        if node.problem:
            return f"node {node.node}: {node.problem}; {healthy[0].node} has what is missing there"
    for name in {name: None for node in nodes for name in node.versions}:
        versions = [node.versions.get(name, "missing") for node in nodes]
        if odd := _odd_one(versions):
            rare, usual = odd
            return (
                f"node {nodes[rare].node}: {name} {versions[rare]}, but {versions[usual]} on "
                f"{nodes[usual].node}; install requirements.lock on every node"
            )
    if odd := _odd_one([node.code for node in nodes]):
        here, other = (nodes[index] for index in odd)
        return (
            f"node {here.node}: other code of gfl and gfl_platform than {other.node}; let the job "
            "bring it (--runtime-env), or install the same on every node"
        )
    if odd := _odd_one([node.data for node in nodes]):
        here, other = (nodes[index] for index in odd)
        return f"node {here.node}: other images or annotations than {other.node}; copy them again"
    slow = min(nodes, key=lambda node: node.clock)
    fast = max(nodes, key=lambda node: node.clock)
    if fast.clock - slow.clock > CLOCK_TOLERANCE:
        return (
            f"node {fast.node}: its clock is {fast.clock - slow.clock:.0f} s ahead of {slow.node}; "
            "set both by NTP"
        )
    return None


def _odd_one(values: Sequence[object]) -> tuple[int, int] | None:
    """Return the index of a value that is not the most common one, and of one that is."""
    (usual, _), *others = Counter(values).most_common()
    return (values.index(others[-1][0]), values.index(usual)) if others else None


def _facts(data: tuple[str, ...], problem: str) -> NodeFacts:
    where = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    code = code_digest(gfl, gfl_platform)
    return NodeFacts(where, code, installed_versions(), data, problem, time.time())


def installed_versions(lock: Path = LOCK) -> dict[str, str]:
    """Return the version of each locked package that is installed here, and the lock's SHA-256.

    Without the lock, as where the packages are installed as wheels, only torch, torchvision and Ray
    are compared.
    """
    names = ["torch", "torchvision", "ray"]
    versions = {}
    if lock.exists():
        text = lock.read_text()
        versions["requirements.lock"] = hashlib.sha256(text.encode()).hexdigest()[:12]
        names += re.findall(r"^([\w.-]+)==", text, re.MULTILINE)
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def code_digest(*packages: ModuleType) -> str:
    """Return the SHA-256 of the sources of `packages` that run here."""
    digest = hashlib.sha256()
    for package in packages:
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
