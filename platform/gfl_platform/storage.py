"""Where things lie: run folders, and weights to start from."""

import difflib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from gfl_platform.config import JobConfig

TORCHVISION = "torchvision://"

LOCK_FILE = "lock"
"""In a run's folder: who holds it."""


class StorageError(ValueError):
    """Something that is not where it should be, or is where it should not."""


def storage_root(job: JobConfig) -> Path:
    """Return the folder of runs and of the embedded tracking store."""
    return Path(job.storage.root).expanduser().resolve()


def open_run_folder(
    job: JobConfig, name: str, *, resume: bool, kind: Literal["runs", "sweeps"] = "runs"
) -> Path:
    """Return the folder of the run or sweep `name`: a new one, or with `resume` the existing one.

    Raises:
        StorageError: a run that exists already, or does not although it is to be resumed.
    """
    folder = storage_root(job) / kind / name
    what = kind.removesuffix("s")
    if resume and not folder.is_dir():
        existing = [path.name for path in folder.parent.glob("*")]
        near = difflib.get_close_matches(name, existing, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "start it without --resume"
        raise StorageError(f"{what} '{name}': nothing to resume in {folder.parent}; {hint}")
    try:
        folder.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as error:
        raise StorageError(
            f"{what} '{name}' exists in {folder.parent}; continue it with --resume, or choose "
            "another run.name"
        ) from error
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder: one job trains a run. The system lets go where the process dies.

    Raises:
        StorageError: another job holds it.
    """
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise StorageError(
                f"run '{folder.name}' is in the hands of {file.read().strip()}; stop that job "
                "first, or choose another run.name"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


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


def fetch_weights(job: JobConfig, location: str) -> Path:
    """Return a file of the weights at `location` that all nodes see.

    Remote ones are kept in the folder `weights` of the storage, and fetched only once.

    Args:
        job: Says where the storage and the registry are.
        location: A path, `s3://BUCKET/KEY`, `https://...`, `torchvision://resnet50`, or one of our
            models: a checkpoint folder, `models:/NAME@ALIAS`, `runs:/ID`.

    Raises:
        StorageError: a location that cannot be reached.
    """
    from gfl.checkpoint import WEIGHTS

    if location.startswith(("models:/", "runs:/")):
        return fetch_model(job, location) / WEIGHTS
    if "://" not in location:
        path = Path(location).expanduser()
        return path / WEIGHTS if path.is_dir() else path
    if location.startswith(TORCHVISION):
        location = _torchvision_url(location)
    if not location.startswith(("s3://", "https://", "http://")):
        raise StorageError(
            f"{location}: expected a file, s3://, https://, torchvision:// or models:/"
        )
    # Many files are called latest.pth: what tells them apart is where they are.
    folder = hashlib.sha256(location.encode()).hexdigest()[:12]
    path = storage_root(job) / "weights" / folder / Path(location).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        try:
            (_download_s3 if location.startswith("s3://") else _download)(location, partial)
        except Exception as error:  # boto3, urllib and the checksum each have their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StorageError(
                f"{location}: cannot be downloaded ({reason}); put the file at {path}, or set "
                "model.pretrained to a local one"
            ) from error
        partial.replace(path)
    return path


def fetch_model(job: JobConfig, location: str) -> Path:
    """Return the checkpoint folder of one of our models (see `registry.fetch_checkpoint`)."""
    from gfl_platform import registry  # which stands on this module

    name = registry.resolve(job, location)
    folder = storage_root(job) / "weights" / name.replace("models:/", "").replace("/", "-")
    if not name.startswith("models:/") or not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
            fetched = registry.fetch_checkpoint(job, name, Path(scratch))
            if not fetched.is_relative_to(scratch):
                return fetched
            fetched.replace(folder)
    return folder


def _torchvision_url(location: str) -> str:
    from torchvision.models import get_model_weights

    name = location.removeprefix(TORCHVISION)
    try:
        return get_model_weights(name)["IMAGENET1K_V1"].url
    except (ValueError, KeyError) as error:
        raise StorageError(f"{location}: torchvision has no such model") from error


def _download(url: str, path: Path) -> None:
    import torch

    cached = Path(torch.hub.get_dir()) / "checkpoints" / path.name
    if cached.exists():
        shutil.copy(cached, path)
        return
    # Names of published files end in the beginning of their checksum.
    checksum = torch.hub.HASH_REGEX.search(path.name)
    torch.hub.download_url_to_file(
        url, str(path), hash_prefix=checksum[1] if checksum else None, progress=False
    )


def _download_s3(url: str, path: Path) -> None:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    boto3.client("s3").download_file(bucket, key, str(path))
