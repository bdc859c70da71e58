"""What the candidates of ground truths are to learn, and how their losses are summed.

Shapes: B images, P locations, C classes, N candidates of all ground truths (`assigner.Matches`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gfl.model.assigner import Targets, match, valid_locations
from gfl.model.boxes import xyxy_to_ltrb
from gfl.points import Points


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
