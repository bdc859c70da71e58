"""A 3 x 3 convolution that is faster than torch's own on CPUs, with the same numbers to rounding.

    layer = Conv3x3(256, 256)
    outputs = layer(levels)  # of a list of maps, or of one map

Matrix products beat oneDNN's convolutions in two cases, in which `Conv3x3` uses them:

- Many cells and channels, on processors with AVX2 but not AVX-512: Winograd's algorithm
  (`winograd.py`), a quarter of the multiplications.
- Few cells and many weights, as in the last stages of a ResNet on small images: one product, for
  which weights in the memory format channels last need no reordering.

It is `nn.Conv2d` elsewhere: on GPUs, in compiled or exported graphs, and under autocast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfl.ops import winograd

WINOGRAD_CELLS = 900
"""Least number of cells for Winograd's algorithm: transforming the weights must pay."""

WIDE_IN, WIDE_OUT = 128, 64
"""Least numbers of input and of output channels for Winograd's algorithm."""

PRODUCT_CELLS, PRODUCT_WEIGHTS = 128, 2**20
"""Greatest number of output cells of a batch, and least number of weights, for a single product."""


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution with a padding of 1 that chooses the fastest algorithm.

    With `for_inference`, for weights that are final, Winograd's algorithm takes the images of a
    batch one by one, so an image has the same digits in every batch.
    """

    for_inference = False

    def __init__(self, inputs: int, outputs: int, stride: Any = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1, bias=bias)

    def forward(self, input: Any) -> Any:  # noqa: A002 (torch's name)
        """Return the convolution of a map (B, C, H, W), or those of a list of maps, as a list."""
        if not isinstance(input, list):
            return self._of_map(input)
        if self._suits_winograd(input):
            return self._winograd(input)
        return [self._of_map(level) for level in input]

    def _of_map(self, images: Tensor) -> Tensor:
        if self._suits_product(images):
            return self._product(images)
        if self._suits_winograd([images]):
            return self._winograd([images])[0]
        return super().forward(images)

    def _may_replace(self, maps: list[Tensor]) -> bool:
        """Return whether an algorithm other than torch's own may be used for `maps`.

        In training that includes forward passes without gradients: the loss normalizers computed
        from them must have the digits of the pass with gradients.
        """
        tensors = (*maps, self.weight)
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if not all(t.is_cpu and t.dtype == torch.float32 and t.dim() == 4 for t in tensors):
            return False
        learns = self.weight.requires_grad and (self.training or torch.is_grad_enabled())
        return self.for_inference or (
            learns and all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
        )

    def _suits_winograd(self, maps: list[Tensor]) -> bool:
        if not self._may_replace(maps) or torch.backends.cpu.get_cpu_capability() != "AVX2":
            return False
        counted = [images[:1] for images in maps] if self.for_inference else maps
        cells = sum(images.shape[0] * images.shape[2] * images.shape[3] for images in counted)
        wide = self.in_channels >= WIDE_IN and self.out_channels >= WIDE_OUT
        return wide and cells >= WINOGRAD_CELLS and self.stride == (1, 1)

    def _winograd(self, maps: list[Tensor]) -> list[Tensor]:
        if not self.for_inference:
            return winograd.convolution(maps, self.weight, self.bias)
        by_image = zip(*(images.split(1) for images in maps), strict=True)
        outputs = [winograd.convolution(list(m), self.weight, self.bias) for m in by_image]
        return [torch.cat(level) for level in zip(*outputs, strict=True)]

    def _suits_product(self, images: Tensor) -> bool:
        if self.for_inference or not self._may_replace([images]):
            return False
        cells = images.shape[0] * images.shape[2] * images.shape[3]
        few = cells <= PRODUCT_CELLS * self.stride[0] * self.stride[1]
        return few and self.weight.numel() >= PRODUCT_WEIGHTS

    def _product(self, images: Tensor) -> Tensor:
        """Return the convolution as one product of the weights and the windows they see."""
        cells = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = cells.unfold(1, 3, self.stride[0]).unfold(2, 3, self.stride[1])
        rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)  # (B, H', W', 9 * C)
        outputs = F.linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return outputs.permute(0, 3, 1, 2)


def replace_convolutions(model: nn.Module) -> None:
    """Replace each `nn.Conv2d` of a `Conv3x3`'s geometry by one with the same parameters.

    Names of parameters and the state of the random generator stay as they are.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and _geometry(child) == GEOMETRY:
                bias = child.bias is not None
                with torch.device("meta"):  # no memory, no random numbers
                    new = Conv3x3(child.in_channels, child.out_channels, child.stride, bias)
                new.weight, new.bias = child.weight, child.bias
                setattr(parent, name, new)


def _geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    return layer.kernel_size, layer.padding, layer.dilation, layer.groups, layer.padding_mode


GEOMETRY = _geometry(Conv3x3(1, 1))
