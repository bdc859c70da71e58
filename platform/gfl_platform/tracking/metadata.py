"""The description of an MLflow run: its configuration, the state of the code and the packages."""

import importlib.metadata
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from gfl.config.loader import ConfigError, ConfigT, dump_config, flatten, load_schema
from gfl.files import write_atomically
from gfl_platform.cluster.events import RunOpened
from gfl_platform.config import JobConfig
from gfl_platform.provenance import COMMIT, git_state
from gfl_platform.redaction import redact
from gfl_platform.storage.files import read_json
from gfl_platform.tracking.client import TrackingError

CONFIG_FILE, PACKAGES_FILE, DIFF_FILE = "config.yaml", "packages.txt", "git.diff"
"""Artifacts of a run: its configuration, the versions of packages, and uncommitted changes."""

RUN_FILE = "run.json"
"""File in a run's folder that names its MLflow run and the store that the user chose for it."""

PROTOCOL = "fps.protocol"
"""Tag of a run: the protocol of its FPS as JSON."""

IDENTITY = "identity"
"""Tag of a run: a random identifier that it has before the store has answered."""

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "hotcoco", "numpy", "safetensors")
"""Packages whose versions are logged."""


def describe(job: JobConfig, name: str, tags: Mapping[str, str] | None = None) -> RunOpened:
    """Return the event that opens a run.

    Args:
        job: Configuration, which is logged as parameters and as a file, without passwords.
        name: Name of the run.
        tags: Further tags of the run.
    """
    values = job.model_dump(mode="json")
    if job.tracking.uri:
        values["tracking"]["uri"] = redact(job.tracking.uri)
    commit, changed, diff = git_state()
    versions = [f"{package}=={importlib.metadata.version(package)}" for package in PACKAGES]
    texts = {CONFIG_FILE: yaml.safe_dump(values, sort_keys=False)}
    texts[PACKAGES_FILE] = "\n".join(versions) + "\n"
    if diff:
        texts[DIFF_FILE] = diff
    state = {COMMIT: commit, "git.changed": changed or "nothing", IDENTITY: uuid.uuid4().hex}
    params = {key: str(value) for key, value in flatten(values).items()}
    return RunOpened(name, {**(tags or {}), **state}, params, texts)


def require_same(path: Path, config: ConfigT, kind: str, may_change: Sequence[str] = ()) -> None:
    """Write the configuration of a new run to a file; of an old one, compare it with the file.

    Args:
        path: The file.
        config: The configuration of this attempt.
        kind: What the message calls the run: `run` or `sweep`.
        may_change: Beginnings of the keys that may differ.

    Raises:
        ConfigError: the configurations differ, and the message names every such key, or the
            file is damaged.
    """
    if not path.exists():
        write_atomically(path, dump_config(config))
        return
    if not path.read_bytes().strip(b"\0 \n"):
        raise ConfigError(
            f"{path} is empty, but held the configuration of this {kind}: delete it, and this "
            f"command's configuration is taken for that of the {kind}"
        )
    before = flatten(load_schema(type(config), path).model_dump(mode="json"))
    now = flatten(config.model_dump(mode="json"))
    changes = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(tuple(may_change))
    ]
    if changes:
        raise ConfigError(
            f"{path}: this {kind} was started with another configuration ({', '.join(changes)}); "
            "resume it with the same, or start another run"
        )
    write_atomically(path, dump_config(config))


def read_run_file(folder: Path) -> dict[str, str]:
    """Return the content of a run's `RUN_FILE`; empty if there is none.

    Raises:
        TrackingError: the file is damaged; the message says what to do.
    """
    path = folder / RUN_FILE
    try:
        return read_json(path)
    except ValueError as error:
        raise TrackingError(
            f'{path} is damaged ({error}); write {{"run_id": "ID"}} into it, with the ID that '
            f"MLflow shows for run '{folder.name}', or delete it to log what follows to another run"
        ) from error
