"""What an MLflow run says of itself: configuration, code and packages."""

import importlib.metadata
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from gfl.config.loader import ConfigError, ConfigT, dump_config, flatten, load_schema
from gfl_platform.cluster.events import RunOpened
from gfl_platform.config import JobConfig
from gfl_platform.provenance import COMMIT, git_state
from gfl_platform.storage.files import write_atomically
from gfl_platform.tracking.client import without_password

CONFIG_FILE, PACKAGES_FILE, DIFF_FILE = "config.yaml", "packages.txt", "git.diff"
"""Among the artifacts of a run: how it was configured, and what it ran with."""

PROTOCOL = "fps.protocol"
"""Tag: the protocol of FPS as JSON."""

IDENTITY = "identity"
"""Tag: given to a run before its store could be reached."""

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "hotcoco", "numpy", "safetensors")


def describe(job: JobConfig, name: str, tags: Mapping[str, str] | None = None) -> RunOpened:
    """Return the event that opens a run: its configuration, the code's state, the packages."""
    values = job.model_dump(mode="json")
    if job.tracking.uri:
        values["tracking"]["uri"] = without_password(job.tracking.uri)
    commit, changed, diff = git_state()
    versions = [f"{package}=={importlib.metadata.version(package)}" for package in PACKAGES]
    texts = {CONFIG_FILE: yaml.safe_dump(values, sort_keys=False)}
    texts[PACKAGES_FILE] = "\n".join(versions) + "\n"
    if diff:
        texts[DIFF_FILE] = diff
    state = {COMMIT: commit, "git.changed": changed or "nothing", IDENTITY: uuid.uuid4().hex}
    params = {key: str(value) for key, value in flatten(values).items()}
    return RunOpened(name, {**(tags or {}), **state}, params, texts)


def require_same(path: Path, config: ConfigT, what: str, free: Sequence[str] = ()) -> None:
    """Note the configuration of a new run; refuse to go on with another than the one noted.

    Args:
        path: Where it is noted.
        config: The present one.
        what: Is called so in the message.
        free: Beginnings of keys that may differ.

    Raises:
        ConfigError: names every key that differs.
    """
    if not path.exists():
        write_atomically(path, dump_config(config))
        return
    before = flatten(load_schema(type(config), path).model_dump(mode="json"))
    now = flatten(config.model_dump(mode="json"))
    changes = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(tuple(free))
    ]
    if changes:
        raise ConfigError(
            f"{path}: this {what} was started with another configuration ({', '.join(changes)}); "
            "resume it with the same, or start another run"
        )
    write_atomically(path, dump_config(config))
