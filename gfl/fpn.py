"""The feature pyramid P3..P7 (Lin et al., CVPR 2017); P6 and P7 as in FCOS, without a ReLU."""

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock


class StridedLevels(ExtraFPNBlock):
    """P6 by a stride-2 convolution on P5, P7 likewise on P6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Append the two levels to `results` (torchvision's interface)."""
        p6 = self.p6(results[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class FPN(nn.Module):
    """Five levels of `channels` each."""

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.levels = FeaturePyramidNetwork(in_channels, channels, StridedLevels(channels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return P3..P7, (B, channels, H_l, W_l) each, of C3, C4, C5."""
        named = dict(zip(("p3", "p4", "p5"), features, strict=True))
        return list(self.levels(named).values())
