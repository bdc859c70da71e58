"""Two versions side by side: configuration, AP of every class, pictures where they disagree."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gfl.config.loader import flatten, reproducible
from gfl.data.images import read_image
from gfl.evaluation.bootstrap import Gain, measure_gain
from gfl.evaluation.coco_eval import score_images
from gfl.evaluation.protocol import differences
from gfl.inference.visualize import draw_pairs
from gfl_platform.cluster.events import Watcher
from gfl_platform.config import JobConfig
from gfl_platform.registry.measurement import (
    Measurement,
    at_settings_of,
    images_of,
    measure,
    own_job,
    recall,
)
from gfl_platform.registry.models import Version
from gfl_platform.tracking.client import Store

PICTURED = 6
"""Number of images in the picture."""


@dataclass(frozen=True)
class Comparison:
    """The differences between version `b` and version `a`.

    Attributes:
        settings: The keys whose values differ, "key: value of a -> value of b".
        a: The measurement of version a.
        b: The measurement of version b on the same images.
        gain: AP of b less that of a.
        protocols: Where the protocols of both FPS differ, empty if the FPS are comparable.
    """

    settings: list[str]
    a: Measurement
    b: Measurement
    gain: Gain
    protocols: list[str]


def compare(
    job: JobConfig, store: Store, versions: tuple[Version, Version], picture: Path, watch: Watcher
) -> Comparison:
    """Compare the versions `a` and `b` on the images of `a`.

    The images on which they disagree most are drawn.

    Args:
        job: Where to measure.
        store: The registry.
        versions: The version `a` and the version `b`.
        picture: The PNG file to write.
        watch: Called with the events of the measurements.

    Raises:
        ValueError: a checkpoint, the dataset or the cluster cannot be used.
        JobFailedError: a worker stopped.
    """
    a, b = versions
    job_a, job_b = own_job(job, store, a), own_job(job, store, b)
    kept_key = f"{a.tags.get('data')}-{a.tags.get('protocol')}"
    of_a = recall(store, a, kept_key) or measure(job_a, store, a, watch)
    of_b = recall(store, b, of_a.key)
    of_b = of_b or measure(at_settings_of(job_b, job_a), store, b, watch)
    split = images_of(job_a, store.storage.cache, list(of_a.ap_by_class))
    gain = measure_gain(split, of_b.rows, of_a.rows, job_a)
    score_a, score_b = (score_images(split, rows, job_a) for rows in (of_a.rows, of_b.rows))
    largest = np.argsort(-np.abs(score_a - score_b), kind="stable")[:PICTURED]
    draw_pairs(
        [read_image(split.records[image].path) for image in largest],
        [
            [rows[rows[:, 0] == split.numbers[image]] for image in largest]
            for rows in (of_a.rows, of_b.rows)
        ],
        split.classes,
        [f"version {version.version}" for version in (a, b)],
        picture,
    )
    protocols = differences(of_a.protocol, of_b.protocol)
    return Comparison(_differing_settings(job_a, job_b), of_a, of_b, gain, protocols)


def _differing_settings(a: JobConfig, b: JobConfig) -> list[str]:
    """Return "key: value in a -> value in b" for every key that changes what is computed."""
    before, after = (flatten(reproducible(job).model_dump(mode="json")) for job in (a, b))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
