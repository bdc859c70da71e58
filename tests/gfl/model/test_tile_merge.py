"""Merged detections of tiles: an object on a border is found once, by its surest edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from gfl.config.schema import PostprocessConfig, TilesConfig
from gfl.data.tiles import VISIBLE, visible_boxes, windows
from gfl.model.tile_merge import merge_tiles
from gfl.structures import Predictions

SETTINGS = PostprocessConfig()
BINS = 5


def predictions(boxes, scores=None, std=None, labels=None):
    count = len(boxes)
    deviations = torch.tensor(std if std else [[0.5] * 4] * count).float().reshape(-1, 4)
    return Predictions(
        boxes=torch.tensor(boxes).float().reshape(-1, 4),
        scores=torch.tensor(scores if scores else [0.9] * count),
        labels=torch.tensor(labels if labels else [0] * count),
        edge_std=deviations,
        distributions=deviations[:, :, None].expand(-1, -1, BINS).clone(),  # tells whose it is
    )


def merge(tiles, places, size):
    return merge_tiles(tiles, torch.tensor(places), size, SETTINGS)


def seen(objects, size, grid, least):
    """What a predictor without errors finds: the visible part of every object in every tile."""
    parts, shares = visible_boxes(np.array(objects, np.float32), size, grid)
    return [
        predictions([box for box, share in zip(of_tile.tolist(), visible, strict=True)
                     if share > 0 and share >= least])
        for of_tile, visible in zip(parts, shares, strict=True)
    ]  # fmt: skip


def assert_found_once(found, objects):
    expected = torch.tensor(objects).float()
    overlaps = box_iou(found.boxes, expected)
    assert len(found) == len(expected)
    assert (overlaps.amax(dim=0) > 0.999).all()


@settings(max_examples=40)
@given(
    x=st.integers(0, 360), y=st.integers(0, 160), width=st.integers(3, 399),
    height=st.integers(3, 199), overlap=st.integers(4, 60),
)  # fmt: skip
def test_an_object_of_any_size_on_any_border_is_found_once(x, y, width, height, overlap):
    box = [x, y, min(x + width, 400), min(y + height, 200)]
    grid = windows(200, 400, TilesConfig(size=80, overlap=overlap))
    tiles = seen([box], (200, 400), grid, least=0)
    assert_found_once(merge(tiles, grid, (200, 400)), [box])


@settings(max_examples=40)
@given(x=st.integers(0, 350), y=st.integers(0, 150), side=st.integers(4, 40))
def test_tiles_that_ignore_small_parts_find_objects_no_larger_than_the_overlap(x, y, side):
    box = [x, y, x + side, y + side]
    grid = windows(200, 400, TilesConfig(size=80, overlap=40))
    tiles = seen([box], (200, 400), grid, least=VISIBLE)
    assert_found_once(merge(tiles, grid, (200, 400)), [box])


def test_a_crowd_of_neighbours_stays_apart():
    """Boxes of 18 px at distances of 20 px, in all positions to the borders of the tiles."""
    objects = [[x, y, x + 18, y + 18] for x in range(1, 381, 20) for y in range(1, 181, 20)]
    grid = windows(200, 400, TilesConfig(size=70, overlap=25))
    settings = PostprocessConfig(detections_per_image=1000)
    found = merge_tiles(
        seen(objects, (200, 400), grid, 0), torch.tensor(grid), (200, 400), settings
    )
    assert_found_once(found, objects)


def test_the_surest_edge_counts_and_a_cut_one_never():
    """The object is x = 40..90. The left tile ends at 70, the right one begins at 50."""
    left = predictions([[40, 10, 70, 31]], [0.75], [[2, 1.5, 0.1, 3]])
    right = predictions([[0, 12, 40, 30]], [0.8], [[0.1, 2, 1, 1]])
    found = merge([left, right], [[0, 0, 70, 64], [50, 0, 120, 64]], (64, 120))
    assert found.boxes.tolist() == [[40, 10, 90, 30]]
    assert found.scores.tolist() == pytest.approx([0.8])
    assert found.edge_std.tolist() == [[2, 1.5, 1, 1]]
    assert found.distributions[0, :, 0].tolist() == [2, 1.5, 1, 1]


def test_a_detection_with_a_much_lower_score_has_no_say_but_where_others_cut():
    left = predictions([[40, 10, 70, 31]], [0.6], [[9, 0.1, 0.1, 0.1]])
    right = predictions([[0, 12, 40, 30]], [0.8], [[0.1, 2, 1, 1]])
    found = merge([left, right], [[0, 0, 70, 64], [50, 0, 120, 64]], (64, 120))
    assert found.boxes.tolist() == [[40, 12, 90, 30]]


def test_an_object_across_three_tiles_has_the_ends_of_the_outer_ones():
    places = [[0, 0, 64, 64], [44, 0, 108, 64], [88, 0, 152, 64]]
    tiles = [
        predictions([[30, 20, 64, 40]], [0.5]),
        predictions([[0, 19, 64, 41]], [0.9], [[1, 0.2, 1, 1]]),
        predictions([[0, 20, 22, 40]], [0.7]),
    ]
    found = merge(tiles, places, (64, 152))
    assert found.boxes.tolist() == [[30, 19, 110, 41]]
    assert found.scores.tolist() == pytest.approx([0.9])


def test_an_object_that_no_tile_sees_the_end_of_reaches_as_far_as_it_is_seen():
    tiles = [predictions([[30, 20, 64, 40]]), predictions([[0, 20, 64, 40]]), predictions([])]
    found = merge(tiles, [[0, 0, 64, 64], [44, 0, 108, 64], [88, 0, 152, 64]], (64, 152))
    assert found.boxes.tolist() == [[30, 20, 108, 40]]


def test_a_piece_that_a_better_detection_covers_is_left_out():
    """The right tile misjudges the 10 px that it sees: there the boxes do not agree."""
    whole, piece = predictions([[20, 10, 58, 50]], [0.9]), predictions([[0, 10, 4, 25]], [0.4])
    places = [[0, 0, 70, 64], [50, 0, 120, 64]]
    found = merge([whole, piece], places, (64, 120))
    assert found.boxes.tolist() == [[20, 10, 58, 50]]
    better = predictions([[0, 10, 4, 25]], [0.95])
    assert len(merge([whole, better], places, (64, 120))) == 2


def test_classes_do_not_merge():
    left = predictions([[40, 10, 70, 30]])
    right = predictions([[0, 10, 40, 30]], labels=[1])
    found = merge([left, right], [[0, 0, 70, 64], [50, 0, 120, 64]], (64, 120))
    assert sorted(found.labels.tolist()) == [0, 1]


def test_whole_objects_in_two_tiles_are_left_to_nms():
    left, right = predictions([[52, 10, 66, 30]], [0.9]), predictions([[3, 10, 16, 30]], [0.8])
    found = merge([left, right], [[0, 0, 70, 64], [50, 0, 120, 64]], (64, 120))
    assert found.boxes.tolist() == [[52, 10, 66, 30]]


def test_a_border_of_the_image_cuts_nothing():
    """Both edges lie on borders of the image, so the surer one counts as any other."""
    left = predictions([[40, 0, 70, 30]], std=[[1, 0.2, 1, 1]])
    right = predictions([[0, 1, 40, 30]], std=[[1, 0.1, 1, 1]])
    found = merge([left, right], [[0, 0, 70, 64], [50, 0, 120, 64]], (64, 120))
    assert found.boxes.tolist() == [[40, 1, 90, 30]]


def test_one_tile_is_returned_as_it_is():
    tile = predictions([[1, 2, 3, 4]])
    assert merge([tile], [[0, 0, 64, 64]], (64, 64)) is tile


def test_an_image_without_detections_has_none():
    assert len(merge([predictions([])] * 2, [[0, 0, 70, 64], [50, 0, 120, 64]], (64, 120))) == 0


@settings(max_examples=30)
@given(seed=st.integers(0, 500))
def test_any_detections_merge_to_boxes_with_an_area_best_first(seed):
    generator = torch.Generator().manual_seed(seed)
    grid = windows(150, 220, TilesConfig(size=64, overlap=24))
    tiles = []
    for _ in grid:
        count = int(torch.randint(0, 12, (), generator=generator))
        corner = torch.rand(count, 2, generator=generator) * 50
        far = (corner + torch.rand(count, 2, generator=generator) * 50 + 1).clamp(max=64)
        scores = torch.rand(count, generator=generator).tolist()
        std = (torch.rand(count, 4, generator=generator) * 4).tolist()
        tiles.append(predictions(torch.cat([corner, far], 1).tolist(), scores, std))
    found = merge(tiles, grid, (150, 220))
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([220, 150, 220, 150])).all()
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    overlaps = box_iou(found.boxes, found.boxes).fill_diagonal_(0)
    assert (overlaps <= SETTINGS.nms_iou).all()
