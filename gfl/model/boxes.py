"""Boxes and locations: coordinates, overlaps, and the grids of locations of all levels.

Boxes are `xyxy` corners, or `ltrb` distances from a point to the four edges.

Shapes: B images, P locations, L levels. Functions of boxes broadcast over leading dimensions (...);
the last dimension holds the 4 coordinates.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

EPSILON = 1e-6
"""Least area used as a divisor, in squared units of the boxes (the reference's value)."""


def ltrb_to_xyxy(points: Tensor, ltrb: Tensor) -> Tensor:
    """Return boxes (..., 4) with edges `ltrb` (..., 4) from `points` (..., 2), all in one unit."""
    return torch.cat([points - ltrb[..., :2], points + ltrb[..., 2:]], dim=-1)


def xyxy_to_ltrb(points: Tensor, boxes: Tensor) -> Tensor:
    """Return `ltrb` (..., 4) from `points` (..., 2) to the edges of `boxes` (..., 4).

    A distance is negative where the point lies outside that edge.
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def ltrb_centerness(ltrb: Tensor) -> Tensor:
    """Return how near a point is to the centre of its box, (...) in [0, 1], from `ltrb` (..., 4).

    It is 1 at the centre, 0 on an edge and outside (FCOS, equation 3; Tian et al., ICCV 2019).
    """
    near = torch.minimum(ltrb[..., :2], ltrb[..., 2:]).clamp(min=0)
    far = torch.maximum(ltrb[..., :2], ltrb[..., 2:]).clamp(min=EPSILON)
    return (near / far).prod(dim=-1).sqrt()


def box_area(boxes: Tensor) -> Tensor:
    """Return the signed product of width and height of `boxes` (..., 4), without any "+ 1"."""
    return _product(boxes[..., 2:] - boxes[..., :2])


def _product(sides: Tensor) -> Tensor:
    """Return width times height, (...), of `sides` (..., 2); the gradient of `prod` is costly."""
    width, height = sides.unbind(-1)
    return width * height


def _intersection_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    least = torch.maximum(boxes[..., :2], others[..., :2])
    most = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = _product((most - least).clamp(min=0))
    union = box_area(boxes) + box_area(others) - intersection
    return intersection, union.clamp(min=EPSILON)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union (...) of `boxes` and `others`, (..., 4), pair by pair."""
    intersection, union = _intersection_and_union(boxes, others)
    return intersection / union


def box_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalised IoU (...) of `boxes` and `others`, (..., 4), pair by pair.

    It lies in [-1, 1] (Rezatofighi et al., CVPR 2019).
    """
    intersection, union = _intersection_and_union(boxes, others)
    least = torch.minimum(boxes[..., :2], others[..., :2])
    most = torch.maximum(boxes[..., 2:], others[..., 2:])
    enclosure = _product((most - least).clamp(min=0)).clamp(min=EPSILON)
    return intersection / union - (enclosure - union) / enclosure


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

    They are cached, because copying them to a GPU would make the host wait in every step.
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
    """Return `values` (N,) as a tensor made on `device`; copying a list would wait for it."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def flatten_levels(levels: list[Tensor]) -> Tensor:
    """Return (B, P, channels) of maps (B, channels, H_l, W_l), in the order of `Points`."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def level_points(levels: list[Tensor]) -> Points:
    """Return the points of maps (B, channels, H_l, W_l)."""
    sizes = tuple((level.shape[2], level.shape[3]) for level in levels)
    # The compiler turns the points into constants itself, and warns of caches.
    make = grid_points.__wrapped__ if torch.compiler.is_compiling() else grid_points
    return make(sizes, levels[0].device)
