"""The detector: body, pyramid and head, with its training objective and its predictions.

Shapes: B images, P locations over all levels, C classes, G padded ground truths,
R = reg_max + 1 bins.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gfl.assigner import Targets, assign, pad_targets, valid_locations
from gfl.backbone import Backbone
from gfl.boxes import box_iou, ltrb_to_xyxy, xyxy_to_ltrb
from gfl.config import Config
from gfl.fpn import FPN
from gfl.head import Head
from gfl.integral import Integral
from gfl.losses import (
    distribution_focal_loss,
    giou_loss,
    localisation_distillation_loss,
    quality_focal_loss,
)
from gfl.points import Points, grid_points
from gfl.postprocess import Predictions, postprocess

LOSSES = ("qfl", "giou", "dfl")
"""The parts of the objective; with a teacher `DISTILLATION` is one more."""

DISTILLATION = "ld"


class Detector(nn.Module):
    """Generalized Focal Loss detector (Li et al., NeurIPS 2020, arXiv 2006.04388)."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.model.backbone)
        self.fpn = FPN(self.backbone.out_channels, config.model.channels)
        self.head = Head(config.model)
        self.integral = Integral(config.model.reg_max, config.model.bin_width)
        mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return class (B, C, H_l, W_l) and distribution logits (B, 4 * R, H_l, W_l) per level."""
        return self.head(self.fpn(self.backbone(images)))

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return RGB `pixels` (B, 3, H, W) in 0..255 as network inputs, 0 beyond `sizes` (B, 2)."""
        height, width = pixels.shape[-2:]
        rows = torch.arange(height, device=pixels.device) < sizes[:, :1]  # (B, H)
        columns = torch.arange(width, device=pixels.device) < sizes[:, 1:]  # (B, W)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return ((pixels.float() - self.pixel_mean) / self.pixel_std) * inside

    def losses(
        self, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted, normalised `qfl`, `giou` and `dfl`, whose sum is the objective.

        Args:
            images: Normalised, (B, 3, H, W).
            boxes: Per image (G_i, 4), `xyxy` in px of `images`.
            labels: Per image (G_i,), classes in 0..C-1.
        """
        return self.objective(self(images), pad_targets(boxes, labels, _full_sizes(images)))

    def objective(
        self,
        outputs: tuple[list[Tensor], list[Tensor]],
        targets: Targets,
        teacher: list[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of what `forward` returned.

        Box losses of a positive location weigh by its highest class score. QFL is divided by the
        positives, GIoU and DFL by the sum of those weights; both divisors are averages over
        workers, by one all-reduce. Distillation is divided by the images alone, as its authors do.

        Args:
            outputs: Class and distribution logits per level.
            targets: The padded ground truths.
            teacher: Another detector's distribution logits of the same images: adds the loss `ld`.
        """
        cls_levels, reg_levels = outputs
        points = _points(cls_levels)
        cls_logits = _flatten(cls_levels)  # (B, P, C)
        reg_logits = _flatten(reg_levels)  # (B, P, 4 * R)
        assigned = assign(points, targets, self.config.assigner.topk)
        positive = assigned >= 0
        truth = assigned.clamp(min=0).unsqueeze(-1)  # (B, P, 1)
        # From here on geometry is in units of each location's stride.
        anchor = points.xy / points.stride
        true_boxes = targets.boxes.gather(1, truth.expand(-1, -1, 4)) / points.stride
        boxes = ltrb_to_xyxy(anchor, self.integral(reg_logits))

        quality = _quality(
            box_iou(boxes.detach(), true_boxes), positive, truth, targets, cls_logits
        )
        qfl = quality_focal_loss(cls_logits, quality, self.config.loss.qfl.beta)
        qfl = qfl.sum(dim=-1) * valid_locations(points, targets.sizes)
        weight = cls_logits.detach().amax(dim=-1).sigmoid() * positive  # (B, P)
        giou = giou_loss(boxes, true_boxes) * weight
        bins = xyxy_to_ltrb(anchor, true_boxes) / self.integral.bin_width
        dfl = distribution_focal_loss(reg_logits.unflatten(-1, (4, -1)), bins).mean(dim=-1) * weight

        config = self.config.loss
        losses = {}
        if teacher is not None:
            assert config.distillation is not None
            ld = localisation_distillation_loss(
                reg_logits.unflatten(-1, (4, -1)),
                _flatten(teacher).unflatten(-1, (4, -1)),
                config.distillation.temperature,
            )
            ld = (ld.mean(dim=-1) * weight).sum() / len(ld)
            losses[DISTILLATION] = ld * config.distillation.weight

        positives = positive.sum(dim=1).clamp(min=1).sum()
        positives, weights = mean_over_workers(torch.stack([positives, weight.sum()])).unbind()
        # At least 1 over all workers. (The reference: 1 on their average, so that the number of
        # workers changes the losses while scores are small.)
        weights = weights.clamp(min=1 / world_size())
        return {
            "qfl": qfl.sum() / positives * config.qfl.weight,
            "giou": giou.sum() / weights * config.giou.weight,
            "dfl": dfl.sum() / weights * config.dfl.weight,
            **losses,
        }

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Tensor | None = None, original_sizes: Tensor | None = None
    ) -> list[Predictions]:
        """Return the detections of every image, in evaluation mode whatever the present one.

        Args:
            images: Normalised, (B, 3, H, W).
            sizes: (height, width) in px of every image without its padding, (B, 2); all of it by
                default.
            original_sizes: (height, width) of the images that boxes are wanted for, (B, 2); `sizes`
                by default.
        """
        sizes = _full_sizes(images) if sizes is None else sizes
        was_training = self.training
        self.eval()
        cls_levels, reg_levels = self(images)
        self.train(was_training)
        return postprocess(
            [_flatten([level]) for level in cls_levels],
            [_flatten([level]) for level in reg_levels],
            _points(cls_levels),
            self.integral,
            sizes,
            sizes if original_sizes is None else original_sizes,
            self.config.postprocess,
        )


def place(detector: Detector, device: torch.device) -> Detector:
    """Move `detector` to `device`, in the memory format in which convolutions are fastest."""
    return detector.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def mean_over_workers(values: Tensor) -> Tensor:
    """Return the mean of `values` over all training processes; itself when there is only one."""
    if world_size() == 1:
        return values
    values = values / world_size()
    dist.all_reduce(values)
    return values


def world_size() -> int:
    """Return the number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _quality(
    iou: Tensor, positive: Tensor, truth: Tensor, targets: Targets, like: Tensor
) -> Tensor:
    """Return the target of QFL, (B, P, C): the IoU at a positive location's class, 0 elsewhere."""
    label = targets.labels.gather(1, truth.squeeze(-1)).unsqueeze(-1)  # (B, P, 1)
    quality = torch.zeros_like(like, dtype=torch.float32)
    return quality.scatter(2, label, (iou * positive).unsqueeze(-1))


def _flatten(levels: list[Tensor]) -> Tensor:
    """Return (B, P, channels) of maps (B, channels, H_l, W_l), in the order of `Points`."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def _points(levels: list[Tensor]) -> Points:
    sizes = tuple((level.shape[2], level.shape[3]) for level in levels)
    # The compiler makes constants of its own, and warns of any cache.
    make = grid_points.__wrapped__ if torch.compiler.is_compiling() else grid_points
    return make(sizes, levels[0].device)


def _full_sizes(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    rows = torch.full((len(images), 1), height, device=images.device)
    return torch.cat([rows, torch.full_like(rows, width)], dim=1)
