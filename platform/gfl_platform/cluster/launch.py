"""The Ray cluster: which one, what a job needs of it, how its workers run."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import inf
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train import UserCallback
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import datasets, placement_group_callback
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from gfl.errors import LeaveError, NonFiniteLossError
from gfl.ops.allocator import KEEPING
from gfl_platform.cluster.events import Events
from gfl_platform.cluster.resources import start_timeout
from gfl_platform.storage.s3 import S3UnavailableError

if TYPE_CHECKING:
    pass
from gfl_platform.cluster.resources import Workers

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


FINAL = (ValueError, NonFiniteLossError)
"""What would stop every further attempt, too, if it is not an `S3UnavailableError`."""


class JobFailedError(RuntimeError):
    """A worker stopped; the message is what it said."""


class DivergedError(JobFailedError):
    """A loss or gradient turned NaN or infinite."""


def run_workers(
    loop: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    workers: Workers,
    events: Events,
    callbacks: Sequence[UserCallback] = (),
    max_failures: int = 0,
    resize_seconds: float = inf,
    **run_options: Any,
) -> Any:
    """Run `loop(settings)` in every worker, several in a process group; return Ray's result.

    Args:
        loop: Finds `events` under `settings["events"]`; what it returns on rank 0 is
            `result.return_value`.
        settings: For `loop`.
        workers: What to run on.
        events: Is told of what workers and controller do.
        callbacks: Of the training controller, besides its own.
        max_failures: How often to start them again.
        resize_seconds: Between looks for nodes that more workers could use, if they are elastic.
        run_options: Of Ray's `RunConfig`.

    Raises:
        JobFailedError: a worker stopped, and going on was no use or was tried often enough; of a
            NaN a `DivergedError`.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    trainer = trainer_class(stoppable=workers.stoppable)(
        loop,
        backend_config=ProcessGroup() if workers.count > 1 else None,
        train_loop_config=settings | {"events": events},
        scaling_config=ScalingConfig(
            num_workers=(workers.least, workers.count) if workers.elastic else workers.count,
            elastic_resize_monitor_interval_s=resize_seconds,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            callbacks=[ControllerCallback(events, max_failures), *callbacks],
            failure_config=FailureConfig(
                max_failures=-1,  # `ControllerCallback` counts
                # Each lost node can cost some starts, for Ray's picture of the cluster is old.
                controller_failure_limit=3 * (1 + max_failures * workers.elastic),
            ),
            worker_runtime_env={} if workers.use_gpu else {"env_vars": KEEPING},
            **run_options,
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with start_timeout(elastic=workers.elastic):
            return trainer.fit()
    except SystemExit as error:  # Ray's answer to Ctrl-C, once the workers have stopped
        raise KeyboardInterrupt from error
    except Exception as error:
        cause = root_cause(error)
        kind = DivergedError if isinstance(cause, DivergedError) else JobFailedError
        raise kind(one_line(cause)) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)


class ControllerCallback(UserCallback):
    """Tells the driver what the training controller sees; gives up where trying again is no use.

    It counts failures in Ray's place, to which a worker that leaves a drained node is one.
    """

    def __init__(self, events: Events, max_failures: int) -> None:
        self._events = events
        self._failures_left = max_failures
        self._leaves = False

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Tell of a checkpoint that lies in storage, with what rank 0 says of it."""
        self._leaves = False
        if checkpoint is not None:
            # One within an epoch has no metrics: it is there to go on from.
            kind = "checkpoint" if "metrics" in metrics[0] else "saved"
            self._events.tell({"kind": kind, "uri": uri_of(checkpoint), **metrics[0]})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Tell of workers that stopped; raise, which ends the run, where they would stop again."""
        leaving = [rank for rank, e in sorted(worker_exceptions.items()) if _left_its_node(e)]
        if leaving:
            if not self._leaves:  # Ray asks again until all of them have stopped
                reason = "its node is drained"
                failure = {"kind": "failure", "rank": leaving[0], "reason": reason, "final": False}
                self._events.tell(failure)
            self._leaves = True
            return
        # Those whose partner died stop, too: one loss, told of by the worker that explains it.
        rank = min(worker_exceptions, key=lambda rank: (*_explains(worker_exceptions[rank]), rank))
        cause = root_cause(worker_exceptions[rank])
        final = _is_final(cause)
        reason = one_line(cause)
        self._events.tell({"kind": "failure", "rank": rank, "reason": reason, "final": final})
        if final:
            diverged = isinstance(cause, NonFiniteLossError)
            raise DivergedError(reason) if diverged else JobFailedError(reason)
        self._failures_left -= 1
        if self._failures_left < 0:
            raise JobFailedError(reason)


def _is_final(cause: BaseException) -> bool:
    return isinstance(cause, FINAL) and not isinstance(cause, S3UnavailableError)


def _explains(error: BaseException) -> tuple[bool, bool]:
    """Return a key that sorts what would end any attempt first, then processes that died."""
    return not _is_final(root_cause(error)), not hasattr(error, "health_check_failure")


def _left_its_node(error: BaseException) -> bool:
    """Return whether a worker stopped because its node is drained, or died with a drained node."""
    died_of = getattr(error, "health_check_failure", error)
    return isinstance(root_cause(error), LeaveError) or getattr(died_of, "preempted", False)


def uri_of(checkpoint: Any) -> str:
    """Return where one of Ray's checkpoints lies: a path, or `s3://...`."""
    remote = checkpoint.filesystem.type_name == "s3"
    return f"s3://{checkpoint.path}" if remote else str(checkpoint.path)


def root_cause(error: BaseException) -> BaseException:
    """Return what lies inside Ray's wrappings of an exception."""
    for name in ("_base_exc", "cause", "controller_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return root_cause(inner)
    return error


def one_line(error: BaseException) -> str:
    """Return what an exception says in one line: the first, or of a traceback as text the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # torch's DataLoader puts the traceback into the message of the exception that it raises again,
    # Ray that of an actor which could not be made.
    with_traceback = lines[0].startswith(("Caught ", "The actor died because of an error raised"))
    return lines[-1].partition(": ")[2] if with_traceback else lines[0]
