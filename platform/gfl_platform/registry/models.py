"""MLflow's model registry: register a checkpoint, look up versions, set aliases, load a model."""

import difflib
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gfl
import gfl_platform
from gfl.checkpoint.files import TRAINING, model_digest
from gfl.evaluation.protocol import data_digest, protocol_hash
from gfl_platform.config import StorageConfig, TrackingConfig, require_alias
from gfl_platform.registry.artifacts import CHECKPOINT
from gfl_platform.registry.history import DECISION, GATED_ALIASES, read_history
from gfl_platform.storage.storage import Storage, is_there
from gfl_platform.tracking.client import Store, on_all_pages, reason_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from gfl.inference.predictor import Model

SCHEMES = "a checkpoint folder, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID"

RUN_ID = re.compile("[0-9a-f]{32}")
"""Form of MLflow's run ids; an id alone means `runs:/RUN_ID`."""


class RegistryError(ValueError):
    """A model, version, alias or run that does not exist or cannot be used."""


@dataclass(frozen=True)
class Version:
    """A registered version of a model.

    Attributes:
        name: Name of the model.
        version: Number of the version.
        aliases: The aliases that point at it.
        run_id: The run that trained it, empty if it is not known.
        created_ms: Time of its registration, in milliseconds since 1970.
        tags: Its tags, without the decisions about it (`gfl_platform.registry.history`).
    """

    name: str
    version: int
    aliases: list[str]
    run_id: str
    created_ms: int
    tags: dict[str, str]


def set_alias(store: Store, name: str, version: int, alias: str) -> int | None:
    """Point `alias` at a version that can be loaded; return the version it pointed at before.

    Raises:
        ValueError: MLflow does not take the alias, or only the gate moves it; the version does not
            exist, or its checkpoint cannot be loaded.
    """
    require_alias(alias)
    if alias in GATED_ALIASES:
        raise RegistryError(f"alias '{alias}': only `jobs.registry promote` and `rollback` move it")
    client = store.client
    _version(client, name, version)  # raises if there is no such version
    load(f"models:/{name}/{version}", store, "cpu")
    before = next((v.version for v in _versions(client, name) if alias in v.aliases), None)
    client.set_registered_model_alias(name, alias, str(version))
    return before


def list_versions(store: Store, name: str | None = None) -> list[Version]:
    """Return the versions of the model `name`, or of all models, newest first.

    Raises:
        RegistryError: the model does not exist.
    """
    client = store.client
    names = [name] if name else _names(client)
    return [version for model in names for version in _versions(client, model)]


def find(store: Store, name: str, reference: str) -> Version:
    """Return the version of the model `name` with the number or alias `reference`.

    Raises:
        RegistryError: there is no such model or version; the message suggests one.
    """
    client = store.client
    if reference.isdigit():
        return _version(client, name, int(reference))
    versions = _versions(client, name)
    for version in versions:
        if reference in version.aliases:
            return version
    aliases = sorted(alias for version in versions for alias in version.aliases)
    raise RegistryError(f"{name}@{reference}: no such alias; {_suggest(reference, aliases)}")


def load(model: str, store: Store | None = None, device: str | None = None) -> "Model":
    """Return the model behind `model`, ready to predict.

    Args:
        model: A checkpoint folder, `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/RUN_ID`.
        store: The registry, by default that of MLFLOW_TRACKING_URI, or without that variable the
            one in `outputs`.
        device: Device of the model, by default the first GPU if there is one.

    Raises:
        ValueError: there is no such model, or it is damaged.
    """
    store = store or Store(TrackingConfig(), Storage(StorageConfig()))
    with tempfile.TemporaryDirectory(prefix="gfl-model-") as scratch:
        checkpoint = fetch_checkpoint(store, model, Path(scratch))
        return gfl.load(checkpoint, device=device)


def fetch_checkpoint(store: Store, model: str, scratch: Path) -> Path:
    """Return a local folder with the checkpoint of a model.

    Args:
        store: The registry.
        model: A checkpoint folder or any other form that `load` takes.
        scratch: Folder for the checkpoint if it has to be fetched.

    Raises:
        ValueError: there is no such model, or its files cannot be read.
    """
    model = _complete(model)
    if model.startswith("models:/"):
        return _fetch_registered(store, model.removeprefix("models:/").strip("/"), scratch)
    if model.startswith("runs:/"):
        return _checkpoint_of_run(store, model.removeprefix("runs:/").strip("/"))
    if "://" in model or model.split("/")[0].endswith(":"):
        raise RegistryError(f"{model}: expected {SCHEMES}")
    folder = Path(model)
    if not folder.is_dir():
        raise RegistryError(f"{model}: no such folder; expected {SCHEMES}")
    return folder


def run_of(store: Store, model: str) -> str | None:
    """Return the run that trained `models:/...` or `runs:/...`, None for a checkpoint folder."""
    model = _complete(model)
    if version := version_of(store, model):
        return version.run_id
    return model.removeprefix("runs:/").strip("/") if model.startswith("runs:/") else None


def version_of(store: Store, model: str) -> Version | None:
    """Return the version that `models:/...` means, None for any other form."""
    if not model.startswith("models:/"):
        return None
    return find(store, *_split(model.removeprefix("models:/").strip("/")))


def resolve(store: Store, model: str) -> str:
    """Return `models:/NAME/VERSION` for a registered model, any other form unchanged."""
    version = version_of(store, model)
    return f"models:/{version.name}/{version.version}" if version else model


def _complete(model: str) -> str:
    """Return `runs:/RUN_ID` for the id of a run, any other form unchanged."""
    return f"runs:/{model}" if RUN_ID.fullmatch(model) and not Path(model).exists() else model


def _split(reference: str) -> tuple[str, str]:
    """Return the name, and the alias or version, of NAME@ALIAS or NAME/VERSION."""
    name, separator, which = reference.replace("@", "/", 1).partition("/")
    if not separator or not which:
        raise RegistryError(
            f"models:/{reference}: expected models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return name, which


def _fetch_registered(store: Store, reference: str, scratch: Path) -> Path:
    """Return a folder below `scratch` with the checkpoint of NAME@ALIAS or NAME/VERSION.

    Raises:
        RegistryError: its files cannot be read, or are not those that the gate has measured.
    """
    version = find(store, *_split(reference))
    folder = fetch_version(store, version, scratch, f"artifacts/{CHECKPOINT}")
    for decision in reversed(read_history(store.client, version.name).decisions):
        if decision.action == "promoted" and decision.version == version.version:
            measured = decision.figures.get("candidate", {}).get("checkpoint")
            if measured and model_digest(folder) != measured:
                raise RegistryError(
                    f"{version.name} version {version.version}: its checkpoint is not the one that "
                    f"was measured for its promotion by {decision.user} (decision "
                    f"{decision.number}); somebody has changed its files: promote another version"
                )
            break
    return folder


def fetch_version(store: Store, version: Version, scratch: Path, part: str = "") -> Path:
    """Return a folder below `scratch` with the files of a version, or with a `part` of them.

    Raises:
        RegistryError: the files cannot be read.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = f"models:/{version.name}/{version.version}/{part}".rstrip("/")
    location = store.client.get_model_version_download_uri(version.name, str(version.version))
    if folder := store.storage.moved(location):
        uri = str(folder / part)
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(scratch)))
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"{version.name} version {version.version}: its artifacts cannot be read "
            f"({reason_of(error)}); they were kept at {location}: bring them back, or set "
            "storage.root to the folder with which they were moved"
        ) from error


def _checkpoint_of_run(store: Store, run_id: str) -> Path:
    """Return the checkpoint of a run with the best AP, among those that still exist."""
    client = store.client
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise RegistryError(f"runs:/{run_id}: no such run in the tracking store") from error
    experiments, of_run = [run.info.experiment_id], f"source_run_id = '{run_id}'"
    models = on_all_pages(
        lambda page: client.search_logged_models(experiments, of_run, page_token=page)
    )
    kept = [
        (metric.value, model.tags["uri"])
        for model in models
        for metric in model.metrics or []
        if metric.key == "AP" and "uri" in model.tags
    ]
    places = [(ap, str(store.storage.moved(uri) or uri)) for ap, uri in kept]
    checkpoints = [(ap, uri) for ap, uri in places if is_there(uri)]
    if not checkpoints:
        where = f"; the best was kept at {max(kept)[1]}" if kept else ""
        raise RegistryError(
            f"runs:/{run_id}: no checkpoint of this run is there{where}; if the folder was moved, "
            "set storage.root to where it is"
        )
    return store.storage.cache.local(max(checkpoints)[1])


def _names(client: "MlflowClient") -> list[str]:
    """Return the names of all models, without those in which an older release kept decisions."""
    models = on_all_pages(lambda page: client.search_registered_models(page_token=page))
    return sorted(model.name for model in models if "gfl.decisions_of" not in model.tags)


def _versions(client: "MlflowClient", name: str) -> list[Version]:
    """Return the versions of a model, newest first."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        raise RegistryError(f"{name}: no such model; {_suggest(name, _names(client))}") from error
    entries = client.search_model_versions(f"name = '{name}'")
    versions = [_as_version(entry, model.aliases) for entry in entries]
    return sorted(versions, key=lambda version: -version.version)


def _version(client: "MlflowClient", name: str, number: int) -> Version:
    """Return the version `number` of the model `name`; if there is none, raise RegistryError."""
    versions = {version.version: version for version in _versions(client, name)}
    if number in versions:
        return versions[number]
    suggestion = _suggest(str(number), [str(known) for known in versions])
    raise RegistryError(f"{name} version {number}: no such version; {suggestion}")


def _as_version(entry: Any, aliases: Mapping[str, str]) -> Version:
    """Return MLflow's entry for a version as ours; `aliases` are those of the whole model."""
    number = int(entry.version)
    return Version(
        name=entry.name,
        version=number,
        aliases=sorted(alias for alias, target in aliases.items() if int(target) == number),
        run_id=entry.run_id or "",
        created_ms=entry.creation_timestamp,
        tags={key: text for key, text in entry.tags.items() if not key.startswith(DECISION)},
    )


def _suggest(text: str, known: list[str]) -> str:
    """Return advice for a name that does not exist: a similar one, or all that exist."""
    near = difflib.get_close_matches(text, known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"there are: {', '.join(known)}" if known else "there is none yet"


def register(
    store: Store, name: str, checkpoint: Path, run_id: str, facts: Mapping[str, float | str]
) -> int:
    """Register a checkpoint as a new version of the model `name`, and return the version.

    The registered model holds its weights without a pickle, and the code that reads them.

    Args:
        store: The registry.
        name: Name of the model, which is created if it does not exist.
        checkpoint: Folder of the checkpoint.
        run_id: The run that trained it.
        facts: Tags of the version: AP, fps, `protocol` (its hash) and `data` (a digest).
    """
    client = store.client
    import mlflow

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
        client.update_run(run_id, status=status)  # `start_run` has ended the run
    version = int(logged.registered_model_version)
    source = client.get_model_version(name, str(version)).source
    for double in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        # An answer was lost, so MLflow's client has asked again.
        if double.source == source and int(double.version) != version:
            client.delete_model_version(name, double.version)
    tag(store, name, version, facts)
    return version


def tag(store: Store, name: str, version: int, facts: Mapping[str, float | str]) -> None:
    """Set the tags `facts` (see `register`) of a version."""
    client = store.client
    for key, value in facts.items():
        text = value if isinstance(value, str) else f"{value:.6g}"
        client.set_model_version_tag(name, str(version), key, text)


def register_once(
    store: Store, name: str, checkpoint: Path, run_id: str, facts: dict[str, float | str]
) -> int:
    """Return the latest version of `name` that a run trained; register one if there is none."""
    of_this_run = f"name = '{name}' and run_id = '{run_id}'"
    versions = store.client.search_model_versions(of_this_run)
    if not versions:
        return register(store, name, checkpoint, run_id, facts)
    latest = max(versions, key=lambda version: int(version.version))
    if facts.keys() - latest.tags.keys():  # its registration was interrupted before its tags
        tag(store, name, int(latest.version), facts)
    return int(latest.version)


def figures_of_version(ap: float, fps: float, protocol: dict[str, Any]) -> dict[str, Any]:
    """Return the tags of a registered version (see `register`)."""
    data = data_digest(protocol)[:12]
    return {"AP": ap, "fps": fps, "protocol": protocol_hash(protocol), "data": data}


def _requirements() -> list[str]:
    """Return the packages that a model needs to be loaded, at the versions installed here."""
    packages = ("torch", "torchvision", "pydantic", "pyyaml", "safetensors", "pillow", "mlflow")
    return [f"{package}=={installed_version(package)}" for package in packages]
