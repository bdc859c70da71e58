"""Who works on a run in a bucket: a lease that its holder renews, and the fence behind it.

Conditional writes (`If-None-Match: *` to create the lease, `If-Match` to renew it and to take it
over) let exactly one of several jobs have it. A waiter measures its age on its own monotonic clock:
the lease of a holder that died has not changed for `AGE_SECONDS`.

A holder that was only paused may wake up after that. Ray's controller writes and deletes without
conditions, so the fence is the place: every takeover raises the lease's term, the checkpoints of a
term lie in a folder of their own, and the new holder begins with copies. What the earlier holder
still writes or deletes concerns its own folder only, until its next renewal fails and ends it.
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from gfl_platform.storage.files import StorageError
from gfl_platform.storage.s3 import (
    S3ConditionError,
    S3Error,
    list_objects,
    put_if,
    read_versioned,
)

logger = logging.getLogger(__name__)

LEASE_FILE = "lease.json"
"""Object in the folder of a run or sweep: its holder, term and number of renewals."""

RENEWAL_SECONDS = 10.0
"""Seconds between two renewals, and at most until a waiter knows that the holder lives."""

AGE_SECONDS = 60.0
"""Seconds without a renewal after which a lease may be taken over."""

LOST_STATUS = 4
"""Exit status of a job whose lease was taken over."""


@dataclass
class _Lease:
    """A lease that this process has.

    Attributes:
        location: Object of the lease, `s3://BUCKET/KEY`.
        term: Number of holders that had to be replaced, plus one.
        version: ETag of the lease as this process wrote it last.
    """

    location: str
    term: int = 1
    version: str = ""

    def __post_init__(self) -> None:
        self._holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._nonce, self._renewals = uuid.uuid4().hex, 0

    def write(self, over: str | None, *, ended: bool = False) -> bool:
        """Write the lease if it is still the version `over`, None for none; return whether it was.

        A request whose answer was lost may have been carried out, and what follows it is refused.
        """
        self._renewals += 1
        record = {"holder": self._holder, "nonce": self._nonce, "term": self.term,
                  "renewals": self._renewals, "ended": ended}  # fmt: skip
        content = json.dumps(record)
        while (version := put_if(self.location, content, over)) is None:
            found, over = read_versioned(self.location)
            if found == content:
                version = over
                break
            if _record_of(found).get("nonce") != self._nonce:
                return False
        self.version = version
        return True


@contextmanager
def leased(folder: str) -> Iterator[int]:
    """Hold the lease of a run or sweep; the value is its term.

    If another job takes it over meanwhile, this process ends at once: whatever it would still tidy
    up, log or register belongs to the other job.

    Args:
        folder: Folder of the run or sweep, `s3://...`.

    Raises:
        StorageError: another job holds it.
        S3Error: the bucket cannot be written.
    """
    if not _honours_conditions(folder):
        logger.warning(
            "warning: %s: this S3 server ignores conditions of writes (If-None-Match, If-Match), "
            "so nothing here keeps two machines from one run: resume a run on another machine "
            "only after its job has ended",
            folder,
        )
        yield 1
        return
    lease = _take(folder)
    done = threading.Event()
    renewal = threading.Thread(target=_keep, args=(lease, done), daemon=True)
    renewal.start()
    try:
        yield lease.term
    finally:
        done.set()
        renewal.join()
        with suppress(S3Error):  # else the next job waits until the lease is old
            lease.write(lease.version, ended=True)


def _take(folder: str) -> _Lease:
    """Take the lease of `folder`: a new one, one that has ended, or one that nobody renews.

    Raises:
        StorageError: another job renews it, or was faster.
    """
    lease = _Lease(f"{folder}/{LEASE_FILE}")
    lease.term = _last_term(folder) + 1
    if lease.write(None):
        return lease
    content, version = read_versioned(lease.location)
    record = _record_of(content)
    holder = record.get("holder", "an unknown job")
    seen, age = version, 0.0
    if not record.get("ended"):
        logger.info(
            "%s: held by %s; waiting up to %.0f s to see whether it lives",
            lease.location, holder, AGE_SECONDS,
        )  # fmt: skip
    while not record.get("ended") and age < AGE_SECONDS:
        asked = time.monotonic()
        time.sleep(RENEWAL_SECONDS / 2)
        content, version = read_versioned(lease.location)
        # While S3 does not answer its holder cannot renew it either: that counts for little.
        age += min(time.monotonic() - asked, RENEWAL_SECONDS)
        record = _record_of(content)
        if version != seen and not record.get("ended"):
            raise StorageError(
                f"{folder} is in the hands of {record.get('holder', holder)}; stop that job first, "
                "or choose another run.name"
            )
    if "term" in record:
        lease.term = record["term"] + (0 if record.get("ended") else 1)
    if not lease.write(version):
        raise StorageError(
            f"{folder}: another job has just taken it; stop that job first, or choose another "
            "run.name"
        )
    if not record.get("ended"):
        logger.warning(
            "warning: %s: taken over from %s, which has been silent for %.0f s",
            folder, holder, age,
        )  # fmt: skip
    return lease


def _keep(lease: _Lease, done: threading.Event) -> None:
    """Renew a lease until `done`; end this process if another job has it.

    While S3 does not answer nobody can take it over either, so the job goes on.
    """
    while not done.wait(RENEWAL_SECONDS):
        try:
            renewed = lease.write(lease.version)
        except S3Error as error:
            logger.info("%s", error)
            continue
        if not renewed:
            logger.error(
                "%s: another job has taken the run over, because this one was silent for more than "
                "%.0f s; this one ends, and its checkpoints are not used",
                lease.location, AGE_SECONDS,
            )  # fmt: skip
            logging.shutdown()
            os._exit(LOST_STATUS)


def _record_of(content: str) -> dict[str, Any]:
    """Return the record in a lease; empty if it is damaged, so that only its age counts."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def checkpoints_folder(term: int) -> str:
    """Return the name of the folder, in a run's folder, for the checkpoints of a term."""
    return "ray" if term == 1 else f"ray-{term}"


def term_of(name: str) -> int:
    """Return the term of a `checkpoints_folder`; 0 for another name."""
    found = re.fullmatch(r"ray(?:-(\d+))?", name)
    return int(found[1] or 1) if found else 0


def _last_term(folder: str) -> int:
    """Return the highest term with checkpoints in a run or sweep; 0 if there is none."""
    parts = (part for name in list_objects(folder) for part in name.split("/")[:-1])
    return max((term_of(part) for part in parts), default=0)


def _honours_conditions(folder: str) -> bool:
    """Return whether the server refuses writes whose conditions do not hold; tries it out."""
    probe = f"{folder}/lease-probe"
    try:
        put_if(probe, "", None)  # From now on it exists.
        return all(put_if(probe, "", version) is None for version in (None, '"no such version"'))
    except S3ConditionError:
        return False
