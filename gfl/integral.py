"""Edge distributions: from logits over distance bins to a distance and its spread (equation 5).

Shapes: R = reg_max + 1 bins; logits (..., 4 * R), sides in the order left, top, right, bottom.
"""

import torch
from torch import Tensor, nn


class Integral(nn.Module):
    """The general distribution of every edge.

    Its bins are `0, bin_width, ..., reg_max * bin_width`, in strides.
    """

    bins: Tensor

    def __init__(self, reg_max: int, bin_width: float = 1.0) -> None:
        super().__init__()
        self.reg_max = reg_max
        self.bin_width = bin_width
        self.register_buffer("bins", torch.arange(reg_max + 1) * bin_width, persistent=False)

    def distribution(self, logits: Tensor) -> Tensor:
        """Return the probability of every bin, (..., 4, R), in float32."""
        return logits.float().unflatten(-1, (4, self.reg_max + 1)).softmax(dim=-1)

    def forward(self, logits: Tensor) -> Tensor:
        """Return the expected `ltrb` (..., 4) in strides (equation 5)."""
        with torch.autocast(logits.device.type, enabled=False):  # which would lower the product
            return self.distribution(logits) @ self.bins

    def moments(self, distribution: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (..., 4) of `distribution` (..., 4, R), in strides."""
        mean = (distribution * self.bins).sum(dim=-1)
        variance = (distribution * (self.bins - mean.unsqueeze(-1)).square()).sum(dim=-1)
        return mean, variance.sqrt()
