"""The model card: what a model was trained with, and how to train it again."""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfl.checkpoint.files import WEIGHTS
from gfl.config.loader import config_hash
from gfl.config.schema import Config
from gfl.evaluation.coco_eval import format_statistic
from gfl_platform.cluster.resources import Workers
from gfl_platform.config import JobConfig, load_job
from gfl_platform.provenance import COMMIT, git_state
from gfl_platform.registry import models
from gfl_platform.registry.history import read_history
from gfl_platform.registry.models import RegistryError, Version
from gfl_platform.tracking.client import Store
from gfl_platform.tracking.metadata import CONFIG_FILE, DIFF_FILE, PACKAGES_FILE, PROTOCOL

DIGEST_TAGS = ("data.train.digest", "data.val.digest", "weights.pretrained", "weights.teacher")

FIRST = (
    "AP", "fps", "protocol", "data", "git.commit", "git.changed", "config_hash", "workers",
    "restarts", "weights.pretrained", "weights.teacher",
)  # fmt: skip
"""Keys that the card shows first, where they are known."""


@dataclass(frozen=True)
class Recipe:
    """How to do a training again.

    Attributes:
        job: Configuration of the training.
        digests: Digests of the annotations and weights that it read, by the tags of its run.
        differences: Where the code or the packages differ from those of the training.
    """

    job: JobConfig
    digests: dict[str, str]
    differences: list[str]


def describe(store: Store, version: Version) -> dict[str, str]:
    """Return the card of a version: origin, measurements and decisions, by key."""
    client = store.client
    facts: dict[str, str] = {}
    packages = []
    if version.run_id:
        run = client.get_run(version.run_id)
        tags = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")}
        metrics = {key: _shown(key, value) for key, value in sorted(run.data.metrics.items())}
        facts = {"restarts": "0"} | metrics | tags
        packages = _artifact(store, version.run_id, PACKAGES_FILE).split()
        if tags.get("git.changed", "nothing") != "nothing":
            facts["git.diff"] = f"runs:/{version.run_id}/git.diff"
    facts |= version.tags
    first = {key: facts.pop(key) for key in FIRST if key in facts}
    about = {"aliases": ", ".join(version.aliases), "run": version.run_id, **first}
    about["config"] = f"runs:/{version.run_id}/{CONFIG_FILE}"
    about["packages"] = ", ".join(packages)
    decided = [
        f"{decision.number}: {decision.action}"
        for decision in read_history(client, version.name).decisions
        if decision.version == version.version
    ]
    return about | {"decisions": ", ".join(decided)} | facts


def _shown(metric: str, value: float) -> str:
    is_statistic = metric.startswith(("AP", "AR"))
    return format_statistic(value, ".6g") if is_statistic else f"{value:.6g}"


def lineage(config: Config, workers: Workers, sources: dict[str, Path | None]) -> dict[str, str]:
    """Return the tags of a run for what its model depends on besides data and code.

    Args:
        config: Configuration of the training.
        workers: Number and kind of its workers.
        sources: Local files of the weights it starts from (`weights`) and of its `teacher`.
    """
    device = "GPU" if workers.use_gpu else "CPU"
    number = f"{workers.least} to {workers.count}" if workers.elastic else workers.count
    tags = {"config_hash": config_hash(config), "workers": f"{number} ({device})"}
    teacher = config.loss.distillation.teacher if config.loss.distillation else None
    named = {"pretrained": config.model.pretrained, "teacher": teacher}
    files = {"pretrained": sources["weights"], "teacher": sources["teacher"]}
    for what, location in named.items():
        if location and (file := files[what]):
            file = file / WEIGHTS if file.is_dir() else file
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            tags[f"weights.{what}"] = f"{location} (sha256 {digest[:12]})"
    return tags


def recipe(where: JobConfig, store: Store, model: str, overrides: Sequence[str]) -> Recipe:
    """Return how a model was trained.

    Args:
        where: The sections `storage` and `tracking` of the new training.
        store: The registry.
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/RUN_ID`.
        overrides: Changes to the configuration, "key=value" each.

    Raises:
        ValueError: there is no such model, or its run holds no configuration.
    """
    run_id = models.run_of(store, model)
    if not run_id:
        raise RegistryError(f"{model}: no run is known that trained it")
    text = _artifact(store, run_id, CONFIG_FILE)
    if not text:
        raise RegistryError(f"{model}: run {run_id} holds no {CONFIG_FILE}; is it one of ours?")
    with tempfile.TemporaryDirectory(prefix="gfl-recipe-") as scratch:
        path = Path(scratch) / CONFIG_FILE
        path.write_text(text)
        anew = ("run={name: null}", "registry={name: null, alias: null}", "sweep=null")
        job = load_job(path, [*anew, *overrides])
    job = job.model_copy(update={"storage": where.storage, "tracking": where.tracking})
    tags = store.client.get_run(run_id).data.tags
    commit, changed, diff = git_state()
    state = {COMMIT: commit, "git.changed": changed or "nothing"}
    differing = [f"{k} {tags.get(k)} -> {v}" for k, v in state.items() if tags.get(k) != v]
    if _artifact(store, run_id, DIFF_FILE).splitlines() != diff.splitlines():
        differing.append(f"{DIFF_FILE}: what is not committed is not what runs:/{run_id} had")
    for line in _artifact(store, run_id, PACKAGES_FILE).split():
        package, _, version = line.partition("==")
        if (present := _installed(package)) != version:
            differing.append(f"{package} {version} -> {present}")
    return Recipe(job, {key: tags[key] for key in DIGEST_TAGS if key in tags}, differing)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def protocol_of(store: Store, model: str) -> dict[str, Any]:
    """Return the protocol of a model's FPS in its training, empty if it is not known."""
    run_id = models.run_of(store, model)
    tags = store.client.get_run(run_id).data.tags if run_id else {}
    protocol: dict[str, Any] = json.loads(tags.get(PROTOCOL, "{}"))
    return protocol


def _artifact(store: Store, run_id: str, name: str) -> str:
    """Return the text of a run's artifact, empty if there is no such artifact."""
    store.require_answer()
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="gfl-card-") as scratch:
        try:
            return store.artifact(run_id, name, Path(scratch)).read_text()
        except (MlflowException, OSError):
            return ""
