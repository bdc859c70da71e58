"""The losses of Generalized Focal Loss (Li et al., NeurIPS 2020) and its baseline, elementwise.

Shapes: every function broadcasts over leading dimensions (...) and computes in float32;
R = reg_max + 1 bins.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from gfl.model.boxes import box_giou

MODULATION_FLOOR = 1e-6
"""Least |y - sigmoid(z)| for 0 < beta < 1, whose gradient at 0 is infinite; below, loss is 0."""

FOCAL_ALPHA = 0.25
"""Weight of positives in focal loss; negatives have 1 - FOCAL_ALPHA (Lin et al., ICCV 2017)."""

FOCAL_GAMMA = 2.0
"""Exponent of focal loss (Lin et al., ICCV 2017)."""

TARGET_MARGIN = 0.1
"""How far below the last bin a DFL target stays, in bins (the reference's value)."""


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float) -> Tensor:
    """Return `|y - sigmoid(z)|^beta * BCE(z, y)` elementwise (equation 3).

    Args:
        logits: z of every location and class, (...).
        quality: y in [0, 1], (...): the IoU where an object of the class is, 0 elsewhere.
        beta: Any real >= 0; 0 is plain binary cross-entropy.
    """
    logits = logits.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return _modulated(cross_entropy, lambda: (quality - logits.sigmoid()).abs(), beta)


def background_focal_loss(logits: Tensor, beta: float) -> Tensor:
    """Return Quality Focal Loss for y = 0, `sigmoid(z)^beta * log(1 + e^z)`.

    Nearly all locations and classes have y = 0, and this takes a third of the operations.

    Args:
        logits: z of every location and class, (...).
        beta: Any real >= 0.
    """
    logits = logits.float()
    return _modulated(F.softplus(logits), logits.sigmoid, beta)


def _modulated(cross_entropy: Tensor, error: Callable[[], Tensor], beta: float) -> Tensor:
    """Return `error()^beta * cross_entropy`; with beta = 0 the error is not computed."""
    if beta == 0:
        return cross_entropy
    if beta >= 1:
        return error().pow(beta) * cross_entropy
    present = error()
    modulation = present.clamp(min=MODULATION_FLOOR).pow(beta) * (present > MODULATION_FLOOR)
    return modulation * cross_entropy


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return `-alpha_t (1 - p_t)^gamma log(p_t)` elementwise (Lin et al., ICCV 2017, equation 5).

    For y of 0 or 1, `1 - p_t` is `|y - p|`, so Quality Focal Loss is focal loss without `alpha_t`.

    Args:
        logits: Logits of every location and class, (...).
        target: 1 where an object of the class is, 0 elsewhere, (...).
    """
    alpha = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    return alpha * quality_focal_loss(logits, target, FOCAL_GAMMA)


def centerness_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy of centerness (...) with its `target` in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy to the two bins around `target`, weighted by nearness (equation 6).

    Args:
        logits: Logits of the bins of one edge, (..., R).
        target: Distance in bins, (...); values beyond [0, R - 1 - TARGET_MARGIN] are clamped to it.
    """
    target = target.float().clamp(min=0, max=logits.shape[-1] - 1 - TARGET_MARGIN)
    left = target.floor()
    to_right = target - left
    log_probability = logits.float().log_softmax(dim=-1)
    # A NaN has no bin. An index out of bounds would end a GPU's context; the loss becomes NaN.
    index = left.long().clamp(min=0, max=logits.shape[-1] - 2).unsqueeze(-1)
    at_left = log_probability.gather(-1, index).squeeze(-1)
    at_right = log_probability.gather(-1, index + 1).squeeze(-1)
    return -(at_left * (1 - to_right) + at_right * to_right)


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return `1 - GIoU` (...) of `boxes` and `targets`, both (..., 4) `xyxy` in one unit."""
    return 1 - box_giou(boxes.float(), targets.float())


def localisation_distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float
) -> Tensor:
    """Return how far an edge's distribution is from a teacher's, (...).

    `T^2 * KL(teacher || student)` of both softened by the temperature T (Zheng et al., CVPR 2022,
    arXiv 2102.12252), averaged over the R bins as in the authors' code, whose weight belongs to it.

    Args:
        logits: Logits of the bins of one edge, (..., R).
        teacher_logits: The teacher's logits of the same bins, (..., R).
        temperature: T > 0.
    """
    student = (logits.float() / temperature).log_softmax(dim=-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).mean(dim=-1)
    return divergence * temperature**2
