"""Samples and batches: augmentation, sharing among workers, padding."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from gfl.configfile import derive
from gfl.data import load_splits
from gfl.data.coco import DataError
from gfl.data.loading import (
    DetectionDataset,
    EvaluationBatches,
    TrainBatches,
    build_loader,
    collate,
)
from gfl.data.transforms import FitWithin, as_sample, build_transforms, fitted_size, read_image


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
    image, boxes = FitWithin(96, 1333)(image, boxes)
    assert image.shape == (3, 96, 128)
    assert boxes.tolist() == [[16, 12, 128, 96]]
    assert image.dtype == torch.uint8


def test_boxes_flip_with_their_image_and_are_clipped(tiny):
    flipped = build_transforms(derive(type(tiny), tiny, ["data.flip=1.0"]).data, training=True)
    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    pixels[:, :, :10] = 255
    image, boxes = flipped(*as_sample(pixels, torch.tensor([[-5.0, 2, 10, 70]])))
    assert image[0, 0].tolist() == [0] * 54 + [255] * 10
    assert boxes.tolist() == [[54, 2, 64, 64]]


def test_a_sample_depends_on_epoch_and_image_alone(dataset):
    first = dataset[1, 5]
    torch.rand(7)
    state = torch.get_rng_state()
    again = dataset[1, 5]
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(torch.get_rng_state(), state)
    flips = {torch.equal(dataset[e, 5].pixels, first.pixels) for e in range(12)}
    assert flips == {True, False}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_every_global_batch(tiny, world):
    shares = [TrainBatches(37, tiny, rank, world, 0) for rank in range(world)]
    single = TrainBatches(37, tiny, 0, 1, 0)
    for step, expected in enumerate(single):
        assert [key for share in shares for key in share.keys(step)] == expected
    assert single.steps_per_epoch == 5
    epoch = [image for step in range(5) for _, image in single.keys(step)]
    assert sorted(epoch[:37]) == list(range(37))
    assert epoch[37:] == epoch[:3]


def test_batches_go_on_from_any_step(tiny):
    complete = list(TrainBatches(20, tiny, 0, 1, 0))
    assert list(TrainBatches(20, tiny, 0, 1, 4)) == complete[4:]
    assert len(TrainBatches(20, tiny, 0, 1, 4)) == len(complete) - 4


def test_a_batch_larger_than_the_set_repeats_it(tiny):
    (keys, *_) = TrainBatches(3, tiny, 0, 1, 0)
    assert len(keys) == 8
    assert {image for _, image in keys} == {0, 1, 2}


def test_batches_that_cannot_be_shared_equally_are_refused(tiny):
    with pytest.raises(DataError, match="8 images cannot be shared equally by 3 workers"):
        TrainBatches(37, tiny, 0, 3, 0)


@pytest.mark.parametrize(
    ("images", "batch", "world"), [(11, 3, 2), (5, 8, 3), (12, 4, 2), (1, 1, 4)]
)
def test_evaluation_takes_every_image_once(images, batch, world):
    shares = [list(EvaluationBatches(images, batch, rank, world)) for rank in range(world)]
    whole = list(EvaluationBatches(images, batch, 0, 1))
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
    batches = TrainBatches(len(dataset), tiny, 0, 1, 0)
    here = [b.pixels for b in islice(build_loader(dataset, batches, 0, pin=False), 3)]
    there = [b.pixels for b in islice(build_loader(dataset, batches, 2, pin=False), 3)]
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other)


def test_a_damaged_image_is_named(tmp_path, dataset):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    with pytest.raises(DataError, match=r"broken\.jpg: cannot be read as an image"):
        read_image(path)
    with pytest.raises(DataError, match=r"absent\.jpg: cannot be read"):
        read_image(tmp_path / "absent.jpg")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        read_image(path)


def test_a_truncated_jpeg_is_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    noise = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut\.jpg"):
        read_image(cut)


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


def test_grey_and_palette_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA"):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (8, 6)).save(path)
        assert read_image(path).shape == (3, 6, 8)
