"""ATSS: which locations learn which ground truth (Zhang et al., CVPR 2020), for a batch at once.

Every step is dense tensor algebra on fixed shapes; nothing waits for the host. The nearest
locations on a level lie in a small window around the object's centre, so the cost grows with the
objects, not with the image.

Shapes: B images, G padded ground truths, L levels, K window cells, T candidates per level,
P locations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gfl.model.boxes import Points, box_iou, xyxy_to_ltrb
from gfl.structures import Targets

PRIOR_SCALE = 8
"""Side of a location's square prior, in strides."""

INSIDE_MARGIN_PX = 0.01
"""How far inside every edge of an object a positive location lies, at least."""


@dataclass(frozen=True)
class Candidates:
    """The nearest locations of every ground truth: (B, G, L * T) each, `xy` (B, G, L * T, 2)."""

    index: Tensor
    xy: Tensor
    stride: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Matches:
    """Who learns what, among the candidates of all ground truths: N = G * L * T of an image.

    Nothing is learned at any other location, so losses of boxes need to look here only.

    Attributes:
        learns: Whether the location learns this ground truth; of a location, at most one does,
            (B, N).
        truth: Which ground truth, (B, N).
        location: Index of the location, (B, N).
        xy: Its position in px, (B, N, 2).
        stride: Of its level in px, (B, N, 1).
    """

    learns: Tensor
    truth: Tensor
    location: Tensor
    xy: Tensor
    stride: Tensor


def padded_extent(sizes: Tensor) -> Tensor:
    """Return image `sizes` (B, 2) rounded up to 32 px; locations beyond it are not trained."""
    return (sizes + 31) // 32 * 32


def valid_locations(points: Points, sizes: Tensor) -> Tensor:
    """Return (B, P): which locations lie on the image rounded up to 32 px."""
    extent = padded_extent(sizes).flip(-1).unsqueeze(1)  # (B, 1, 2), as x, y
    return (points.xy < extent).all(dim=-1)


def assign(points: Points, targets: Targets, topk: int) -> Tensor:
    """Return the ground truth that every location learns, (B, P) int64, -1 where none."""
    matches = match(points, targets, topk)
    nobody = matches.truth.new_full((len(matches.truth), len(points.xy)), -1)
    truth = matches.truth.where(matches.learns, -1)
    return nobody.scatter_reduce(1, matches.location, truth, "amax")


def match(points: Points, targets: Targets, topk: int) -> Matches:
    """Return which candidates learn their ground truth.

    Per ground truth the `topk` nearest locations of every level are candidates; those whose prior
    overlaps it by mean + standard deviation over all candidates, and which lie inside it, are
    positive. A location that several claim goes to the highest overlap, on a tie to the first.
    Equal distances go to the lowest index.
    """
    candidates = nearest_locations(points, targets, topk)
    boxes = targets.boxes.unsqueeze(2)  # (B, G, 1, 4)
    half = candidates.stride.unsqueeze(-1) * (PRIOR_SCALE / 2)
    priors = torch.cat([candidates.xy - half, candidates.xy + half], dim=-1)
    overlap = box_iou(priors, boxes)  # (B, G, L * T)
    edges = xyxy_to_ltrb(candidates.xy, boxes.expand(*overlap.shape, 4))
    positive = (
        candidates.mask
        & (overlap >= _threshold(overlap, candidates.mask))
        & (edges.amin(dim=-1) > INSIDE_MARGIN_PX)
    )
    truth = torch.arange(overlap.shape[1], device=overlap.device).view(1, -1, 1)
    truth, location = truth.expand_as(overlap).flatten(1), candidates.index.flatten(1)
    claim = overlap.where(positive, -1).flatten(1)
    return Matches(
        learns=_wins(location, claim, truth, locations=len(points.xy)),
        truth=truth,
        location=location,
        xy=candidates.xy.flatten(1, 2),
        stride=candidates.stride.flatten(1).unsqueeze(-1),
    )


def nearest_locations(points: Points, targets: Targets, topk: int) -> Candidates:
    """Return the `topk` locations of every level nearest to each ground truth's centre."""
    index, xy, distance = _window(points, targets, reach=topk)  # (B, G, L, K)
    # Cells are in index order, so a stable sort gives ties to the lowest index; `topk` may not.
    distance, order = distance.sort(dim=-1, stable=True)
    distance, order = distance[..., :topk], order[..., :topk]
    stride = points.level_stride.expand_as(distance)
    mask = distance.isfinite() & targets.mask[:, :, None, None]
    xy = xy.gather(3, order.unsqueeze(-1).expand(*order.shape, 2))
    return Candidates(
        index=index.gather(-1, order).flatten(2),
        xy=xy.flatten(2, 3),
        stride=stride.flatten(2),
        mask=mask.flatten(2),
    )


def _window(points: Points, targets: Targets, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return index, position (px) and distance (px) of the cells around each centre.

    The index is (B, G, L, K), likewise the distance, which is infinite where there is no cell; the
    position is (B, G, L, K, 2).

    The `reach` nearest columns to the centre are consecutive, and a cell outside of them has
    `reach` nearer ones in its own row; likewise for rows. One more on either side covers rounding.
    """
    stride = points.level_stride
    # An image that is smaller than its batch has fewer cells.
    cells = torch.ceil(padded_extent(targets.sizes).flip(-1).unsqueeze(1) / stride)  # (B, L, 2)
    cells = cells.long().minimum(points.level_shape).unsqueeze(1)  # (B, 1, L, 2)
    side = reach + 2
    centre = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2  # (B, G, 2)
    middle = (centre.unsqueeze(2) / stride).round().long()  # (B, G, L, 2)
    first = (middle - side // 2).minimum(cells - side).clamp(min=0)
    offset = torch.arange(side, device=cells.device)
    rows, columns = torch.meshgrid(offset, offset, indexing="ij")
    steps = torch.stack([columns, rows], dim=-1).flatten(0, 1)  # (K, 2)
    cell = first.unsqueeze(3) + steps  # (B, G, L, K, 2)
    exists = (cell < cells.unsqueeze(3)).all(dim=-1)
    xy = cell * stride.unsqueeze(-1)
    distance = (xy - centre[:, :, None, None]).pow(2).sum(dim=-1).sqrt()
    columns_of_level = points.level_shape[:, :1]
    index = points.level_start.unsqueeze(1) + cell[..., 1] * columns_of_level + cell[..., 0]
    return index.where(exists, 0), xy, distance.where(exists, torch.inf)


def _threshold(overlap: Tensor, mask: Tensor) -> Tensor:
    """Return mean + sample standard deviation of each ground truth's candidates, (B, G, 1)."""
    count = mask.sum(dim=-1, keepdim=True)
    mean = overlap.where(mask, 0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    square = (overlap - mean).square().where(mask, 0).sum(dim=-1, keepdim=True)
    return mean + (square / (count - 1).clamp(min=1)).sqrt()


def _wins(location: Tensor, claim: Tensor, truth: Tensor, locations: int) -> Tensor:
    """Return whose claim (an overlap, -1 of who makes none) its location follows, (B, N)."""
    nothing = claim.new_full((len(claim), locations), -1)
    best = nothing.scatter_reduce(1, location, claim, "amax").gather(1, location)
    highest = (claim >= 0) & (claim == best)
    nobody = torch.iinfo(truth.dtype).max
    last = truth.new_full((len(claim), locations), nobody)
    first = last.scatter_reduce(1, location, truth.where(highest, nobody), "amin")
    return highest & (truth == first.gather(1, location))


@dataclass(frozen=True)
class Aim:
    """What the candidates are to learn; geometry is in units of their strides.

    Attributes:
        learns: Whether a candidate learns its object, (B, N); the others' boxes mean nothing.
        valid: Whether a location takes part, (B, P).
        location: Of every candidate, (B, N).
        label: The object's class, (B, N).
        xy: Of every candidate, (B, N, 2).
        boxes: The object's `xyxy`, (B, N, 4).
        ltrb: The distances to its edges, (B, N, 4).
    """

    learns: Tensor
    valid: Tensor
    location: Tensor
    label: Tensor
    xy: Tensor
    boxes: Tensor
    ltrb: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Return the `values` (B, P, D) of the candidates, (B, N, D)."""
        return values.gather(1, self.location.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    def of_label(self, logits: Tensor) -> Tensor:
        """Return the `logits` (B, P, C) of the candidates' classes, (B, N)."""
        return logits.flatten(1).gather(1, self.location * logits.shape[2] + self.label)

    def summed(self, background: Tensor, objects: Tensor) -> Tensor:
        """Return a loss of scores, summed over all locations and classes.

        Args:
            background: Without any object, (B, P, C).
            objects: What each candidate changes of it if it learns, (B, N).
        """
        return (background.sum(dim=-1) * self.valid).sum() + self.total(objects)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` (B, N) over the candidates that learn.

        In the order of locations, so that padding of the ground truths changes no digit.
        """
        nothing = torch.zeros_like(self.valid, dtype=values.dtype)
        return nothing.scatter_add(1, self.location, values * self.learns).sum()


def find_aim(points: Points, targets: Targets, topk: int) -> Aim:
    """Return what the candidates of `targets` learn (ATSS with `topk` of a level)."""
    found = match(points, targets, topk)
    boxes = targets.boxes.gather(1, found.truth.unsqueeze(-1).expand(-1, -1, 4)) / found.stride
    xy = found.xy / found.stride
    return Aim(
        learns=found.learns,
        valid=valid_locations(points, targets.sizes),
        location=found.location,
        label=targets.labels.gather(1, found.truth),
        xy=xy,
        boxes=boxes,
        ltrb=xyxy_to_ltrb(xy, boxes),
    )
