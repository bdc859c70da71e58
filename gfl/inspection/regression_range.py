"""The regression range of a `reg_max`: which edges of a training set it can express.

An edge is learned at every positive location of its object, as a distance in bins. Targets beyond
`reg_max - TARGET_MARGIN` are clipped, so the model never places such edges of large objects right.
The measurement assigns targets to annotations alone and loads no image.

Shapes: B images, P locations, G objects, N positive locations with four edges each (left, top,
right, bottom).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

import numpy as np
import torch
from torch import Tensor

from gfl.config.schema import Config, DataConfig, ModelConfig
from gfl.data.dataset import fitted_size
from gfl.data.split import ImageRecord
from gfl.model.assigner import assign_targets
from gfl.model.boxes import STRIDES, Points, grid_points, xyxy_to_ltrb
from gfl.model.losses import TARGET_MARGIN
from gfl.structures import pad_targets

ACCEPTED_SHARE = 0.001
"""A suggested `reg_max` clips less than this share of edges."""

BIN_WIDTHS = (0.5, 1.0, 2.0, 4.0)
"""Bin widths (Delta) that are compared, those of the paper's table 2c."""

BATCH = 8
"""Images whose targets are assigned together."""


@dataclass(frozen=True)
class Edges:
    """The edges that the positive locations of a set learn.

    Attributes:
        distance: `ltrb` in strides, (N, 4).
        stride: Stride of each location's level in px, (N,).
        owner: Index of the object that each location learns, (N,).
        objects: Number of objects, learned or not.
    """

    distance: Tensor
    stride: Tensor
    owner: Tensor
    objects: int


@dataclass(frozen=True)
class LevelRange:
    """Distances of edges from their locations, on one level or on all levels.

    Attributes:
        positives: Number of positive locations.
        clipped: Number of their edges beyond the regression range.
        share: Clipped edges as a share of all edges, 0 to 1.
        largest: Largest distance in bins.
        percentile: 99.9th percentile of the distances in bins.
    """

    positives: int
    clipped: int
    share: float
    largest: float
    percentile: float


@dataclass(frozen=True)
class BinWidth:
    """The effect of a bin width (Delta).

    Attributes:
        bin_width: Distance between neighbouring bins, in strides.
        reg_max: Smallest `reg_max` that clips less than `ACCEPTED_SHARE` of all edges.
        share: Share of edges that the present `reg_max` clips, 0 to 1.
        resolution_px: Distance between neighbouring bins on each level, in px.
    """

    bin_width: float
    reg_max: int
    share: float
    resolution_px: list[float]


@dataclass(frozen=True)
class RegressionRange:
    """The regression range of the present `reg_max` and bin width, and of alternatives.

    Attributes:
        short_side: Short side that images are scaled to, in px.
        images: Number of images measured.
        objects: Number of objects in these images.
        clipped_objects: Number of objects with an edge beyond the regression range.
        unlearned_objects: Number of objects without any positive location.
        levels: Distances on each level, by stride.
        total: Distances over all levels.
        reg_max: Smallest `reg_max` that clips less than `ACCEPTED_SHARE` at the present bin width.
        bin_widths: Effect of each alternative bin width.
    """

    short_side: int
    images: int
    objects: int
    clipped_objects: int
    unlearned_objects: int
    levels: dict[int, LevelRange]
    total: LevelRange
    reg_max: int
    bin_widths: list[BinWidth]


def training_scales(data: DataConfig) -> list[int]:
    """Return the short sides (px) that training scales images to: the only one, or both ends."""
    return sorted(set(data.multi_scale or (data.short_side,)))


def measure_regression_range(
    records: Sequence[ImageRecord], config: Config, short_side: int
) -> RegressionRange:
    """Return the regression range of `config.model` on `records`, scaled to `short_side` px."""
    edges = find_edges(records, short_side, config.data.long_side, config.assigner.topk)
    model = config.model
    clipped = _clipped(edges.distance, model).any(dim=1)
    widths = sorted({*BIN_WIDTHS, model.bin_width})
    return RegressionRange(
        short_side=short_side,
        images=len(records),
        objects=edges.objects,
        clipped_objects=len(edges.owner[clipped].unique()),
        unlearned_objects=edges.objects - len(edges.owner.unique()),
        levels={s: _level_range(edges.distance[edges.stride == s], model) for s in STRIDES},
        total=_level_range(edges.distance, model),
        reg_max=suggest_reg_max(edges.distance, model.bin_width),
        bin_widths=[_bin_width(edges.distance, width, model.reg_max) for width in widths],
    )


def find_edges(records: Sequence[ImageRecord], short: int, long: int, topk: int) -> Edges:
    """Return the edges of all positive locations, in images scaled to fit (long, short) px."""
    # Images with similar counts share a batch to save padding; one without objects has no edge.
    records = sorted((r for r in records if len(r.boxes)), key=lambda r: len(r.boxes))
    starts = range(0, len(records), BATCH)
    parts = [_edges(records[s : s + BATCH], short, long, topk) for s in starts]
    none = torch.zeros(0)
    before = accumulate((part.objects for part in parts), initial=0)
    return Edges(
        distance=torch.cat([none.view(0, 4), *(part.distance for part in parts)]),
        stride=torch.cat([none, *(part.stride for part in parts)]),
        owner=torch.cat([none.long(), *(p.owner + n for p, n in zip(parts, before, strict=False))]),
        objects=sum(part.objects for part in parts),
    )


def needed_reg_max(distance: Tensor, bin_width: float) -> Tensor:
    """Return the smallest `reg_max` that includes each `distance` (strides), int32, same shape."""
    return (distance / bin_width + TARGET_MARGIN).ceil().int()


def _clipped(distance: Tensor, model: ModelConfig) -> Tensor:
    """Return which of the distances (strides) are clipped; those of Dirac edges never are."""
    needed = needed_reg_max(distance, model.bin_width)
    return (needed > model.reg_max) & (model.edges == "distribution")


def suggest_reg_max(distance: Tensor, bin_width: float) -> int:
    """Return the smallest `reg_max` that clips less than `ACCEPTED_SHARE` of all distances."""
    needed = needed_reg_max(distance, bin_width).flatten()
    count = max(1, len(needed))
    # The entry at index r counts the edges that need more than r.
    beyond = len(needed) - torch.bincount(needed, minlength=2).cumsum(0)
    return max(1, int((beyond.double() / count < ACCEPTED_SHARE).int().argmax()))


def network_boxes(record: ImageRecord, short: int, long: int) -> tuple[Tensor, tuple[int, int]]:
    """Return an image's boxes (G, 4) and (height, width) as the network sees them, in px."""
    height, width = record.size
    new_height, new_width = fitted_size(height, width, short, long)
    x, y = new_width / width, new_height / height
    limits = torch.tensor([new_width, new_height, new_width, new_height])
    boxes = torch.tensor(record.boxes) * torch.tensor([x, y, x, y])
    boxes = boxes.clamp(min=0).minimum(limits)
    return boxes, (new_height, new_width)


def _edges(records: Sequence[ImageRecord], short: int, long: int, topk: int) -> Edges:
    boxes, sizes = zip(*(network_boxes(r, short, long) for r in records), strict=True)
    labels = [torch.tensor(r.labels) for r in records]
    targets = pad_targets(boxes, labels, torch.tensor(sizes))
    points = _cover(max(h for h, _ in sizes), max(w for _, w in sizes))
    assigned = assign_targets(points, targets, topk).truth_of_locations()  # (B, P)
    image, location = (assigned >= 0).nonzero(as_tuple=True)
    truth = assigned[image, location]
    stride = points.stride[location]
    ltrb = xyxy_to_ltrb(points.xy[location], targets.boxes[image, truth])
    counts = torch.tensor([len(r.boxes) for r in records])
    first = counts.cumsum(0) - counts
    return Edges(ltrb / stride, stride.squeeze(1), first[image] + truth, int(counts.sum()))


def _cover(height: int, width: int) -> Points:
    """Return locations that cover images up to this size (px); none beyond an image counts."""
    height, width = (ceil(side / STRIDES[-1]) * STRIDES[-1] for side in (height, width))
    return grid_points(tuple((height // s, width // s) for s in STRIDES), torch.device("cpu"))


def _level_range(distance: Tensor, model: ModelConfig) -> LevelRange:
    edges = distance.numel()
    clipped = int(_clipped(distance, model).sum())
    bins = (distance / model.bin_width).numpy()
    return LevelRange(
        positives=len(distance),
        clipped=clipped,
        share=clipped / max(1, edges),
        largest=float(bins.max(initial=0)),
        percentile=float(np.quantile(bins, 0.999)) if edges else 0.0,
    )


def _bin_width(distance: Tensor, width: float, reg_max: int) -> BinWidth:
    clipped = int((needed_reg_max(distance, width) > reg_max).sum())
    share = clipped / max(1, distance.numel())
    return BinWidth(width, suggest_reg_max(distance, width), share, [width * s for s in STRIDES])
