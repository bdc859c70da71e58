"""Where things lie, here or on S3: run folders, checkpoints, weights to start from."""

import difflib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal

from gfl_platform.config import JobConfig
from gfl_platform.storage.s3 import (
    Cache,
    PatientS3,
    download,
    is_remote,
    list_objects,
    remove,
    require_bucket,
    upload,
)

LOCK_FILE = "lock"
"""In a run's folder: who holds it."""


class StorageError(ValueError):
    """Something that is not where it should be, or is where it should not."""


STATE_FILES = ("config.yaml", "sweep.yaml", "run.json", "trial.json")
"""What a driver on another machine has to know to go on with a run, or a sweep and its trials."""


def cache_of(job: JobConfig) -> Cache:
    """Return where copies of what lies on S3 are kept, on every node."""
    return Cache(Path(job.storage.cache), int(job.storage.cache_gb * 1e9))


def storage_root(job: JobConfig) -> Path:
    """Return the folder of runs and of the embedded tracking store; on this node if it is on S3."""
    root = job.storage.root
    if is_remote(root):
        return cache_of(job).folder.expanduser() / "roots" / root.removeprefix("s3://").strip("/")
    return Path(root).expanduser().resolve()


def location_of(job: JobConfig, path: Path) -> str:
    """Return where all nodes see what belongs at `path` below `storage_root`."""
    if not is_remote(job.storage.root):
        return str(path)
    return f"{job.storage.root.rstrip('/')}/{path.relative_to(storage_root(job)).as_posix()}"


def shared(job: JobConfig, path: Path) -> str:
    """Return where all nodes see a file or folder of this one: it is uploaded if they do not."""
    if not is_remote(job.storage.root):
        return str(path.resolve())
    location = f"{job.storage.root.rstrip('/')}/shared/{_digest_of(path)}/{path.name}"
    stored = {name: size for name, (_, size) in list_objects(location).items()}
    if stored != _sizes(path):  # not there, or in part: an upload may have been killed
        upload(path, location)
    return location


def _sizes(path: Path) -> dict[str, int]:
    """Return the sizes of the files below `path` by relative name, as `list_objects` has them."""
    if path.is_file():
        return {"": path.stat().st_size}
    files = [each for each in path.rglob("*") if each.is_file()]
    return {each.relative_to(path).as_posix(): each.stat().st_size for each in files}


def _digest_of(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def ray_storage(job: JobConfig, folder: Path) -> dict[str, Any]:
    """Return Ray's options for keeping a run's checkpoints."""
    location = location_of(job, folder)
    if not is_remote(location):
        return {"storage_path": location}
    path = location.removeprefix("s3://")
    return {"storage_path": path, "storage_filesystem": PatientS3()}


@contextmanager
def space_required(where: str) -> Iterator[None]:
    """Say in one line that a checkpoint found no space.

    Raises:
        StorageError: the device that holds `where` is full.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise StorageError(
                f"{where}: no space left on the device for a checkpoint; the one before is whole: "
                "free some space, but no checkpoint of this run, and go on with --resume"
            ) from error
        raise


def is_there(location: str) -> bool:
    """Return whether a folder, here or on S3, is there."""
    return bool(list_objects(location)) if is_remote(location) else Path(location).is_dir()


def share_state(job: JobConfig, folder: Path) -> None:
    """Put a run's `STATE_FILES` where a driver on another machine finds them."""
    if is_remote(job.storage.root):
        for name in STATE_FILES:
            if (folder / name).is_file():
                upload(folder / name, f"{location_of(job, folder)}/{name}")


def discard(job: JobConfig, folder: Path) -> None:
    """Delete a folder below `storage_root`, here and where all nodes see it."""
    shutil.rmtree(folder, ignore_errors=True)
    if is_remote(job.storage.root):
        remove(location_of(job, folder))


def folders_in(job: JobConfig, folder: Path) -> set[str]:
    """Return the names of the folders in one below `storage_root`, where all nodes see it."""
    if not is_remote(job.storage.root):
        return {path.name for path in folder.iterdir() if path.is_dir()}
    return {key.split("/")[0] for key in list_objects(location_of(job, folder)) if "/" in key}


def find_run_folder(
    job: JobConfig, name: str, *, resume: bool, kind: Literal["runs", "sweeps"] = "runs"
) -> Path:
    """Return the folder of the run or sweep `name`, which is there if it is to be resumed.

    Raises:
        StorageError: a run that exists already, or does not although it is to be resumed.
    """
    folder = storage_root(job) / kind / name
    what = kind.removesuffix("s")
    if is_remote(job.storage.root):
        _join_remote(job, folder, resume=resume)
    if resume and not folder.is_dir():
        existing = [path.name for path in folder.parent.glob("*")]
        near = difflib.get_close_matches(name, existing, n=1)
        other = "check its name and storage.root, or start it without --resume"
        hint = f"did you mean '{near[0]}'?" if near else other
        raise StorageError(f"{what} '{name}': nothing to resume in {folder.parent}; {hint}")
    if folder.exists() and not resume:
        raise StorageError(
            f"{what} '{name}' exists in {folder.parent}; continue it with --resume, or choose "
            "another run.name"
        )
    return folder


def open_run_folder(
    job: JobConfig, name: str, *, resume: bool, kind: Literal["runs", "sweeps"] = "runs"
) -> Path:
    """Return the folder of the run or sweep `name`: a new one, or with `resume` the existing one.

    Raises:
        StorageError: as `find_run_folder`.
    """
    folder = find_run_folder(job, name, resume=resume, kind=kind)
    try:
        folder.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as error:  # of two at a time, one fails
        raise StorageError(f"{folder}: another job has just begun it") from error
    return folder


def _join_remote(job: JobConfig, folder: Path, *, resume: bool) -> None:
    """Fetch the state of a run that is on S3, begun on another machine; refuse to begin it anew."""
    location = location_of(job, folder)
    require_bucket(location)
    known = [key for key in list_objects(location) if _is_state(PurePath(key))]
    if known and not resume:
        raise StorageError(
            f"run '{folder.name}' exists in {location}; continue it with --resume, or choose "
            "another run.name"
        )
    for name in known:
        path, arrived = folder / name, folder / f"{name}.arrived"
        path.parent.mkdir(parents=True, exist_ok=True)
        download(f"{location}/{name}", arrived)
        # A trial here may have gone on while S3 was away, one there on another machine.
        if name.endswith("trial.json") and _epochs(arrived) < _epochs(path):
            arrived.unlink()
        else:
            arrived.replace(path)


def _epochs(trial: Path) -> int:
    return len(read_json(trial).get("curve", ()))


def _is_state(key: PurePath) -> bool:
    of_a_trial = len(key.parts) == 3 and key.parts[0] == "trials"
    return key.name in STATE_FILES and (of_a_trial or len(key.parts) == 1)


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
        try:
            yield Path(folder)
        finally:
            if is_remote(job.storage.root):
                remove(location_of(job, Path(folder)))


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`: afterwards the file holds all of it, or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file of ours; empty if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}
