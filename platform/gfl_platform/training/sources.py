"""Weights that a training starts from: files, published weights and our own models."""

import hashlib
import logging
import shutil
import tempfile
from pathlib import Path

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

    Downloads are kept in the folder `weights` of the storage.

    Args:
        store: The registry, and the storage that keeps downloads.
        location: A path, `s3://BUCKET/KEY`, `https://...`, `torchvision://resnet50`, or one of our
            models: a checkpoint folder, `models:/NAME@ALIAS`, `runs:/ID`.

    Raises:
        StorageError: the location cannot be read.
    """
    storage = store.storage
    if location.startswith(("models:/", "runs:/")):
        return fetch_model(store, location) / WEIGHTS
    if "://" not in location:
        path = Path(location).expanduser()
        return path / WEIGHTS if path.is_dir() else path
    if is_remote(location):
        return storage.cache.local(location)
    if location.startswith(TORCHVISION):
        location = _torchvision_url(location)
    if not location.startswith(("https://", "http://")):
        raise StorageError(
            f"{location}: expected a file, s3://, https://, torchvision:// or models:/"
        )
    # Many files are called latest.pth; only their locations differ.
    folder = hashlib.sha256(location.encode()).hexdigest()[:12]
    path = storage.root / "weights" / folder / Path(location).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        try:
            _download(location, partial)
        except Exception as error:  # urllib and the check of the checksum raise many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StorageError(
                f"{location}: cannot be downloaded ({reason}); put the file at {path}, or set "
                "model.pretrained to a local one"
            ) from error
        partial.replace(path)
    return path


def fetch_model(store: Store, location: str) -> Path:
    """Return the checkpoint folder of one of our models, where all nodes see it."""
    name = models.resolve(store, location)
    folder = store.storage.root / "weights" / name.replace("models:/", "").replace("/", "-")
    if not name.startswith("models:/") or not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
            fetched = models.fetch_checkpoint(store, name, Path(scratch))
            if not fetched.is_relative_to(scratch):
                return fetched
            fetched.replace(folder)
    return folder


def _torchvision_url(location: str) -> str:
    name = location.removeprefix(TORCHVISION)
    try:
        return get_model_weights(name)["IMAGENET1K_V1"].url
    except (ValueError, KeyError) as error:
        raise StorageError(f"{location}: torchvision has no such model") from error


def _download(url: str, path: Path) -> None:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / path.name
    if cached.exists():
        shutil.copy(cached, path)
        return
    # The name of a published file ends with the first digits of its checksum.
    checksum = torch.hub.HASH_REGEX.search(path.name)
    torch.hub.download_url_to_file(
        url, str(path), hash_prefix=checksum[1] if checksum else None, progress=False
    )
