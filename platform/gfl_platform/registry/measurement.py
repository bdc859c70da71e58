"""Measurements of registered versions that can be compared: the same images, the same protocol."""

import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gfl.checkpoint.files import read_config
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
from gfl_platform.storage.storage import Storage
from gfl_platform.tracking.client import connect

FOLDER = "evaluations"
"""Among the artifacts of a run: what was measured of its model, by images and protocol."""

OF_IMAGES = ("format", "classes", "val", "shapes")
"""Of the section `data`: which images are evaluated."""

OF_SCALING = ("short_side", "long_side", "val_batch")
"""Of the section `data`: how they are scaled."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of a version.

    Attributes:
        metrics: COCO's statistics.
        ap_by_class: AP of each class, by name, in the order of labels.
        fps: Frames per second.
        protocol: How they were measured.
        digest: Of the images and their annotations.
        rows: The detections, (N, 7), as `gfl.structures.Rows` says.
    """

    metrics: dict[str, float]
    ap_by_class: dict[str, float]
    fps: float
    protocol: dict[str, Any]
    digest: str
    rows: Rows

    @property
    def key(self) -> str:
        """Names the images and the protocol: measurements with the same key are comparable."""
        return f"{self.digest[:12]}-{protocol_hash(self.protocol)}"


def own_job(where: JobConfig, version: Version) -> JobConfig:
    """Return the configuration that a version was trained with, to be run as `where` says.

    Raises:
        ValueError: its checkpoint cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="gfl-model-") as scratch:
        config = read_config(models.fetch_checkpoint(where, _uri(version), Path(scratch)))
    sections = ("cluster", "storage", "tracking", "registry")
    return derive(JobConfig, config, []).model_copy(
        update={section: getattr(where, section) for section in sections}
    )


def on_images_of(job: JobConfig, other: JobConfig) -> JobConfig:
    """Return `job` with the images of `other`, and its way to count detections."""
    data = {key: getattr(other.data, key) for key in OF_IMAGES}
    changed = {"data": job.data.model_copy(update=data), "evaluation": other.evaluation}
    return job.model_copy(update=changed)


def at_settings_of(job: JobConfig, other: JobConfig) -> JobConfig:
    """Return `job` with the images, their scaling and the post-processing of `other`."""
    job = on_images_of(job, other)
    data = {key: getattr(other.data, key) for key in OF_SCALING}
    changed = {"data": job.data.model_copy(update=data), "postprocess": other.postprocess}
    return job.model_copy(update=changed)


def images_of(job: JobConfig, classes: Sequence[str]) -> Split:
    """Return the images that `job` evaluates a model with `classes` on, to be read in this process.

    Raises:
        ValueError: a dataset that cannot be used.
    """
    render_shapes(job)
    cache = Storage(job.storage).cache
    here = {key: str(cache.local(place)) for key, place in job.data.val}
    data = job.data.model_copy(update={"val": SplitConfig(**here)})
    return read_split(data, "val", job.model.num_classes, classes)


def measure(job: JobConfig, version: Version, watch: Watcher) -> Measurement:
    """Evaluate a version as `job` says, and keep what was measured with its run.

    Raises:
        ValueError: a checkpoint, dataset or cluster that cannot be used.
        JobFailedError: a worker stopped.
    """
    with Storage(job.storage).scratch_folder() as scratch:
        checkpoint = models.fetch_checkpoint(job, _uri(version), scratch)
        found = evaluate_checkpoint(checkpoint, job, watch)
    measured = Measurement(
        metrics=found["metrics"],
        ap_by_class=found["ap_by_class"],
        fps=found["fps"],
        protocol=found["protocol"],
        digest=found["digest"],
        rows=found["detections"],
    )
    _keep(job, version, measured)
    return measured


def recall(job: JobConfig, version: Version, key: str) -> Measurement | None:
    """Return what is kept of a version's measurement under `key`, if there is any."""
    client = connect(job)
    from mlflow.exceptions import MlflowException

    name = f"{FOLDER}/{version.name}-{version.version}-{key}.npz"
    with tempfile.TemporaryDirectory(prefix="gfl-measured-") as scratch:
        try:
            path = client.download_artifacts(version.run_id, name, scratch)
        except (MlflowException, OSError):
            return None
        with np.load(path, allow_pickle=False) as kept:
            return Measurement(**json.loads(str(kept["figures"])), rows=kept["rows"])


def _keep(job: JobConfig, version: Version, measured: Measurement) -> None:
    figures = {name: value for name, value in vars(measured).items() if name != "rows"}
    content = io.BytesIO()
    np.savez_compressed(content, figures=json.dumps(figures), rows=measured.rows)
    with tempfile.TemporaryDirectory(prefix="gfl-measured-") as scratch:
        path = Path(scratch) / f"{version.name}-{version.version}-{measured.key}.npz"
        path.write_bytes(content.getvalue())
        connect(job).log_artifact(version.run_id, str(path), FOLDER)


def _uri(version: Version) -> str:
    return f"models:/{version.name}/{version.version}"
