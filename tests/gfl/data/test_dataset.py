"""Samples and batches: augmentation, sharing among workers, padding."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gfl.config.loader import ConfigError, derive
from gfl.data.augment import Augmentation, Labelled, as_sample
from gfl.data.dataset import (
    DetectionDataset,
    FitWithin,
    build_loader,
    collate,
    fit_within,
    fitted_size,
)
from gfl.data.samplers import EvaluationBatches, TrainBatches, repeats_per_epoch
from gfl.data.split import ImageRecord, load_splits
from gfl.errors import DataError


@pytest.fixture
def dataset(tiny):
    return DetectionDataset(load_splits(tiny)[0], tiny, training=True)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1067)),
        (427, 640, (800, 1199)),
        (1000, 300, (1333, 400)),
        (375, 1242, (402, 1333)),
    ],
)
def test_images_fit_as_in_the_reference(height, width, expected):
    assert fitted_size(height, width, 800, 1333) == expected


def test_boxes_scale_with_their_image():
    image, boxes = as_sample(
        torch.zeros(3, 48, 64, dtype=torch.uint8), torch.tensor([[8.0, 6, 64, 48]])
    )
    image, boxes = FitWithin((96, 96), 1333)(image, boxes)
    assert image.shape == (3, 96, 128)
    assert boxes.tolist() == [[16, 12, 128, 96]]
    assert image.dtype == torch.uint8


def test_boxes_flip_with_their_image_and_are_clipped(tiny):
    data = derive(type(tiny), tiny, ["data.augment.flip=1.0"]).data
    flipped = Augmentation(data, fit_within(data, training=True))
    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    pixels[:, :, :10] = 255
    sample = as_sample(pixels, torch.tensor([[-5.0, 2, 10, 70]]))
    (image, boxes, _), changes = flipped(Labelled(*sample, torch.tensor([0])))
    assert image[0, 0].tolist() == [0] * 54 + [255] * 10
    assert boxes.tolist() == [[54, 2, 64, 64]]
    assert changes == ["horizontal flip"]


def test_a_sample_depends_on_epoch_and_image_alone(dataset):
    first = dataset[1, 5]
    torch.rand(7)
    state = torch.get_rng_state()
    again = dataset[1, 5]
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(torch.get_rng_state(), state)
    flips = {torch.equal(dataset[e, 5].pixels, first.pixels) for e in range(12)}
    assert flips == {True, False}


def images(count, tall=(), labels=None):
    return [
        ImageRecord(
            image_id=i,
            path=Path(f"{i}.jpg"),
            size=(40, 30) if i in tall else (30, 40),
            boxes=np.zeros((1, 4), np.float32),
            labels=np.array(labels[i] if labels else [0]),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_every_global_batch(tiny, world):
    shares = [TrainBatches(images(37), tiny, rank, world, 0) for rank in range(world)]
    single = TrainBatches(images(37), tiny, 0, 1, 0)
    for step, expected in enumerate(single):
        assert [key for share in shares for key in share.keys(step)] == expected
    assert single.steps_per_epoch == 5
    epoch = [image for step in range(5) for _, image in single.keys(step)]
    assert sorted(epoch[:37]) == list(range(37))
    assert epoch[37:] == epoch[:3]


def test_batches_go_on_from_any_step(tiny):
    complete = list(TrainBatches(images(20), tiny, 0, 1, 0))
    assert list(TrainBatches(images(20), tiny, 0, 1, 4)) == complete[4:]
    assert len(TrainBatches(images(20), tiny, 0, 1, 4)) == len(complete) - 4


def test_a_batch_larger_than_the_set_repeats_it(tiny):
    (keys, *_) = TrainBatches(images(3), tiny, 0, 1, 0)
    assert len(keys) == 8
    assert {image for _, image in keys} == {0, 1, 2}


def test_wide_and_tall_images_have_batches_of_their_own(tiny):
    tall = set(range(0, 40, 3))
    batches = TrainBatches(images(40, tall), tiny, 0, 1, 0)
    epoch = [batches.keys(step) for step in range(batches.steps_per_epoch)]
    assert sorted(image for keys in epoch for _, image in keys) == list(range(40))
    mixed = [keys for keys in epoch if len({image in tall for _, image in keys}) > 1]
    assert len(mixed) <= 1
    apart = derive(type(tiny), tiny, ["data.group_by_aspect=false"])
    order = [key for keys in TrainBatches(images(40, tall), apart, 0, 1, 0) for key in keys]
    assert (
        order[:40] == [key for keys in TrainBatches(images(40), tiny, 0, 1, 0) for key in keys][:40]
    )


def test_an_image_that_is_repeated_is_augmented_anew(tiny):
    config = derive(type(tiny), tiny, ["data.repeat=3", "data.batch=6"])
    batches = TrainBatches(images(4), config, 0, 1, 0)
    assert batches.steps_per_epoch == 2
    keys = [key for step in range(4) for key in batches.keys(step)]
    assert sorted(keys) == [(draw, image) for draw in range(6) for image in range(4)]


def test_rare_classes_are_shown_more_often(tiny):
    """Class 1 is on 1 of 16 images: sqrt(0.5 / (1 / 16)) = 2.83, rounded up."""
    labels = [[0, 0]] * 14 + [[0, 1], []]
    config = derive(type(tiny), tiny, ["data.oversample=0.5"])
    assert repeats_per_epoch(images(16, labels=labels), config.data) == [1] * 14 + [3, 1]
    twice = derive(type(tiny), tiny, ["data.oversample=0.5", "data.repeat=2"])
    assert repeats_per_epoch(images(16, labels=labels), twice.data)[14] == 6


def test_the_short_side_is_drawn_for_training_alone(tiny):
    config = derive(type(tiny), tiny, ["data.multi_scale=[48, 60]"])
    split = load_splits(config)[0]
    training = DetectionDataset(split, config, training=True)
    sizes = {training[draw, 0].pixels.shape[1] for draw in range(60)}
    assert sizes == set(range(48, 61))
    assert DetectionDataset(split, config, training=False)[3, 0].pixels.shape[1] == 64
    with pytest.raises(ConfigError, match=r"multi_scale \[60, 48\]: expected \[smallest, largest"):
        derive(type(tiny), tiny, ["data.multi_scale=[60, 48]"])


def test_batches_that_cannot_be_shared_equally_are_refused(tiny):
    with pytest.raises(DataError, match="8 images cannot be shared equally by 3 workers"):
        TrainBatches(images(37), tiny, 0, 3, 0)


@pytest.mark.parametrize(
    ("images", "batch", "world"), [(11, 3, 2), (5, 8, 3), (12, 4, 2), (1, 1, 4)]
)
def test_evaluation_takes_every_image_once(images, batch, world):
    shares = [list(EvaluationBatches([1] * images, batch, rank, world)) for rank in range(world)]
    whole = list(EvaluationBatches([1] * images, batch, 0, 1))
    dealt = [keys for share in shares for keys in share]
    assert sorted(dealt) == sorted(whole)
    assert sorted(image for keys in dealt for _, image in keys) == list(range(images))


def test_batches_are_padded_to_a_multiple_of_32(dataset):
    one, other = dataset[0, 0], dataset[0, 1]
    small = replace(
        other, pixels=other.pixels[:, :40, :50], boxes=other.boxes[:0], labels=other.labels[:0]
    )
    batch = collate([one, small])
    assert batch.pixels.shape == (2, 3, 64, 64)
    assert batch.targets.sizes.tolist() == [[64, 64], [40, 50]]
    assert batch.targets.mask.sum(dim=1).tolist() == [len(one.labels), 0]
    assert batch.pixels[1, :, 40:].max() == 0


def test_a_batch_without_any_object_has_a_masked_column(dataset):
    sample = dataset[0, 0]
    empty = replace(sample, boxes=sample.boxes[:0], labels=sample.labels[:0])
    targets = collate([empty, empty]).targets
    assert targets.boxes.shape == (2, 1, 4)
    assert not targets.mask.any()


def test_loading_processes_give_the_same_batches(tiny, dataset):
    batches = TrainBatches(dataset.split.records, tiny, 0, 1, 0)
    here = [b.pixels for b in islice(build_loader(dataset, batches, 0, pin=False), 3)]
    there = [b.pixels for b in islice(build_loader(dataset, batches, 2, pin=False), 3)]
    assert len(here) == 3
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other)


def test_an_image_of_another_size_than_annotated_is_named(coco, tiny):
    folder, file = coco(annotations=[{"bbox": [0, 0, 9, 9]}])
    Image.new("RGB", (60, 48)).save(f"{folder}/a.jpg")
    config = derive(
        type(tiny), tiny,
        [f"data.train={{images: {folder}, annotations: {file}}}", "model.num_classes=1",
         f"data.val={{images: {folder}, annotations: {file}}}"],
    )  # fmt: skip
    broken = DetectionDataset(load_splits(config)[0], config, training=True)
    with pytest.raises(DataError, match=r"a\.jpg: is 60 x 48 px, but its annotations say 64 x 48"):
        broken[0, 0]
