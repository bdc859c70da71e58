"""Decoded images, kept in a folder: from the second epoch on, reading replaces decoding."""

import hashlib
import logging
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from gfl.data.images import DECODER_VERSION, read_image

logger = logging.getLogger(__name__)


def read_cached(path: Path, folder: Path) -> Tensor:
    """Return `read_image(path)`, from `folder` if it was decoded before; keep it there if not.

    An entry belongs to a file's absolute path, time of change and size in bytes. Processes may read
    and write at once: an entry appears complete, or not at all.

    Raises:
        DataError: a file that is missing or no image.
    """
    try:
        status = path.stat()
    except OSError:
        return read_image(path)  # says what is wrong
    key = f"{DECODER_VERSION} {path.absolute()} {status.st_mtime_ns} {status.st_size}"
    name = hashlib.sha256(key.encode()).hexdigest()
    entry = folder / name[:2] / f"{name}.npy"  # no folder of a hundred thousand files
    pixels = _load(entry)
    if pixels is None:
        pixels = read_image(path)
        _keep(pixels, entry, folder)
    return pixels


def _load(entry: Path) -> Tensor | None:
    """Return the pixels of an entry, None where there is none or it is damaged."""
    if not entry.exists():
        return None
    try:
        pixels = np.load(entry, allow_pickle=False)
        if (pixels.dtype, pixels.ndim, pixels.shape[-1]) == (np.uint8, 3, 3):
            return torch.from_numpy(pixels).permute(2, 0, 1)
    except Exception:  # a damaged header makes numpy raise whatever its parsers meet
        logger.debug("%s: damaged", entry, exc_info=True)
    return None


def _keep(pixels: Tensor, entry: Path, folder: Path) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=entry.parent) as scratch:
            whole = Path(scratch) / entry.name
            np.save(whole, pixels.permute(1, 2, 0).numpy())
            whole.replace(entry)
    except OSError as error:
        _warn(folder, error.strerror)


@cache
def _warn(folder: Path, reason: str) -> None:
    """Say once that images are not kept; training goes on without."""
    logger.warning("data.cache: %s: cannot keep decoded images (%s)", folder, reason)
