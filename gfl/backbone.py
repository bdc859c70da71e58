"""The convolutional body: torchvision's ResNet without its classifier, returning C3, C4 and C5."""

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet34, resnet50

from gfl.config import BackboneConfig

BUILDERS: dict[str, Callable[[], ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}


class Backbone(nn.Module):
    """A ResNet body; parameter names are torchvision's, and the reference's."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        body = BUILDERS[config.name]()
        self.out_channels = [
            body.fc.in_features // 4,
            body.fc.in_features // 2,
            body.fc.in_features,
        ]
        self.conv1, self.bn1, self.relu, self.maxpool = (
            body.conv1,
            body.bn1,
            body.relu,
            body.maxpool,
        )
        self.layer1, self.layer2 = body.layer1, body.layer2
        self.layer3, self.layer4 = body.layer3, body.layer4
        self._norm_eval = config.norm_eval
        stages = [
            [self.conv1, self.bn1],
            [self.layer1],
            [self.layer2],
            [self.layer3],
            [self.layer4],
        ]
        frozen = [module for stage in stages[: config.frozen_stages + 1] for module in stage]
        self._frozen = frozen
        for module in frozen:
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps C3, C4, C5 of `images` (B, 3, H, W) at strides 8, 16, 32."""
        c1 = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c2 = self.layer1(c1)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; BatchNorm of frozen stages, with `norm_eval` all, stays in evaluation."""
        super().train(mode)
        fixed = (
            self.modules() if self._norm_eval else (m for f in self._frozen for m in f.modules())
        )
        for module in fixed:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self
