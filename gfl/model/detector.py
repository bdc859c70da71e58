"""The detector: body, pyramid and head, with its training objective and its predictions.

Shapes: B images, P locations over all levels, C classes, G padded ground truths, N candidates of
all ground truths (`assigner.Matches`), R bins (`ModelConfig.bins`).
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gfl.config.schema import Config
from gfl.distributed import world_size
from gfl.model.assigner import Aim, find_aim
from gfl.model.backbone import FPN, Backbone
from gfl.model.boxes import (
    flatten_levels,
    level_points,
    ltrb_to_xyxy,
)
from gfl.model.criterion import (
    DISTILLATION,
    _amounts,
    _centerness_losses,
    _joint_losses,
    mean_amounts,
)
from gfl.model.head import Head, build_edges
from gfl.model.losses import (
    distribution_focal_loss,
    giou_loss,
    localisation_distillation_loss,
)
from gfl.model.postprocess import postprocess
from gfl.ops.convolution import Convolution, PredictingConvolution, convert
from gfl.structures import Predictions, Targets, pad_targets


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
        self.integral = build_edges(config.model)
        convert(self)
        mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], ...]:
        """Return class logits (B, C, H_l, W_l) and logits of edges (B, 4 * R, H_l, W_l) per level.

        With `model.quality: centerness` a third list follows: centerness logits (B, 1, H_l, W_l).
        """
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
        """Return the weighted, normalised losses `loss_names`, whose sum is the objective.

        Args:
            images: Normalised, (B, 3, H, W).
            boxes: Per image (G_i, 4), `xyxy` in px of `images`.
            labels: Per image (G_i,), classes in 0..C-1.
        """
        return self.objective(self(images), pad_targets(boxes, labels, _full_sizes(images)))

    def objective(
        self,
        outputs: tuple[list[Tensor], ...],
        targets: Targets,
        teacher: list[Tensor] | None = None,
        divisors: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of what `forward` returned.

        Losses of scores and of centerness are divided by the positives, losses of boxes by the sum
        of their weights; both divisors are averages over workers, by one all-reduce. Distillation
        is divided by the images alone, as its authors do. Boxes cost by the candidates, of which
        there are a fixed number per ground truth, not by the locations.

        Args:
            outputs: Class logits, logits of edges and, where there is one, centerness per level.
            targets: The padded ground truths.
            teacher: Another detector's distribution logits of the same images: adds the loss `ld`.
            divisors: Both divisors (2,), where these images do not tell: see `mean_amounts`.
        """
        aim, edges, boxes, of_scores, weight = self._scored(outputs, targets)
        of_boxes = {"giou": giou_loss(boxes, aim.boxes)}
        if self.config.model.edges == "distribution":
            bins = aim.ltrb / self.config.model.bin_width
            dfl = distribution_focal_loss(edges.unflatten(-1, (4, -1)), bins)
            of_boxes["dfl"] = dfl.mean(dim=-1)

        if divisors is None:
            divisors = mean_amounts(_amounts(aim, weight), world_size())
        positives, weights = divisors.unbind()
        losses = {name: loss / positives for name, loss in of_scores.items()}
        losses |= {name: aim.total(loss * weight) / weights for name, loss in of_boxes.items()}
        losses = {name: loss * getattr(self.config.loss, name).weight
                  for name, loss in losses.items()}  # fmt: skip
        if teacher is not None:
            ld = self._distillation(edges, aim.of(flatten_levels(teacher)))
            losses[DISTILLATION] = aim.total(ld * weight) / len(ld)
        return losses

    def amounts(self, outputs: tuple[list[Tensor], ...], targets: Targets) -> Tensor:
        """Return the positives and the sum of box weights in what `forward` returned, (2,)."""
        aim, *_, weight = self._scored(outputs, targets)
        return _amounts(aim, weight)

    def _scored(
        self, outputs: tuple[list[Tensor], ...], targets: Targets
    ) -> tuple[Aim, Tensor, Tensor, dict[str, Tensor], Tensor]:
        """Return aims, logits of edges, boxes, losses of scores, how much each box counts."""
        points = level_points(outputs[0])
        cls_logits, reg_logits, *centerness = (flatten_levels(levels) for levels in outputs)
        aim = find_aim(points, targets, self.config.assigner.topk)
        edges = aim.of(reg_logits)  # (B, N, 4 * R)
        boxes = ltrb_to_xyxy(aim.xy, self.integral(edges))
        if centerness:
            of_scores, weight = _centerness_losses(cls_logits, centerness[0], aim)
        else:
            of_scores, weight = _joint_losses(cls_logits, boxes, aim, self.config.loss.qfl.beta)
        return aim, edges, boxes, of_scores, weight

    def _distillation(self, edges: Tensor, lesson: Tensor) -> Tensor:
        """Return how far `edges` are from a teacher's, both (B, N, 4 * R): weighted, (B, N)."""
        config = self.config.loss.distillation
        assert config is not None
        ld = localisation_distillation_loss(
            edges.unflatten(-1, (4, -1)), lesson.unflatten(-1, (4, -1)), config.temperature
        )
        return ld.mean(dim=-1) * config.weight

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
        outputs = self(images)
        self.train(was_training)
        cls_logits, reg_logits, *centerness = (
            [flatten_levels([level]) for level in levels] for levels in outputs
        )
        return postprocess(
            cls_logits,
            reg_logits,
            level_points(outputs[0]),
            self.integral,
            sizes,
            sizes if original_sizes is None else original_sizes,
            self.config.postprocess,
            *centerness,
        )


def place(detector: Detector, device: torch.device) -> Detector:
    """Move `detector` to `device`, in the memory format in which convolutions are fastest."""
    return detector.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _full_sizes(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    rows = torch.full((len(images), 1), height, device=images.device)
    return torch.cat([rows, torch.full_like(rows, width)], dim=1)


@torch.no_grad()
def folded(detector: Detector) -> Detector:
    """Return a copy that predicts the same, without a pass over maps for every norm.

    In evaluation mode a BatchNorm is a factor and a term per channel, which its convolution takes.
    """
    copy = deepcopy(detector).eval().requires_grad_(False)
    for module in list(copy.backbone.modules()):
        for convolution, name, norm in _pairs(module):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            term = norm.bias.double() - norm.running_mean.double() * factor
            weight = convolution.weight
            weight.copy_(weight.double() * factor.view(-1, 1, 1, 1))
            convolution.bias = nn.Parameter(term.to(weight), requires_grad=False)
            setattr(module, name, nn.Identity())
    for module in copy.modules():
        if type(module) is Convolution:
            module.__class__ = PredictingConvolution
    return copy


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Conv2d, str, _BatchNorm]]:
    """Give each convolution among the children of `module` that a norm follows, and the norm."""
    for (_, first), (name, second) in pairwise(list(module.named_children())):
        if isinstance(first, nn.Conv2d) and isinstance(second, _BatchNorm):
            yield first, name, second
