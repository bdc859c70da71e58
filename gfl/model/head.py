"""The head: two towers shared by all levels, class logits and edge logits, and their decoding.

Shapes: B images, C classes, R bins (`ModelConfig.bins`), (H, W) the cells of a level.
"""

import math

import torch
from torch import Tensor, nn

from gfl.config.schema import ModelConfig, QualityPredictorConfig
from gfl.model.boxes import STRIDES
from gfl.ops.convolution import Conv3x3

LARGEST_LOG_DISTANCE = 10.0
"""Greatest logarithm of a Dirac edge's distance in strides; areas stay finite in float32."""


class Integral(nn.Module):
    """Decoder of edges that are general distributions over the bins of a distance.

    The bins are `0, bin_width, ..., reg_max * bin_width`, in strides.
    """

    bins: Tensor

    def __init__(self, reg_max: int, bin_width: float = 1.0) -> None:
        super().__init__()
        self.reg_max = reg_max
        self.bin_width = bin_width
        self.register_buffer("bins", torch.arange(reg_max + 1) * bin_width, persistent=False)

    def distribution(self, logits: Tensor) -> Tensor:
        """Return the probability of every bin, (..., 4, R) in float32, of `logits` (..., 4 * R)."""
        return logits.float().unflatten(-1, (4, self.reg_max + 1)).softmax(dim=-1)

    def forward(self, logits: Tensor) -> Tensor:
        """Return the expected `ltrb` (..., 4) in strides (equation 5)."""
        # Autocast would compute the product in a lower precision.
        with torch.autocast(logits.device.type, enabled=False):
            return self.distribution(logits) @ self.bins

    def describe(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and standard deviation (..., 4) in strides, and distribution (..., 4, R)."""
        distribution = self.distribution(logits)
        return (*self.moments(distribution), distribution)

    def moments(self, distribution: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (..., 4) of `distribution` (..., 4, R), in strides."""
        mean = (distribution * self.bins).sum(dim=-1)
        variance = (distribution * (self.bins - mean.unsqueeze(-1)).square()).sum(dim=-1)
        return mean, variance.sqrt()


class Dirac(nn.Module):
    """Decoder of edges that are Dirac deltas: one distance has all of the probability (R = 1).

    It decodes as FCOS does (Tian et al., ICCV 2019), which keeps distances positive.
    """

    def forward(self, logits: Tensor) -> Tensor:
        """Return `ltrb` (..., 4) in strides: `exp` of the clamped `logits`, in float32."""
        return logits.float().clamp(max=LARGEST_LOG_DISTANCE).exp()

    def describe(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return distance and standard deviation 0, (..., 4), and probability 1 (..., 4, 1)."""
        distance = self(logits)
        return distance, torch.zeros_like(distance), torch.ones_like(distance).unsqueeze(-1)


def build_integral(config: ModelConfig) -> Integral | Dirac:
    """Return the module that decodes the edge logits of a model into distances."""
    if config.edges == "dirac":
        return Dirac()
    return Integral(config.reg_max, config.bin_width)


LARGEST_LOG_SCORE = -1e-7
"""Greatest logarithm of a joint score; below 0, so its logit is finite in float32."""


class QualityPredictor(nn.Module):
    """GFLv2's distribution-guided quality predictor (Li et al., CVPR 2021, section 3.2).

    The sharper the distribution of an edge, the better the edge is placed. From the `topk` highest
    probabilities of each of the four distributions and their mean it predicts one quality per
    location.
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

    GFLv2's score is J = C * I (equation 4). As a logit it needs no other losses or predictions:
    log(J) is a sum, and logit(J) = log(J) - log(1 - J).
    """
    log_score = (
        nn.functional.logsigmoid(cls_logits.float())
        + nn.functional.logsigmoid(quality_logits.float())
    ).clamp(max=LARGEST_LOG_SCORE)
    return log_score - (-torch.expm1(log_score)).log()


PRIOR_PROBABILITY = 0.01
"""Score of every class at the start of training (Lin et al., ICCV 2017)."""

GROUP_WIDTH = 8
"""Channels per group of GroupNorm, as in the reference, which has 256 channels in 32 groups."""

TOWER_LAYERS = 3
"""Number of modules of a tower per convolution: the convolution, its GroupNorm and the ReLU."""


class Tower(nn.Sequential):
    """Convolutions, GroupNorms and ReLUs that are shared by the maps of all levels."""

    def __init__(self, channels: int, depth: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(Conv3x3(channels, channels, bias=False))
            layers.append(nn.GroupNorm(channels // GROUP_WIDTH, channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Return the feature maps of `levels`, (B, channels, H_l, W_l) each."""
        for layer in self:
            if isinstance(layer, Conv3x3):
                levels = layer(levels)
            else:
                levels = [layer(level) for level in levels]
        return levels


class Head(nn.Module):
    """The head: class logits and edge logits of every location of every level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.channels
        self.cls_tower = Tower(channels, config.tower_convs)
        self.reg_tower = Tower(channels, config.tower_convs)
        self.cls_logits = Conv3x3(channels, config.num_classes)
        self.reg_logits = Conv3x3(channels, 4 * config.bins)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in STRIDES)
        self.quality_predictor: QualityPredictor | None = None
        if config.quality_predictor is not None:
            self.quality_predictor = QualityPredictor(config.quality_predictor, config.bins)
        self.centerness_logits: nn.Conv2d | None = None
        if config.quality == "centerness":
            self.centerness_logits = nn.Conv2d(channels, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        prior_logit = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        assert self.cls_logits.bias is not None
        nn.init.constant_(self.cls_logits.bias, prior_logit)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], ...]:
        """Return class logits (B, C, H, W) and edge logits (B, 4 * R, H, W) per level.

        With `model.quality: centerness` a third list follows: centerness logits (B, 1, H, W).
        """
        cls_logits = self.cls_logits(self.cls_tower(levels))
        features = self.reg_tower(levels)
        reg_logits = [
            logits * scale
            for logits, scale in zip(self.reg_logits(features), self.scales, strict=True)
        ]
        if self.centerness_logits is not None:
            return cls_logits, reg_logits, [self.centerness_logits(f) for f in features]
        if self.quality_predictor is not None:
            cls_logits = [
                joint_logits(cls, self.quality_predictor(reg))
                for cls, reg in zip(cls_logits, reg_logits, strict=True)
            ]
        return cls_logits, reg_logits
