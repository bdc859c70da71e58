"""Augmentation: presets, geometry of boxes, the rule of cut objects, the same digits everywhere."""

import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from gfl.config.loader import ConfigError, derive, dump_config, load_config, parse_config
from gfl.config.schema import PRESETS, AugmentConfig
from gfl.data.augment import (
    Labelled,
    as_sample,
    colour_map,
    flip_steps,
    geometric_steps,
    visible_share,
    whole,
    without_cut_objects,
)
from gfl.data.dataset import DetectionDataset, build_loader, collate
from gfl.data.mosaic import mixup, mosaic
from gfl.data.samplers import TrainBatches, combining_draws
from gfl.data.split import load_splits

EVERYTHING = AugmentConfig(
    flip=1.0, flip_vertical=1.0, quarter_turn=1.0, scale_jitter=(0.5, 2.0),
    iou_crop=1.0, zoom_out=1.0, affine=1.0,
)  # fmt: skip


def augmented(tiny, *changes):
    """Return a training set with `data.augment` changed."""
    config = derive(type(tiny), tiny, [f"data.augment.{change}" for change in changes])
    return DetectionDataset(load_splits(config)[0], config, training=True)


def test_single_keys_override_a_preset_in_any_order(tiny):
    for order in (1, -1):
        changes = ["data.augment.preset=strong", "data.augment.mosaic=0"][::order]
        augment = derive(type(tiny), tiny, changes).data.augment
        assert (augment.preset, augment.mosaic) == ("strong", 0)
        assert augment.mixup == PRESETS["strong"]["mixup"]


def test_a_preset_replaces_the_values_of_the_one_before(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("data: {augment: {preset: strong, flip: 0}}")
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\ndata: {augment: {preset: light}}")
    config = load_config(child)
    assert config.data.augment == AugmentConfig(preset="light")
    assert parse_config(dump_config(config), "again") == config
    assert load_config(base, ["data.augment.blur=1"]).data.augment.mosaic > 0


def test_the_page_has_the_values_of_every_preset():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]+\|(.+)\|$", page, re.MULTILINE)
    printed = {key: [cell.strip() for cell in cells.split("|")] for key, cells in rows}
    for number, preset in enumerate(("coco", "light", "strong", "aerial")):
        for key, value in AugmentConfig(preset=preset).model_dump().items():
            if key in ("preset", "blur", "jpeg"):
                continue
            text = f"{value:g}" if isinstance(value, float | int) else None
            expected = text or (f"{value[0]:g} to {value[1]:g}" if value else "none")
            assert printed[key][number] == expected, (preset, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("preset=storng", r"data\.augment\.preset: got 'storng'.*'coco'"),
        ("mosaic=2", r"data\.augment\.mosaic: got 2.*less than or equal to 1"),
        ("scale_jitter=[2, 1]", r"scale_jitter \[2\.0, 1\.0\]: expected \[smallest, largest\]"),
        ("scale_jitter=[0, 1]", r"data\.augment\.scale_jitter\.0: got 0"),
        ("close_epochs=-1", r"data\.augment\.close_epochs: got -1"),
        ("mosiac=1", r"unknown key; did you mean 'mosaic'"),
    ],
)
def test_wrong_values_are_refused_in_one_line(tiny, change, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        derive(type(tiny), tiny, [f"data.augment.{change}"])
    assert "\n" not in str(refusal.value)


def rectangles(draw_height, draw_width, corners):
    boxes = [
        (x * draw_width, y * draw_height, (x + (1 - x) * w) * draw_width,
         (y + (1 - y) * h) * draw_height)
        for x, y, w, h in corners
    ]  # fmt: skip
    return torch.tensor(boxes).round()


def mask_of(box, height, width):
    """Return a white box on black as an image."""
    image = torch.zeros(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    x1, y1, x2, y2 = box.int().tolist()
    image[:, y1:y2, x1:x2] = 255
    return tv_tensors.Image(image)


def bounds(image):
    """Return the box of a mask's pixels of 40 % brightness or more; None for no mask.

    At half the brightness the tips of rotated corners would be missing.
    """
    white = image[0] >= 104
    if not white.any():
        return None
    rows, columns = white.any(dim=1).nonzero(), white.any(dim=0).nonzero()
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


GEOMETRY = [*geometric_steps(EVERYTHING), *flip_steps(EVERYTHING)]


@pytest.mark.parametrize("step", GEOMETRY, ids=lambda step: step.name)
@settings(max_examples=25)
@given(
    height=st.integers(60, 90), width=st.integers(60, 90), seed=st.integers(0, 1000),
    corner=st.tuples(*[st.floats(0.05, 0.5)] * 2, *[st.floats(0.3, 0.9)] * 2),
)  # fmt: skip
def test_warped_boxes_are_those_of_warped_masks(step, height, width, seed, corner):
    """A mask and its box are cut by the same border, and agree within half a pixel.

    Sampling blunts the corners of a rotated mask, which adds up to a fifth of a pixel.
    """
    (box,) = rectangles(height, width, [corner])
    image, boxes = as_sample(mask_of(box, height, width), box[None])
    torch.manual_seed(seed)
    image, boxes = step.transform(image, whole(boxes))
    (warped,) = boxes.as_subclass(Tensor)
    tall, wide = image.shape[-2:]
    assert boxes.canvas_size == (tall, wide)
    warped = warped.clamp(min=0).minimum(torch.tensor([wide, tall, wide, tall]))
    found = bounds(image)
    if found is None:
        assert (warped[2:] - warped[:2]).min() <= 1.5
    else:
        allowed = 0.7 if step.name == "affine" else 0.5
        assert (warped - torch.tensor(found)).abs().max() <= allowed


@settings(max_examples=25)
@given(height=st.integers(40, 90), width=st.integers(40, 90), seed=st.integers(0, 1000))
def test_the_boxes_of_a_mosaic_are_those_of_its_masks(height, width, seed):
    torch.manual_seed(seed)
    sides = [(height, width), (64, 80), (80, 64), (50, 50)]
    canvas = []
    for shown in range(4):
        torch.manual_seed(seed)
        parts = []
        for number, (tall, wide) in enumerate(sides):
            box = torch.tensor([0.0, 0.0, wide, tall])
            pixels = mask_of(box if number == shown else box * 0, tall, wide)
            boxes = box[None] if number == shown else torch.zeros(0, 4)
            parts.append(Labelled(*as_sample(pixels, boxes), torch.full((len(boxes),), number)))
        image, boxes, labels = mosaic(parts, visible=0.0)
        assert image.shape[-2:] == (height, width)
        assert labels.tolist() == [shown]
        assert (boxes[0] - torch.tensor(bounds(image))).abs().max() <= 0.5
        canvas.append(image.bool())
    assert torch.stack(canvas).sum(dim=0).max() == 1  # no image covers another


def test_a_mixup_has_the_objects_of_both_images():
    first = Labelled(
        *as_sample(torch.full((3, 40, 60), 200, dtype=torch.uint8), torch.tensor([[0.0, 0, 9, 9]])),
        torch.tensor([1]),
    )
    second = Labelled(
        *as_sample(torch.zeros(3, 20, 20, dtype=torch.uint8), torch.tensor([[0.0, 0, 10, 20]])),
        torch.tensor([2]),
    )
    image, boxes, labels = mixup(first, second)
    assert labels.tolist() == [1, 2]
    assert boxes.tolist() == [[0, 0, 9, 9], [0, 0, 20, 40]]
    assert 60 <= int(image.min()) == int(image.max()) <= 140


def test_the_visible_share_decides_which_cut_objects_are_taught():
    """Areas in a region of 100 x 50: the boxes show 1, 1/2, 1/4, 6/25 and nothing."""
    boxes = torch.tensor(
        [[10.0, 10, 20, 20], [-10, 0, 10, 20], [90, 40, 110, 60], [-19, 0, 6, 9], [120, 0, 130, 9]]
    )
    region = torch.tensor([0.0, 0, 100, 50])
    assert visible_share(boxes, region).tolist() == pytest.approx([1, 0.5, 0.25, 0.24, 0])
    image, wrapped = as_sample(torch.zeros(3, 50, 100, dtype=torch.uint8), boxes)
    unclipped = tv_tensors.wrap(boxes, like=wrapped, clamping_mode=None)
    kept = without_cut_objects(Labelled(image, unclipped, torch.arange(5)), 0.25)
    assert kept.labels.tolist() == [0, 1, 2]
    assert kept.boxes.tolist() == [[10, 10, 20, 20], [0, 0, 10, 20], [90, 40, 100, 50]]
    everything = without_cut_objects(Labelled(image, unclipped, torch.arange(5)), 0.0)
    assert everything.labels.tolist() == [0, 1, 2, 3]  # what is not in the image is never taught


def test_a_map_of_colours_keeps_grey_and_luma():
    grey = torch.full((3,), 100.0)
    turned = colour_map(1.0, 1.5, 0.1)
    torch.testing.assert_close(turned @ grey, grey, rtol=1e-4, atol=1e-2)
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luma @ turned, luma, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(colour_map(2.0, 1.0, 0.0), 2 * torch.eye(3), rtol=0, atol=1e-4)


def hashes(dataset, keys):
    samples = [dataset[key] for key in keys]
    return [(s.pixels.numpy().tobytes(), s.boxes.tolist(), s.labels.tolist()) for s in samples]


BUSY = ["mosaic=0.5", "mixup=0.3", "affine=0.3", "blur=0.3", "jpeg=0.3", "iou_crop=0.3"]
"""Changes that make every step of a preset likely in few samples."""


@pytest.mark.parametrize("preset", PRESETS)
def test_samples_depend_on_nothing_but_seed_epoch_and_image(tiny, preset):
    """Three epochs, of which the last has no mosaic, for any worker and from any step on."""
    changes = [f"preset={preset}", *(BUSY if preset == "strong" else []), "close_epochs=1"]
    dataset = augmented(tiny, *changes)
    config = derive(type(tiny), tiny, ["data.batch=6"])
    whole_run = list(TrainBatches(dataset.records, config, 0, 1, 0))
    keys = [key for batch in whole_run for key in batch]
    expected = dict(zip(keys, hashes(dataset, keys), strict=True))
    again = augmented(tiny, *changes)
    torch.rand(11)
    steps = len(whole_run)
    for world in (2, 3):
        for start in (steps // 3 + 1, steps - 2):  # inside and outside of the phase of mosaics
            for rank in reversed(range(world)):
                for keys in TrainBatches(dataset.records, config, rank, world, start):
                    assert hashes(again, keys) == [expected[key] for key in keys]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_loading_processes_give_the_same_samples(tiny, preset):
    dataset = augmented(tiny, f"preset={preset}", *(BUSY if preset == "strong" else []))
    batches = TrainBatches(dataset.records, tiny, 0, 1, 0)
    here = list(islice(build_loader(dataset, batches, 0, pin=False), 4))
    there = list(islice(build_loader(dataset, batches, 4, pin=False), 4))
    assert len(here) == 4
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.targets.boxes, other.targets.boxes)
        assert torch.equal(one.targets.labels, other.targets.labels)


def test_the_last_epochs_are_without_mosaic_and_mixup(tiny):
    """Two of three epochs, with two draws each, have them."""
    config = derive(
        type(tiny), tiny,
        ["data.repeat=2", "data.augment.mosaic=1", "data.augment.mixup=1",
         "data.augment.flip=0", "data.augment.close_epochs=1"],
    )  # fmt: skip
    dataset = DetectionDataset(load_splits(config)[0], config, training=True)
    assert config.schedule.epochs == 3
    assert [dataset[draw, 0].changes for draw in range(6)] == [("mosaic", "mixup")] * 4 + [()] * 2
    never = derive(type(config), config, ["data.augment.close_epochs=7"])
    assert combining_draws(dataset.records, never) == 0


def test_an_evaluation_is_never_augmented(tiny):
    config = derive(type(tiny), tiny, ["data.augment.preset=strong", "data.augment.mosaic=1"])
    plain = DetectionDataset(load_splits(tiny)[1], tiny, training=False)
    strong = DetectionDataset(load_splits(config)[1], config, training=False)
    assert torch.equal(plain[0, 3].pixels, strong[0, 3].pixels)
    assert strong[0, 3].changes == ()


def test_images_without_objects_pass_through_everything():
    image, boxes = as_sample(torch.zeros(3, 50, 60, dtype=torch.uint8), torch.zeros(0, 4))
    for step in GEOMETRY:
        torch.manual_seed(0)
        changed, kept = step.transform(image, whole(boxes))
        assert kept.shape == (0, 4)
        assert kept.canvas_size == tuple(changed.shape[-2:])


def test_a_sample_from_everything_is_one_for_the_network(tiny):
    dataset = augmented(tiny, "preset=strong", *BUSY, "quarter_turn=0.5", "zoom_out=0.5")
    samples = [dataset[0, image] for image in range(len(dataset))]
    for sample in samples:
        height, width = sample.pixels.shape[-2:]
        assert max(height, width) == 64
        low, high = sample.boxes[:, :2], sample.boxes[:, 2:]
        assert (low >= 0).all()
        assert (high <= torch.tensor([width, height])).all()
        assert ((high - low) >= 1).all()
    assert {name for sample in samples for name in sample.changes} >= {"mosaic", "affine", "JPEG"}
    assert collate(samples).pixels.shape[0] == len(samples)
