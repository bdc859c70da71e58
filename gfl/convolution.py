"""Convolutions at full speed on CPUs: those that learn, and those that predict.

Without AVX-512, oneDNN's gradient of the weights takes two to three times as long where large maps
are channels last, and is the only one of its kernels that does: so both maps are laid out plainly
for this one product.

Where maps are tiny and weights are many, as in the last stage on small images, torch spends most of
the time on turning weights and their gradient from one layout to the other. There, a convolution is
one matrix product, for which weights that are channels last lie as they should.

What only predicts may multiply less, by Winograd's algorithm (Lavin and Gray, CVPR 2016): with no
more than AVX2, NNPACK's takes half the time of oneDNN's kernel where maps are large and wide.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE = 4096
"""Cells of a map from which the way round pays, by far; small ones are not worth two copies."""

FEW = 3
"""Input channels, of the pixels themselves, with which oneDNN deals otherwise."""

TINY = 128
"""Locations of a batch up to which a matrix product pays."""

MANY = 2**20
"""Weights from which turning them costs more than the convolution."""

WIDE = 256
"""Channels from which NNPACK is faster, though it transforms the weights every time."""

WIDE_CELLS = 2048
"""Cells of a map from which it is, besides."""

_backward = torch.ops.aten.convolution_backward


class Convolution(nn.Conv2d):
    """`nn.Conv2d`, with the same numbers to rounding."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 (torch's name)
        # Without gradients, too, while it trains: what losses are divided by has the same digits.
        learns = weight.requires_grad and (self.training or torch.is_grad_enabled())
        if learns and _may_be_faster(input, weight):
            if self._is_tiny(input):
                return self._product(input, weight, bias)
            if _is_slow(input, weight):
                where = (self.stride, self.padding, self.dilation, self.groups)
                return _PlainWeightGradient.apply(input, weight, bias, *where)
        return super()._conv_forward(input, weight, bias)

    def _is_tiny(self, images: Tensor) -> bool:
        locations = images.shape[0] * images.shape[2] * images.shape[3]
        locations //= self.stride[0] * self.stride[1]
        return (
            locations <= TINY
            and self.weight.numel() >= MANY
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


class PredictingConvolution(Convolution):
    """`nn.Conv2d`, with the same numbers to 1e-4 of their spread; for what learns no more."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 (torch's name)
        if not (_is_float32_on_cpu(input, weight) and self._may_be_winograd(input)):
            return super()._conv_forward(input, weight, bias)
        weight = weight.contiguous()
        found = [  # each image alone: NNPACK is fast, and for all batches the same, that way
            torch._nnpack_spatial_convolution(image, weight, bias, (1, 1))
            for image in input.contiguous().split(1)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _may_be_winograd(self, images: Tensor) -> bool:
        return (
            self.in_channels >= WIDE
            and images.dim() == 4
            and len(images) > 0
            and images.shape[2] * images.shape[3] >= WIDE_CELLS
            and self.kernel_size == (3, 3)
            and self.stride == self.dilation == self.padding == (1, 1)
            and self.padding_mode == "zeros"
            and self.groups == 1
            and torch.backends.cpu.get_cpu_capability() == "AVX2"
            and torch.backends.nnpack.is_available()
        )


def convert(model: nn.Module) -> None:
    """Make every `nn.Conv2d` in `model` a `Convolution`; subclasses stay what they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Convolution


class _PlainWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        images, weight, bias, *where = arguments
        ctx.save_for_backward(images, weight)
        stride, padding, dilation, groups = where
        ctx.geometry = stride, padding, dilation, False, (0, 0), groups
        return nn.functional.conv2d(images, weight, bias, *where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        of_images, _, of_bias = ctx.needs_input_grad[:3]
        found = None
        if of_images:
            only = (True, False, False)
            found, _, _ = _backward(gradient, images, weight, None, *ctx.geometry, only)
        plain = (gradient.contiguous(), images.contiguous(), weight.contiguous())
        biases = [len(weight)] if of_bias else None
        _, weights, bias = _backward(*plain, biases, *ctx.geometry, (False, True, of_bias))
        weights = weights.contiguous(memory_format=torch.channels_last)
        return found, weights, bias, None, None, None, None


def _may_be_faster(images: Tensor, weight: Tensor) -> bool:
    return (
        _is_float32_on_cpu(images, weight)
        and weight.shape[2:] != (1, 1)
        and images.is_contiguous(memory_format=torch.channels_last)
    )


def _is_float32_on_cpu(images: Tensor, weight: Tensor) -> bool:
    return (
        images.device.type == "cpu"
        and images.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _is_slow(images: Tensor, weight: Tensor) -> bool:
    return (
        "AVX512" not in torch.backends.cpu.get_cpu_capability()
        and weight.shape[1] > FEW
        and images.shape[2] * images.shape[3] >= LARGE
    )
