"""The detector: backbone, feature pyramid and head, with its losses and its predictions.

    detector = Detector(load_config("configs/gfl_r50_1x.yaml"))
    losses = detector.losses(images, boxes, labels)
    predictions = detector.predict(images)

Shapes: B images, C classes, R bins (`ModelConfig.bins`), (H_l, W_l) the cells of level l.
"""

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from gfl.config.schema import Config
from gfl.model.backbone import BATCH_NORMS, FPN, Backbone
from gfl.model.boxes import flatten_levels, level_points
from gfl.model.criterion import Criterion
from gfl.model.head import Head, build_integral
from gfl.model.postprocess import postprocess
from gfl.ops.convolution import Conv3x3
from gfl.structures import Predictions, pad_targets


class Detector(nn.Module):
    """Generalized Focal Loss detector (Li et al., NeurIPS 2020, arXiv 2006.04388).

    Attributes:
        config: The configuration that it was built from.
        backbone: Images to the feature maps C3, C4 and C5.
        fpn: C3, C4 and C5 to the levels P3 to P7.
        head: Levels to class logits and edge logits.
        integral: Edge logits to distances.
        criterion: Outputs and targets to losses.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.model.backbone)
        self.fpn = FPN(self.backbone.out_channels, config.model.channels)
        self.head = Head(config.model)
        self.integral = build_integral(config.model)
        self.criterion = Criterion(config, self.integral)
        mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], ...]:
        """Return class logits (B, C, H_l, W_l) and edge logits (B, 4 * R, H_l, W_l) per level.

        With `model.quality: centerness` a third list follows: centerness logits (B, 1, H_l, W_l).

        Args:
            images: Normalised, (B, 3, H, W).
        """
        return self.head(self.fpn(self.backbone(images)))

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return RGB `pixels` (B, 3, H, W) in 0..255 as network inputs, 0 beyond `sizes` (B, 2)."""
        height, width = pixels.shape[-2:]
        rows = torch.arange(height, device=pixels.device) < sizes[:, :1]  # (B, H)
        columns = torch.arange(width, device=pixels.device) < sizes[:, 1:]  # (B, W)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return ((pixels.float() - self.pixel_mean) / self.pixel_std) * inside

    def losses(
        self, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted, normalised losses of `images`; training minimises their sum.

        Args:
            images: Normalised, (B, 3, H, W).
            boxes: Per image (G_i, 4), `xyxy` in px of `images`.
            labels: Per image (G_i,), classes in 0..C-1.

        Raises:
            ValueError: boxes and labels do not fit together or do not fit the images.
        """
        targets = pad_targets(boxes, labels, _full_sizes(images))
        return self.criterion.losses(self(images), targets)

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Tensor | None = None, original_sizes: Tensor | None = None
    ) -> list[Predictions]:
        """Return the detections of every image, computed in evaluation mode.

        Args:
            images: Normalised, (B, 3, H, W).
            sizes: (height, width) in px of every image without its padding, (B, 2); by default
                there is no padding.
            original_sizes: (height, width) in px of the images that boxes are returned for, (B, 2);
                by default `sizes`.
        """
        sizes = _full_sizes(images) if sizes is None else sizes
        was_training = self.training
        self.eval()
        outputs = self(images)
        self.train(was_training)
        cls_logits, reg_logits, *centerness = (
            [flatten_levels([level]) for level in levels] for levels in outputs
        )
        return postprocess(
            cls_logits,
            reg_logits,
            level_points(outputs[0]),
            self.integral,
            sizes,
            sizes if original_sizes is None else original_sizes,
            self.config.postprocess,
            *centerness,
        )


def place(detector: Detector, device: torch.device) -> Detector:
    """Move `detector` to `device`, in the memory format in which convolutions are fastest."""
    return detector.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _full_sizes(images: Tensor) -> Tensor:
    """Return (height, width) of `images` (B, 3, H, W) with their padding, (B, 2)."""
    height, width = images.shape[-2:]
    rows = torch.full((len(images), 1), height, device=images.device)
    return torch.cat([rows, torch.full_like(rows, width)], dim=1)


@torch.no_grad()
def folded(detector: Detector) -> Detector:
    """Return a copy for inference whose BatchNorms are folded into the convolutions before them.

    In evaluation mode a BatchNorm is one factor and one term per channel. The copy predicts the
    same to rounding, and its gradients are switched off.
    """
    copy = deepcopy(detector).eval().requires_grad_(False)
    for module in list(copy.backbone.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, BATCH_NORMS):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, nn.Identity())
    for module in copy.modules():
        if isinstance(module, Conv3x3):
            module.for_inference = True
    return copy
