"""S3: what is at a location, and why it cannot be used.

Credentials come through the usual AWS chain, another endpoint from AWS_ENDPOINT_URL.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

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
