"""Regression ranges against closed forms, an independent loop and the training transforms."""

from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfl.config.schema import AssignerConfig, Config, DataConfig, ModelConfig
from gfl.data.augment import as_sample
from gfl.data.dataset import build_transforms, fitted_size
from gfl.data.split import ImageRecord
from gfl.inspection.regression_range import (
    ACCEPTED_SHARE,
    BIN_WIDTHS,
    measure_regression_range,
    needed_reg_max,
    network_boxes,
    suggest_reg_max,
    training_scales,
)
from gfl.model.assigner import assign_targets
from gfl.model.boxes import STRIDES, grid_points
from gfl.model.losses import TARGET_MARGIN
from gfl.structures import pad_targets
from tests.support.detectors import level_sizes


def record(boxes, height=800, width=800):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), np.int64)
    return ImageRecord(1, Path("a.jpg"), (height, width), boxes, labels)


def config_of(**model):
    return Config(model=ModelConfig(**model))


def test_a_long_box_is_beyond_the_regression_range_to_its_left_and_right_alone():
    # 800 x 40 px: on P4 (stride 16) its ends lie 25 bins from its centre, where its locations are,
    # and on P5 (stride 32) 12.5 bins; above and below it is no more than 2.5.
    measured = measure_regression_range([record([[0, 380, 800, 420]])], config_of(reg_max=16), 800)
    assert measured.levels[16].positives > 0
    assert measured.levels[16].share == 0.5
    assert measured.levels[16].clipped == 2 * measured.levels[16].positives
    assert 25 <= measured.levels[16].largest <= 27
    assert measured.levels[32].positives > 0
    assert measured.levels[32].clipped == 0
    assert measured.total.clipped == measured.levels[16].clipped
    assert (measured.objects, measured.clipped_objects, measured.unlearned_objects) == (1, 1, 0)
    # All of P4's are within the range of bins two strides wide, at half the resolution.
    twice = measure_regression_range([record([[0, 380, 800, 420]])], config_of(bin_width=2.0), 800)
    assert twice.total.clipped == 0
    assert twice.reg_max == ceil(measured.levels[16].largest / 2 + TARGET_MARGIN)
    assert twice.bin_widths[2].resolution_px == [16, 32, 64, 128, 256]


def test_an_object_between_all_locations_is_never_learned():
    boxes = [[10.5, 10.5, 12.5, 12.5], [100, 100, 300, 300]]
    measured = measure_regression_range([record(boxes), record([])], config_of(), 800)
    assert (measured.images, measured.objects, measured.unlearned_objects) == (2, 2, 1)


def test_without_any_object_nothing_is_clipped():
    measured = measure_regression_range([record([])], config_of(), 800)
    assert measured.total.positives == measured.total.clipped == measured.objects == 0
    assert measured.total.share == 0
    assert measured.reg_max == 1


@pytest.mark.parametrize(
    ("distance", "bin_width", "needed"),
    [(0.05, 1, 1), (0.9, 1, 1), (0.95, 1, 2), (15.85, 1, 16), (15.95, 1, 17), (15.95, 2, 9)],
)
def test_the_last_bin_is_reached_up_to_the_margin_of_the_loss(distance, bin_width, needed):
    assert needed_reg_max(torch.tensor([distance]), bin_width).tolist() == [needed]


@given(
    sixteenths=st.lists(st.integers(1, 640), min_size=1, max_size=40),
    near=st.integers(0, 5000),
    bin_width=st.sampled_from(BIN_WIDTHS),
)
def test_the_suggestion_clips_little_enough_and_a_smaller_one_does_not(sixteenths, near, bin_width):
    # In sixteenths, no distance lies on the border of the regression range.
    distance = torch.tensor([n / 16 for n in sixteenths] + [0.5] * near)

    def share_clipped(reg_max):
        return (distance / bin_width > reg_max - TARGET_MARGIN).double().mean().item()

    suggested = suggest_reg_max(distance, bin_width)
    assert share_clipped(suggested) < ACCEPTED_SHARE
    assert suggested == 1 or share_clipped(suggested - 1) >= ACCEPTED_SHARE


def test_exactly_the_limit_is_too_much():
    distance = torch.tensor([0.5] * 999 + [7.0])
    assert suggest_reg_max(distance, 1.0) == 8
    assert suggest_reg_max(torch.cat([distance, torch.tensor([0.5])]), 1.0) == 1


def random_records(seed, count):
    generator = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(count):
        height, width, objects = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((60, 400), (60, 400), (0, 6))
        )
        corners = torch.rand(objects, 2, 2, generator=generator) * torch.tensor([width, height])
        low, high = corners.amin(dim=1) - 5, corners.amax(dim=1) + 5
        records.append(record(torch.cat([low, high], dim=1).tolist(), height, width))
    return records


def loop_reference(records, short, long, topk, reg_max):
    """Clipped edges and positives of every level: image by image, location by location."""
    clipped, positives, owners = dict.fromkeys(STRIDES, 0), dict.fromkeys(STRIDES, 0), set()
    for number, r in enumerate(records):
        height, width = fitted_size(*r.size, short, long)
        scale = torch.tensor([width / r.size[1], height / r.size[0]] * 2)
        boxes = torch.tensor(r.boxes) * scale
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        sizes = torch.tensor([[height, width]])
        padded = (ceil(height / 32) * 32, ceil(width / 32) * 32)
        points = grid_points(level_sizes(*padded), torch.device("cpu"))
        targets = pad_targets([boxes], [torch.tensor(r.labels)], sizes)
        assigned = assign_targets(points, targets, topk).truth_of_locations()[0].tolist()
        for location, truth in enumerate(assigned):
            if truth < 0:
                continue
            x, y = points.xy[location].tolist()
            step = int(points.stride[location])
            x1, y1, x2, y2 = boxes[truth].tolist()
            far = [d / step for d in (x - x1, y - y1, x2 - x, y2 - y)]
            positives[step] += 1
            clipped[step] += sum(d > reg_max - TARGET_MARGIN for d in far)
            owners.add((number, truth))
    return clipped, positives, len(owners)


@pytest.mark.parametrize("short", [96, 160])
def test_shares_are_those_of_an_independent_loop(short):
    records = random_records(seed=short, count=21)
    config = Config(
        model=ModelConfig(reg_max=4),
        data=DataConfig(short_side=short, long_side=256),
        assigner=AssignerConfig(topk=5),
    )
    measured = measure_regression_range(records, config, short)
    clipped, positives, learned = loop_reference(records, short, 256, 5, reg_max=4)
    assert {s: row.positives for s, row in measured.levels.items()} == positives
    assert {s: row.clipped for s, row in measured.levels.items()} == clipped
    assert 0 < sum(clipped.values()) == measured.total.clipped
    assert measured.objects - measured.unlearned_objects == learned


@pytest.mark.parametrize("size", [(61, 200), (300, 77), (64, 64)])
def test_boxes_are_those_of_training(size):
    (r,) = random_records(seed=7, count=1)
    r = record([*r.boxes.tolist(), [-9, -9, 999, 30]], *size)
    data = DataConfig(short_side=100, long_side=170)
    pixels, expected = build_transforms(data)(
        *as_sample(torch.zeros(3, *size, dtype=torch.uint8), torch.tensor(r.boxes))
    )
    boxes, new_size = network_boxes(r, 100, 170)
    assert new_size == tuple(pixels.shape[-2:])
    torch.testing.assert_close(boxes, expected.as_subclass(torch.Tensor), rtol=0, atol=1e-4)


def test_multi_scale_is_looked_at_from_both_ends():
    assert training_scales(DataConfig()) == [800]
    assert training_scales(DataConfig(multi_scale=(480, 800))) == [480, 800]
    assert training_scales(DataConfig(multi_scale=(640, 640))) == [640]
