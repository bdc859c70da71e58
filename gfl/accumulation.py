"""A batch that goes through the network in several passes, whose gradients add up.

A global batch is cut into equal shares, one for each worker; where workers are missing, the others
take several. A share is cut into passes where it does not fit into memory at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gfl.data.dataset import Batch
from gfl.model.assigner import Targets
from gfl.model.detector import Detector, mean_amounts
from gfl.train.microbatch import Objective


@dataclass(frozen=True)
class Pass:
    """Images of a share that go through the network together.

    Attributes:
        images: Normalised, (B, 3, H, W).
        targets: Of these images.
        weight: How much its losses count in those of its share.
    """

    images: Tensor
    targets: Targets
    weight: float


def cut(detector: Detector, share: Batch, images_per_pass: int | None) -> list[Pass]:
    """Return a share in passes of `images_per_pass` images; in one by default."""
    images = detector.normalize(share.pixels, share.targets.sizes)
    images = images.contiguous(memory_format=torch.channels_last)
    count = len(images)
    size = min(images_per_pass or count, count)
    parts = [slice(start, start + size) for start in range(0, count, size)]
    return [
        Pass(images[part], _select(share.targets, part), len(images[part]) / count)
        for part in parts
    ]


def divisors(objective: Objective, shares: Sequence[list[Pass]], total: int) -> list[Tensor]:
    """Return what normalises the first pass of every share, the second, and so on: (2,) each.

    That is `mean_amounts` over these passes of all shares, as if they ran at once on as many
    workers. Takes a forward pass of each.

    Args:
        objective: What is trained.
        shares: This worker's.
        total: Shares of all workers.
    """
    with statistics_kept(objective.detector):
        amounts = [
            torch.stack([objective.amounts(each.images, each.targets) for each in share])
            for share in shares
        ]
    return list(mean_amounts(torch.stack(amounts).sum(dim=0), total))


@contextmanager
def statistics_kept(detector: Detector) -> Iterator[None]:
    """Leave the running statistics of BatchNorm as they are.

    Training takes those of the first worker; hence of its first share.
    """
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _select(targets: Targets, part: slice) -> Targets:
    """Return the targets of some of the images."""
    chosen = {name: value[part] for name, value in vars(targets).items()}
    return replace(targets, **chosen)
