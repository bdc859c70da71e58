"""S3: what is at a location, and why it cannot be used.

Credentials come through the usual AWS chain, another endpoint from AWS_ENDPOINT_URL.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

from gfl.config.schema import Config, SplitConfig

SCHEME = "s3://"

ATTEMPTS = 12
"""At every request; the pauses between them grow to 20 s, so a minute's outage is waited for."""

PASSING = ("SlowDown", "RequestTimeout", "ExpiredToken")
"""Refusals that do not last, besides those of status 5xx."""

DOWNLOADS = 16
"""At once."""

Object = tuple[str, int]
"""ETag and size: what tells versions of an object apart."""

PATIENCE = 120.0
"""Seconds that storage may refuse a file before the training stops."""

FoundT = TypeVar("FoundT")


class S3Error(ValueError):
    """A location on S3 that cannot be used."""


class S3UnavailableError(S3Error):
    """S3, or the way to it, fails at the moment: the same may succeed later."""


def is_remote(location: str) -> bool:
    """Return whether `location` is on S3."""
    return location.startswith(SCHEME)


def split_location(location: str) -> tuple[str, str]:
    """Return bucket and key of `s3://BUCKET/KEY`.

    Raises:
        S3Error: there is no bucket in it.
    """
    bucket, _, key = location.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise S3Error(f"{location}: expected s3://BUCKET/KEY")
    return bucket, key.strip("/")


def client(attempts: int = ATTEMPTS) -> Any:
    """Return a client of S3 that is patient with a service that is busy."""
    import boto3
    from botocore.config import Config as ClientConfig

    retries = {"mode": "standard", "max_attempts": attempts}
    return boto3.client("s3", config=ClientConfig(retries=retries, max_pool_connections=DOWNLOADS))


class PatientS3(S3FileSystem):
    """Arrow's file system on S3, which forgets its patience on the way to another process.

    Made in this way Arrow does not look for an endpoint in the environment.
    """

    def __init__(self) -> None:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        super().__init__(
            endpoint_override=endpoint or None,
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        )

    def __reduce__(self) -> tuple[type["PatientS3"], tuple[()]]:
        return PatientS3, ()


@contextmanager
def explained(location: str) -> Iterator[None]:
    """Say in one line why `location` cannot be used.

    Raises:
        S3Error: says where, what, and what to do; an `S3UnavailableError` if it may pass.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise S3Error(
            f"{location}: no AWS credentials; set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give the machine an instance profile"
        ) from error
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if error.operation_name == "HeadBucket" and code == "404":
            code = "NoSuchBucket"
        hints = {
            "NoSuchBucket": "no such bucket; create it, or correct the name",
            "AccessDenied": "access denied; let these credentials list, read and write it",
            "403": "access denied; let these credentials list, read and write it",
            "404": "not there any more",
        }
        passes = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
        kind = S3UnavailableError if passes or code in PASSING else S3Error
        raise kind(f"{location}: {hints.get(code, str(error))}") from error
    except (BotoCoreError, Boto3Error) as error:
        reason = str(error).splitlines()[0]
        raise S3UnavailableError(
            f"{location}: {reason}; check AWS_ENDPOINT_URL and the network"
        ) from error


def patiently(do: Callable[[], FoundT], passing: type[Exception]) -> FoundT:
    """Return what `do` does; try again while it fails with `passing`, as S3 does for a while.

    Raises:
        Exception: `passing` for good, or another; that no space is left, at once.
    """
    deadline, pause = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            return do()
        except passing as error:
            if getattr(error, "errno", None) == errno.ENOSPC or time.monotonic() > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 20.0)


def list_objects(location: str) -> dict[str, Object]:
    """Return the object at `location`, under an empty name, or those below it by relative name.

    Raises:
        S3Error: the bucket cannot be read.
    """
    bucket, key = split_location(location)
    found = {}
    with explained(location):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        for page in pages:
            for each in page.get("Contents", ()):
                name = each["Key"].removeprefix(key)
                is_marker = name.endswith("/")  # Arrow's and the console's way to make a folder
                if not is_marker and (name == "" or name.startswith("/") or not key):
                    found[name.lstrip("/")] = (each["ETag"].strip('"'), each["Size"])
    return {"": found[""]} if "" in found else found


def require_bucket(location: str) -> None:
    """Check that the bucket of `location` answers.

    Raises:
        S3Error: it does not.
    """
    with explained(location):
        client(attempts=3).head_bucket(Bucket=split_location(location)[0])


def upload(source: Path, location: str) -> None:
    """Copy a file, or the files of a folder, to `location`.

    Raises:
        S3Error: it cannot be written.
    """
    bucket, key = split_location(location)
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    with explained(location):
        for file in files:
            name = key if source.is_file() else f"{key}/{file.relative_to(source).as_posix()}"
            client().upload_file(str(file), bucket, name)


def download(location: str, path: Path) -> None:
    """Copy an object to `path`.

    Raises:
        S3Error: it cannot be read.
    """
    bucket, key = split_location(location)
    with explained(location):
        client().download_file(bucket, key, str(path))


def remove(location: str) -> None:
    """Delete the objects below `location`."""
    bucket, key = split_location(location)
    with explained(location):
        for name in list_objects(location):
            client().delete_object(Bucket=bucket, Key=f"{key}/{name}".rstrip("/"))


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
