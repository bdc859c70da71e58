"""Where things lie: run folders, and weights to start from."""

import difflib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gfl_platform.config import JobConfig

TORCHVISION = "torchvision://"


class StorageError(ValueError):
    """Something that is not where it should be, or is where it should not."""


def storage_root(job: JobConfig) -> Path:
    """Return the folder of runs and of the embedded tracking store."""
    return Path(job.storage.root).expanduser().resolve()


def runs_folder(job: JobConfig) -> Path:
    """Return the folder that holds a folder for each run."""
    return storage_root(job) / "runs"


def open_run_folder(job: JobConfig, name: str, *, resume: bool) -> Path:
    """Return the folder of the run `name`: a new one, or with `resume` the existing one.

    Raises:
        StorageError: a run that exists already, or does not although it is to be resumed.
    """
    folder = runs_folder(job) / name
    if resume and not folder.is_dir():
        existing = [path.name for path in runs_folder(job).glob("*")]
        near = difflib.get_close_matches(name, existing, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "start it without --resume"
        raise StorageError(f"run '{name}': nothing to resume in {folder.parent}; {hint}")
    try:
        folder.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as error:
        raise StorageError(
            f"run '{name}' exists in {folder.parent}; continue it with --resume, or choose another "
            "run.name"
        ) from error
    return folder


@contextmanager
def scratch_folder(job: JobConfig) -> Iterator[Path]:
    """Give a folder that all nodes see and that is gone afterwards."""
    root = storage_root(job)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=root) as folder:
        yield Path(folder)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`: afterwards the file holds all of it, or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file of ours; empty if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def fetch_weights(location: str) -> Path:
    """Return a local file of the weights at `location`: a path, or `torchvision://resnet50`.

    Raises:
        StorageError: a location that cannot be reached.
    """
    if not location.startswith(TORCHVISION):
        return Path(location)
    import torch
    from torchvision.models import get_model_weights

    name = location.removeprefix(TORCHVISION)
    try:
        url = get_model_weights(name)["IMAGENET1K_V1"].url
    except (ValueError, KeyError) as error:
        raise StorageError(f"{location}: torchvision has no such model") from error
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(url).name
    if not path.exists():
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise StorageError(
                f"{location}: {url} cannot be downloaded ({error}); put the file at {path}, or set "
                "model.backbone.pretrained to a local one or to null"
            ) from error
    return path
