"""A 3 x 3 convolution that learns, ours beside torch's in its two layouts: time and rounding.

Forward and both gradients, on a CPU; with more than AVX2, ours is torch's. Errors are the largest,
in the spread of what is exact.
"""

import copy
import statistics
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gfl.ops.convolution import replace_convolutions

SIZES = (
    (1, 256, 100, 168), (1, 128, 100, 168), (1, 256, 50, 84), (1, 512, 25, 42), (2, 256, 32, 40),
)  # fmt: skip
"""Images, channels, height, width: of P3, C3, P4 and C5 at 800 x 1344, and of P3 at 256 x 320."""


def compare(rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds, errors, and what part ours takes of torch's faster layout's, by size."""
    return {" x ".join(map(str, size)): _compare(size, rounds) for size in SIZES}


def _compare(size: tuple[int, int, int, int], rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(size[1], size[1], 3, padding=1, bias=False))
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(last)
    replace_convolutions(ours)
    images, gradient = torch.randn(size).relu(), torch.randn(size)
    exact = list(_run(copy.deepcopy(plain).double(), images.double(), gradient.double()))
    figures: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + 1):  # the first is warm-up
        for name, model in (("ours", ours), ("torch_plain", plain), ("torch_channels_last", last)):
            layout = torch.contiguous_format if model is plain else torch.channels_last
            inputs = [one.contiguous(memory_format=layout) for one in (images, gradient)]
            start = time.perf_counter()
            found = list(_run(model, *inputs))
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
            figures[f"{name}_error"] = _error(found, exact)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    figures |= {f"{name}_ms": 1000 * median for name, median in medians.items()}
    fastest = min(median for name, median in medians.items() if name != "ours")
    return figures | {"of_torch": medians["ours"] / fastest}


def _run(model: nn.Module, images: Tensor, gradient: Tensor) -> Iterable[Tensor]:
    images = images.detach().requires_grad_()
    found = model(images)
    return found.detach(), *torch.autograd.grad(found, (images, *model.parameters()), gradient)


def _error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(((one - other).abs().max() / other.std()).item() for one, other in pairs)
