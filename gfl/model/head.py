"""The head: two towers shared over levels, class logits and logits of edges.

Shapes: B images, C classes, R bins (`ModelConfig.bins`), (H, W) the cells of a level.
"""

import math

import torch
from torch import Tensor, nn

from gfl.config.schema import ModelConfig
from gfl.ops.convolution import over
from gfl.points import STRIDES
from gfl.quality import QualityPredictor, joint_logits

PRIOR_PROBABILITY = 0.01
"""Score of every class at the start of training (Lin et al., ICCV 2017)."""

GROUP_WIDTH = 8
"""Channels per group of GroupNorm: the reference's 256 in 32 groups, as wide in other towers."""

TOWER_LAYERS = 3
"""Modules of a tower per convolution: itself, its GroupNorm and the ReLU."""


def _tower(channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        layers.append(nn.GroupNorm(channels // GROUP_WIDTH, channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Head(nn.Module):
    """Class logits and logits of edges of every location of every level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.channels
        self.cls_tower = _tower(channels, config.tower_convs)
        self.reg_tower = _tower(channels, config.tower_convs)
        self.cls_logits = nn.Conv2d(channels, config.num_classes, 3, padding=1)
        self.reg_logits = nn.Conv2d(channels, 4 * config.bins, 3, padding=1)
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
        """Return class logits (B, C, H, W) and logits of edges (B, 4 * R, H, W) per level.

        With `model.quality: centerness` a third list follows: centerness logits (B, 1, H, W).
        """
        cls_logits = over(self.cls_logits, over(self.cls_tower, levels))
        features = over(self.reg_tower, levels)
        reg_logits = [
            logits * scale
            for logits, scale in zip(over(self.reg_logits, features), self.scales, strict=True)
        ]
        if self.centerness_logits is not None:
            return cls_logits, reg_logits, [self.centerness_logits(f) for f in features]
        if self.quality_predictor is not None:
            cls_logits = [
                joint_logits(cls, self.quality_predictor(reg))
                for cls, reg in zip(cls_logits, reg_logits, strict=True)
            ]
        return cls_logits, reg_logits
