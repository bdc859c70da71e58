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
from gfl.structures import Rows
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

PICTURED = 6


@dataclass(frozen=True)
class Comparison:
    """What distinguishes version `b` from `a`.

    Attributes:
        settings: "key: a's value -> b's value", where their configurations differ.
        a: What was measured of one.
        b: What was measured of the other, on the same images.
        gain: AP of b less that of a.
        protocols: Where the protocols of their FPS differ; empty if they compare.
    """

    settings: list[str]
    a: Measurement
    b: Measurement
    gain: Gain
    protocols: list[str]


def compare(job: JobConfig, a: Version, b: Version, picture: Path, watch: Watcher) -> Comparison:
    """Compare two versions on the images of `a`; draw those on which they disagree most.

    Args:
        job: Says where to measure and which registry.
        a: One version.
        b: The other.
        picture: The PNG file.
        watch: Is told how far the measurements are.

    Raises:
        ValueError: a checkpoint, dataset or cluster that cannot be used.
        JobFailedError: a worker stopped.
    """
    one, other = own_job(job, a), own_job(job, b)
    before, now = (flatten(reproducible(each).model_dump(mode="json")) for each in (one, other))
    keys = sorted(before.keys() | now.keys())
    settings = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    logged = f"{a.tags.get('data')}-{a.tags.get('protocol')}"
    of_a = recall(job, a, logged) or measure(one, a, watch)
    of_b = recall(job, b, of_a.key) or measure(at_settings_of(other, one), b, watch)
    split = images_of(one, list(of_a.ap_by_class))
    gain = measure_gain(split, of_b.rows, of_a.rows, one)
    scores = [score_images(split, each.rows, one) for each in (of_a, of_b)]
    most = np.argsort(-np.abs(scores[0] - scores[1]), kind="stable")[:PICTURED]
    draw_pairs(
        [read_image(split.records[image].path) for image in most],
        [[_of_image(each, split.records[i].image_id) for i in most] for each in (of_a, of_b)],
        dict(zip(split.category_ids, split.classes, strict=True)),
        [f"version {version.version}" for version in (a, b)],
        picture,
    )
    return Comparison(settings, of_a, of_b, gain, differences(of_a.protocol, of_b.protocol))


def _of_image(measured: Measurement, image_id: int) -> Rows:
    return measured.rows[measured.rows[:, 0] == image_id]
