"""Copies of files on S3, kept on every node that reads them.

One process of a node lists the objects of a job's data and downloads them while the others wait;
these, and processes that start later for the same job, use its list. A copy stays as long as a
process uses it; an unused one is deleted when its space is needed. The locks are `flock`s, which
the operating system releases when a process dies.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from gfl.config.schema import Config, SplitConfig
from gfl.files import inside, write_atomically
from gfl_platform.storage.files import read_rebuildable
from gfl_platform.storage.s3 import (
    CONNECTIONS,
    Object,
    S3Error,
    S3UnavailableError,
    download,
    is_remote,
    list_objects,
    patiently,
    split_location,
)

logger = logging.getLogger(__name__)

DOWNLOADS = CONNECTIONS
"""Files that are downloaded at the same time."""

REPORT_SECONDS = 5.0
"""Seconds between two reports of a download's progress."""

MANIFEST = "manifest.json"
"""File in a copy's folder: ETag and size of the objects that have arrived, by relative name."""

LISTING = "listing.json"
"""File in a copy's folder: the objects on S3, and the job for which they were listed."""

FILES = "files"
"""Folder in a copy's folder that holds the files."""

DOWNLOADING, USED, EVICTING = "downloading.lock", "used.lock", "evicting.lock"
"""Lock files: of the process that downloads, of all that use a copy, of the one that deletes."""

GONE = "gone-"
"""Beginning of the names of copies that are being deleted."""


@dataclass(frozen=True)
class Cache:
    """The copies on one node.

    Attributes:
        folder: Folder that holds the copies.
        limit: Size of all copies together, in bytes.
        job: Identifier of the job; a location is listed once for a job on each node.
    """

    folder: Path
    limit: int
    job: str = field(default_factory=lambda: uuid.uuid4().hex)

    def local(self, location: str) -> Path:
        """Return the path of a copy, as of the job's begin; a local path is returned as it is.

        Only objects that changed are downloaded. The copy stays until this process ends.

        Args:
            location: A path, or `s3://BUCKET/KEY` of an object or of a folder.

        Raises:
            S3Error: there is nothing at `location`, it cannot be read, or it does not fit.
        """
        if not is_remote(location):
            return Path(location).expanduser()
        copy = self.folder.expanduser() / hashlib.sha256(location.encode()).hexdigest()[:16]
        _use(copy)
        with (copy / DOWNLOADING).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            objects = self._listed(location, copy)
            self._make_room(location, copy, sum(size for _, size in objects.values()))
            try:
                _Download(location, copy, objects).run()
            except S3Error:  # An object may have changed; the next attempt lists them again.
                (copy / LISTING).unlink(missing_ok=True)
                raise
        name = split_location(location)[1].rpartition("/")[2] if "" in objects else ""
        return copy / FILES / name

    def _listed(self, location: str, copy: Path) -> dict[str, Object]:
        """Return the objects at `location`, as another process listed them for this job.

        Raises:
            S3Error: there is nothing, or it cannot be read.
        """
        listing = read_rebuildable(copy / LISTING)
        if listing.get("job") == self.job:
            return {name: (etag, size) for name, (etag, size) in listing["objects"].items()}
        objects = list_objects(location)
        if not objects:
            raise S3Error(f"{location}: nothing is there; correct it, or upload the files")
        write_atomically(copy / LISTING, json.dumps({"job": self.job, "objects": objects}))
        return objects

    def localized(self, config: Config) -> Config:
        """Return `config` with local copies in place of data on S3.

        Raises:
            S3Error: the data cannot be downloaded.
        """

        def localized_split(split: SplitConfig) -> SplitConfig:
            remote = {key: place for key, place in split if is_remote(place)}
            copies = {key: str(self.local(place)) for key, place in remote.items()}
            return split.model_copy(update=copies)

        data = config.data
        splits = {"train": localized_split(data.train), "val": localized_split(data.val)}
        return config.model_copy(update={"data": data.model_copy(update=splits)})

    def _make_room(self, location: str, copy: Path, needed: int) -> None:
        """Delete unused copies, the longest unused first, until `needed` bytes fit."""
        if needed > self.limit:
            raise S3Error(
                f"{location}: {needed / 1e9:.1f} GB do not fit into storage.cache_gb "
                f"({self.limit / 1e9:g}); raise it"
            )
        with (copy.parent / EVICTING).open("a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            self._evict(location, copy, needed)

    def _evict(self, location: str, copy: Path, needed: int) -> None:
        """Delete copies for `_make_room`, one process at a time."""
        others = [path.parent for path in copy.parent.glob(f"*/{USED}") if path.parent != copy]
        others.sort(key=lambda other: (other / USED).stat().st_mtime)
        sizes = {other: _size(other) for other in others}
        for other in others:
            if sum(sizes.values()) + needed <= self.limit:
                return
            with (other / USED).open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue  # Another process uses this copy.
                # A process that begins to use the copy meanwhile makes a folder of its own.
                gone = other.rename(other.with_name(f"{GONE}{uuid.uuid4().hex}"))
                shutil.rmtree(gone)
                del sizes[other]
        used = sum(sizes.values())
        if used + needed > self.limit:
            raise S3Error(
                f"{location}: {needed / 1e9:.1f} GB do not fit into {self.folder} besides the "
                f"{used / 1e9:.1f} GB that processes of this node use: storage.cache_gb allows "
                f"{self.limit / 1e9:g}; raise it, or wait until those have ended"
            )


class _Download:
    """Brings one copy up to date, file by file; the next attempt continues an interrupted one."""

    def __init__(self, location: str, copy: Path, objects: dict[str, Object]) -> None:
        self._location, self._copy, self._objects = location, copy, objects
        self._paths = {name: self._path(name) for name in objects}
        self._arrived = _manifest(copy) or self._recovered()
        self._lock, self._reported = threading.Lock(), time.monotonic()

    def run(self) -> None:
        """Delete files that are gone from S3, and download those that are new or changed."""
        for name in self._arrived.keys() - self._objects.keys():
            self._path(name).unlink(missing_ok=True)
        self._arrived = {
            name: version for name, version in self._objects.items() if self._is_current(name)
        }
        if self._missing():
            try:
                patiently(self._fetch_missing, S3UnavailableError)
            finally:
                self._write_manifest()

    def _recovered(self) -> dict[str, Object]:
        """Return the objects whose copies have their MD5, for a copy without a manifest."""
        names = {path: name for name, path in self._paths.items()}
        arrived = {}
        for path in _files(self._copy):
            name = names.get(path)
            if name is None:  # A part of a file, or a file that is gone from S3.
                path.unlink()
            elif _md5(path) == self._objects[name][0]:
                arrived[name] = self._objects[name]
        return arrived

    def _missing(self) -> list[str]:
        return [name for name in self._objects if name not in self._arrived]

    def _path(self, name: str) -> Path:
        """Return the path of an object's copy.

        Raises:
            S3Error: its name leads out of the folder.
        """
        try:
            return inside(
                self._copy / FILES, name or split_location(self._location)[1].split("/")[-1]
            )
        except ValueError as error:
            raise S3Error(f"{self._location}: {error}") from error

    def _is_current(self, name: str) -> bool:
        if self._arrived.get(name) != self._objects[name]:
            return False
        path = self._paths[name]
        return path.is_file() and path.stat().st_size == self._objects[name][1]

    def _write_manifest(self) -> None:
        write_atomically(self._copy / MANIFEST, json.dumps(self._arrived))

    def _fetch_missing(self) -> None:
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            for _ in pool.map(self._fetch, self._missing()):
                pass

    def _fetch(self, name: str) -> None:
        """Download one object, and check its size and MD5.

        boto3 checks the object's own checksum, if it has one.

        Raises:
            S3Error: the object was changed during the download.
        """
        etag, size = self._objects[name]
        path = self._paths[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        location = f"{self._location.rstrip('/')}/{name}".rstrip("/")
        download(location, partial)
        digest = _md5(partial)
        is_md5 = len(etag) == len(digest) and "-" not in etag
        if partial.stat().st_size != size or (is_md5 and digest != etag):
            raise S3Error(f"{location}: changed while it was read; try again")
        partial.replace(path)
        with self._lock:
            self._note(name)

    def _note(self, name: str) -> None:
        """Note that an object has arrived, also in the manifest, in case this process is killed."""
        self._arrived[name] = self._objects[name]
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._reported = time.monotonic()
            self._write_manifest()
            arrived, total = len(self._arrived), len(self._objects)
            logger.info("%s: %d of %d files are on this node", self._location, arrived, total)


def _manifest(copy: Path) -> dict[str, Object]:
    """Return the objects that have arrived in a copy; none if the manifest is damaged."""
    return {name: (etag, size) for name, (etag, size) in read_rebuildable(copy / MANIFEST).items()}


def _size(copy: Path) -> int:
    """Return the size of a copy's files, in bytes."""
    if manifest := _manifest(copy):
        return sum(size for _, size in manifest.values())
    return sum(path.stat().st_size for path in _files(copy))


def _files(copy: Path) -> list[Path]:
    return [path for path in (copy / FILES).rglob("*") if path.is_file()]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


_LOCKS: dict[Path, IO[str]] = {}
"""Lock files that this process keeps open until it ends."""


def _use(copy: Path) -> None:
    """Lock a copy against deletion until this process ends, and note the time of its use."""
    path = copy / USED
    while path not in _LOCKS:
        copy.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # Another process may delete the copy meanwhile.
            lock = path.open("a")
            fcntl.flock(lock, fcntl.LOCK_SH)
            if path.exists() and path.samefile(f"/dev/fd/{lock.fileno()}"):
                _LOCKS[path] = lock
            else:
                lock.close()
    path.touch()
