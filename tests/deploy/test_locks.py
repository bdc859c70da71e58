"""The locked requirements are whole: every package has a version, a hash, and its dependencies."""

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVER = (ROOT / "deploy" / "mlflow" / "requirements.in").read_text().split()
EXTRAS = PROJECT["optional-dependencies"]
LOCKS = {
    "requirements.lock": PROJECT["dependencies"],
    "requirements-dev.lock": [*PROJECT["dependencies"], *EXTRAS["export"], *EXTRAS["dev"][1:]],
    "deploy/mlflow/requirements.lock": SERVER,
}


def packages(lock):
    """Return {name: (version, number of hashes)} of a file of locked requirements."""
    entry = r"^([\w.-]+)==(\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}.*\n?)*)"
    entries = re.findall(entry, lock, re.M)
    return {name: (version, hashes.count("--hash")) for name, version, hashes in entries}


@pytest.fixture(scope="module")
def versions():
    torch = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "requirements-torch.txt").read_text(), re.M))
    assert torch.keys() == {"torch", "torchvision"}
    return torch


@pytest.mark.parametrize("file", LOCKS)
def test_a_lock_holds_the_projects_dependencies_with_hashes(file, versions):
    text = (ROOT / file).read_text()
    locked = packages(text)
    entries = [line for line in text.splitlines() if not line.startswith((" ", "#")) and line]
    assert len(locked) == len(entries), "an entry without a version or a hash"
    assert all(hashes > 0 for _, hashes in locked.values())
    pinned = versions | {name: version for name, (version, _) in locked.items()}
    for dependency in map(Requirement, LOCKS[file]):
        name = canonicalize_name(dependency.name)
        assert name in pinned, f"{name}: run `make lock`"
        assert dependency.specifier.contains(pinned[name]), f"{dependency}: run `make lock`"


def test_the_locks_agree_and_are_what_is_installed_here(versions):
    runtime, dev, server = (packages((ROOT / file).read_text()) for file in LOCKS)
    assert runtime.items() <= dev.items()
    for name in server.keys() & runtime.keys():
        assert server[name] == runtime[name], name
    for name in dev:
        for text in requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in dev.keys() | versions.keys(), (name, text)
