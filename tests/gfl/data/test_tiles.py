"""Tiles: the grid of windows, the boxes in them, and the samples that are read from them."""

from itertools import pairwise
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfl.config.loader import ConfigError, derive
from gfl.config.schema import TilesConfig
from gfl.data import dataset, images
from gfl.data.dataset import DetectionDataset, collate
from gfl.data.images import read_image
from gfl.data.samplers import EvaluationBatches
from gfl.data.split import ImageRecord, load_splits
from gfl.data.tiles import VISIBLE, TileRecords, starts, visible_boxes, windows
from gfl.inspection.findings import describe, inspect_data
from gfl.train.trainer import Trainer

sizes = st.integers(32, 90).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))


def record(boxes, size=(100, 100), labels=None):
    array = np.array(boxes, np.float32).reshape(-1, 4)
    classes = np.array(labels if labels else [0] * len(array), dtype=np.int64)
    return ImageRecord(7, Path("a.jpg"), size, array, classes)


@given(side=st.integers(1, 500), tiles=sizes)
def test_as_few_windows_as_possible_cover_an_axis(side, tiles):
    size, overlap = tiles
    begins = starts(side, size, overlap)
    width = min(size, side)
    assert (begins[0], begins[-1] + width) == (0, side)
    steps = [later - earlier for earlier, later in pairwise(begins)]
    assert all(0 < step <= size - overlap for step in steps)
    if len(begins) > 1:
        reach_of_one_less = size + (len(begins) - 2) * (size - overlap)
        assert reach_of_one_less < side


@pytest.mark.parametrize(
    ("side", "expected"), [(100, [0]), (101, [0, 1]), (180, [0, 80]), (181, [0, 80, 81])]
)
def test_the_last_window_is_shifted_back(side, expected):
    assert starts(side, size=100, overlap=20) == expected


def test_windows_go_row_by_row_and_are_whole_images_at_most():
    tiles = TilesConfig(size=64, overlap=0)
    assert windows(40, 100, tiles).tolist() == [[0, 0, 64, 40], [36, 0, 100, 40]]
    assert len(windows(1200, 2000, TilesConfig(size=800, overlap=100))) == 6


def visible_in_a_loop(box, window):
    """The part of a box in a window, in px of the window, and its share of what could be seen."""
    part, share = [0.0] * 4, 1.0
    for axis in (0, 1):
        low, high = max(box[axis], window[axis]), min(box[axis + 2], window[axis + 2])
        part[axis], part[axis + 2] = low - window[axis], high - window[axis]
        most = min(box[axis + 2] - box[axis], window[axis + 2] - window[axis])
        share *= max(0, high - low) / max(most, 1) if high - low >= 1 else 0
    return part, share


@st.composite
def a_box(draw, side, smallest=1):
    low = [draw(st.integers(0, side - smallest)) for _ in range(2)]
    return [*low, *(draw(st.integers(start + smallest, side)) for start in low)]


@given(box=a_box(side=150), tiles=sizes)
def test_boxes_and_shares_are_those_of_a_loop(box, tiles):
    grid = windows(150, 150, TilesConfig(size=tiles[0], overlap=tiles[1]))
    parts, shares = visible_boxes(np.array([box], np.float32), (150, 150), grid)
    for part, share, window in zip(parts[:, 0], shares[:, 0], grid.tolist(), strict=True):
        expected, expected_share = visible_in_a_loop(box, window)
        assert share == pytest.approx(expected_share)
        if share:
            assert part.tolist() == expected


@given(box=a_box(side=150, smallest=2), tiles=sizes)
def test_every_object_is_taught_by_a_tile_whatever_the_overlap(box, tiles):
    grid = TilesConfig(size=tiles[0], overlap=tiles[1])
    records = TileRecords([record([box], (150, 150))], grid, training=True)
    assert any(len(tile.boxes) == 1 for tile in records)


@given(
    size=st.integers(32, 90), overlap=st.integers(2, 31),
    sides=st.tuples(*[st.integers(2, 31)] * 2), corner=st.tuples(*[st.integers(0, 119)] * 2),
)  # fmt: skip
def test_an_object_no_larger_than_the_overlap_is_whole_in_a_tile(size, overlap, sides, corner):
    width, height = (min(side, overlap) for side in sides)
    box = [*corner, corner[0] + width, corner[1] + height]
    records = TileRecords(
        [record([box], (150, 150))], TilesConfig(size=size, overlap=overlap), training=True
    )
    placed = []
    for tile in records:
        x, y, _, _ = tile.tile.window
        placed += (tile.boxes + np.array([x, y, x, y])).tolist()
    assert box in placed


def test_a_tile_has_the_objects_that_it_shows_enough_of():
    """Windows begin at 0 and 36. The second box shows a fifth of itself in the first window."""
    whole, cut, overhanging = [10, 10, 30, 30], [60, 10, 80, 30], [50, 50, 120, 64]
    of = record([whole, cut, overhanging], (64, 100), labels=[2, 0, 1])
    first, second = TileRecords([of], TilesConfig(size=64, overlap=20), training=True)
    assert (first.size, first.image_id, first.tile.window) == ((64, 64), 7, (0, 0, 64, 64))
    assert first.boxes.tolist() == [whole, [50, 50, 64, 64]]
    assert first.labels.tolist() == [2, 1]
    assert second.tile.window == (36, 0, 100, 64)
    assert second.boxes.tolist() == [[24, 10, 44, 30], [14, 50, 64, 64]]
    assert second.labels.tolist() == [0, 1]
    assert 0.2 < VISIBLE < 14 / 50


def test_training_leaves_out_tiles_that_show_but_small_pieces():
    """The upper left tile shows 6 x 6 of 20 x 20 px; the lower right one shows 14 x 14."""
    grid = TilesConfig(size=32, overlap=0)
    both = [record([], (64, 64)), record([[26, 26, 46, 46]], (64, 64))]
    assert TileRecords(both, grid, training=False).counts == [4, 4]
    taught = TileRecords(both, grid, training=True)
    assert taught.counts == [4, 1]
    assert [len(tile.boxes) for tile in taught] == [0, 0, 0, 0, 1]
    assert taught[-1].boxes.tolist() == [[0, 0, 14, 14]]
    assert [tile.tile.image for tile in taught[3:9]] == [0, 1]


def tiled(tiny, *changes):
    return derive(type(tiny), tiny, ["data.tiles={size: 40, overlap: 16}", "data.short_side=40",
                                     "data.augment.flip=0", *changes])  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_is_a_window_of_its_image(tiny, tmp_path, training):
    plain, cached = tiled(tiny), tiled(tiny, f"data.cache={tmp_path}")
    split = load_splits(plain)[0]
    samples = DetectionDataset(split, plain, training=training)
    for _ in range(2):  # the second time entries of the cache are mapped
        from_cache = DetectionDataset(split, cached, training=training)
        for number in (0, 1, 5, 30):
            of, sample = samples.records[number], samples[0, number]
            x1, y1, x2, y2 = of.tile.window
            expected = read_image(of.path)[:, y1:y2, x1:x2]
            assert sample.original_size == of.size == (40, 40)
            assert torch.equal(sample.pixels, expected)
            assert torch.equal(from_cache[0, number].pixels, expected)
            assert sample.boxes.tolist() == of.boxes.tolist()


def test_an_evaluation_decodes_an_image_once(tiny, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        dataset, "read_image", lambda path: decoded.append(path) or read_image(path)
    )
    config = tiled(tiny)
    samples = DetectionDataset(load_splits(config)[1], config, training=False)
    for number in range(12):
        samples[0, number]
    assert decoded == [record.path for record in samples.split.records[:3]]


def test_a_cached_image_is_mapped_for_a_tile(tiny, tmp_path, monkeypatch):
    config = tiled(tiny, f"data.cache={tmp_path}")
    samples = DetectionDataset(load_splits(config)[0], config, training=True)
    samples[0, 0]
    modes = []
    load = np.load
    monkeypatch.setattr(
        images.np,
        "load",
        lambda file, mode=None, **more: modes.append(mode) or load(file, mode, **more),
    )
    samples[0, 0]
    assert modes == ["c"]


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch=st.integers(1, 5),
    world=st.integers(1, 4),
)
def test_the_tiles_of_an_image_belong_to_one_worker(counts, batch, world):
    shares = [list(EvaluationBatches(counts, batch, rank, world)) for rank in range(world)]
    whole = list(EvaluationBatches(counts, batch, 0, 1))
    assert sorted(keys for share in shares for keys in share) == sorted(whole)
    assert [sample for keys in whole for _, sample in keys] == list(range(sum(counts)))
    assert all(0 < len(keys) <= batch for keys in whole)
    image_of = np.repeat(np.arange(len(counts)), counts)
    owners = [{int(image_of[sample]) for keys in share for _, sample in keys} for share in shares]
    assert sum(len(images) for images in owners) == len(counts)


def test_a_training_learns_from_tiles(tiny):
    config = tiled(tiny)
    trainer = Trainer(config, load_splits(config)[0], torch.device("cpu"))
    records = trainer.dataset.records
    assert len(records) > 36
    assert trainer.batches.steps_per_epoch == ceil(len(records) / 8)
    keys = trainer.batches.keys(0)
    assert max(tile for _, tile in keys) > 36
    batch = collate([trainer.dataset[key] for key in keys])
    assert batch.targets.sizes.tolist() == [[40, 40]] * 8
    assert trainer.train_step(batch).isfinite().all()


def test_the_doctor_measures_objects_in_tiles(tiny):
    """Tiles of 32 px scaled to 64 px double the distances of edges, up to the size of a tile."""
    config = derive(type(tiny), tiny, ["data.tiles={size: 32, overlap: 16}"])
    splits = load_splits(tiny)
    plain = inspect_data(tiny, *splits, {}).regression_ranges[0]
    inspection = inspect_data(config, *splits, {})
    of_tiles = inspection.regression_ranges[0]
    assert of_tiles.images == len(DetectionDataset(splits[0], config, training=True))
    assert of_tiles.objects > plain.objects
    assert max(level.largest for level in of_tiles.levels.values()) <= 8
    doubled = derive(type(tiny), tiny, ["data.short_side=128", "data.long_side=128"])
    assert inspection.splits["train"].sizes == describe(splits[0], doubled.data).sizes


def test_tiles_that_do_not_advance_are_refused(tiny):
    with pytest.raises(
        ConfigError, match=r"data\.tiles\.overlap 64 is not below data\.tiles\.size"
    ):
        tiled(tiny, "data.tiles={size: 64, overlap: 64}")
