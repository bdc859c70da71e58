"""Convolutions at full speed on CPUs without AVX-512.

What oneDNN's kernels are slow at there, matrix products do faster, with the same numbers to
rounding: 3 x 3 convolutions of many cells by Winograd's algorithm (`winograd.py`), in training and
in prediction, and all of few cells and many weights, as in the last stages on small images, as one
product, for which weights that are channels last lie as they should.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfl.ops import winograd

MANY_CELLS = 900
"""Cells of a batch from which Winograd's algorithm repays what it makes of the weights,"""

WIDE = 128
"""with this many channels coming in,"""

WIDE_OUT = 64
"""and this many going out."""

FEW_CELLS = 128
"""Cells of a batch up to which a single product pays,"""

MANY_WEIGHTS = 2**20
"""if there are so many weights."""


class Convolution(nn.Conv2d):
    """`nn.Conv2d`, with the same numbers to rounding."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 (torch's name)
        if self._may_choose(input):
            if self._is_one_product(input):
                return self._product(input, weight, bias)
            if self._multiplies_less(input):
                return self._winograd([input], weight, bias)[0]
        return super()._conv_forward(input, weight, bias)

    def _may_choose(self, *maps: Tensor) -> bool:
        # Without gradients, too, while it trains: what losses are divided by has the same digits.
        return (
            _is_float32_on_cpu(*maps, self.weight)
            and self.weight.requires_grad
            and (self.training or torch.is_grad_enabled())
            and all(one.is_contiguous(memory_format=torch.channels_last) for one in maps)
        )

    def _multiplies_less(self, *maps: Tensor) -> bool:
        return (
            sum(one.shape[0] * one.shape[2] * one.shape[3] for one in maps) >= MANY_CELLS
            and self.in_channels >= WIDE
            and self.out_channels >= WIDE_OUT
            and self.kernel_size == (3, 3)
            and self.stride == self.dilation == self.padding == (1, 1)
            and self.padding_mode == "zeros"
            and self.groups == 1
            and torch.backends.cpu.get_cpu_capability() == "AVX2"
        )

    def _is_one_product(self, images: Tensor) -> bool:
        cells = images.shape[0] * images.shape[2] * images.shape[3]
        return (
            cells <= FEW_CELLS * self.stride[0] * self.stride[1]
            and self.weight.numel() >= MANY_WEIGHTS
            and self.kernel_size != (1, 1)
            and self.padding_mode == "zeros"
            and self.groups == 1
            and self.dilation == (1, 1)
        )

    def _product(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        height, width = self.kernel_size
        around = (0, 0, *self._reversed_padding_repeated_twice)
        padded = F.pad(images.permute(0, 2, 3, 1), around)
        windows = padded.unfold(1, height, self.stride[0]).unfold(2, width, self.stride[1])
        rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        found = F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias)
        return found.permute(0, 3, 1, 2)

    def over(self, levels: list[Tensor]) -> list[Tensor]:
        """Return `self(level)` of each level; Winograd's algorithm takes them together."""
        if self._may_choose(*levels) and self._multiplies_less(*levels):
            return self._winograd(levels, self.weight, self.bias)
        return [self(level) for level in levels]

    def _winograd(self, maps: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        return winograd.convolution(maps, weight, bias)


class PredictingConvolution(Convolution):
    """The same for what learns no more; images go through Winograd's algorithm one by one.

    So one has the same digits in every batch, as far as oneDNN sees to that, too.
    """

    def _may_choose(self, *maps: Tensor) -> bool:
        return _is_float32_on_cpu(*maps, self.weight)

    def _is_one_product(self, images: Tensor) -> bool:
        return False

    def _multiplies_less(self, *maps: Tensor) -> bool:
        return super()._multiplies_less(*(images[:1] for images in maps))

    def _winograd(self, maps: list[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        images = zip(*(one.split(1) for one in maps), strict=True)
        found = [winograd.convolution(list(levels), weight, bias) for levels in images]
        levels = zip(*found, strict=True)
        return [level[0] if len(level) == 1 else torch.cat(level) for level in levels]


def over(module: nn.Module, levels: list[Tensor]) -> list[Tensor]:
    """Return `module(level)` of each level; layer by layer, if no hook wants to see them."""
    if not _is_watched(module):
        if isinstance(module, nn.Sequential):
            for layer in module:
                levels = over(layer, levels)
            return levels
        if isinstance(module, Convolution):
            return module.over(levels)
    return [module(level) for level in levels]


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    )


def convert(model: nn.Module) -> None:
    """Make every `nn.Conv2d` in `model` a `Convolution`; subclasses stay what they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Convolution


def _is_float32_on_cpu(*tensors: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and all(
            one.dim() == 4 and one.device.type == "cpu" and one.dtype == torch.float32
            for one in tensors
        )
    )
