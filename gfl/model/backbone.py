"""The convolutional body: torchvision's ResNet without its classifier, returning C3, C4 and C5."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import ResNet, resnet18, resnet34, resnet50, resnet101
from torchvision.models.resnet import Bottleneck

from gfl.config.schema import BackboneConfig
from gfl.deformable import DeformableConv2d

BUILDERS: dict[str, Callable[[], ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnext101_32x4d": partial(ResNet, Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4),
}


class Backbone(nn.Module):
    """A ResNet body; parameter names are torchvision's, and the reference's."""

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
                # Of a basic block, which has two 3x3, the second.
                for block in getattr(self, f"layer{stage - 1}"):
                    block.conv2 = DeformableConv2d(block.conv2, config.deformable.version)
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
        """Set the mode; BatchNorm of frozen stages, with `norm_eval` all, stays in evaluation."""
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

        if self._norm_eval:  # no statistics to keep
            return checkpoint(block, features, use_reentrant=False)
        return checkpoint(block, features, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Keep BatchNorm from counting a batch twice when its block is computed again."""
    with ExitStack() as stack:
        for norm in _norms([block]):
            counter = norm.num_batches_tracked
            assert counter is not None
            for name, value in (("momentum", 0.0), ("num_batches_tracked", counter.clone())):
                stack.callback(setattr, norm, name, getattr(norm, name))
                setattr(norm, name, value)
        yield


def _norms(modules: Iterable[nn.Module]) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    for module in modules:
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                yield child
