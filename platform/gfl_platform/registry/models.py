"""MLflow's model registry: point aliases at versions, look up, load."""

import difflib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gfl
import gfl_platform
from gfl_platform.config import JobConfig, require_alias
from gfl_platform.registry.history import DECISION, GATED_ALIASES
from gfl_platform.storage.storage import Storage, is_there
from gfl_platform.tracking.client import connect, on_all_pages, reason_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from gfl.inference.predictor import Model
import shutil

CHECKPOINT = "checkpoint"
"""Name of the checkpoint among a model's artifacts."""

SCHEMES = "a checkpoint folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID"

RUN_ID = re.compile("[0-9a-f]{32}")
"""As MLflow makes them; one alone stands for `runs:/RUN_ID`."""


class RegistryError(ValueError):
    """A model, version, alias or run that does not exist."""


@dataclass(frozen=True)
class Version:
    """A registered version and its tags, without the decisions on it (see `history`)."""

    name: str
    version: int
    aliases: list[str]
    run_id: str
    created_ms: int
    tags: dict[str, str]


def set_alias(job: JobConfig, name: str, version: int, alias: str) -> int | None:
    """Point `alias` at a version that can be loaded; return the version it pointed at before.

    Raises:
        ValueError: an alias that MLflow does not take, or that only the gate moves; a model or
            version that does not exist or whose checkpoint does not load.
    """
    require_alias(alias)
    if alias in GATED_ALIASES:
        raise RegistryError(f"alias '{alias}': only `jobs.registry promote` and `rollback` move it")
    client = connect(job)
    wanted = _version(client, name, version)
    load(f"models:/{name}/{version}", job, "cpu")
    before = next((v.version for v in _versions(client, name) if alias in v.aliases), None)
    client.set_registered_model_alias(name, alias, str(wanted.version))
    return before


def list_versions(job: JobConfig, name: str | None = None) -> list[Version]:
    """Return the versions of the model `name`, or of all models, newest first.

    Raises:
        RegistryError: a model that does not exist.
    """
    client = connect(job)
    names = [name] if name else _names(client)
    return [version for each in names for version in _versions(client, each)]


def find(job: JobConfig, name: str, reference: str) -> Version:
    """Return the version of the model `name` with the number or alias `reference`.

    Raises:
        RegistryError: there is none; suggests one.
    """
    client = connect(job)
    if reference.isdigit():
        return _version(client, name, int(reference))
    versions = _versions(client, name)
    for version in versions:
        if reference in version.aliases:
            return version
    aliases = sorted(alias for version in versions for alias in version.aliases)
    raise RegistryError(f"{name}@{reference}: no such alias; {_suggest(reference, aliases)}")


def load(model: str, job: JobConfig | None = None, device: str | None = None) -> "Model":
    """Return the model behind `model`, ready to predict.

    Args:
        model: A checkpoint folder, `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/RUN_ID`.
        job: Says which registry; by default MLFLOW_TRACKING_URI does, else it is in `outputs`.
        device: Where it predicts, by default the first GPU if there is one.

    Raises:
        ValueError: no such model, or a damaged one.
    """
    with tempfile.TemporaryDirectory(prefix="gfl-model-") as scratch:
        return gfl.load(fetch_checkpoint(job or JobConfig(), model, Path(scratch)), device=device)


def fetch_checkpoint(job: JobConfig, model: str, scratch: Path) -> Path:
    """Return a local folder with the checkpoint of `model` (see `load`), maybe below `scratch`."""
    model = _spelt_out(model)
    if model.startswith("models:/"):
        return _fetch_registered(job, model.removeprefix("models:/").strip("/"), scratch)
    if model.startswith("runs:/"):
        return _checkpoint_of_run(job, model.removeprefix("runs:/").strip("/"))
    if "://" in model or model.split("/")[0].endswith(":"):
        raise RegistryError(f"{model}: expected {SCHEMES}")
    folder = Path(model)
    if not folder.is_dir():
        raise RegistryError(f"{model}: no such folder; expected {SCHEMES}")
    return folder


def run_of(job: JobConfig, model: str) -> str | None:
    """Return the run that trained `models:/...` or `runs:/...`; None of anything else."""
    model = _spelt_out(model)
    if model.startswith("models:/"):
        return find(job, *_split(model.removeprefix("models:/").strip("/"))).run_id
    return model.removeprefix("runs:/").strip("/") if model.startswith("runs:/") else None


def resolve(job: JobConfig, model: str) -> str:
    """Return `models:/NAME/VERSION` of a registered `model`; any other as it is."""
    if not model.startswith("models:/"):
        return model
    version = find(job, *_split(model.removeprefix("models:/").strip("/")))
    return f"models:/{version.name}/{version.version}"


def _spelt_out(model: str) -> str:
    return f"runs:/{model}" if RUN_ID.fullmatch(model) and not Path(model).exists() else model


def _split(reference: str) -> tuple[str, str]:
    """Return the name, and the alias or version, of NAME@ALIAS or NAME/VERSION."""
    name, separator, which = reference.replace("@", "/", 1).partition("/")
    if not separator or not which:
        raise RegistryError(
            f"models:/{reference}: expected models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return name, which


def _fetch_registered(job: JobConfig, reference: str, scratch: Path) -> Path:
    version = find(job, *_split(reference))
    name = version.name
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=f"models:/{name}/{version.version}/artifacts/{CHECKPOINT}",
            dst_path=str(scratch),
        )
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"{name} version {version.version}: its artifacts cannot be read "
            f"({reason_of(error)}); register it again"
        ) from error
    return Path(folder)


def _checkpoint_of_run(job: JobConfig, run_id: str) -> Path:
    """Return the run's checkpoint with the best AP."""
    client = connect(job)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise RegistryError(f"runs:/{run_id}: no such run in the tracking store") from error
    within, of_run = [run.info.experiment_id], f"source_run_id = '{run_id}'"
    models = on_all_pages(lambda page: client.search_logged_models(within, of_run, page_token=page))
    found = [
        (metric.value, model.tags["uri"])
        for model in models
        for metric in model.metrics or []
        if metric.key == "AP" and is_there(model.tags.get("uri", ""))
    ]
    if not found:
        raise RegistryError(f"runs:/{run_id}: no checkpoint of this run is there any more")
    return Storage(job.storage).cache.local(max(found)[1])


def _names(client: "MlflowClient") -> list[str]:
    """Return the names of all models."""
    found = on_all_pages(lambda page: client.search_registered_models(page_token=page))
    return sorted(model.name for model in found)


def _versions(client: "MlflowClient", name: str) -> list[Version]:
    """Return the versions of a model, newest first."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        raise RegistryError(f"{name}: no such model; {_suggest(name, _names(client))}") from error
    found = client.search_model_versions(f"name = '{name}'")
    versions = [_as_version(version, model.aliases) for version in found]
    return sorted(versions, key=lambda version: -version.version)


def _version(client: "MlflowClient", name: str, number: int) -> Version:
    versions = _versions(client, name)
    for version in versions:
        if version.version == number:
            return version
    known = [str(version.version) for version in versions]
    raise RegistryError(f"{name} version {number}: no such version; {_suggest(str(number), known)}")


def _as_version(found: Any, aliases: Mapping[str, str]) -> Version:
    number = int(found.version)
    return Version(
        name=found.name,
        version=number,
        aliases=sorted(alias for alias, target in aliases.items() if int(target) == number),
        run_id=found.run_id or "",
        created_ms=found.creation_timestamp,
        tags={key: text for key, text in found.tags.items() if not key.startswith(DECISION)},
    )


def _suggest(wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"there are: {', '.join(known)}" if known else "there is none yet"


def register(
    job: JobConfig, name: str, checkpoint: Path, run_id: str, facts: Mapping[str, float | str]
) -> int:
    """Register a checkpoint as a new version of the model `name`, and return the version.

    The model carries its weights without any pickle, and the code that reads them.

    Args:
        job: Says which registry.
        name: Of the model, made if it is new.
        checkpoint: Folder.
        run_id: The run that trained it.
        facts: To keep with the version: AP, fps, `protocol` (its hash) and `data` (a digest).
    """
    client = connect(job)
    import mlflow

    from gfl.checkpoint.files import TRAINING

    package = Path(gfl_platform.__file__).parent
    status = client.get_run(run_id).info.status
    with tempfile.TemporaryDirectory(prefix="gfl-model-") as scratch:
        model = Path(scratch) / CHECKPOINT
        model.mkdir()
        for file in checkpoint.iterdir():
            if file.name != TRAINING and file.is_file():
                shutil.copyfile(file, model / file.name)
        with mlflow.start_run(run_id=run_id):
            logged = mlflow.pyfunc.log_model(
                name=name,
                python_model=str(package / "registry" / "pyfunc.py"),
                artifacts={CHECKPOINT: str(model)},
                code_paths=[str(package), str(Path(gfl.__file__).parent)],
                pip_requirements=_requirements(),
                registered_model_name=name,
                metadata=dict(facts),
            )
        client.update_run(run_id, status=status)  # `start_run` ends the run, whoever opened it
    version = int(logged.registered_model_version)
    tag(job, name, version, facts)
    return version


def tag(job: JobConfig, name: str, version: int, facts: Mapping[str, float | str]) -> None:
    """Keep `facts` (see `register`) with a version."""
    client = connect(job)
    for key, value in facts.items():
        shown = value if isinstance(value, str) else f"{value:.6g}"
        client.set_model_version_tag(name, str(version), key, shown)


def register_once(
    job: JobConfig, name: str, checkpoint: Path, run_id: str, facts: dict[str, float | str]
) -> int:
    """Return the version of `name` that a run has, as `register` makes it where it has none."""
    of_this_run = f"name = '{name}' and run_id = '{run_id}'"
    known = connect(job).search_model_versions(of_this_run)
    if not known:
        return register(job, name, checkpoint, run_id, facts)
    latest = max(known, key=lambda version: int(version.version))
    if facts.keys() - latest.tags.keys():  # an interruption came before them
        tag(job, name, int(latest.version), facts)
    return int(latest.version)


def figures_of_version(ap: float, fps: float, protocol: dict[str, Any]) -> dict[str, Any]:
    """Return what a registered version is listed with."""
    from gfl.evaluation.protocol import data_digest, protocol_hash

    data = data_digest(protocol)[:12]
    return {"AP": ap, "fps": fps, "protocol": protocol_hash(protocol), "data": data}


def _requirements() -> list[str]:
    """Return what a model needs to be loaded, at the versions it was trained with."""
    from importlib.metadata import version

    packages = ("torch", "torchvision", "pydantic", "pyyaml", "safetensors", "pillow", "mlflow")
    return [f"{package}=={version(package)}" for package in packages]
