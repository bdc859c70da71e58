"""Register a checkpoint as a version of a model, with what it is listed with."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gfl
from gfl_platform.config import JobConfig
from gfl_platform.registry.models import CHECKPOINT
from gfl_platform.tracking.client import connect


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

    here = Path(__file__).parent
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
                python_model=str(here / "pyfunc.py"),
                artifacts={CHECKPOINT: str(model)},
                code_paths=[str(here), str(Path(gfl.__file__).parent)],
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
