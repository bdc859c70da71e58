"""Training from start to end: epochs, evaluations, checkpoints and reports.

    trainer = fit(config, load_splits(config), callbacks, FitOptions(device, folder))

It continues from any checkpoint, and it is distributed where `torch.distributed` is initialised. It
knows nothing of Ray or MLflow: its `Callbacks` receive the reports and save what they want to keep.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from gfl.checkpoint.snapshot import Snapshot
from gfl.config.schema import Config
from gfl.data.dataset import Batch, DetectionDataset, build_loader
from gfl.data.samplers import EvaluationBatches
from gfl.data.split import Split
from gfl.data.tiles import TileRecords
from gfl.distributed import mean_over_workers, worker_rank
from gfl.errors import PreemptedError
from gfl.evaluation.evaluator import evaluate
from gfl.model.detector import Detector
from gfl.train.metrics import StepMeter
from gfl.train.trainer import Start, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """The steps since the report before.

    Attributes:
        step: Number of steps done.
        total_steps: Number of steps of the whole training.
        epoch: Number of epochs done, with its fraction.
        seconds_left: Time for the remaining steps at the present rate, without evaluations.
        metrics: `loss`, each loss, `grad_norm` (means over steps and workers), `lr`,
            `images_per_second` (over all workers), and those of `StepMeter.metrics`.
    """

    step: int
    total_steps: int
    epoch: float
    seconds_left: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class CheckpointReport:
    """A point from which training can be continued.

    Attributes:
        epoch: Number of epochs done.
        step: Number of steps done.
        config: The configuration of the training.
        snapshot: Returns the checkpoint. One worker may call it, before the callback returns.
    """

    epoch: int
    step: int
    config: Config
    snapshot: Callable[[], Snapshot]


@dataclass(frozen=True)
class EpochReport(CheckpointReport):
    """The end of an epoch, after its evaluation.

    Attributes:
        metrics: The COCO statistics of the evaluation.
    """

    metrics: dict[str, float]


class Callbacks(Protocol):
    """What `fit` calls on every worker; reports hold the same numbers on all of them."""

    def on_steps(self, report: StepReport) -> None:
        """Called every `report_every` steps, at checkpoints and at the end of every epoch."""

    def on_checkpoint(self, report: CheckpointReport) -> None:
        """Called every `checkpoint_every` steps, except at the end of an epoch."""

    def on_epoch(self, report: EpochReport) -> None:
        """Called at the end of every epoch."""


@dataclass(frozen=True)
class FitOptions:
    """How to train on this worker.

    Attributes:
        device: Device of this worker.
        failure_folder: Folder for the batch that turns a loss into NaN.
        start: What the training starts from.
        report_every: Steps between reports. The host waits for the device only at a report.
        checkpoint_every: Steps between checkpoints within an epoch; by default there are none.
        should_stop: Called at every report; whether to stop with a checkpoint, because this worker
            is preempted. If it returns True on any worker, all workers stop.
    """

    device: torch.device
    failure_folder: Path
    start: Start = field(default_factory=Start)
    report_every: int = 10
    checkpoint_every: int | None = None
    should_stop: Callable[[], bool] | None = None


def fit(
    config: Config, splits: tuple[Split, Split], callbacks: Callbacks, options: FitOptions
) -> Trainer:
    """Train, and evaluate after every epoch.

    Args:
        config: The configuration of the training.
        splits: The images to train on, and those to evaluate on.
        callbacks: Receives the reports.
        options: How to train on this worker.

    Raises:
        PreemptedError: `should_stop` returned True before the last step.
        NonFiniteLossError: a loss or gradient turned NaN or infinite since the last report.
    """
    train, val = splits
    device, checkpoint_every = options.device, options.checkpoint_every
    trainer = Trainer(config, train, device, options.start)
    processes = config.data.loader_workers
    loader = build_loader(trainer.dataset, trainer.batches, processes, pin=device.type == "cuda")
    evaluation = build_evaluation_loader(config, val, device)
    window = _ReportWindow(trainer, options.report_every, options.should_stop)
    trainer.parallel.train()
    preempted = False
    batches = () if trainer.stops_early else window.meter.timed(loader)
    for step_shards in _by_step(batches, len(trainer.batches.shards)):
        window.add(trainer.train_step(*(shard.to(device) for shard in step_shards)))
        end_of_epoch = trainer.step % trainer.batches.steps_per_epoch == 0
        checkpoint_due = checkpoint_every is not None and trainer.step % checkpoint_every == 0
        if window.full or end_of_epoch or checkpoint_due:
            report, bad_step, preempted = window.close()
            if bad_step >= 0:
                raise trainer.explain_bad_step(bad_step, options.failure_folder)
            callbacks.on_steps(report)
        if end_of_epoch:
            _broadcast_buffers(trainer.detector, trainer.model)
            metrics = evaluate(trainer.model, val, evaluation, device)
            trainer.parallel.train()
            trainer.record_ap(metrics["AP"])
            snapshot = partial(trainer.snapshot, train, metrics)
            progress = (trainer.epochs_done, trainer.step, config)
            callbacks.on_epoch(EpochReport(*progress, snapshot, metrics))
            if trainer.stops_early:
                break
            window.restart()
        elif checkpoint_due or preempted:
            snapshot = partial(trainer.snapshot, train, {})
            progress = (trainer.epochs_done, trainer.step, config)
            callbacks.on_checkpoint(CheckpointReport(*progress, snapshot))
            window.restart()
        if preempted and trainer.step < trainer.batches.total_steps:
            raise PreemptedError(f"preempted after step {trainer.step}, whose checkpoint is stored")
    return trainer


def _by_step(batches: Iterable[Batch], shards: int) -> Iterator[list[Batch]]:
    """Yield the `shards` of every step, which follow each other in `batches`."""
    of_step: list[Batch] = []
    for batch in batches:
        of_step.append(batch)
        if len(of_step) == shards:
            yield of_step
            of_step = []


def build_evaluation_loader(
    config: Config, split: Split, device: torch.device
) -> DataLoader[Batch]:
    """Return the loader of this worker's part of an evaluation set."""
    rank, world = worker_rank()
    dataset = DetectionDataset(split, config, training=False)
    records = dataset.records
    counts = records.counts if isinstance(records, TileRecords) else [1] * len(records)
    batches = EvaluationBatches(counts, config.data.val_batch, rank, world)
    return build_loader(dataset, batches, config.data.loader_workers, pin=device.type == "cuda")


def _broadcast_buffers(*detectors: Detector) -> None:
    """Give all workers the BatchNorm statistics of rank 0, which are those of the checkpoints."""
    if dist.is_initialized():
        for detector in detectors:
            for buffer in detector.buffers():
                dist.broadcast(buffer, src=0)


class _ReportWindow:
    """The steps since the last report; the host waits for their numbers at `close` only."""

    def __init__(
        self, trainer: Trainer, steps: int, should_stop: Callable[[], bool] | None
    ) -> None:
        self._trainer = trainer
        self._should_stop = should_stop
        self._rows: deque[Tensor] = deque(maxlen=steps)
        self.meter = StepMeter(trainer.device)
        self.restart()

    def restart(self) -> None:
        """Start the clock anew, so that work other than training does not count."""
        self._rows.clear()
        self.meter.restart()
        self._start = time.perf_counter()

    def add(self, row: Tensor) -> None:
        """Add a step, with its losses and the norm of its gradient."""
        self._rows.append(row)
        self.meter.end_step()

    @property
    def full(self) -> bool:
        """Whether a report is due."""
        return len(self._rows) == self._rows.maxlen

    def close(self) -> tuple[StepReport, int, bool]:
        """Return the report, the first bad step (-1 if there is none), and whether to stop.

        One all-reduce averages losses and the requests to stop over workers.
        """
        trainer = self._trainer
        row = torch.stack(list(self._rows)).mean(dim=0).double()
        stop = row.new_full((1,), self._should_stop is not None and self._should_stop())
        means = mean_over_workers(torch.cat([row, stop]))
        *losses, norm, stopping_workers, bad_step = torch.cat(
            [means, trainer.first_bad_step.view(1)]
        ).tolist()
        seconds = time.perf_counter() - self._start
        metrics = {
            "loss": sum(losses),
            **dict(zip(trainer.loss_module.names, losses, strict=True)),
            "grad_norm": norm,
            "lr": trainer.scheduler.get_last_lr()[0],
            "images_per_second": len(self._rows) * trainer.config.data.batch / seconds,
            **self.meter.metrics(),
        }
        batches = trainer.batches
        report = StepReport(
            step=trainer.step,
            total_steps=batches.total_steps,
            epoch=trainer.step / batches.steps_per_epoch,
            seconds_left=seconds / len(self._rows) * (batches.total_steps - trainer.step),
            metrics=metrics,
        )
        self.restart()
        return report, int(bad_step), stopping_workers > 0
