"""Objects on S3: list, upload, download and delete them, with errors that say what to do.

Credentials come through the usual AWS chain, another endpoint from AWS_ENDPOINT_URL. Files travel
through boto3's transfer manager, which splits large ones into parts and checks their checksums.
"""

import errno
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

SCHEME = "s3://"

ATTEMPTS = 12
"""Attempts of each request; the pauses between them grow to 20 s, which bridges a minute."""

CONNECTIONS = 16
"""Connections to S3 that one process keeps open at a time."""

TRANSIENT_CODES = ("SlowDown", "RequestTimeout", "ExpiredToken")
"""Codes of refusals that do not last, besides those of status 5xx."""

Object = tuple[str, int]
"""ETag and size in bytes of an object, which tell its versions apart."""

PATIENCE = 120.0
"""Seconds for which an operation is tried again before the training stops."""

ResultT = TypeVar("ResultT")


class S3Error(ValueError):
    """A location on S3 cannot be used."""


class S3ConditionError(S3Error):
    """A server of S3 does not know conditional writes."""


class S3UnavailableError(S3Error):
    """S3, or the network on the way to it, fails at the moment; a later attempt may succeed."""


def is_remote(location: str) -> bool:
    """Return whether `location` is on S3."""
    return location.startswith(SCHEME)


def split_location(location: str) -> tuple[str, str]:
    """Return the bucket and the key of `s3://BUCKET/KEY`.

    Raises:
        S3Error: there is no bucket in it.
    """
    bucket, _, key = location.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise S3Error(f"{location}: expected s3://BUCKET/KEY")
    return bucket, key.strip("/")


@functools.cache
def client(attempts: int = ATTEMPTS) -> Any:
    """Return the process's client of S3, which all threads share.

    Args:
        attempts: Number of attempts of each request; there is one client for each number.
    """
    import boto3
    from botocore.config import Config as ClientConfig

    retries = {"mode": "standard", "max_attempts": attempts}
    return boto3.client(
        "s3", config=ClientConfig(retries=retries, max_pool_connections=CONNECTIONS)
    )


class PatientS3(S3FileSystem):
    """Arrow's file system on S3 with our number of attempts.

    Arrow loses the number of attempts when it pickles its own class for another process, and it
    does not read AWS_ENDPOINT_URL when it is constructed with options.
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
    """Turn boto3's errors into one line that says why `location` cannot be used.

    Raises:
        S3Error: names the location, the reason and what to do; an `S3UnavailableError` if a later
            attempt may succeed.
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
        reasons = {
            "NoSuchBucket": "no such bucket; create it, or correct the name",
            "AccessDenied": "access denied; let these credentials list, read and write it",
            "403": "access denied; let these credentials list, read and write it",
            "404": "not there any more",
        }
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        is_transient = status >= 500 or code in TRANSIENT_CODES
        kind = S3UnavailableError if is_transient else S3Error
        raise kind(f"{location}: {reasons.get(code, str(error))}") from error
    except (BotoCoreError, Boto3Error) as error:
        reason = str(error).splitlines()[0]
        raise S3UnavailableError(
            f"{location}: {reason}; check AWS_ENDPOINT_URL and the network"
        ) from error


def patiently(operation: Callable[[], ResultT], transient: type[Exception]) -> ResultT:
    """Return the result of `operation`, which is repeated for `PATIENCE` seconds while it fails.

    Args:
        operation: Operation that may be repeated.
        transient: Type of the errors after which another attempt may succeed. A full device is
            never one of them.

    Raises:
        Exception: the operation's own error: the last transient one, or the first other one.
    """
    deadline, pause = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            return operation()
        except transient as error:
            if getattr(error, "errno", None) == errno.ENOSPC or time.monotonic() > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 20.0)


def list_objects(location: str) -> dict[str, Object]:
    """Return the object at `location` under an empty name, or those below it by relative name.

    Raises:
        S3Error: the bucket cannot be read.
    """
    bucket, key = split_location(location)
    objects = {}
    with explained(location):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        for entry in (entry for page in pages for entry in page.get("Contents", ())):
            name = entry["Key"].removeprefix(key)
            is_marker = name.endswith("/")  # Arrow and the AWS console create such objects.
            if not is_marker and (name == "" or name.startswith("/") or not key):
                objects[name.removeprefix("/")] = (entry["ETag"].strip('"'), entry["Size"])
    return {"": objects[""]} if "" in objects else objects


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
        S3Error: the location cannot be written.
    """
    bucket, key = split_location(location)
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    with explained(location):
        for file in files:
            name = key if source.is_file() else f"{key}/{file.relative_to(source).as_posix()}"
            client().upload_file(str(file), bucket, name)


def put_if(location: str, content: str, version: str | None) -> str | None:
    """Write an object if it is still the one of `version`; return the new version's ETag.

    Args:
        location: The object.
        content: Its new content.
        version: ETag of the version to replace; None if there must not be one.

    Returns:
        None if the condition does not hold, or another write is under way.

    Raises:
        S3ConditionError: the server does not know conditions.
        S3Error: the bucket cannot be written.
    """
    from botocore.exceptions import ClientError

    bucket, key = split_location(location)
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    with explained(location):
        try:
            answer = client().put_object(Bucket=bucket, Key=key, Body=content.encode(), **condition)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if code == "NotImplemented":
                raise S3ConditionError(f"{location}: no conditional writes here") from error
            if code == "NoSuchKey" or status in (409, 412):
                return None
            raise
    return str(answer["ETag"])


def read_versioned(location: str) -> tuple[str, str]:
    """Return the content of an object and its ETag; both are empty if there is none."""
    from botocore.exceptions import ClientError

    bucket, key = split_location(location)
    with explained(location):
        try:
            answer = client().get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return "", ""
            raise
        return answer["Body"].read().decode(errors="replace"), str(answer["ETag"])


def copy_folder(source: str, target: str, last: str) -> None:
    """Copy the objects below `source` within S3, the one named `last` after all others.

    Objects that somebody deletes meanwhile are left out.
    """
    bucket, key = split_location(target)
    source_bucket, source_key = split_location(source)
    for name in sorted(list_objects(source), key=lambda name: name == last):
        origin = {"Bucket": source_bucket, "Key": f"{source_key}/{name}"}
        try:
            with explained(f"{source}/{name}"):
                client().copy(origin, bucket, f"{key}/{name}")
        except S3UnavailableError:
            raise
        except S3Error:
            if list_objects(f"{source}/{name}"):
                raise


def download(location: str, path: Path) -> None:
    """Copy an object to `path`.

    Raises:
        S3Error: the object cannot be read.
    """
    bucket, key = split_location(location)
    with explained(location):
        client().download_file(bucket, key, str(path))


def remove(location: str) -> None:
    """Delete the object at `location`, or those below it."""
    bucket, key = split_location(location)
    with explained(location):
        for name in list_objects(location):
            client().delete_object(Bucket=bucket, Key=f"{key}/{name}".rstrip("/"))
