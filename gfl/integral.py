"""Edges: from logits over distance bins to a distance and its spread (equation 5).

Or, without a distribution, from one logit to a distance.

Shapes: R = reg_max + 1 bins; logits (..., 4 * R), sides in the order left, top, right, bottom.
"""

import torch
from torch import Tensor, nn

from gfl.config.schema import ModelConfig

LARGEST_LOG_DISTANCE = 10.0
"""Of a Dirac edge, in strides: far beyond any image, and areas stay finite in float32."""


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

    def describe(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and standard deviation (..., 4), in strides, and distribution (..., 4, R)."""
        distribution = self.distribution(logits)
        return (*self.moments(distribution), distribution)

    def moments(self, distribution: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (..., 4) of `distribution` (..., 4, R), in strides."""
        mean = (distribution * self.bins).sum(dim=-1)
        variance = (distribution * (self.bins - mean.unsqueeze(-1)).square()).sum(dim=-1)
        return mean, variance.sqrt()


class Dirac(nn.Module):
    """The Dirac delta of every edge: one distance, all of the probability (R = 1).

    Decodes as FCOS does (Tian et al., ICCV 2019), which keeps distances positive.
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Return `ltrb` (..., 4) in strides, `exp` of `logits`, in float32 and never infinite."""
        return logits.float().clamp(max=LARGEST_LOG_DISTANCE).exp()

    def describe(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return distance and spread (..., 4), which is 0, and the one bin's share (..., 4, 1)."""
        distance = self(logits)
        return distance, torch.zeros_like(distance), torch.ones_like(distance).unsqueeze(-1)


def build_edges(config: ModelConfig) -> Integral | Dirac:
    """Return what turns the logits of edges into distances."""
    if config.edges == "dirac":
        return Dirac()
    return Integral(config.reg_max, config.bin_width)
