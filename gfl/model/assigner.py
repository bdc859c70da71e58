"""ATSS: the locations that are trained on each ground truth (Zhang et al., CVPR 2020).

    assigned = assign_targets(points, targets, topk=9)

Every step is dense tensor algebra on fixed shapes and works on a whole batch; nothing waits for the
host. The locations nearest to an object lie in a small window around its centre, so the cost grows
with the number of objects and not with the size of the image.

Shapes: B images, G padded ground truths, L levels, K cells of a window, T candidates per level,
N = G * L * T candidates of an image, P locations, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gfl.model.boxes import Points, box_iou, xyxy_to_ltrb
from gfl.structures import Targets

PRIOR_SCALE = 8
"""Side of the square prior of a location, in strides."""

INSIDE_MARGIN_PX = 0.01
"""Distance in px by which a positive location lies inside every edge of its object, at least."""


@dataclass(frozen=True)
class AssignedTargets:
    """What is trained at the candidate locations of all ground truths.

    All other locations are negatives, so losses of boxes are computed for the candidates alone.
    Geometry is in units of the candidate's stride.

    Attributes:
        positive: Whether the candidate is trained on its ground truth, (B, N). A location is
            positive for one ground truth at most. Where it is False, the fields below that describe
            the ground truth mean nothing.
        valid: Whether a location lies on its image and takes part in training, (B, P).
        location: Index of the candidate's location, (B, N).
        truth: Index of the candidate's ground truth, (B, N).
        label: Class of the ground truth, (B, N).
        xy: Position of the candidate, (B, N, 2).
        boxes: Box of the ground truth, `xyxy`, (B, N, 4).
        ltrb: Distances from the candidate to the edges of the ground truth, (B, N, 4).
    """

    positive: Tensor
    valid: Tensor
    location: Tensor
    truth: Tensor
    label: Tensor
    xy: Tensor
    boxes: Tensor
    ltrb: Tensor

    def at_candidates(self, values: Tensor) -> Tensor:
        """Return the `values` (B, P, D) of all locations at the candidates, (B, N, D)."""
        return values.gather(1, self.location.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    def label_logits(self, logits: Tensor) -> Tensor:
        """Return each candidate's logit of its own class, (B, N), from `logits` (B, P, C)."""
        return logits.flatten(1).gather(1, self.location * logits.shape[2] + self.label)

    def sum_over_locations(self, background: Tensor, change: Tensor) -> Tensor:
        """Return the sum of a classification loss over all valid locations and all classes.

        Args:
            background: Loss of every location and class if there were no object, (B, P, C).
            change: What an object of its class adds to the loss of each candidate, (B, N).
        """
        return (background.sum(dim=-1) * self.valid).sum() + self.sum_over_positives(change)

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """Return the sum of `values` (B, N) over the positive candidates.

        The sum runs in the order of locations, so padding of the ground truths changes no digit.
        """
        zeros = torch.zeros_like(self.valid, dtype=values.dtype)
        return zeros.scatter_add(1, self.location, values * self.positive).sum()

    def truth_of_locations(self) -> Tensor:
        """Return the ground truth that every location is trained on, (B, P), -1 where none."""
        none = torch.full_like(self.valid, -1, dtype=self.truth.dtype)
        return none.scatter_reduce(1, self.location, self.truth.where(self.positive, -1), "amax")


def assign_targets(points: Points, targets: Targets, topk: int) -> AssignedTargets:
    """Return what the candidate locations of `targets` are trained on.

    The candidates of a ground truth are the `topk` nearest locations of every level. Positive are
    those whose prior overlaps the ground truth by at least mean + standard deviation over all of
    its candidates, and which lie inside it. A location that is positive for several ground truths
    goes to the one with the highest overlap and, on a tie, to the first. Of locations at equal
    distances the one with the lowest index is nearer.
    """
    candidates = _nearest_locations(points, targets, topk)
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
    stride = candidates.stride.flatten(1).unsqueeze(-1)  # (B, N, 1)
    xy = candidates.xy.flatten(1, 2) / stride
    truth_boxes = targets.boxes.gather(1, truth.unsqueeze(-1).expand(-1, -1, 4)) / stride
    return AssignedTargets(
        positive=_wins(location, claim, truth, locations=len(points.xy)),
        valid=valid_locations(points, targets.sizes),
        location=location,
        truth=truth,
        label=targets.labels.gather(1, truth),
        xy=xy,
        boxes=truth_boxes,
        ltrb=xyxy_to_ltrb(xy, truth_boxes),
    )


def valid_locations(points: Points, sizes: Tensor) -> Tensor:
    """Return which locations lie on their image, whose size is rounded up to 32 px, (B, P)."""
    extent = _padded_extent(sizes).flip(-1).unsqueeze(1)  # (B, 1, 2), as x, y
    return (points.xy < extent).all(dim=-1)


def _padded_extent(sizes: Tensor) -> Tensor:
    """Return image `sizes` (B, 2) rounded up to 32 px; locations beyond it are not trained."""
    return (sizes + 31) // 32 * 32


@dataclass(frozen=True)
class _Candidates:
    """The nearest locations of every ground truth.

    Attributes:
        index: Index of the location, (B, G, L * T).
        xy: Position of the location in px, (B, G, L * T, 2).
        stride: Stride of the location's level in px, (B, G, L * T).
        mask: Whether the candidate exists: small levels have fewer than T locations, and padded
            ground truths have no candidates, (B, G, L * T).
    """

    index: Tensor
    xy: Tensor
    stride: Tensor
    mask: Tensor


def _nearest_locations(points: Points, targets: Targets, topk: int) -> _Candidates:
    """Return the `topk` locations of every level nearest to each ground truth's centre."""
    index, xy, distance = _window(points, targets, nearest=topk)  # (B, G, L, K)
    # Cells are in the order of their index. A stable sort keeps that order where distances are
    # equal; `topk` may not.
    distance, order = distance.sort(dim=-1, stable=True)
    distance, order = distance[..., :topk], order[..., :topk]
    stride = points.level_stride.expand_as(distance)
    mask = distance.isfinite() & targets.mask[:, :, None, None]
    xy = xy.gather(3, order.unsqueeze(-1).expand(*order.shape, 2))
    return _Candidates(
        index=index.gather(-1, order).flatten(2),
        xy=xy.flatten(2, 3),
        stride=stride.flatten(2),
        mask=mask.flatten(2),
    )


def _window(points: Points, targets: Targets, nearest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cells of every level around each ground truth's centre, in a square window.

    The window holds the `nearest` cells: it spans the `nearest` columns that are closest to the
    centre, and a cell in any other column is farther than `nearest` cells of its own row. The same
    holds for rows. One more column and row on either side allow for rounding.

    Returns:
        Index of each cell's location, (B, G, L, K); its position in px, (B, G, L, K, 2); its
        distance from the centre in px, (B, G, L, K), infinite where the level has no such cell.
    """
    stride = points.level_stride
    # An image that is smaller than its batch has fewer cells than the level's map.
    cells = torch.ceil(_padded_extent(targets.sizes).flip(-1).unsqueeze(1) / stride)  # (B, L, 2)
    cells = cells.long().minimum(points.level_shape).unsqueeze(1)  # (B, 1, L, 2)
    side = nearest + 2
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
    """Return mean + sample standard deviation of each ground truth's overlaps, (B, G, 1)."""
    count = mask.sum(dim=-1, keepdim=True)
    mean = overlap.where(mask, 0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    square = (overlap - mean).square().where(mask, 0).sum(dim=-1, keepdim=True)
    return mean + (square / (count - 1).clamp(min=1)).sqrt()


def _wins(location: Tensor, claim: Tensor, truth: Tensor, locations: int) -> Tensor:
    """Return whether a candidate has the best claim to its location, (B, N).

    Args:
        location: Index of each candidate's location, (B, N).
        claim: Overlap of each candidate that may be positive, -1 for all others, (B, N).
        truth: Index of each candidate's ground truth, (B, N); the lowest wins a tie.
        locations: Number of locations, P.
    """
    no_claim = claim.new_full((len(claim), locations), -1)
    best = no_claim.scatter_reduce(1, location, claim, "amax").gather(1, location)
    highest = (claim >= 0) & (claim == best)
    no_truth = torch.iinfo(truth.dtype).max
    no_winner = truth.new_full((len(claim), locations), no_truth)
    first = no_winner.scatter_reduce(1, location, truth.where(highest, no_truth), "amin")
    return highest & (truth == first.gather(1, location))
