"""Measurements of registered versions that can be compared: the same images, the same protocol."""

import io
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from gfl.checkpoint.files import model_digest, read_config
from gfl.config.loader import derive
from gfl.config.schema import SplitConfig
from gfl.data.split import Split, read_split
from gfl.data.synthetic import render_shapes
from gfl.evaluation.protocol import protocol_hash
from gfl.structures import Rows
from gfl_platform.cluster.events import Watcher
from gfl_platform.config import JobConfig
from gfl_platform.evaluation.evaluate import evaluate_checkpoint
from gfl_platform.registry import models
from gfl_platform.registry.models import Version
from gfl_platform.storage.cache import Cache
from gfl_platform.tracking.client import Store

logger = logging.getLogger(__name__)

FOLDER = "evaluations"
"""Folder for measurements among the artifacts of a run, one file for each version and key."""

IMAGE_KEYS = ("format", "classes", "val", "shapes")
"""Keys of the section `data` that say which images are evaluated."""

SCALING_KEYS = ("short_side", "long_side", "val_batch")
"""Keys of the section `data` that say how images are scaled."""


@dataclass(frozen=True)
class Measurement:
    """AP, FPS and the detections of one version on one set of images.

    Attributes:
        metrics: COCO's statistics, by name.
        ap_by_class: AP of each class, by name, in the order of labels.
        fps: Frames per second.
        protocol: The protocol of the FPS (`gfl.evaluation.protocol`).
        digest: Digest of the images and their annotations.
        rows: The detections, (N, 7), with the columns of `gfl.structures.Rows`.
        checkpoint: Digest of the checkpoint that was measured (`model_digest`); empty if unknown.
    """

    metrics: dict[str, float]
    ap_by_class: dict[str, float]
    fps: float
    protocol: dict[str, Any]
    digest: str
    rows: Rows
    checkpoint: str = ""

    @property
    def key(self) -> str:
        """Name of the images and the protocol; measurements with the same key are comparable."""
        return f"{self.digest[:12]}-{protocol_hash(self.protocol)}"


def own_job(where: JobConfig, store: Store, version: Version) -> JobConfig:
    """Return the configuration that a version was trained with, with the other sections of `where`.

    Raises:
        ValueError: the checkpoint of the version cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="gfl-model-") as scratch:
        config = read_config(models.fetch_checkpoint(store, _uri(version), Path(scratch)))
    sections = ("cluster", "storage", "tracking", "registry")
    return derive(JobConfig, config, []).model_copy(
        update={section: getattr(where, section) for section in sections}
    )


def on_images_of(job: JobConfig, other: JobConfig) -> JobConfig:
    """Return `job` with the images and the section `evaluation` of `other`."""
    data = {key: getattr(other.data, key) for key in IMAGE_KEYS}
    changed = {"data": job.data.model_copy(update=data), "evaluation": other.evaluation}
    return job.model_copy(update=changed)


def at_settings_of(job: JobConfig, other: JobConfig) -> JobConfig:
    """Return `job` with the images, their scaling and the post-processing of `other`."""
    job = on_images_of(job, other)
    data = {key: getattr(other.data, key) for key in SCALING_KEYS}
    changed = {"data": job.data.model_copy(update=data), "postprocess": other.postprocess}
    return job.model_copy(update=changed)


def images_of(job: JobConfig, cache: Cache, classes: Sequence[str]) -> Split:
    """Return the images on which `job` evaluates a model with `classes`, as local files.

    Raises:
        ValueError: the dataset cannot be used.
    """
    render_shapes(job)
    here = {key: str(cache.local(place)) for key, place in job.data.val}
    data = job.data.model_copy(update={"val": SplitConfig(**here)})
    return read_split(data, "val", job.model.num_classes, classes)


def measure(job: JobConfig, store: Store, version: Version, watch: Watcher) -> Measurement:
    """Evaluate a version as `job` says, and keep the measurement among the artifacts of its run.

    Raises:
        ValueError: the checkpoint, dataset or cluster cannot be used.
        JobFailedError: a worker stopped.
    """
    with store.storage.scratch_folder() as scratch:
        checkpoint = models.fetch_checkpoint(store, _uri(version), scratch)
        digest = model_digest(checkpoint)
        result = evaluate_checkpoint(checkpoint, job, watch)
    measurement = Measurement(
        metrics=result["metrics"],
        ap_by_class=result["ap_by_class"],
        fps=result["fps"],
        protocol=result["protocol"],
        digest=result["digest"],
        rows=result["detections"],
        checkpoint=digest,
    )
    keep(store, version, measurement)
    return measurement


def recall(store: Store, version: Version, key: str) -> Measurement | None:
    """Return the measurement of a version that is kept under `key`, if there is one.

    A damaged file counts as none, so that the version is measured again.
    """
    from mlflow.exceptions import MlflowException

    name = f"{FOLDER}/{version.name}-{version.version}-{key}.npz"
    with tempfile.TemporaryDirectory(prefix="gfl-measured-") as scratch:
        try:
            path = store.artifact(version.run_id, name, Path(scratch))
            with np.load(path, allow_pickle=False) as kept:
                # A file with other columns has another name for its rows.
                return Measurement(**json.loads(str(kept["figures"])), rows=kept["numbered_rows"])
        except (MlflowException, OSError, EOFError, ValueError, LookupError, BadZipFile) as error:
            logger.debug("%s: not read (%s)", name, error)
            return None


def keep(store: Store, version: Version, measurement: Measurement) -> None:
    """Write a measurement to the artifacts of the run that trained the version."""
    figures = {name: value for name, value in vars(measurement).items() if name != "rows"}
    content = io.BytesIO()
    np.savez_compressed(content, figures=json.dumps(figures), numbered_rows=measurement.rows)
    with tempfile.TemporaryDirectory(prefix="gfl-measured-") as scratch:
        path = Path(scratch) / f"{version.name}-{version.version}-{measurement.key}.npz"
        path.write_bytes(content.getvalue())
        store.client.log_artifact(version.run_id, str(path), FOLDER)


def _uri(version: Version) -> str:
    return f"models:/{version.name}/{version.version}"
