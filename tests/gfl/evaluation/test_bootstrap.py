"""Intervals of AP differences: pycocotools' figures, and what drawing images really gives."""

import numpy as np
import pytest

from gfl.config.schema import Config
from gfl.evaluation import bootstrap, coco_eval
from gfl.evaluation.bootstrap import measure_gain
from gfl.evaluation.coco_eval import evaluate_split
from tests.support.splits import split_of


@pytest.fixture
def scene():
    """A split of 12 images, and what two detectors of different skill found in it."""
    generator = np.random.default_rng(5)
    annotations, both = [], ([], [])
    for image in range(1, 13):
        for _ in range(generator.integers(0, 4)):
            kind, box = generator.choice([3, 7]), generator.uniform(10, 40, 4)
            annotations.append((image, int(kind), box.tolist(), int(generator.random() < 0.15)))
            for rows, noise in zip(both, (2.0, 6.0), strict=True):
                moved = box + generator.normal(0, noise, 4)
                rows.append([image - 1, *moved, generator.random(), int(kind == 7)])
        for rows in both:  # nothing is there
            rows.append([image - 1, *generator.uniform(10, 40, 4), generator.random(), 0])
    return split_of(annotations, 12), *(np.array(rows) for rows in both)


def test_the_difference_is_the_evaluations(scene):
    split, rows, baseline = scene
    config = Config()
    gain = measure_gain(split, rows, baseline, config, draws=50)
    one, other = (evaluate_split(split, each, config) for each in (rows, baseline))
    assert gain.ap == pytest.approx(one.metrics["AP"] - other.metrics["AP"], abs=1e-12)
    assert gain.low < gain.ap < gain.high
    assert gain.by_class == pytest.approx(
        {name: one.ap_by_class[name] - other.ap_by_class[name] for name in "ab"}, abs=1e-12
    )
    same = measure_gain(split, rows, rows, config, draws=50)
    assert (same.ap, same.low, same.high, same.is_noise) == (0, 0, 0, True)


def test_an_image_that_is_drawn_twice_counts_twice(scene):
    """Weights give what pycocotools finds where images are really there several times."""
    split, rows, _ = scene
    order = {number: place for place, number in enumerate(split.numbers)}
    matches = coco_eval.match_split(split, rows, Config())
    classes = bootstrap._by_class(matches, order)
    generator = np.random.default_rng(1)
    for _ in range(5):
        drawn = generator.integers(1, 13, 12)
        weights = np.bincount(drawn, minlength=13)[1:].astype(float)
        annotations, copies = [], []
        for new, image in enumerate(drawn, start=1):
            objects = split.truth.objects
            annotations += [
                (new, (3, 7)[a["category"]], a["bbox"].tolist(), int(a["ignored"] > 0))
                for a in objects[objects["image"] == image - 1]
            ]
            part = rows[rows[:, 0] == image - 1].copy()
            part[:, 0] = new - 1
            copies.append(part)
        together = split_of(annotations, 12)
        expected = evaluate_split(together, np.concatenate(copies), Config(), official=True)
        (ap,) = bootstrap._mean_ap(bootstrap._ap_by_class(classes, weights[None]))
        assert ap == pytest.approx(expected.metrics["AP"], abs=1e-12)


def test_the_interval_is_as_wide_as_sampling_makes_it():
    """A detector that finds half of all objects, beside one that finds all: a binomial."""
    count = 200
    box = (0, 0, 50, 50)
    split = split_of([(n, 3, box, 0) for n in range(1, count + 1)], count)
    everything = np.array([[n, *box, 0.9, 0] for n in range(count)], float)
    gain = measure_gain(split, everything, everything[::2], Config(), draws=2000)
    assert gain.ap == pytest.approx(0.5, abs=0.01)
    deviation = (0.25 / count) ** 0.5
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert not gain.is_noise
    assert gain.by_class == pytest.approx({"a": gain.ap})


def test_without_detections_there_is_no_difference(scene):
    nothing = np.empty((0, 7))
    gain = measure_gain(scene[0], nothing, nothing, Config(), draws=20)
    assert (gain.ap, gain.low, gain.high) == (0, 0, 0)
