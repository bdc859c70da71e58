"""GFLv2's quality of a box, read off its edge distributions (Li et al., CVPR 2021, 2011.12885)."""

import torch
from torch import Tensor, nn

from gfl.config.schema import QualityPredictorConfig

LARGEST_LOG_SCORE = -1e-7
"""Joint scores stay under 1 by this much, so that their logit is finite in float32."""


class QualityPredictor(nn.Module):
    """The distribution-guided quality predictor: a sharp distribution is a well-placed edge.

    It reads the `topk` highest probabilities of each of the four distributions and their mean, and
    gives one number per location (section 3.2).
    """

    def __init__(self, config: QualityPredictorConfig, bins: int) -> None:
        super().__init__()
        self._topk = config.topk
        self._bins = bins
        self.layers = nn.Sequential(
            nn.Conv2d(4 * (config.topk + 1), config.hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(config.hidden, 1, 1),
        )

    def forward(self, reg_logits: Tensor) -> Tensor:
        """Return quality logits (B, 1, H, W) of distribution logits (B, 4 * R, H, W)."""
        probability = reg_logits.float().unflatten(1, (4, self._bins)).softmax(dim=2)
        highest = probability.topk(self._topk, dim=2).values  # (B, 4, topk, H, W)
        statistics = torch.cat([highest, highest.mean(dim=2, keepdim=True)], dim=2)
        return self.layers(statistics.flatten(1, 2))


def joint_logits(cls_logits: Tensor, quality_logits: Tensor) -> Tensor:
    """Return the logits of `sigmoid(cls_logits) * sigmoid(quality_logits)`, in float32.

    GFLv2's score J = C * I (equation 4) as a logit, so that losses and predictions need not know
    of it: log(J) is a sum, and logit(J) = log(J) - log(1 - J).
    """
    log_score = (
        nn.functional.logsigmoid(cls_logits.float())
        + nn.functional.logsigmoid(quality_logits.float())
    ).clamp(max=LARGEST_LOG_SCORE)
    return log_score - (-torch.expm1(log_score)).log()
