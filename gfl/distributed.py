"""The training processes: rank, world size, and means over them."""

import torch.distributed as dist
from torch import Tensor


def worker_rank() -> tuple[int, int]:
    """Return this process's rank and the number of training processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_workers(values: Tensor) -> Tensor:
    """Return the mean of `values` over all training processes; itself when there is only one."""
    if world_size() == 1:
        return values
    values = values / world_size()
    dist.all_reduce(values)
    return values


def world_size() -> int:
    """Return the number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
