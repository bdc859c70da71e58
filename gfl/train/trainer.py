"""A detector in training: the training step from top to bottom, its checkpoints and its failures.

    trainer = Trainer(config, train_split, device)
    losses_and_norm = trainer.train_step(batch)

Shapes: L losses (`LossModule.names`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gfl.checkpoint.files import WEIGHTS, About, read_about
from gfl.checkpoint.pretrained import load_weights
from gfl.checkpoint.snapshot import Snapshot, load_checkpoint, read_training, take_snapshot
from gfl.config.loader import ConfigError, dump_config
from gfl.config.schema import Config
from gfl.data.dataset import Batch, DetectionDataset, collate, require_batch_statistics
from gfl.data.samplers import TrainBatches, shard_size
from gfl.data.split import Split
from gfl.distributed import worker_rank
from gfl.errors import NonFiniteLossError
from gfl.model.detector import Detector, place
from gfl.train.microbatch import (
    LossModule,
    MicroBatch,
    first_non_finite,
    frozen_statistics,
    micro_batches,
)
from gfl.train.optimizer import Average, build_optimizer, build_scheduler, scaled_lr


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    Attributes:
        weights: Local file of weights, of the whole detector or its backbone.
        resume: Folder of the checkpoint to continue from. The result is bit for bit that of an
            uninterrupted training.
        teacher: Folder of the checkpoint that `loss.distillation` learns from.
        shards: Number of equal shards into which a global batch is cut, by default the number of
            workers. Fewer workers than shards take several each, one after the other, and train
            what as many workers as shards would, to rounding. This takes a third more time per
            image, because losses are normalised over all shards, which takes another forward pass.
            It excludes synchronised BatchNorm.
    """

    weights: Path | None = None
    resume: Path | None = None
    teacher: Path | None = None
    shards: int | None = None


class Trainer:
    """A detector in training, with its optimizer, schedule, data and progress.

    Attributes:
        config: The configuration of the training.
        train_split: The images to train on.
        device: Device of this worker.
        rank: Rank of this worker.
        world: Number of workers.
        detector: The detector in training.
        step: Number of steps done.
        batches: This worker's shards of every global batch, as keys of samples.
        dataset: The samples.
        optimizer: The optimizer of all trainable parameters.
        scheduler: The learning-rate schedule, one step of it per training step.
        scaler: The loss scaler of float16; with other precisions it does nothing.
        average: The average of the weights, if `optim.ema` asks for one.
        best_ap: Highest AP of an epoch so far, -1 before the first evaluation.
        best_epoch: Epoch of `best_ap`.
        loss_module: The detector with its criterion.
        parallel: `loss_module`, wrapped by DDP where there are several workers.
        first_bad_step: First step whose gradient was not finite, -1 if there is none. It stays on
            the device, so no step waits for it.
    """

    def __init__(
        self,
        config: Config,
        train: Split,
        device: torch.device,
        start: Start = Start(),
    ) -> None:
        """Build a new training, or the one that the checkpoint `start.resume` continues.

        Args:
            config: The configuration of the training.
            train: The images to train on.
            device: Device of this worker.
            start: What it starts from.
        """
        torch.manual_seed(config.seed)
        # With nondeterministic kernels a resumed training would differ from an uninterrupted one.
        torch.backends.cudnn.deterministic = True
        self.config = config
        self.train_split = train
        self.device = device
        self.rank, self.world = worker_rank()
        _require_device(config, device, self.world)
        self.detector = Detector(config)
        resume = start.resume
        if resume:
            load_weights(self.detector, resume / WEIGHTS)
        elif start.weights:
            reset = config.model.reset_classifier
            load_weights(self.detector, start.weights, reset_classifier=reset)
        place(self.detector, device)
        self.step = read_about(resume).step if resume else 0
        self.dataset = DetectionDataset(train, config, training=True)
        records = self.dataset.records
        self.batches = TrainBatches(records, config, self.rank, self.world, self.step, start.shards)
        shard = shard_size(config, self.batches.total_shards)
        require_batch_statistics(config, records, shard)
        self.optimizer = build_optimizer(self.detector, config)
        self.scheduler = build_scheduler(
            self.optimizer, config.schedule, self.batches.steps_per_epoch
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.optim.precision == "float16")
        self.average = (
            None if config.optim.ema is None else Average(self.detector, config.optim.ema)
        )
        self.best_ap, self.best_epoch = -1.0, 0
        if resume:
            self._restore(resume)
        teacher = place(load_checkpoint(start.teacher)[0], device) if start.teacher else None
        self.loss_module = LossModule(self.detector, config, teacher)
        self.parallel: nn.Module = self.loss_module
        if self.world > 1:
            devices = [device] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.loss_module, device_ids=devices, gradient_as_bucket_view=True
            )
        self._must_settle_buckets = self.world > 1
        self.first_bad_step = torch.full((), -1, dtype=torch.long, device=device)

    @property
    def model(self) -> Detector:
        """The detector that is evaluated and kept: `detector`, or the average of its weights."""
        return self.detector if self.average is None else self.average.detector

    @property
    def epochs_done(self) -> int:
        """Number of whole epochs trained."""
        return self.step // self.batches.steps_per_epoch

    @property
    def stops_early(self) -> bool:
        """Whether early stopping ends the training: no better AP for `schedule.patience` epochs."""
        patience = self.config.schedule.patience
        return patience is not None and self.epochs_done - self.best_epoch >= patience

    def record_ap(self, ap: float) -> None:
        """Record the AP of the epoch that has just ended, for early stopping."""
        if ap > self.best_ap:
            self.best_ap, self.best_epoch = ap, self.epochs_done

    def train_step(self, *shards: Batch) -> Tensor:
        """Train on this worker's shards of a global batch.

        Returns:
            The losses and the norm of the gradient before clipping, (L + 1,). The mean of the
            losses over workers is that of the global batch.
        """
        if self._must_settle_buckets:
            self._settle_buckets(shards)
        self.optimizer.zero_grad()
        losses = self._backward(shards)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.detector.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        skip = self._must_skip(norm)
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)
        # Fused optimizers of torch do not step where this attribute is 1; `GradScaler.step` sets it
        # the same way.
        self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        if self.average is not None:
            self.average.add(self.detector)
        self.scheduler.step()
        self.step += 1
        return torch.cat([losses, norm.detach().unsqueeze(0)])

    def _backward(self, shards: Sequence[Batch]) -> Tensor:
        """Add the gradients of `shards` to those of the parameters, and return their losses (L,).

        The loss of a shard is the mean of those of its micro-batches, each normalised together with
        its counterparts of the other shards. Losses and gradients are weighted such that their mean
        over workers is their mean over all shards. Workers average gradients once, in the backward
        pass of the last micro-batch.
        """
        total = torch.zeros(len(self.loss_module.names), device=self.device)
        shard_weight = self.world / self.batches.total_shards
        parts = self._micro_batches(shards)
        for number, part in enumerate(parts, start=1):
            with (
                nullcontext() if number == len(parts) else self._local_gradients(),
                nullcontext() if part.shard == 0 else frozen_statistics(self.detector),
            ):
                self.loss_module.mark_sizes(part.images, part.targets)
                losses = self.parallel(part.images, part.targets, part.normalizers)
                losses = losses * (part.weight * shard_weight)
                self.scaler.scale(losses.sum()).backward()
            total += losses.detach()
        return total

    def _settle_buckets(self, shards: Sequence[Batch]) -> None:
        """Run a backward pass whose gradients are thrown away, before the first step.

        DDP fills its buckets of gradients anew after the first backward pass that averages them,
        and with three or more workers the sum of a gradient depends on its place in a bucket. So
        without this pass the first step after a resumption would sum in another order than the same
        step of an uninterrupted training. Buffers, the statistics of BatchNorm, stay as they are.
        """
        self._must_settle_buckets = False
        part = self._micro_batches(shards)[-1]
        buffers = [buffer.clone() for buffer in self.detector.buffers()]
        self.loss_module.mark_sizes(part.images, part.targets)
        self.parallel(part.images, part.targets, part.normalizers).sum().backward()
        for buffer, before in zip(self.detector.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _micro_batches(self, shards: Sequence[Batch]) -> list[MicroBatch]:
        images_per_pass, total_shards = self.config.data.images_per_pass, self.batches.total_shards
        return micro_batches(self.loss_module, shards, images_per_pass, total_shards)

    def _local_gradients(self) -> AbstractContextManager[None]:
        """Return a context in which a backward pass does not average gradients over workers."""
        if isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return nullcontext()

    def _must_skip(self, norm: Tensor) -> Tensor:
        """Return whether the optimizer must not step, decided on the device, ().

        From the first bad step on no weight changes any more. All workers have the same gradients
        and decide alike. In float16 a gradient that is not finite lowers the loss scale, and a step
        is bad only once the scale is too low to be the reason.
        """
        overflow = ~norm.isfinite()
        bad = overflow & (self.first_bad_step < 0)
        if self.scaler.is_enabled():
            # `GradScaler.get_scale` would wait for the device.
            scale = self.scaler.scale(torch.ones((), device=self.device))
            bad &= scale < 1
        self.first_bad_step = torch.where(bad, self.step, self.first_bad_step)
        return overflow | (self.first_bad_step >= 0)

    def snapshot(self, split: Split, metrics: dict[str, float]) -> Snapshot:
        """Return a checkpoint of the present state in the host's memory."""
        about = About(split.classes, split.category_ids, self.step, self.epochs_done, metrics)
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": (self.best_ap, self.best_epoch),
        }
        if self.average is not None:  # then the weights of the checkpoint are the average's
            training["detector"] = self.detector.state_dict()
        return take_snapshot(self.model, self.config, about, training)

    def _restore(self, folder: Path) -> None:
        """Restore what `snapshot` saved, but for the weights of `model`."""
        state = read_training(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.best_ap, self.best_epoch = state["best"]
        if self.average is not None:  # it has copied the weights of the checkpoint already
            self.detector.load_state_dict(state["detector"])

    def explain_bad_step(self, step: int, folder: Path) -> NonFiniteLossError:
        """Return the error for `step`, the first bad one, and save what reproduces it.

        The weights are still those of that step and its samples can be drawn again, so the step is
        repeated. All workers must call this together.

        Args:
            step: The bad step.
            folder: Folder for the batch and the configuration of that step.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(self.config))
        shards: list[Batch] = []
        images: list[str] = []
        for number in self.batches.shards:
            keys = self.batches.keys(step, number)
            shards.append(collate([self.dataset[key] for key in keys]).to(self.device))
            of_shard = [str(self.dataset.records[image].path) for _, image in keys]
            saved = {"pixels": shards[-1].pixels, **vars(shards[-1].targets), "images": of_shard}
            torch.save(saved, folder / f"batch-rank{number}.pt")
            images += of_shard
        self.parallel.train()
        # All micro-batches run, for other workers wait for each of them.
        parts = self._micro_batches(shards)
        culprits = [first_non_finite(self.loss_module, part) for part in parts]
        of_workers = [(next((name for name in culprits if name), None), images)]
        if dist.is_initialized():
            of_workers = of_workers * self.world
            dist.all_gather_object(of_workers, of_workers[0])
        culprit, images = next((pair for pair in of_workers if pair[0]), of_workers[0])
        return NonFiniteLossError(
            f"step {step}: NaN or infinity, first in "
            f"{culprit or 'the gradients over all workers'}; images: {', '.join(images)}; "
            f"batch and configuration saved in {folder}; check these images' boxes and lower "
            f"optim.lr (now {scaled_lr(self.config):g})"
        )


def _require_device(config: Config, device: torch.device, world: int) -> None:
    if config.model.backbone.sync_norm and world > 1 and device.type != "cuda":
        raise ConfigError(
            "model.backbone.sync_norm: BatchNorm over several workers runs on GPUs only; use one "
            "worker, or set model.backbone.sync_norm=false"
        )
