"""Ray Train's trainers, with the processes and imports that our trainings need and no others."""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import datasets, placement_group_callback
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

logger = logging.getLogger(__name__)

DISBAND_SECONDS = 30.0
"""For workers to leave their process group; then they are ended. Ray's own default."""


def trainer_class(*, stoppable: bool) -> Any:
    """Return Ray's class of trainers without the processes that are of no use here.

    One serves Ray Data's datasets, the other frees what a stopped training held. Where there is no
    dashboard, the second would ask whoever else listens on its port, and then stop the training.

    Args:
        stoppable: Whether Ray Tune may stop the training.
    """
    useless: tuple[type, ...] = (datasets.DatasetsCallback,)
    if not stoppable:
        useless += (placement_group_callback.PlacementGroupCleanerCallback,)

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if not isinstance(c, useless)]

    return Trainer


class ProcessGroup(BackendConfig):
    """`torch.distributed` among several workers, as Ray's `TorchConfig` sets it up in them.

    Only workers import that, and torch with it: it would hold up the controller for seconds, and
    take it half a gigabyte.
    """

    @property
    def backend_cls(self) -> type[Backend]:  # noqa: D102
        return _Backend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:  # noqa: D102
        return _own_device

    @property
    def framework(self) -> TrainingFramework:  # noqa: D102
        return TrainingFramework.TORCH


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address = worker_group.execute(_prepare)[0]
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        count = len(worker_group)
        joined = [worker_group.execute_single_async(rank, _join, backend, rank, count, address)
                  for rank in range(count)]  # fmt: skip
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        several = len(worker_group) > 1
        try:
            ray.get(worker_group.execute_async(_disband, several), timeout=DISBAND_SECONDS)
        except GetTimeoutError:
            logger.warning("workers did not leave their process group in time")


def _own_device() -> AbstractContextManager[None]:
    from ray.train.torch.config import TorchConfigContextManager

    found: AbstractContextManager[None] = TorchConfigContextManager()
    return found


def _prepare() -> tuple[str, int]:
    """Return an address and a free port; torch is there then, so that nobody takes it meanwhile."""
    from ray.train.torch import config

    config._set_torch_distributed_env_vars()
    return get_address_and_port()


def _join(backend: str, rank: int, count: int, address: tuple[str, int]) -> None:
    from ray.train.torch import config

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = map(str, address)
    config._setup_torch_process_group(backend, rank, count, "env://")


def _disband(several: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=several)
