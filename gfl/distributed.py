"""Rank, number of workers and means over workers, where `torch.distributed` is initialised."""

import torch.distributed as dist
from torch import Tensor


def worker_rank() -> tuple[int, int]:
    """Return the rank of this worker and the number of workers."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_workers(values: Tensor) -> Tensor:
    """Return the mean of `values` over all workers; with one worker, `values` itself."""
    if world_size() == 1:
        return values
    values = values / world_size()
    dist.all_reduce(values)
    return values


def world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
