"""Which edges a `reg_max` can express, over a whole training set and without loading an image.

An edge is learned at every positive location of its object, as a distance in bins. Beyond
`reg_max - REACH_MARGIN` the target is clipped: such edges of large objects are never placed right.

Shapes: N positive locations, with four edges each in the order left, top, right, bottom.
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
from gfl.model.assigner import assign
from gfl.model.boxes import STRIDES, Points, grid_points, xyxy_to_ltrb
from gfl.model.losses import REACH_MARGIN
from gfl.structures import pad_targets

ENOUGH = 0.001
"""A suggested `reg_max` clips less than this share of edges."""

BIN_WIDTHS = (0.5, 1.0, 2.0, 4.0)
"""Delta as in table 2c of the paper."""

IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class Edges:
    """What the positive locations of a set learn.

    Attributes:
        distance: `ltrb` in strides, (N, 4).
        stride: Of each location's level in px, (N,).
        owner: Which object each location learns, (N,).
        objects: How many objects there are, learned or not.
    """

    distance: Tensor
    stride: Tensor
    owner: Tensor
    objects: int


@dataclass(frozen=True)
class LevelReach:
    """How far edges lie from their locations on one level, or on all.

    Attributes:
        positives: Locations.
        clipped: Their edges out of reach.
        share: The same as a share of all edges.
        largest: Distance in bins.
        percentile: 99.9th of the distances in bins.
    """

    positives: int
    clipped: int
    share: float
    largest: float
    percentile: float


@dataclass(frozen=True)
class BinWidth:
    """What a bin width (Delta) would do.

    Attributes:
        bin_width: In strides.
        reg_max: The smallest that clips less than `ENOUGH`.
        share: Of edges clipped by the present `reg_max`.
        resolution_px: Between two bins on each level.
    """

    bin_width: float
    reg_max: int
    share: float
    resolution_px: list[float]


@dataclass(frozen=True)
class Reach:
    """What the present `reg_max` and bin width reach, and what others would.

    Attributes:
        short_side: Images are scaled to, in px.
        images: Looked at.
        objects: In these images.
        clipped_objects: Those with an edge out of reach.
        unlearned_objects: Those without any positive location.
        levels: By stride.
        total: Over all levels.
        reg_max: The smallest that clips less than `ENOUGH` at the present bin width.
        bin_widths: Alternatives.
    """

    short_side: int
    images: int
    objects: int
    clipped_objects: int
    unlearned_objects: int
    levels: dict[int, LevelReach]
    total: LevelReach
    reg_max: int
    bin_widths: list[BinWidth]


def training_scales(data: DataConfig) -> list[int]:
    """Return the short sides between which training scales images: one, or both ends."""
    return sorted(set(data.multi_scale or (data.short_side,)))


def measure_reach(records: Sequence[ImageRecord], config: Config, short_side: int) -> Reach:
    """Return what `config.model` reaches of the objects in `records`, scaled to `short_side`."""
    edges = find_edges(records, short_side, config.data.long_side, config.assigner.topk)
    model = config.model
    clipped = _clipped(edges.distance, model).any(dim=1)
    widths = sorted({*BIN_WIDTHS, model.bin_width})
    return Reach(
        short_side=short_side,
        images=len(records),
        objects=edges.objects,
        clipped_objects=len(edges.owner[clipped].unique()),
        unlearned_objects=edges.objects - len(edges.owner.unique()),
        levels={s: _level_reach(edges.distance[edges.stride == s], model) for s in STRIDES},
        total=_level_reach(edges.distance, model),
        reg_max=suggest_reg_max(edges.distance, model.bin_width),
        bin_widths=[_bin_width(edges.distance, width, model.reg_max) for width in widths],
    )


def find_edges(records: Sequence[ImageRecord], short: int, long: int, topk: int) -> Edges:
    """Return what every positive location learns in images scaled to fit (long, short) px."""
    # Alike counts together save padding; an image without objects has no edge.
    records = sorted((r for r in records if len(r.boxes)), key=lambda r: len(r.boxes))
    starts = range(0, len(records), IMAGES_AT_ONCE)
    parts = [_edges(records[s : s + IMAGES_AT_ONCE], short, long, topk) for s in starts]
    none = torch.zeros(0)
    before = accumulate((part.objects for part in parts), initial=0)
    return Edges(
        distance=torch.cat([none.view(0, 4), *(part.distance for part in parts)]),
        stride=torch.cat([none, *(part.stride for part in parts)]),
        owner=torch.cat([none.long(), *(p.owner + n for p, n in zip(parts, before, strict=False))]),
        objects=sum(part.objects for part in parts),
    )


def needed_reg_max(distance: Tensor, bin_width: float) -> Tensor:
    """Return the smallest `reg_max` that reaches each `distance` in strides; int32, same shape."""
    return (distance / bin_width + REACH_MARGIN).ceil().int()


def _clipped(distance: Tensor, model: ModelConfig) -> Tensor:
    """Return which of `distance` in strides is out of reach; none of a Dirac edge is."""
    needed = needed_reg_max(distance, model.bin_width)
    return (needed > model.reg_max) & (model.edges == "distribution")


def suggest_reg_max(distance: Tensor, bin_width: float) -> int:
    """Return the smallest `reg_max` that clips less than `ENOUGH` of all edges."""
    needed = needed_reg_max(distance, bin_width).flatten()
    count = max(1, len(needed))
    # At index r: how many edges need more than r.
    beyond = len(needed) - torch.bincount(needed, minlength=2).cumsum(0)
    return max(1, int((beyond.double() / count < ENOUGH).int().argmax()))


def network_boxes(record: ImageRecord, short: int, long: int) -> tuple[Tensor, tuple[int, int]]:
    """Return the boxes (G, 4) and the (height, width) that the network's input has, in px."""
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
    assigned = assign(points, targets, topk)  # (B, P)
    image, location = (assigned >= 0).nonzero(as_tuple=True)
    truth = assigned[image, location]
    stride = points.stride[location]
    ltrb = xyxy_to_ltrb(points.xy[location], targets.boxes[image, truth])
    counts = torch.tensor([len(r.boxes) for r in records])
    first = counts.cumsum(0) - counts
    return Edges(ltrb / stride, stride.squeeze(1), first[image] + truth, int(counts.sum()))


def _cover(height: int, width: int) -> Points:
    """Return locations that cover images up to this size; those beyond an image do not matter."""
    height, width = (ceil(side / STRIDES[-1]) * STRIDES[-1] for side in (height, width))
    return grid_points(tuple((height // s, width // s) for s in STRIDES), torch.device("cpu"))


def _level_reach(distance: Tensor, model: ModelConfig) -> LevelReach:
    edges = distance.numel()
    clipped = int(_clipped(distance, model).sum())
    bins = (distance / model.bin_width).numpy()
    return LevelReach(
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
