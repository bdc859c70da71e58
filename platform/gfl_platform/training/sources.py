"""Weights that a training starts from: files, published weights and our own models."""

import hashlib
import logging
import shutil
import tempfile
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torchvision.models import get_model_weights

from gfl.checkpoint.files import WEIGHTS
from gfl.checkpoint.pretrained import load_weights
from gfl.config.loader import reproducible
from gfl.model.detector import Detector
from gfl_platform.cluster import resources
from gfl_platform.config import JobConfig
from gfl_platform.registry import models
from gfl_platform.storage.files import StorageError
from gfl_platform.storage.s3 import is_remote
from gfl_platform.tracking.client import Store

logger = logging.getLogger(__name__)

TORCHVISION = "torchvision://"
"""Prefix of the locations of torchvision's weights."""

CHECKSUM = "#sha256="
"""What stands between a location and the checksum of its content."""

TIMEOUT_S = 60
"""How long a server may send nothing, in seconds."""


def fetch_sources(job: JobConfig, store: Store) -> dict[str, Path | None]:
    """Fetch the `weights` to start from and the checkpoint folder of the `teacher`.

    Returns:
        Their paths where all nodes see them, None for what the configuration does not name.

    Raises:
        ValueError: a file cannot be fetched, or its weights do not fit the model.
    """
    weights, backbone, distillation = None, job.model.backbone, job.loss.distillation
    if job.model.pretrained is not None:
        weights = fetch_weights(store, job.model.pretrained)
        if not resources.in_cluster():  # on a cluster, only the workers may see the file
            reset = job.model.reset_classifier
            load_weights(Detector(reproducible(job)), weights, reset_classifier=reset)
    elif backbone.frozen_stages >= 0 or backbone.norm_eval:
        logger.warning(
            "warning: model.pretrained is null, so frozen stages and fixed BatchNorm stay random; "
            "from scratch, set model.backbone.frozen_stages=-1 and model.backbone.norm_eval=false"
        )
    return {
        "weights": weights,
        "teacher": fetch_model(store, distillation.teacher) if distillation else None,
    }


def fetch_weights(store: Store, location: str) -> Path:
    """Return a file with the weights at `location` that all nodes see.

    Downloads are kept in the folder `weights` of the storage, each location in a folder of its own.

    Args:
        store: The registry, and the storage that keeps downloads.
        location: A path, `s3://BUCKET/KEY`, `https://...`, `torchvision://resnet50`, or one of our
            models: a checkpoint folder, `models:/NAME@ALIAS`, `runs:/ID`. Any file may end in
            `#sha256=HEX`, the checksum that it must have.

    Raises:
        StorageError: the location cannot be read, or its content has another checksum.
    """
    location, _, checksum = location.partition(CHECKSUM)
    path = _weights_file(store, location, checksum)
    if checksum and path.is_file():
        _require_checksum(path, checksum)
    return path


def _weights_file(store: Store, location: str, checksum: str) -> Path:
    storage = store.storage
    if location.startswith(("models:/", "runs:/")):
        return fetch_model(store, location) / WEIGHTS
    if "://" not in location:
        path = Path(location).expanduser()
        return path / WEIGHTS if path.is_dir() else path
    if is_remote(location):
        return storage.cache.local(location)
    is_published = location.startswith(TORCHVISION)
    url = _torchvision_url(location) if is_published else location
    if not url.startswith("https://"):
        raise StorageError(
            f"{location}: expected a file, s3://, https://, torchvision:// or models:/ (not "
            "http://, over which anybody on the way can change the weights)"
        )
    # Many files are called best.pth; only their locations differ.
    folder = hashlib.sha256(url.encode()).hexdigest()[:12]
    path = storage.root / "weights" / folder / (PurePosixPath(urlsplit(url).path).name or "weights")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        try:
            if not is_published or not _copy_from_hub(partial):
                _download(url, partial)
        except Exception as error:  # urllib raises many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StorageError(
                f"{location}: cannot be downloaded ({reason}); put the file at {path}, or set "
                "model.pretrained to a local one"
            ) from error
        if not _sha256(partial).startswith(_published_digits(path) if is_published else checksum):
            raise StorageError(
                f"{location}: the download has the SHA-256 {_sha256(partial)}, not {checksum}; "
                "correct the checksum, or ask who changed the file"
            )
        partial.replace(path)
    return path


def _require_checksum(path: Path, checksum: str) -> None:
    if _sha256(path) != checksum.lower():
        raise StorageError(
            f"{path}: its SHA-256 is {_sha256(path)}, not {checksum}; correct the checksum, or "
            "replace the file"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _published_digits(path: Path) -> str:
    """Return the first digits of the checksum, with which the name of a published file ends."""
    return path.stem.rpartition("-")[2]


def _copy_from_hub(path: Path) -> bool:
    """Copy a published file from torch's own folder of downloads, if it is there and undamaged."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / path.name
    if not cached.exists() or not _sha256(cached).startswith(_published_digits(path)):
        return False
    shutil.copy(cached, path)
    return True


def fetch_model(store: Store, location: str) -> Path:
    """Return the checkpoint folder of one of our models, where all nodes see it.

    A registered version is kept under its name, number, registry, run and time: another registry
    has other versions of the same name.
    """
    folder = store.storage.root / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    version = models.version_of(store, location)
    if version is None:
        return models.fetch_checkpoint(store, location, folder)
    identity = f"{store.uri} {version.run_id} {version.created_ms}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    kept = folder / f"{version.name}-{version.version}-{digest}"
    if not kept.exists():
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            name = f"models:/{version.name}/{version.version}"
            models.fetch_checkpoint(store, name, Path(scratch)).replace(kept)
    return kept


def _torchvision_url(location: str) -> str:
    name = location.removeprefix(TORCHVISION)
    try:
        return get_model_weights(name)["IMAGENET1K_V1"].url
    except (ValueError, KeyError) as error:
        raise StorageError(f"{location}: torchvision has no such model") from error


def _download(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, path.open("wb") as file:
        if not answer.url.startswith("https://"):
            raise ValueError(f"redirected to {answer.url}, which is not https://")
        shutil.copyfileobj(answer, file)
