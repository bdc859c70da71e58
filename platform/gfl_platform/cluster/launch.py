"""Running a training loop in the workers of a Ray cluster, with failures told in one line."""

import copy
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from gfl.errors import NonFiniteLossError, PreemptedError
from gfl_platform.cluster.event_queue import Events
from gfl_platform.cluster.events import CheckpointSaved, EpochEvaluated, Waiting, WorkerFailed
from gfl_platform.cluster.ray_private import death_of_process
from gfl_platform.cluster.resources import Workers, shortage, start_timeout
from gfl_platform.storage.s3 import S3UnavailableError

PROGRAM_ERRORS = (
    TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, ImportError,
)  # fmt: skip
"""Errors of a program on data that it does not expect. Their messages need the type."""

FINAL_ERRORS = (ValueError, NonFiniteLossError, *PROGRAM_ERRORS)
"""Errors that every further attempt would raise, too, `S3UnavailableError` excepted. A lost node or
a lost connection raises none of them."""


class JobFailedError(RuntimeError):
    """A worker stopped; the message is the worker's own."""


class DivergedError(JobFailedError):
    """A loss or gradient turned NaN or infinite."""


@dataclass(frozen=True)
class RunOptions:
    """What happens to the workers of a job, and where their checkpoints lie.

    Attributes:
        ray: Options of Ray's `RunConfig`.
        callbacks: Further callbacks of the training controller.
        max_failures: Number of times that failed workers are started again.
        resize_seconds: Seconds between two checks for nodes that an elastic job could use.
    """

    ray: Mapping[str, Any]
    callbacks: Sequence[UserCallback] = ()
    max_failures: int = 0
    resize_seconds: float = inf


def run_workers(
    loop: Callable[[dict[str, Any]], Any],
    settings: Mapping[str, Any],
    workers: Workers,
    events: Events,
    options: RunOptions,
) -> Any:
    """Run `loop(settings)` in every worker, all in one process group; return Ray's result.

    Args:
        loop: The function that each worker runs. It finds `events` under `settings["events"]`, and
            its return value on rank 0 is `result.return_value`.
        settings: The argument of `loop`.
        workers: The processes and devices to run on.
        events: The way to the driver, for the workers and the training controller.
        options: What happens to the workers, and where their checkpoints lie.

    Raises:
        JobFailedError: a worker stopped, and another attempt was useless or one too many; it is a
            `DivergedError` if the reason was a NaN.
    """

    def run_loop(settings: dict[str, Any]) -> Any:
        try:
            return loop(settings)
        except Exception as error:
            raise portable(error) from None

    node_losses = options.max_failures if workers.elastic else 0
    trainer = TorchTrainer(
        run_loop,
        train_loop_config={**settings, "events": events},
        scaling_config=ScalingConfig(
            num_workers=(workers.least, workers.count) if workers.elastic else workers.count,
            elastic_resize_monitor_interval_s=options.resize_seconds,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            callbacks=[ControllerCallback(events, options.max_failures), *options.callbacks],
            failure_config=FailureConfig(
                max_failures=-1,  # `ControllerCallback` counts
                # A lost node can cost some starts, until Ray's picture of the cluster is new.
                controller_failure_limit=3 * (1 + node_losses),
            ),
            **options.ray,
        ),
    )
    if reason := shortage(workers):
        events.tell(Waiting(reason))
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


def portable(error: Exception) -> Exception:
    """Return an error that another process can read, which not every class allows.

    Ray could not tell what stopped a worker, and would start it again.
    """
    try:
        copy.deepcopy(error)  # makes it anew as unpickling does
    except Exception:
        kind = ValueError if _is_final(error) else RuntimeError
        return kind(f"{type(error).__name__}: {one_line(error)}")
    return error


class ControllerCallback(UserCallback):
    """Tells the driver what the training controller sees, and ends a run that cannot succeed.

    It counts failures in place of Ray, which would count a worker that leaves a drained node.
    """

    def __init__(self, events: Events, max_failures: int) -> None:
        self._events = events
        self._failures_left = max_failures
        self._preempted = False

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Tell the driver about a checkpoint that is in storage, with the metrics of rank 0."""
        self._preempted = False
        if checkpoint is None:
            return
        facts, uri = metrics[0], uri_of(checkpoint)
        step, epoch = facts["step"], facts["epoch"]
        if "metrics" in facts:
            self._events.tell(EpochEvaluated(step, epoch, facts["metrics"], uri))
        else:  # a checkpoint within an epoch, which only serves to continue from
            self._events.tell(CheckpointSaved(step, epoch, uri))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Tell the driver about workers that stopped; raise if they would stop again.

        Raises:
            JobFailedError: the run has to end.
        """
        preempted_ranks = [r for r, e in sorted(worker_exceptions.items()) if _was_preempted(e)]
        if preempted_ranks:
            if not self._preempted:  # Ray calls again until all of them have stopped
                reason = "its node is drained"
                self._events.tell(WorkerFailed(preempted_ranks[0], reason, final=False))
            self._preempted = True
            return
        # Workers whose partner died stop, too: one loss, explained by the worker that caused it.
        rank = min(worker_exceptions, key=lambda rank: (_precedence(worker_exceptions[rank]), rank))
        cause = root_cause(worker_exceptions[rank])
        final = _is_final(cause) or self._failures_left == 0
        reason = one_line(cause)
        self._events.tell(WorkerFailed(rank, reason, final))
        if final:
            diverged = isinstance(cause, NonFiniteLossError)
            raise DivergedError(reason) if diverged else JobFailedError(reason)
        self._failures_left -= 1


def _is_final(cause: BaseException) -> bool:
    return isinstance(cause, FINAL_ERRORS) and not isinstance(cause, S3UnavailableError)


def _precedence(error: BaseException) -> int:
    """Return 0 for an error that ends every attempt, 1 for a process that died, 2 for others."""
    if _is_final(root_cause(error)):
        return 0
    return 2 if death_of_process(error) is None else 1


def _was_preempted(error: BaseException) -> bool:
    """Return whether a worker stopped because its node is drained, or died with a drained node."""
    death = death_of_process(error) or error
    return isinstance(root_cause(error), PreemptedError) or getattr(death, "preempted", False)


def uri_of(checkpoint: Checkpoint) -> str:
    """Return the location of one of Ray's checkpoints: a path, or `s3://...`."""
    remote = checkpoint.filesystem.type_name == "s3"
    return f"s3://{checkpoint.path}" if remote else str(checkpoint.path)


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that Ray has wrapped in its own."""
    for name in ("cause", "controller_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return root_cause(inner)
    return error


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line: of a traceback as text, its last line.

    A program's error has its type in front, because its message may be a key alone.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # torch's DataLoader puts the traceback into the message of the exception that it raises again,
    # Ray that of an actor which could not be made.
    with_traceback = lines[0].startswith(("Caught ", "The actor died because of an error raised"))
    line = lines[-1].partition(": ")[2] if with_traceback else lines[0]
    return f"{type(error).__name__}: {line}" if isinstance(error, PROGRAM_ERRORS) else line
