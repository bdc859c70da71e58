"""Local files: read with damage named, and folders locked by one process at a time."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
"""File in a run's folder; the process that works on the run locks it and notes its name there."""


class StorageError(ValueError):
    """A file or folder is missing, exists already, is locked or cannot be written."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; empty if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return {}
    content = json.loads(path.read_bytes() or b"null")
    if not isinstance(content, dict):
        raise ValueError(f"got {content!r:.40}, expected a mapping")
    return content


def read_rebuildable(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file whose content can be had again.

    It is empty if there is no such file, and, with a warning, if the file is damaged.
    """
    try:
        return read_json(path)
    except ValueError as error:
        logger.warning("warning: %s is damaged (%s); it is written anew", path, error)
        return {}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a run's folder, so that only one job works on the run.

    The operating system releases the lock when the process dies.

    Raises:
        StorageError: another job holds the lock, whose process and machine the message names, or
            the file system has no locks.
    """
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise StorageError(
                f"run '{folder.name}' is used by {file.read().strip()}; stop that job "
                "first, or choose another run.name"
            ) from error
        except OSError as error:
            raise StorageError(
                f"{folder}: this file system has no locks ({error.strerror}), which keep two jobs "
                "from one run; mount it with locks (Lustre: -o flock, NFS: without nolock), or set "
                "storage.root to another folder or to s3://BUCKET/PREFIX"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def space_required(where: str) -> Iterator[None]:
    """Explain in one line that there was no space for a checkpoint.

    Args:
        where: Folder on the device that may be full.

    Raises:
        StorageError: the device is full.
    """
    try:
        yield
    except Exception as error:
        reasons = (error, error.__context__)  # torch raises its own error after that of the file
        if any(getattr(reason, "errno", None) == errno.ENOSPC for reason in reasons) or (
            "No space left" in str(error)
        ):
            raise StorageError(
                f"{where}: no space left on the device for a checkpoint; the one before is whole. "
                "Free some space without deleting checkpoints of this run, then use --resume"
            ) from error
        raise
