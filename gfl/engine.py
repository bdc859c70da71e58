"""The training loop: one step, an epoch, a fit.

It resumes from any checkpoint, and is distributed where `torch.distributed` is initialised.
Knows nothing of Ray or MLflow: a `Listener` hears what happens and saves what it wants to keep.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gfl.assigner import Targets
from gfl.checkpoint import WEIGHTS, About, read_about, read_training, save_checkpoint
from gfl.config import Config, dump_config
from gfl.data.coco import CocoSplit
from gfl.data.loading import (
    Batch,
    DetectionDataset,
    EvaluationBatches,
    TrainBatches,
    build_loader,
    collate,
)
from gfl.detector import Detector, mean_over_workers
from gfl.diagnosis import NonFiniteLossError, first_non_finite
from gfl.evaluation import evaluate
from gfl.optim import build_optimizer, build_scheduler, scaled_lr
from gfl.pretrained import load_weights

logger = logging.getLogger(__name__)

LOSSES = ("qfl", "giou", "dfl")


@dataclass(frozen=True)
class StepReport:
    """What happened since the report before, averaged over steps and workers.

    Attributes:
        step: Steps done.
        total_steps: Of the whole training.
        epoch: Epochs done, with fraction.
        seconds_left: Until all steps are done at the present rate, evaluations not counted.
        metrics: `loss`, each loss, `lr`, `grad_norm`, `images_per_second` (over all workers).
    """

    step: int
    total_steps: int
    epoch: float
    seconds_left: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class EpochReport:
    """An epoch that has been trained and evaluated.

    Attributes:
        epoch: Epochs done.
        step: Steps done.
        metrics: The COCO statistics.
        save: Writes a checkpoint into an existing folder; to be called on one worker only.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    save: Callable[[Path], None]


class Listener(Protocol):
    """Hears of training on every worker; the numbers are the same on all."""

    def on_steps(self, report: StepReport) -> None:
        """Every `report_every` steps."""

    def on_epoch(self, report: EpochReport) -> None:
        """At the end of every epoch."""


class _Objective(nn.Module):
    """The detector's objective as a forward pass, which DistributedDataParallel needs."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, targets: Targets) -> Tensor:
        losses = self.detector.objective(images, targets)
        return torch.stack([losses[name] for name in LOSSES])


class Trainer:
    """A detector in training: its optimizer, its schedule, its data and how far it is."""

    def __init__(
        self,
        config: Config,
        train: CocoSplit,
        device: torch.device,
        weights: Path | None = None,
        resume: Path | None = None,
    ) -> None:
        """Build everything anew, or as it was in the checkpoint `resume`.

        Args:
            config: What to train.
            train: On what.
            device: Where.
            weights: Local file to start from: the whole detector's, or its backbone's.
            resume: Folder of a checkpoint to go on from.
        """
        torch.manual_seed(config.seed)
        self.config = config
        self.train_split = train
        self.device = device
        self.rank, self.world = worker_rank()
        self.detector = Detector(config)
        if source := (resume / WEIGHTS if resume else weights):
            load_weights(self.detector, source)
        place(self.detector, device)
        self.step = read_about(resume).step if resume else 0
        self.batches = TrainBatches(len(train.records), config, self.rank, self.world, self.step)
        self.dataset = DetectionDataset(train, config, training=True)
        self.optimizer = build_optimizer(self.detector, config)
        self.scheduler = build_scheduler(
            self.optimizer, config.schedule, self.batches.steps_per_epoch
        )
        if resume:
            state = read_training(resume)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        objective = _Objective(self.detector)
        self.objective: nn.Module = objective
        if dist.is_initialized():
            devices = [device] if device.type == "cuda" else None
            self.objective = DistributedDataParallel(
                objective, device_ids=devices, gradient_as_bucket_view=True
            )
        # The first step whose gradient was not finite; on the device, so that no step waits.
        self.first_bad_step = torch.full((), -1, dtype=torch.long, device=device)

    @property
    def epochs_done(self) -> int:
        """Whole epochs trained."""
        return self.step // self.batches.steps_per_epoch

    def train_step(self, batch: Batch) -> Tensor:
        """Train on this worker's share of a global batch; return losses and gradient norm, (4,).

        From the first gradient that is not finite on, no weight changes any more: the optimizer is
        told so on the device. Gradients are the same on all workers, hence so is the decision.
        """
        images = self.detector.normalize(batch.pixels, batch.targets.sizes)
        losses = self.objective(images.contiguous(memory_format=torch.channels_last), batch.targets)
        self.optimizer.zero_grad()
        losses.sum().backward()
        gradients = [p.grad for p in self.detector.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        bad = ~norm.isfinite() & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.step, self.first_bad_step)
        # torch's fused optimizers skip their step where this is 1, as its gradient scaler has it.
        self.optimizer.found_inf = (self.first_bad_step >= 0).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return torch.cat([losses.detach(), norm.detach().unsqueeze(0)])

    def save(self, folder: Path, split: CocoSplit, metrics: dict[str, float]) -> None:
        """Write a checkpoint into the existing `folder`."""
        about = About(split.classes, split.category_ids, self.step, self.epochs_done, metrics)
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        save_checkpoint(folder, self.detector, self.config, about, training)

    def explain_bad_step(self, step: int, folder: Path) -> NonFiniteLossError:
        """Return the error to stop with because of `step`; save what reproduces it in `folder`.

        That is its batch and the configuration. Weights are still those of that step, and samples
        can be drawn again. To be called on every worker.
        """
        keys = self.batches.keys(step)
        batch = collate([self.dataset[key] for key in keys]).to(self.device)
        images = self.detector.normalize(batch.pixels, batch.targets.sizes)
        self.objective.train()
        culprit = first_non_finite(self.detector, images, batch.targets)
        names = [str(self.train_split.records[image].path) for _, image in keys]
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / f"batch-rank{self.rank}.pt"
        torch.save({"pixels": batch.pixels, **vars(batch.targets), "images": names}, saved)
        (folder / "config.yaml").write_text(dump_config(self.config))
        found = [(culprit, names)]
        if dist.is_initialized():
            found = [found[0]] * self.world
            dist.all_gather_object(found, (culprit, names))
        culprit, names = next(((c, n) for c, n in found if c is not None), found[0])
        return NonFiniteLossError(
            f"step {step}: NaN or infinity, first in "
            f"{culprit or 'the gradients over all workers'}; images: {', '.join(names)}; "
            f"batch and configuration saved in {folder}; check these images' boxes and lower "
            f"optim.lr (now {scaled_lr(self.config):g})"
        )


def place(detector: Detector, device: torch.device) -> Detector:
    """Move `detector` to `device`, in the memory format in which convolutions are fastest."""
    return detector.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def worker_rank() -> tuple[int, int]:
    """Return this process's rank and the number of training processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fit(
    config: Config,
    splits: tuple[CocoSplit, CocoSplit],
    listener: Listener,
    *,
    device: torch.device,
    failure_folder: Path,
    weights: Path | None = None,
    resume: Path | None = None,
    report_every: int = 10,
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
        report_every: Steps between reports; the host waits for the device only then.

    Raises:
        NonFiniteLossError: at the first report after a loss or gradient turned NaN or infinite.
    """
    train, val = splits
    trainer = Trainer(config, train, device, weights, resume)
    if trainer.step == 0:
        logger.info(
            "learning rate %g for %d images a step (%g for %d)",
            *(scaled_lr(config), config.data.batch, config.optim.lr, config.optim.lr_batch),
        )
    pin = device.type == "cuda"
    workers = config.data.loader_workers
    loader = build_loader(trainer.dataset, trainer.batches, workers, pin=pin)
    evaluation = build_evaluation_loader(config, val, device)
    window = _Window(trainer, report_every)
    trainer.objective.train()
    for batch in loader:
        window.add(trainer.train_step(batch.to(device)))
        end_of_epoch = trainer.step % trainer.batches.steps_per_epoch == 0
        if window.full or end_of_epoch:
            report, bad_step = window.close()
            if bad_step >= 0:
                raise trainer.explain_bad_step(bad_step, failure_folder)
            listener.on_steps(report)
        if end_of_epoch:
            _share_buffers(trainer.detector)
            metrics = evaluate(trainer.detector, val, evaluation, device)
            trainer.objective.train()

            def save(folder: Path, metrics: dict[str, float] = metrics) -> None:
                trainer.save(folder, train, metrics)

            listener.on_epoch(EpochReport(trainer.epochs_done, trainer.step, metrics, save))
            window.restart()
    return trainer


def build_evaluation_loader(
    config: Config, split: CocoSplit, device: torch.device
) -> DataLoader[Batch]:
    """Return the loader of this worker's share of the evaluation set."""
    rank, world = worker_rank()
    batches = EvaluationBatches(len(split.records), config.data.val_batch, rank, world)
    dataset = DetectionDataset(split, config, training=False)
    return build_loader(dataset, batches, config.data.loader_workers, pin=device.type == "cuda")


def _share_buffers(detector: Detector) -> None:
    """Give all workers the BatchNorm statistics of rank 0: those that checkpoints hold."""
    if dist.is_initialized():
        for buffer in detector.buffers():
            dist.broadcast(buffer, src=0)


class _Window:
    """The steps since the last report; fetching their numbers is the only time the host waits."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self._trainer = trainer
        self._rows: deque[Tensor] = deque(maxlen=steps)
        self.restart()

    def restart(self) -> None:
        """Start the clock anew, after work that is no training."""
        self._rows.clear()
        self._start = time.perf_counter()

    def add(self, row: Tensor) -> None:
        """Note a step's losses and gradient norm."""
        self._rows.append(row)

    @property
    def full(self) -> bool:
        """Whether it is time to report."""
        return len(self._rows) == self._rows.maxlen

    def close(self) -> tuple[StepReport, int]:
        """Return the report of these steps, and the first step that was not finite (-1: none)."""
        trainer = self._trainer
        means = mean_over_workers(torch.stack(list(self._rows)).mean(dim=0).double())
        *losses, norm, bad_step = torch.cat([means, trainer.first_bad_step.view(1)]).tolist()
        seconds = time.perf_counter() - self._start
        metrics = {
            "loss": sum(losses),
            **dict(zip(LOSSES, losses, strict=True)),
            "grad_norm": norm,
            "lr": trainer.scheduler.get_last_lr()[0],
            "images_per_second": len(self._rows) * trainer.config.data.batch / seconds,
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
        return report, int(bad_step)
