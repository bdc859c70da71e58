"""Weights to start from, fetched once: files, published ones, our own models."""

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


def fetch_sources(job: JobConfig, store: Store) -> dict[str, Path | None]:
    """Return the weights to start from and the teacher's checkpoint, where all nodes see them.

    Raises:
        ValueError: what cannot be fetched or loaded; before anything is written for the run.
    """
    weights, backbone, distillation = None, job.model.backbone, job.loss.distillation
    if job.model.pretrained is not None:
        weights = fetch_weights(store, job.model.pretrained)
        if not resources.in_cluster():  # where nodes' files may be elsewhere
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
    """Return a file of the weights at `location` that all nodes see.

    Remote ones are kept in the folder `weights` of the storage, and fetched only once.

    Args:
        store: The registry, and the storage that keeps remote weights.
        location: A path, `s3://BUCKET/KEY`, `https://...`, `torchvision://resnet50`, or one of our
            models: a checkpoint folder, `models:/NAME@ALIAS`, `runs:/ID`.

    Raises:
        StorageError: a location that cannot be reached.
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
    # Many files are called latest.pth: what tells them apart is where they are.
    folder = hashlib.sha256(location.encode()).hexdigest()[:12]
    path = storage.root / "weights" / folder / Path(location).name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        try:
            _download(location, partial)
        except Exception as error:  # urllib and the checksum each have their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StorageError(
                f"{location}: cannot be downloaded ({reason}); put the file at {path}, or set "
                "model.pretrained to a local one"
            ) from error
        partial.replace(path)
    return path


def fetch_model(store: Store, location: str) -> Path:
    """Return the checkpoint folder of one of our models (see `registry.fetch_checkpoint`)."""
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
    # Names of published files end in the beginning of their checksum.
    checksum = torch.hub.HASH_REGEX.search(path.name)
    torch.hub.download_url_to_file(
        url, str(path), hash_prefix=checksum[1] if checksum else None, progress=False
    )
