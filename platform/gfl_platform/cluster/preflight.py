"""What the nodes of a training must have in common: code, packages, data, the time."""

import hashlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch.distributed as dist

from gfl.data.split import Split
from gfl.distributed import worker_rank
from gfl_platform.storage.s3 import S3UnavailableError

CLOCK_TOLERANCE = 60.0
"""Seconds; far more than NTP leaves, less than S3 forgives."""


class DifferentNodesError(ValueError):
    """Nodes that cannot train together."""


@dataclass(frozen=True)
class NodeFacts:
    """What a worker says of its node.

    Attributes:
        node: Name and address.
        code: Digest of our sources.
        versions: Of packages that results depend on.
        data: Digests of the data; empty if they could not be read.
        problem: Why not.
        clock: Seconds since the epoch, at the same moment on all.
    """

    node: str
    code: str
    versions: dict[str, str]
    data: tuple[str, ...]
    problem: str
    clock: float


def same_on_all_nodes(load: Callable[[], tuple[Split, Split]]) -> tuple[Split, Split]:
    """Return what `load` gives, once all workers have it and have everything else in common.

    To be called on every worker.

    Raises:
        DifferentNodesError: they differ; the same words on all.
        ValueError: none of them could load.
        S3UnavailableError: this one could not, at the moment.
    """
    _, world = worker_rank()
    if world == 1:
        return load()
    splits, problem = None, None
    try:
        splits = load()
    except S3UnavailableError:  # no difference of nodes: all start again
        raise
    except ValueError as error:
        problem = error
    dist.barrier()  # so that clocks are read at the same time
    data = tuple(split.digest for split in splits or ())
    found = [_facts(data, str(problem or ""))] * world
    dist.all_gather_object(found, found[0])
    if difference := find_difference(found):
        raise DifferentNodesError(difference)
    if splits is None:
        assert problem is not None
        raise problem
    return splits


def problem_of_any_worker(problem: str) -> str:
    """Return the problem of the first worker that has one, on all of them; empty if none has.

    To be called on every worker.
    """
    _, world = worker_rank()
    found = [problem] * world
    if world > 1:
        dist.all_gather_object(found, problem)
    return next(filter(None, found), "")


def find_difference(found: Sequence[NodeFacts]) -> str | None:
    """Return what one of the nodes has otherwise than most, in one line; None if nothing."""
    well = [facts for facts in found if not facts.problem]
    for facts in found if well else ():
        if facts.problem:
            return f"node {facts.node}: {facts.problem}; {well[0].node} has what is missing there"
    first = found[0]
    for name in first.versions:
        if odd := _odd_one([facts.versions[name] for facts in found]):
            here, other = (found[index] for index in odd)
            return (
                f"node {here.node}: {name} {here.versions[name]}, but {other.versions[name]} on "
                f"{other.node}; install the packages of constraints.txt on every node"
            )
    if odd := _odd_one([facts.code for facts in found]):
        here, other = (found[index] for index in odd)
        return (
            f"node {here.node}: other code of gfl and gfl_platform than {other.node}; let the job "
            "bring it (--runtime-env), or install the same on every node"
        )
    if odd := _odd_one([facts.data for facts in found]):
        here, other = (found[index] for index in odd)
        return f"node {here.node}: other images or annotations than {other.node}; copy them again"
    slow, fast = (pick(found, key=lambda facts: facts.clock) for pick in (min, max))
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
    import ray

    where = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    versions = {name: _version(name) for name in ("torch", "torchvision", "ray")}
    return NodeFacts(where, code_digest(), versions, data, problem, time.time())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def code_digest() -> str:
    """Return what tells apart the sources of `gfl` and `gfl_platform` that run here."""
    import gfl
    import gfl_platform

    digest = hashlib.sha256()
    for package in (gfl, gfl_platform):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
