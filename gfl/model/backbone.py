"""The backbone, torchvision's ResNet without its classifier, and the feature pyramid on top of it.

Shapes: B images of H x W px, C channels, (H_l, W_l) the cells of level l.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import ResNet, resnet18, resnet34, resnet50, resnet101
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FeaturePyramidNetwork, deform_conv2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from gfl.config.schema import BackboneConfig
from gfl.ops.convolution import replace_convolutions

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
"""Classes of the BatchNorms that a backbone may have."""


class DeformableConv2d(nn.Conv2d):
    """A convolution that samples its input at positions moved by offsets it predicts from there.

    Its parameters have the reference's names: `weight`, `conv_offset.weight`, `conv_offset.bias`.
    All groups share one set of offsets. Offsets start at zero, where version 1 is a plain
    convolution and version 2 half of one, because its mask is `sigmoid(0)`.
    """

    def __init__(self, convolution: nn.Conv2d, version: int) -> None:
        """Build the deformable form of `convolution`, which has no bias, with its weights."""
        assert convolution.bias is None
        assert isinstance(convolution.padding, tuple)
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            (convolution.kernel_size[0], convolution.kernel_size[1]),
            stride=(convolution.stride[0], convolution.stride[1]),
            padding=(convolution.padding[0], convolution.padding[1]),
            dilation=(convolution.dilation[0], convolution.dilation[1]),
            groups=convolution.groups,
            bias=False,
        )
        self.weight = convolution.weight
        self._modulated = version == 2
        self._offsets = 2 * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            self.in_channels,
            self._offsets * 3 // 2 if self._modulated else self._offsets,
            (self.kernel_size[0], self.kernel_size[1]),
            stride=(self.stride[0], self.stride[1]),
            padding=(convolution.padding[0], convolution.padding[1]),
            dilation=(self.dilation[0], self.dilation[1]),
        )
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return the convolution (B, out_channels, H', W') of `input` (B, in_channels, H, W)."""
        moved = self.conv_offset(input)
        mask = moved[:, self._offsets :].float().sigmoid() if self._modulated else None
        # Positions need float32, and torchvision's kernel supports autocast on GPUs only.
        with torch.autocast(input.device.type, enabled=False):
            sampled = deform_conv2d(
                input.float(),
                moved[:, : self._offsets].float(),
                self.weight,
                self.bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=mask,
            )
        return sampled.to(moved.dtype)


class StridedLevels(ExtraFPNBlock):
    """The levels P6 and P7, each by a convolution of stride 2 on the level before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Return `results` with P6 and P7 appended (the interface is torchvision's)."""
        p6 = self.p6(results[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class FPN(nn.Module):
    """The feature pyramid: five levels of equally many channels."""

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.levels = FeaturePyramidNetwork(in_channels, channels, StridedLevels(channels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        replace_convolutions(self)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return the levels P3 to P7, (B, channels, H_l, W_l) each, from the maps C3, C4 and C5."""
        named = dict(zip(("p3", "p4", "p5"), features, strict=True))
        return list(self.levels(named).values())


BUILDERS: dict[str, Callable[[], ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnext101_32x4d": partial(ResNet, Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4),
}


class Backbone(nn.Module):
    """A ResNet without its classifier; its parameters have the names of torchvision's.

    Attributes:
        out_channels: Channels of C3, C4 and C5.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        body = BUILDERS[config.name]()
        if config.sync_norm:
            body = nn.SyncBatchNorm.convert_sync_batchnorm(body)
        width = body.fc.in_features
        self.out_channels = [width // 4, width // 2, width]
        self.conv1, self.bn1, self.relu, self.maxpool = (
            body.conv1,
            body.bn1,
            body.relu,
            body.maxpool,
        )
        self.layer1, self.layer2 = body.layer1, body.layer2
        self.layer3, self.layer4 = body.layer3, body.layer4
        if config.deformable is not None:
            for stage in config.deformable.stages:
                # `conv2` is the 3 x 3 convolution of a bottleneck, the second one of a basic block.
                for block in getattr(self, f"layer{stage - 1}"):
                    block.conv2 = DeformableConv2d(block.conv2, config.deformable.version)
        replace_convolutions(self)
        self._norm_eval = config.norm_eval
        self._checkpoint = config.checkpoint_gradients
        parts: list[nn.Module] = [nn.ModuleList([self.conv1, self.bn1]), *self._stages()]
        self._frozen = parts[: config.frozen_stages + 1]
        for part in self._frozen:
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps C3, C4, C5 of `images` (B, 3, H, W) at strides 8, 16, 32."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for stage in self._stages():
            for block in stage:
                features = self._run(block, features)
            maps.append(features)
        return maps[1:]

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; BatchNorms of frozen stages, or all with `norm_eval`, keep evaluating."""
        super().train(mode)
        for norm in _norms([self] if self._norm_eval else self._frozen):
            norm.eval()
        return self

    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def _run(self, block: nn.Module, features: Tensor) -> Tensor:
        if not (self._checkpoint and self.training and features.requires_grad):
            return block(features)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _statistics_kept(block)

        if self._norm_eval:  # then there are no statistics to protect
            return checkpoint(block, features, use_reentrant=False)
        return checkpoint(block, features, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Keep BatchNorms from counting a batch again when their block is computed again."""
    with ExitStack() as stack:
        for norm in _norms([block]):
            counter = norm.num_batches_tracked
            assert counter is not None
            for name, value in (("momentum", 0.0), ("num_batches_tracked", counter.clone())):
                stack.callback(setattr, norm, name, getattr(norm, name))
                setattr(norm, name, value)
        yield


def _norms(modules: Iterable[nn.Module]) -> Iterator[nn.BatchNorm2d | nn.SyncBatchNorm]:
    """Yield the BatchNorms in `modules`."""
    for module in modules:
        for child in module.modules():
            if isinstance(child, BATCH_NORMS):
                yield child
