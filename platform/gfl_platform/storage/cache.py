"""Copies of files on S3, kept on every node that reads them."""

import fcntl
import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gfl.config.schema import Config, SplitConfig
from gfl_platform.storage.s3 import (
    DOWNLOADS,
    SCHEME,
    Object,
    S3Error,
    S3UnavailableError,
    client,
    explained,
    is_remote,
    list_objects,
    patiently,
    split_location,
)

logger = logging.getLogger(__name__)

TOLD_EVERY = 5.0
"""Seconds between two words on a download, and between two notes of what has arrived."""

MANIFEST, FILES, DOWNLOADING, USED = "manifest.json", "files", "downloading.lock", "used.lock"


@dataclass(frozen=True)
class Cache:
    """Copies of what lies on S3, on one node.

    Attributes:
        folder: Of the copies.
        limit: Bytes; copies that nobody uses give way, the longest unused first.
    """

    folder: Path
    limit: int

    def local(self, location: str, tell: Callable[[str], None] = logger.info) -> Path:
        """Return a path to what is at `location`, up to date; a local path is returned as it is.

        One process of a node downloads, others wait; what is there already is not fetched again.
        The copy stays until this process ends.

        Args:
            location: A path, `s3://BUCKET/KEY` of an object, or of a folder.
            tell: Hears of a download's progress.

        Raises:
            S3Error: nothing is there, it cannot be read, or it does not fit.
        """
        if not is_remote(location):
            return Path(location).expanduser()
        objects = list_objects(location)
        if not objects:
            raise S3Error(f"{location}: nothing is there; correct it, or upload the files")
        copy = self.folder.expanduser() / hashlib.sha256(location.encode()).hexdigest()[:16]
        (copy / FILES).mkdir(parents=True, exist_ok=True)
        _hold(copy / USED, fcntl.LOCK_SH)
        with (copy / DOWNLOADING).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._make_room(location, copy, sum(size for _, size in objects.values()))
            _Mirror(location, copy, objects, tell).update()
        name = Path(split_location(location)[1]).name if "" in objects else ""
        return copy / FILES / name

    def localized(self, config: Config, tell: Callable[[str], None] = logger.info) -> Config:
        """Return `config` with local copies in place of data on S3.

        Raises:
            S3Error: data that cannot be had.
        """

        def here(split: SplitConfig) -> SplitConfig:
            remote = {key: place for key, place in split if is_remote(place)}
            found = {key: str(self.local(place, tell)) for key, place in remote.items()}
            return split.model_copy(update=found)

        data = config.data
        both = {"train": here(data.train), "val": here(data.val)}
        return config.model_copy(update={"data": data.model_copy(update=both)})

    def _make_room(self, location: str, copy: Path, needed: int) -> None:
        if needed > self.limit:
            raise S3Error(
                f"{location}: {needed / 1e9:.1f} GB do not fit into storage.cache_gb "
                f"({self.limit / 1e9:g}); raise it"
            )
        others = [path.parent for path in copy.parent.glob(f"*/{USED}") if path.parent != copy]
        others.sort(key=lambda other: (other / USED).stat().st_mtime)
        sizes = {other: _size(other) for other in others}
        for other in others:
            if sum(sizes.values()) + needed <= self.limit:
                break
            with (other / USED).open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue  # a process of this node reads it
                shutil.rmtree(other)
                del sizes[other]
        if (used := sum(sizes.values())) + needed > self.limit:
            raise S3Error(
                f"{location}: {needed / 1e9:.1f} GB do not fit into {self.folder} besides the "
                f"{used / 1e9:.1f} GB that processes of this node use: storage.cache_gb allows "
                f"{self.limit / 1e9:g}; raise it, or wait until those have ended"
            )


class _Mirror:
    """A download of what is not there yet, file by file: an interrupted one goes on."""

    def __init__(
        self, location: str, copy: Path, objects: dict[str, Object], tell: Callable[[str], None]
    ) -> None:
        self._location, self._copy, self._objects, self._tell = location, copy, objects, tell
        self._bucket, self._key = split_location(location)
        manifest = copy / MANIFEST
        self._have: dict[str, Any] = json.loads(manifest.read_text()) if manifest.exists() else {}
        self._client = client()
        self._lock, self._told = threading.Lock(), time.monotonic()

    def update(self) -> None:
        """Make the copy like the original."""
        for name in self._have.keys() - self._objects.keys():
            self._path(name).unlink(missing_ok=True)
        self._have = {
            name: facts for name, facts in self._have.items() if self._is_there(name, facts)
        }
        if self._missing():
            try:
                patiently(self._fetch_missing, S3UnavailableError)
            finally:
                self._write_manifest()

    def _missing(self) -> list[str]:
        return [name for name in self._objects if name not in self._have]

    def _fetch_missing(self) -> None:
        with explained(self._location), ThreadPoolExecutor(DOWNLOADS) as pool:
            for _ in pool.map(self._fetch, self._missing()):
                pass

    def _path(self, name: str) -> Path:
        return self._copy / FILES / (name or Path(self._key).name)

    def _is_there(self, name: str, facts: Sequence[Any]) -> bool:
        if list(facts) != list(self._objects.get(name, ())):
            return False
        path = self._path(name)
        return path.is_file() and path.stat().st_size == self._objects[name][1]

    def _write_manifest(self) -> None:
        partial = self._copy / f"{MANIFEST}.part"
        partial.write_text(json.dumps(self._have))
        partial.replace(self._copy / MANIFEST)

    def _fetch(self, name: str) -> None:
        etag, size = self._objects[name]
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        key = f"{self._key}/{name}".strip("/")
        # boto3 checks the object's own checksum, where it has one, and here we do its MD5.
        self._client.download_file(self._bucket, key, str(partial))
        digest = _md5(partial)
        is_md5 = len(etag) == len(digest) and "-" not in etag
        if partial.stat().st_size != size or (is_md5 and digest != etag):
            raise S3Error(f"{SCHEME}{self._bucket}/{key}: changed while it was read; try again")
        partial.replace(path)
        with self._lock:
            self._note(name)

    def _note(self, name: str) -> None:
        self._have[name] = self._objects[name]
        if time.monotonic() - self._told >= TOLD_EVERY:
            self._told = time.monotonic()
            self._write_manifest()  # for a download that is killed
            done, total = len(self._have), len(self._objects)
            self._tell(f"{self._location}: {done} of {total} files are on this node")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _size(copy: Path) -> int:
    manifest = copy / MANIFEST
    known = json.loads(manifest.read_text()) if manifest.exists() else {}
    return sum(size for _, size in known.values())


_HELD: dict[Path, IO[str]] = {}


def _hold(path: Path, how: int) -> None:
    """Keep a lock on `path` until this process ends."""
    if path not in _HELD:
        _HELD[path] = path.open("a")
        fcntl.flock(_HELD[path], how)
    path.touch()
