"""Ray Train's trainers, with the processes that our trainings need and no others."""

from typing import Any


def trainer_class(*, several: bool, stoppable: bool) -> Any:
    """Return Ray's class of trainers without the processes that are of no use here.

    One serves Ray Data's datasets, the other frees what a stopped training held. Where there is no
    dashboard, the second would ask whoever else listens on its port, and then stop the training.

    Args:
        several: Whether there are several workers, which need a process group.
        stoppable: Whether Ray Tune may stop the training.
    """
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback

    if several:
        from ray.train.torch import TorchTrainer as Base
    else:  # driver and controller need no torch, which takes seconds
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as Base

    useless: tuple[type, ...] = (datasets.DatasetsCallback,)
    if not stoppable:
        useless += (placement_group_callback.PlacementGroupCleanerCallback,)

    class Trainer(Base):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if not isinstance(c, useless)]

    return Trainer
