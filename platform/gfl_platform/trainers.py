"""Ray Train's trainers, with the processes and imports that our trainings need and no others."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import datasets, placement_group_callback
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 30.0
"""For workers to leave their process group; then they are ended. Ray's own limit."""


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

    Only workers import that, and torch with it: it would hold up driver and controller for
    seconds, and take them half a gigabyte.
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
        address, port = worker_group.execute_single(0, get_address_and_port)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        count = len(worker_group)
        group = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        joined = [worker_group.execute_single_async(rank, _join, backend, group, rank, count)
                  for rank in range(count)]  # fmt: skip
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        try:
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_SECONDS)
        except GetTimeoutError:
            logger.warning("workers did not leave their process group in time")


@contextmanager
def _own_device() -> Iterator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


def _join(backend: str, group: dict[str, str], rank: int, count: int) -> None:
    from ray.train.torch import config

    os.environ.update(group)
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, count, "env://")


def _leave() -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=True)
