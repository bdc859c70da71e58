"""The locations of a feature pyramid, flattened over levels: level by level, row by row.

Shapes: P points over all L levels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)
"""Pixels between neighbouring locations of levels P3..P7."""


@dataclass(frozen=True)
class Points:
    """The locations of all levels.

    Attributes:
        xy: Position of every location in px, (P, 2), at `(column * stride, row * stride)`.
        stride: Stride of every location's level in px, (P, 1).
        level_stride: Stride of every level in px, (L, 1).
        level_shape: (columns, rows) of every level in cells, (L, 2), int64.
        level_start: Index of every level's first location, (L,), int64.
        per_level: The number of locations on each level.
    """

    xy: Tensor
    stride: Tensor
    level_stride: Tensor
    level_shape: Tensor
    level_start: Tensor
    per_level: tuple[int, ...]


@lru_cache(maxsize=64)
def grid_points(level_sizes: tuple[tuple[int, int], ...], device: torch.device) -> Points:
    """Return the locations of levels of (height, width) cells, with the strides `STRIDES`.

    Cached: copying these constants to a GPU would make the host wait in every step.
    """
    xy, stride = [], []
    with torch.inference_mode(mode=False):  # a cached inference tensor could not be trained with
        for (height, width), step in zip(level_sizes, STRIDES, strict=True):
            rows = torch.arange(height, dtype=torch.float32) * step
            columns = torch.arange(width, dtype=torch.float32) * step
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            xy.append(torch.stack([x, y], dim=-1).flatten(0, 1))
            stride.append(torch.full((height * width, 1), float(step)))
        per_level = tuple(height * width for height, width in level_sizes)
        return Points(
            xy=torch.cat(xy).to(device),
            stride=torch.cat(stride).to(device),
            level_stride=torch.tensor(STRIDES, dtype=torch.float32, device=device).unsqueeze(1),
            level_shape=torch.tensor(level_sizes, device=device).flip(-1),
            level_start=torch.tensor([0, *per_level[:-1]], device=device).cumsum(0),
            per_level=per_level,
        )


def level_sizes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) in cells of each level for an input of `height` x `width` px."""
    return tuple((math.ceil(height / step), math.ceil(width / step)) for step in STRIDES)
