"""The training criterion: targets of the candidates, their losses, and what normalises them.

Shapes: B images, P locations, C classes, N candidates of all ground truths (`assigner.Matches`).
"""

import torch
from torch import Tensor

from gfl.config.schema import ModelConfig
from gfl.distributed import mean_over_workers, world_size
from gfl.model.assigner import Aim
from gfl.model.boxes import box_iou, ltrb_centerness
from gfl.model.losses import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    background_focal_loss,
    centerness_loss,
    focal_loss,
    quality_focal_loss,
)

DISTILLATION = "ld"
"""The part of the objective that a teacher adds."""


def loss_names(model: ModelConfig) -> tuple[str, ...]:
    """Return the parts of the objective, a teacher's apart."""
    of_scores = ("qfl",) if model.quality == "joint" else ("focal", "centerness")
    of_boxes = ("giou", "dfl") if model.edges == "distribution" else ("giou",)
    return of_scores + of_boxes


def mean_amounts(amounts: Tensor, shares: int) -> Tensor:
    """Return what losses are divided by: positives and box weights (..., 2) of an average share.

    Args:
        amounts: `Detector.amounts`, summed over this worker's shares of the batch.
        shares: Of the batch, over all workers.
    """
    positives, weights = (mean_over_workers(amounts) * (world_size() / shares)).unbind(-1)
    # At least 1 over all shares. (The reference: 1 on their average: workers change the losses.)
    return torch.stack([positives, weights.clamp(min=1 / shares)], dim=-1)


def _amounts(aim: Aim, weight: Tensor) -> Tensor:
    return torch.stack([aim.learns.sum(dim=1).clamp(min=1).sum(), aim.total(weight)])


def _joint_losses(
    cls_logits: Tensor, boxes: Tensor, aim: Aim, beta: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Return GFL's losses of scores, and how much each candidate's box counts, (B, N).

    Scores learn the IoU of the present `boxes`; a box counts by its highest class score.
    """
    iou = box_iou(boxes.detach(), aim.boxes)
    logits = aim.of_label(cls_logits)
    change = quality_focal_loss(logits, iou, beta) - background_focal_loss(logits, beta)
    qfl = aim.summed(background_focal_loss(cls_logits, beta), change)
    weight = aim.of(cls_logits.detach()).amax(dim=-1).sigmoid()
    return {"qfl": qfl}, weight


def _centerness_losses(
    cls_logits: Tensor, centerness_logits: Tensor, aim: Aim
) -> tuple[dict[str, Tensor], Tensor]:
    """Return ATSS's losses of scores, and how much each candidate's box counts, (B, N).

    Scores learn the class alone; a box counts by the centerness that its location is to have.
    """

    def background(logits: Tensor) -> Tensor:
        return background_focal_loss(logits, FOCAL_GAMMA) * (1 - FOCAL_ALPHA)

    centerness = ltrb_centerness(aim.ltrb)
    logits, present = aim.of_label(cls_logits), torch.ones_like(centerness)
    change = focal_loss(logits, present) - background(logits)
    focal = aim.summed(background(cls_logits), change)
    loss = centerness_loss(aim.of(centerness_logits).squeeze(-1), centerness)
    return {"focal": focal, "centerness": aim.total(loss)}, centerness
