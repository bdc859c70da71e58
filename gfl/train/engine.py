"""Training from start to end: epochs, evaluations, reports.

Resumes from any checkpoint, and is distributed where `torch.distributed` is initialised. Knows
nothing of Ray or MLflow: a `Listener` hears what happens and saves what it wants to keep.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
from gfl.distributed import mean_over_workers, worker_rank
from gfl.errors import LeaveError
from gfl.evaluation.evaluator import evaluate
from gfl.model.detector import Detector
from gfl.ops.allocator import return_freed_memory
from gfl.train.metrics import StepMeter
from gfl.train.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What happened since the report before, averaged over steps and workers.

    Attributes:
        step: Steps done.
        total_steps: Of the whole training.
        epoch: Epochs done, with fraction.
        seconds_left: Until all steps are done at the present rate, evaluations not counted.
        metrics: `loss`, each loss, `lr`, `grad_norm`, `images_per_second` (over all workers), and
            the metrics of `gfl.train.metrics`: `step_ms_p50`, `data_wait_share` and so on.
    """

    step: int
    total_steps: int
    epoch: float
    seconds_left: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class CheckpointReport:
    """A point of training to go on from.

    Attributes:
        epoch: Epochs done.
        step: Steps done.
        config: What the trainer was built from.
        snapshot: Returns the checkpoint; for one worker only, and before training goes on.
    """

    epoch: int
    step: int
    config: Config
    snapshot: Callable[[], Snapshot]


@dataclass(frozen=True)
class EpochReport(CheckpointReport):
    """An epoch that has been trained and evaluated.

    Attributes:
        metrics: The COCO statistics.
    """

    metrics: dict[str, float]


class Listener(Protocol):
    """Hears of training on every worker; the numbers are the same on all."""

    def on_steps(self, report: StepReport) -> None:
        """Every `report_every` steps."""

    def on_checkpoint(self, report: CheckpointReport) -> None:
        """Every `checkpoint_every` steps, ends of epochs apart."""

    def on_epoch(self, report: EpochReport) -> None:
        """At the end of every epoch."""


def fit(
    config: Config,
    splits: tuple[Split, Split],
    listener: Listener,
    *,
    device: torch.device,
    failure_folder: Path,
    weights: Path | None = None,
    resume: Path | None = None,
    teacher: Path | None = None,
    report_every: int = 10,
    checkpoint_every: int | None = None,
    shares: int | None = None,
    leave: Callable[[], bool] | None = None,
) -> Trainer:
    """Train, and evaluate after every epoch.

    Args:
        config: What to train, and how.
        splits: The images to train and to evaluate on.
        listener: Hears of progress.
        device: Where; in a distributed run, this worker's.
        failure_folder: Where the batch goes that turns the loss NaN.
        weights: Local file of weights to start from.
        resume: Checkpoint to go on from; the result is the same bit for bit as without
            interruption.
        teacher: Folder of the checkpoint that `loss.distillation` learns from.
        report_every: Steps between reports; the host waits for the device only then.
        checkpoint_every: Steps between checkpoints within an epoch; none by default.
        shares: Into how many equal shares a global batch is cut, by default as many as there are
            workers. Fewer workers take several each, one after the other, and train what as many
            workers as shares would, to rounding; this costs a third more time per image, for
            losses are normalised over all shares, which takes a forward pass more. BatchNorm may
            not be synchronised then.
        leave: Asked at every report: whether to stop, with a checkpoint. One worker's yes is all's.

    Raises:
        LeaveError: because `leave` said so.
        NonFiniteLossError: at the first report after a loss or gradient turned NaN or infinite.
    """
    train, val = splits
    trainer = Trainer(config, train, device, weights, resume, teacher, shares)
    processes = config.data.loader_workers
    loader = build_loader(trainer.dataset, trainer.batches, processes, pin=device.type == "cuda")
    evaluation = build_evaluation_loader(config, val, device)
    window = _Window(trainer, report_every, leave)
    trainer.parallel.train()
    leaving = False
    batches = () if trainer.out_of_patience else window.meter.timed(loader)
    for shares_of_step in _steps(batches, trainer):
        window.add(trainer.train_step(*(share.to(device) for share in shares_of_step)))
        end_of_epoch = trainer.step % trainer.batches.steps_per_epoch == 0
        to_keep = checkpoint_every is not None and trainer.step % checkpoint_every == 0
        if window.full or end_of_epoch or to_keep:
            report, bad_step, leaving = window.close()
            if bad_step >= 0:
                raise trainer.explain_bad_step(bad_step, failure_folder)
            listener.on_steps(report)
        if end_of_epoch:
            _share_buffers(trainer.detector, trainer.model)
            if device.type == "cpu":
                return_freed_memory()  # or loaders, which are forked, would share it, page by page
            metrics = evaluate(trainer.model, val, evaluation, device)
            trainer.parallel.train()
            trainer.note_quality(metrics["AP"])
            snapshot = partial(trainer.snapshot, train, metrics)
            where = (trainer.epochs_done, trainer.step, trainer.config)
            listener.on_epoch(EpochReport(*where, snapshot, metrics))
            if trainer.out_of_patience:
                break
            window.restart()
        elif to_keep or leaving:
            snapshot = partial(trainer.snapshot, train, {})
            where = (trainer.epochs_done, trainer.step, trainer.config)
            listener.on_checkpoint(CheckpointReport(*where, snapshot))
            window.restart()
        if leaving and trainer.step < trainer.batches.total_steps:
            raise LeaveError(f"stopped after step {trainer.step}, where a checkpoint is")
    return_freed_memory()
    return trainer


def _steps(batches: Iterable[Batch], trainer: Trainer) -> Iterator[tuple[Batch, ...]]:
    """Give this worker's shares of every step, which follow each other."""
    yield from zip(*[iter(batches)] * len(trainer.batches.shares), strict=True)


def build_evaluation_loader(
    config: Config, split: Split, device: torch.device
) -> DataLoader[Batch]:
    """Return the loader of this worker's share of the evaluation set."""
    rank, world = worker_rank()
    batches = EvaluationBatches(len(split.records), config.data.val_batch, rank, world)
    dataset = DetectionDataset(split, config, training=False)
    return build_loader(dataset, batches, config.data.loader_workers, pin=device.type == "cuda")


def _share_buffers(*detectors: Detector) -> None:
    """Give all workers the BatchNorm statistics of rank 0: those that checkpoints hold."""
    if dist.is_initialized():
        for detector in detectors:
            for buffer in detector.buffers():
                dist.broadcast(buffer, src=0)


class _Window:
    """The steps since the last report; fetching their numbers is the only time the host waits."""

    def __init__(
        self, trainer: Trainer, steps: int, leave: Callable[[], bool] | None = None
    ) -> None:
        self._trainer = trainer
        self._leave = leave
        self._rows: deque[Tensor] = deque(maxlen=steps)
        self.meter = StepMeter(trainer.device)
        self.restart()

    def restart(self) -> None:
        """Start the clock anew, after work that is no training."""
        self._rows.clear()
        self.meter.restart()
        self._start = time.perf_counter()

    def add(self, row: Tensor) -> None:
        """Note a step's losses and gradient norm."""
        self._rows.append(row)
        self.meter.end_step()

    @property
    def full(self) -> bool:
        """Whether it is time to report."""
        return len(self._rows) == self._rows.maxlen

    def close(self) -> tuple[StepReport, int, bool]:
        """Return the report, the first step that was not finite (-1: none), whether to leave."""
        trainer = self._trainer
        row = torch.stack(list(self._rows)).mean(dim=0).double()
        asked = row.new_full((1,), self._leave is not None and self._leave())
        means = mean_over_workers(torch.cat([row, asked]))
        *losses, norm, share_leaving, bad_step = torch.cat(
            [means, trainer.first_bad_step.view(1)]
        ).tolist()
        seconds = time.perf_counter() - self._start
        metrics = {
            "loss": sum(losses),
            **dict(zip(trainer.objective.names, losses, strict=True)),
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
        return report, int(bad_step), share_leaving > 0
