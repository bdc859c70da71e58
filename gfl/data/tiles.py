"""Tiles: windows of large images that are trained on, evaluated and predicted like images.

No file is written. A tile is an `ImageRecord` whose boxes are those parts of its image's boxes that
lie in its window:

    windows(1200, 2000, TilesConfig(size=800, overlap=100))  # 2 rows of 3 windows

Shapes: I images, T tiles, W windows of an image, G objects of an image.
"""

from collections.abc import Sequence
from math import ceil
from typing import overload

import numpy as np
import numpy.typing as npt

from gfl.config.schema import DataConfig, TilesConfig
from gfl.data.split import ImageRecord, Tile

VISIBLE = 0.25
"""Smallest visible share of an object that a tile teaches.

The share refers to what a tile could show at most: on each axis, the smaller of the object's side
and the tile's. One of two neighbours shows at least half on each axis. So at least one tile teaches
the object, whatever the overlap.
"""

SMALLEST_BOX = 1
"""Smallest side in px of a box in a tile, as in an image (the reference's value)."""


def starts(side: int, size: int, overlap: int) -> list[int]:
    """Return where windows of `size` px begin on an axis of `side` px.

    Neighbours share at least `overlap` px. The last window is shifted back to end with the image,
    so all have the same size: `size`, or `side` if that is smaller. There are as few as possible.
    """
    if side <= size:
        return [0]
    step = size - overlap
    count = ceil((side - overlap) / step)
    return [min(number * step, side - size) for number in range(count)]


def windows(height: int, width: int, tiles: TilesConfig | None) -> npt.NDArray[np.int64]:
    """Return the windows of an image, `xyxy` in px, row by row, (W, 4): one if `tiles` is None."""
    if tiles is None:
        return np.array([[0, 0, width, height]], dtype=np.int64)
    tall, wide = min(tiles.size, height), min(tiles.size, width)
    corners = [
        (x, y, x + wide, y + tall)
        for y in starts(height, tiles.size, tiles.overlap)
        for x in starts(width, tiles.size, tiles.overlap)
    ]
    return np.array(corners, dtype=np.int64)


def visible_boxes(
    boxes: npt.NDArray[np.float32], size: tuple[int, int], of: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the parts of boxes that windows show, and how much they show of each box.

    Args:
        boxes: Boxes of an image, `xyxy` in px, (G, 4).
        size: (height, width) of the image in px.
        of: The windows, (W, 4).

    Returns:
        Boxes in px of the window, clipped to it, (W, G, 4), and visible shares as `VISIBLE`
        explains them, 0 where less than `SMALLEST_BOX` is visible, (W, G).
    """
    height, width = size
    limits = np.array([width, height, width, height], np.float32)
    inside = np.clip(boxes, 0, limits)[None]  # (1, G, 4)
    windows = of.astype(np.float32)[:, None]  # (W, 1, 4)
    low = np.maximum(inside[..., :2], windows[..., :2])
    high = np.minimum(inside[..., 2:], windows[..., 2:])
    sides = np.maximum(high - low, 0)  # (W, G, 2)
    most = np.minimum(inside[..., 2:] - inside[..., :2], windows[..., 2:] - windows[..., :2])
    shares = (sides / np.maximum(most, SMALLEST_BOX)).prod(axis=-1)
    shares[(sides < SMALLEST_BOX).any(axis=-1)] = 0
    corner = windows[..., :2]
    return np.concatenate([low - corner, high - corner], axis=-1), shares


def sample_records(
    records: Sequence[ImageRecord], data: DataConfig, *, training: bool
) -> Sequence[ImageRecord]:
    """Return the images that samples are made of: `records`, or with `data.tiles` their tiles."""
    return TileRecords(records, data.tiles, training=training) if data.tiles else records


class TileRecords(Sequence[ImageRecord]):
    """The tiles of images, which are made from arrays when they are asked for.

    Attributes:
        counts: Number of tiles of every image, (I,).
    """

    def __init__(
        self, records: Sequence[ImageRecord], tiles: TilesConfig, *, training: bool
    ) -> None:
        """Cut images into tiles.

        Args:
            records: The images.
            tiles: Size and overlap of the tiles.
            training: Whether to leave out tiles in which only pieces are visible that are too small
                to be taught: they are neither objects nor background.
        """
        self._records = records
        parts = []
        for record in records:
            of_image = windows(*record.size, tiles)
            if training:
                _, shares = visible_boxes(record.boxes, record.size, of_image)
                taught, empty = (shares >= VISIBLE).any(axis=1), (shares == 0).all(axis=1)
                of_image = of_image[taught | empty]
            parts.append(of_image)
        self.counts = [len(part) for part in parts]
        self._images = np.repeat(np.arange(len(records)), self.counts)
        self._windows = np.concatenate(parts) if parts else np.empty((0, 4), np.int64)

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[tile] for tile in range(len(self))[index]]
        tile = self.tile(index)
        record = self._records[tile.image]
        x1, y1, x2, y2 = tile.window
        boxes, shares = visible_boxes(record.boxes, record.size, np.array([tile.window]))
        taught = shares[0] >= VISIBLE
        return ImageRecord(
            record.image_id,
            record.path,
            (y2 - y1, x2 - x1),
            boxes[0, taught],
            record.labels[taught],
            tile,
        )

    def tile(self, index: int) -> Tile:
        """Return the place of the tile `index` in its image."""
        image = int(self._images[index])
        x1, y1, x2, y2 = self._windows[index].tolist()
        return Tile(image, (x1, y1, x2, y2), self._records[image].size)
