"""A detector that only predicts: no norms in its body, and convolutions that cannot learn."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gfl.model.detector import Detector
from gfl.ops.convolution import Convolution, PredictingConvolution


@torch.no_grad()
def folded(detector: Detector) -> Detector:
    """Return a copy that predicts the same, without a pass over maps for every norm.

    In evaluation mode a BatchNorm is a factor and a term per channel, which its convolution takes.
    """
    copy = deepcopy(detector).eval().requires_grad_(False)
    for module in list(copy.backbone.modules()):
        for convolution, name, norm in _pairs(module):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            term = norm.bias.double() - norm.running_mean.double() * factor
            weight = convolution.weight
            weight.copy_(weight.double() * factor.view(-1, 1, 1, 1))
            convolution.bias = nn.Parameter(term.to(weight), requires_grad=False)
            setattr(module, name, nn.Identity())
    for module in copy.modules():
        if type(module) is Convolution:
            module.__class__ = PredictingConvolution
    return copy


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Conv2d, str, _BatchNorm]]:
    """Give each convolution among the children of `module` that a norm follows, and the norm."""
    for (_, first), (name, second) in pairwise(list(module.named_children())):
        if isinstance(first, nn.Conv2d) and isinstance(second, _BatchNorm):
            yield first, name, second
