"""The locations of a feature pyramid, flattened over levels: level by level, row by row.

Shapes: P points over all L levels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

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
    """

    xy: Tensor
    stride: Tensor
    level_stride: Tensor
    level_shape: Tensor
    level_start: Tensor


@lru_cache(maxsize=64)
def grid_points(level_sizes: tuple[tuple[int, int], ...], device: torch.device) -> Points:
    """Return the locations of levels of (height, width) cells, with the strides `STRIDES`.

    Cached: copying these constants to a GPU would make the host wait in every step.
    """
    xy, stride = [], []
    with torch.inference_mode(False):  # a cached inference tensor could not be trained with
        for (height, width), step in zip(level_sizes, STRIDES, strict=True):
            rows = torch.arange(height, dtype=torch.float32, device=device) * step
            columns = torch.arange(width, dtype=torch.float32, device=device) * step
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            xy.append(torch.stack([x, y], dim=-1).flatten(0, 1))
            stride.append(torch.full((height * width, 1), float(step), device=device))
        per_level = [height * width for height, width in level_sizes]
        return Points(
            xy=torch.cat(xy),
            stride=torch.cat(stride),
            level_stride=_constants(map(float, STRIDES), device).unsqueeze(1),
            level_shape=_constants(chain(*level_sizes), device).view(-1, 2).flip(-1),
            level_start=_constants([0, *per_level[:-1]], device).cumsum(0),
        )


def _constants(values: Iterable[float], device: torch.device) -> Tensor:
    """Return `values` (N,) written on `device`: copying a list there would wait for it."""
    return torch.stack([torch.full((), value, device=device) for value in values])
