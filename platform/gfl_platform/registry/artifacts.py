"""The files of a registered version: MLflow must run nothing from them but our own code.

Whatever the `MLmodel` file of a version names is unpickled or imported when MLflow loads the model,
under any file name. So what `models.register` writes is allowed, and nothing else.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

CHECKPOINT = "checkpoint"
"""Name of the checkpoint among a model's artifacts."""

ALLOWED = re.compile(
    r"MLmodel|conda\.yaml|python_env\.yaml|requirements\.txt|registered_model_meta|pyfunc\.py"
    r"|code/(gfl|gfl_platform)/[\w/]+\.(py|html\.jinja)"
    rf"|artifacts/{CHECKPOINT}/([\w-]+\.safetensors|[\w-]+\.json|config\.yaml)"
)
"""Paths of the files that `models.register` writes."""

LOADER: dict[str, Any] = {
    "loader_module": "mlflow.pyfunc.loaders.code_model",
    "model_code_path": "pyfunc.py",
    "code": "code",
    "artifacts": CHECKPOINT,
}
"""Settings of MLflow's loader that name code or files, as `models.register` writes them."""

HARMLESS = frozenset({"cloudpickle_version", "env", "python_version", "streamable"})
"""Settings of MLflow's loader that name no file that it reads."""


def find_faults(folder: Path) -> list[str]:
    """Return one sentence for each file, and each setting of the loader, that is not allowed."""
    faults = [
        f"Artifact {path} is none of those that a registration writes; MLflow could run its "
        "code, or unpickle it."
        for path in _paths(folder)
        if not ALLOWED.fullmatch(path)
    ]
    return faults + [
        f"MLmodel: {fault}; only the loader that a registration writes may run code."
        for fault in _loader_faults(folder / "MLmodel")
    ]


def _paths(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            yield str(path.relative_to(folder))


def _loader_faults(path: Path) -> Iterator[str]:
    """Yield where an `MLmodel` file differs from those that `models.register` writes."""
    try:
        flavors = yaml.safe_load(path.read_text())["flavors"]
        (name, settings), *others = flavors.items()
        settings = dict(settings)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        yield f"cannot be read ({type(error).__name__})"
        return
    if name != "python_function" or others:
        yield f"has the flavors {list(flavors)}, not python_function alone"
    if isinstance(settings.get("model_code_path"), str):
        settings["model_code_path"] = PurePosixPath(settings["model_code_path"]).name
    match settings.get("artifacts"):
        case {"checkpoint": {"path": "artifacts/checkpoint"}, **rest} if not rest:
            settings["artifacts"] = CHECKPOINT
    for key in sorted(LOADER.keys() | settings.keys() - HARMLESS):
        if settings.get(key) != LOADER.get(key):
            yield f"{key} is {repr(settings.get(key))[:80]}"
