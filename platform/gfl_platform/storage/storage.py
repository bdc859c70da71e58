"""Where a job's runs, checkpoints and scratch files lie: in a folder, or in a bucket on S3.

A `Storage` is made once per command from the section `storage` of the configuration:

    storage = Storage(job.storage)
    folder = storage.open_run_folder("first", resume=False)
"""

import difflib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from gfl.files import inside
from gfl_platform.config import StorageConfig
from gfl_platform.storage.cache import Cache
from gfl_platform.storage.files import StorageError, held, read_rebuildable
from gfl_platform.storage.lease import checkpoints_folder, leased
from gfl_platform.storage.s3 import (
    PatientS3,
    download,
    is_remote,
    list_objects,
    remove,
    require_bucket,
    upload,
)

RECORDS = ("run.json", "trial.json")
"""Files in the folder of a run, sweep or trial that change while it runs."""

STATE_FILES = ("config.yaml", "sweep.yaml", *RECORDS)
"""Files that a driver on another machine needs to continue a run, or a sweep and its trials."""

Kind = Literal["runs", "sweeps"]
"""Folder below the storage's root."""


def is_there(location: str) -> bool:
    """Return whether a folder exists, on this node or on S3."""
    return bool(list_objects(location)) if is_remote(location) else Path(location).is_dir()


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, a sweep or a trial that this job works on, and no other job.

    Attributes:
        storage: The storage that it belongs to.
        path: The folder on this node.
        term: Term of its lease; 1 for a folder that all nodes see.
    """

    storage: "Storage"
    path: Path
    term: int = 1

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of this term, and of Ray's notes about them."""
        return self.path / checkpoints_folder(self.term)

    def below(self, name: str) -> "RunFolder":
        """Return the folder `name` in this one, such as that of a trial."""
        return replace(self, path=self.path / name)


class Storage:
    """The place of runs, and this node's copies of remote files.

    Attributes:
        location: A folder that all nodes see, or `s3://BUCKET/PREFIX`.
        cache: Copies of remote files on this node.
        root: Folder on this node of the runs and of the embedded tracking store. It is `location`
            itself, or, if that is on S3, a folder beside the copies.
    """

    def __init__(self, config: StorageConfig) -> None:
        self.location = config.root.rstrip("/") if is_remote(config.root) else config.root
        self.cache = Cache(Path(config.cache), int(config.cache_gb * 1e9))
        if self.is_remote:
            name = self.location.removeprefix("s3://").strip("/")
            self.root = self.cache.folder.expanduser() / "roots" / name
        else:
            self.root = Path(config.root).expanduser().resolve()

    @property
    def is_remote(self) -> bool:
        """Whether runs lie on S3."""
        return is_remote(self.location)

    def moved(self, location: str) -> Path | None:
        """Return where a file or folder is now, if `root` was renamed or copied since it was kept.

        Args:
            location: The path, or `file:` URI, at which it was kept. None is returned for any other
                location, and if something is still there.
        """
        address = urlsplit(location)
        path = Path(unquote(address.path))
        if address.scheme not in ("", "file") or path.exists():
            return None
        # One name alone, such as `artifacts`, may be that of another folder.
        tails = (path.parts[start:] for start in range(1, len(path.parts) - 1))
        candidates = (self.root.joinpath(*tail) for tail in tails)
        return next((candidate for candidate in candidates if candidate.exists()), None)

    def location_of(self, path: Path) -> str:
        """Return the location at which all nodes see `path`, which is below `root`."""
        if not self.is_remote:
            return str(path)
        return f"{self.location}/{path.relative_to(self.root).as_posix()}"

    def shared(self, path: Path) -> str:
        """Return the location at which all nodes see a file or folder of this node.

        If `location` is on S3, the file or folder is uploaded, unless it is there already.
        """
        if not self.is_remote:
            return str(path.resolve())
        location = f"{self.location}/shared/{_digest_of(path)}/{path.name}"
        stored = {name: size for name, (_, size) in list_objects(location).items()}
        if stored != _sizes(path):  # An upload that was killed leaves only some of the files.
            upload(path, location)
        return location

    def ray_options(self, folder: Path) -> dict[str, Any]:
        """Return the options of Ray's `RunConfig` that keep a run's checkpoints in `folder`."""
        location = self.location_of(folder)
        if not self.is_remote:
            return {"storage_path": location}
        path = location.removeprefix("s3://")
        return {"storage_path": path, "storage_filesystem": PatientS3()}

    def share_state(self, folder: Path) -> None:
        """Upload a run's `STATE_FILES` if runs lie on S3, for a driver on another machine."""
        if self.is_remote:
            for name in STATE_FILES:
                if (folder / name).is_file():
                    upload(folder / name, f"{self.location_of(folder)}/{name}")

    def discard(self, folder: Path) -> None:
        """Delete a folder below `root`, on this node and where all nodes see it."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.is_remote:
            remove(self.location_of(folder))

    def folders_in(self, folder: Path) -> set[str]:
        """Return the names of the folders that all nodes see in `folder`, which is below `root`."""
        if not self.is_remote:
            return {path.name for path in folder.iterdir() if path.is_dir()}
        keys = list_objects(self.location_of(folder))
        return {key.split("/")[0] for key in keys if "/" in key}

    @contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """Make a folder that all nodes see; it is deleted at the end of the context."""
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=self.root) as folder:
            try:
                yield Path(folder)
            finally:
                if self.is_remote:
                    remove(self.location_of(Path(folder)))

    def find_run_folder(self, name: str, *, resume: bool, kind: Kind = "runs") -> Path:
        """Return the folder of the run or sweep `name`; with `resume` it exists.

        Raises:
            StorageError: the run exists and `resume` is false, or the other way round.
        """
        folder = self.root / kind / name
        what = kind.removesuffix("s")
        if self.is_remote:
            self._fetch_state(folder, STATE_FILES, resume=resume)
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

    def open_run_folder(self, name: str, *, resume: bool, kind: Kind = "runs") -> Path:
        """Return the folder of the run or sweep `name`: a new one, or with `resume` the old one.

        Raises:
            StorageError: as for `find_run_folder`.
        """
        folder = self.find_run_folder(name, resume=resume, kind=kind)
        try:
            folder.mkdir(parents=True, exist_ok=resume)
        except FileExistsError as error:  # Two jobs start the run at the same moment: one fails.
            raise StorageError(f"{folder}: another job has just begun it") from error
        return folder

    @contextmanager
    def held(self, path: Path, *, resume: bool) -> Iterator[RunFolder]:
        """Keep all other jobs away from a run or sweep: by a lock, and by a lease on S3.

        Args:
            path: Its folder, as `open_run_folder` returns it.
            resume: Whether the run exists already.

        Raises:
            StorageError: another job holds it, or has begun it meanwhile.
        """
        with held(path):
            if not self.is_remote:
                yield RunFolder(self, path)
                return
            with leased(self.location_of(path)) as term:
                self._fetch_state(
                    path, RECORDS, resume=resume
                )  # The holder before may have written.
                self.share_state(path)
                yield RunFolder(self, path, term)

    def _fetch_state(self, folder: Path, names: Sequence[str], *, resume: bool) -> None:
        """Download the named state of a run that was begun on another machine.

        Raises:
            StorageError: there is such a run, but it is not to be resumed.
        """
        location = self.location_of(folder)
        require_bucket(location)
        state_files = [key for key in list_objects(location) if _is_state(PurePath(key))]
        if state_files and not resume:
            raise StorageError(
                f"run '{folder.name}' exists in {location}; continue it with --resume, or choose "
                "another run.name"
            )
        for name in (key for key in state_files if PurePath(key).name in names):
            path = inside(folder, name)
            arrived = path.with_name(f"{path.name}.arrived")
            path.parent.mkdir(parents=True, exist_ok=True)
            download(f"{location}/{name}", arrived)
            # While S3 was unreachable, a trial may have continued here; keep the longer history.
            if name.endswith("trial.json") and _epochs(arrived) < _epochs(path):
                arrived.unlink()
            else:
                arrived.replace(path)


def _sizes(path: Path) -> dict[str, int]:
    """Return the sizes of the files below `path` by relative name, as `list_objects` does."""
    if path.is_file():
        return {"": path.stat().st_size}
    files = [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def _digest_of(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _epochs(trial: Path) -> int:
    return len(read_rebuildable(trial).get("curve", ()))


def _is_state(key: PurePath) -> bool:
    belongs_to_trial = len(key.parts) == 3 and key.parts[0] == "trials"
    return key.name in STATE_FILES and (belongs_to_trial or len(key.parts) == 1)
