"""The training criterion: what is trained where, the losses, and what normalises them.

    criterion = Criterion(config, integral)
    losses = criterion.losses(detector(images), targets)

ATSS assigns ground truths to locations (`assigner.py`). Every location then has a loss of its class
scores, and every positive location has losses of its box:

    classification   QFL, or focal loss + centerness    / number of positives
    boxes            GIoU, DFL                          / sum of the positives' box weights

Both divisors, the *loss normalizers*, are averages over all workers: each worker adds up its two
*normalizer sums*, and one all-reduce of this tensor of two elements makes the averages.

Shapes: B images, P locations of all levels, C classes, R bins (`ModelConfig.bins`), N candidate
locations of all ground truths of an image (`assigner.AssignedTargets`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gfl.config.schema import Config, ModelConfig
from gfl.distributed import mean_over_workers, world_size
from gfl.model.assigner import AssignedTargets, assign_targets
from gfl.model.boxes import box_iou, flatten_levels, level_points, ltrb_centerness, ltrb_to_xyxy
from gfl.model.head import Dirac, Integral
from gfl.model.losses import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    background_focal_loss,
    centerness_loss,
    distribution_focal_loss,
    focal_loss,
    giou_loss,
    localisation_distillation_loss,
    quality_focal_loss,
)
from gfl.structures import Targets

DISTILLATION = "ld"
"""Name of the loss that a teacher adds."""


def loss_names(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of a model's losses in their order, without that of a teacher."""
    classification = ("qfl",) if model.quality == "joint" else ("focal", "centerness")
    boxes = ("giou", "dfl") if model.edges == "distribution" else ("giou",)
    return classification + boxes


def loss_normalizers(sums: Tensor, shards: int) -> Tensor:
    """Return the loss normalizers (..., 2) from normalizer sums, by one all-reduce.

    Args:
        sums: `Criterion.normalizer_sums`, added up over this worker's shards, (..., 2).
        shards: Number of shards of the global batch over all workers.

    Returns:
        Number of positives and sum of box weights of an average shard. The sum of box weights over
        all shards is at least 1. (The reference bounds the average over workers by 1 instead, which
        makes losses depend on the number of workers.)
    """
    positives, weights = (mean_over_workers(sums) * (world_size() / shards)).unbind(-1)
    return torch.stack([positives, weights.clamp(min=1 / shards)], dim=-1)


@dataclass(frozen=True)
class _MatchedOutputs:
    """A detector's outputs beside their targets, with the losses of scores not yet normalised.

    Attributes:
        assigned: The targets of the candidates.
        edge_logits: Logits of the candidates' edges, (B, N, 4 * R).
        boxes: Boxes decoded from them, `xyxy` in strides, (B, N, 4).
        score_losses: Sum over all locations of each loss of scores or centerness.
        box_weight: Weight of each candidate's box in the losses of boxes, detached, (B, N).
    """

    assigned: AssignedTargets
    edge_logits: Tensor
    boxes: Tensor
    score_losses: dict[str, Tensor]
    box_weight: Tensor

    def normalizer_sums(self) -> Tensor:
        """Return max(positives, 1) summed over images, and the sum of box weights, (2,)."""
        positives = self.assigned.positive.sum(dim=1).clamp(min=1).sum()
        return torch.stack([positives, self.assigned.sum_over_positives(self.box_weight)])


class Criterion:
    """The losses of what a detector's `forward` returns."""

    def __init__(self, config: Config, integral: Integral | Dirac) -> None:
        """Build the criterion that `config` describes.

        Args:
            config: Its sections `model`, `loss` and `assigner` are used.
            integral: The detector's own decoder of edge logits.
        """
        self._config = config
        self._integral = integral

    def losses(
        self,
        outputs: tuple[list[Tensor], ...],
        targets: Targets,
        teacher_logits: list[Tensor] | None = None,
        normalizers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted, normalised losses `loss_names`; training minimises their sum.

        Losses of boxes are computed at the candidates, a fixed number per ground truth, and not at
        all locations. The distillation loss is divided by the number of images alone, as in its
        authors' code.

        Args:
            outputs: Class logits, edge logits and, where the model has one, centerness per level.
            targets: The padded ground truths.
            teacher_logits: Another detector's edge logits per level for the same images; they add
                the loss `ld`.
            normalizers: The `loss_normalizers` (2,) to use in place of those of these images on all
                workers.
        """
        matched = self._match(outputs, targets)
        assigned = matched.assigned
        box_losses = self._box_losses(matched)
        if normalizers is None:
            normalizers = loss_normalizers(matched.normalizer_sums(), world_size())
        positives, weights = normalizers.unbind()
        losses = {name: loss / positives for name, loss in matched.score_losses.items()}
        for name, loss in box_losses.items():
            losses[name] = assigned.sum_over_positives(loss * matched.box_weight) / weights
        for name in losses:
            losses[name] = losses[name] * getattr(self._config.loss, name).weight
        if teacher_logits is not None:
            lesson = assigned.at_candidates(flatten_levels(teacher_logits))
            ld = self._distillation_loss(matched.edge_logits, lesson)
            losses[DISTILLATION] = assigned.sum_over_positives(ld * matched.box_weight) / len(ld)
        return losses

    def normalizer_sums(self, outputs: tuple[list[Tensor], ...], targets: Targets) -> Tensor:
        """Return what these images add to the normalizers: positives and box weights, (2,)."""
        return self._match(outputs, targets).normalizer_sums()

    def _match(self, outputs: tuple[list[Tensor], ...], targets: Targets) -> _MatchedOutputs:
        """Assign targets, decode the candidates' boxes, and compute the losses of scores."""
        points = level_points(outputs[0])
        cls_logits, reg_logits, *centerness = (flatten_levels(levels) for levels in outputs)
        assigned = assign_targets(points, targets, self._config.assigner.topk)
        edge_logits = assigned.at_candidates(reg_logits)  # (B, N, 4 * R)
        boxes = ltrb_to_xyxy(assigned.xy, self._integral(edge_logits))
        if centerness:
            score_losses, weight = centerness_losses(cls_logits, centerness[0], assigned)
        else:
            beta = self._config.loss.qfl.beta
            score_losses, weight = joint_losses(cls_logits, boxes, assigned, beta)
        return _MatchedOutputs(assigned, edge_logits, boxes, score_losses, weight)

    def _box_losses(self, matched: _MatchedOutputs) -> dict[str, Tensor]:
        """Return the losses of each candidate's box, (B, N) each, neither weighted nor summed."""
        losses = {"giou": giou_loss(matched.boxes, matched.assigned.boxes)}
        if self._config.model.edges == "distribution":
            bins = matched.assigned.ltrb / self._config.model.bin_width
            dfl = distribution_focal_loss(matched.edge_logits.unflatten(-1, (4, -1)), bins)
            losses["dfl"] = dfl.mean(dim=-1)
        return losses

    def _distillation_loss(self, edge_logits: Tensor, lesson: Tensor) -> Tensor:
        """Return the weighted loss (B, N) of edge logits and a teacher's, (B, N, 4 * R) both."""
        config = self._config.loss.distillation
        assert config is not None
        ld = localisation_distillation_loss(
            edge_logits.unflatten(-1, (4, -1)), lesson.unflatten(-1, (4, -1)), config.temperature
        )
        return ld.mean(dim=-1) * config.weight


def joint_losses(
    cls_logits: Tensor, boxes: Tensor, assigned: AssignedTargets, beta: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Return GFL's loss of scores, and the weight of each candidate's box, (B, N).

    The target of a positive location's class score is the IoU of its present, detached box with the
    ground truth; the weight of its box is its highest class score. The loss is summed by
    `QFL(z, y) = QFL(z, 0) + [QFL(z, y) - QFL(z, 0)]`: the first term at all locations and classes,
    the bracket at the candidates only.

    Args:
        cls_logits: Class logits of all locations, (B, P, C).
        boxes: Decoded boxes of the candidates in strides, (B, N, 4).
        assigned: The targets of the candidates.
        beta: Exponent of Quality Focal Loss.
    """
    iou = box_iou(boxes.detach(), assigned.boxes)
    logits = assigned.label_logits(cls_logits)
    change = quality_focal_loss(logits, iou, beta) - background_focal_loss(logits, beta)
    qfl = assigned.sum_over_locations(background_focal_loss(cls_logits, beta), change)
    weight = assigned.at_candidates(cls_logits.detach()).amax(dim=-1).sigmoid()
    return {"qfl": qfl}, weight


def centerness_losses(
    cls_logits: Tensor, centerness_logits: Tensor, assigned: AssignedTargets
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the ATSS baseline's losses of scores, and the weight of each candidate's box, (B, N).

    The target of a positive location's class score is 1; the weight of its box is the centerness of
    the location in its ground truth, which a third output of the head learns.

    Args:
        cls_logits: Class logits of all locations, (B, P, C).
        centerness_logits: Centerness logits of all locations, (B, P, 1).
        assigned: The targets of the candidates.
    """

    def background(logits: Tensor) -> Tensor:
        return background_focal_loss(logits, FOCAL_GAMMA) * (1 - FOCAL_ALPHA)

    centerness = ltrb_centerness(assigned.ltrb)
    logits, present = assigned.label_logits(cls_logits), torch.ones_like(centerness)
    change = focal_loss(logits, present) - background(logits)
    focal = assigned.sum_over_locations(background(cls_logits), change)
    loss = centerness_loss(assigned.at_candidates(centerness_logits).squeeze(-1), centerness)
    return {"focal": focal, "centerness": assigned.sum_over_positives(loss)}, centerness
