"""Deformable convolution, v1 (Dai et al., ICCV 2017) and modulated v2 (Zhu et al., CVPR 2019)."""

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(nn.Conv2d):
    """A convolution whose samples are moved by offsets that it predicts from its own input.

    Parameter names are the reference's: `weight`, `conv_offset.weight`, `conv_offset.bias`. All
    groups share one set of offsets, which starts at zero: then v1 is a plain convolution, and v2
    half of one (its mask is `sigmoid(0)`).
    """

    def __init__(self, convolution: nn.Conv2d, version: int) -> None:
        """Take the place of `convolution`, without a bias, with its weights."""
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
        """Return (B, out_channels, H', W') of `input` (B, in_channels, H, W)."""
        moved = self.conv_offset(input)
        mask = moved[:, self._offsets :].float().sigmoid() if self._modulated else None
        # Positions need float32, and torchvision's kernel knows autocast on GPUs only.
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
