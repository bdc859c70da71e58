"""A detector in training: one step, its checkpoints, and what to say of a step that failed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
from gfl.data.dataset import Batch, DetectionDataset, collate
from gfl.data.samplers import TrainBatches
from gfl.data.split import Split
from gfl.distributed import worker_rank
from gfl.errors import NonFiniteLossError
from gfl.model.detector import Detector, place
from gfl.ops.allocator import keep_freed_memory
from gfl.train.microbatch import (
    Objective,
    Pass,
    cut,
    divisors,
    first_non_finite,
    statistics_kept,
)
from gfl.train.optimizer import Average, build_optimizer, build_scheduler, scaled_lr


class Trainer:
    """A detector in training: its optimizer, its schedule, its data and how far it is."""

    def __init__(
        self,
        config: Config,
        train: Split,
        device: torch.device,
        weights: Path | None = None,
        resume: Path | None = None,
        teacher: Path | None = None,
        shares: int | None = None,
    ) -> None:
        """Build everything anew, or as it was in the checkpoint `resume`.

        Args:
            config: What to train.
            train: On what.
            device: Where.
            weights: Local file to start from: the whole detector's, or its backbone's.
            resume: Folder of a checkpoint to go on from.
            teacher: Folder of the checkpoint that `loss.distillation` learns from.
            shares: Into which global batches are cut, as `fit` says.
        """
        if device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.seed)
        # On a GPU, too, a resumed training is the uninterrupted one to the last digit.
        torch.backends.cudnn.deterministic = True
        self.config = config
        self.train_split = train
        self.device = device
        self.rank, self.world = worker_rank()
        _require_device(config, device, self.world)
        self.detector = Detector(config)
        if resume:
            load_weights(self.detector, resume / WEIGHTS)
        elif weights:
            load_weights(self.detector, weights, reset_classifier=config.model.reset_classifier)
        place(self.detector, device)
        self.step = read_about(resume).step if resume else 0
        self.batches = TrainBatches(train.records, config, self.rank, self.world, self.step, shares)
        self.dataset = DetectionDataset(train, config, training=True)
        self.optimizer = build_optimizer(self.detector, config)
        self.scheduler = build_scheduler(
            self.optimizer, config.schedule, self.batches.steps_per_epoch
        )
        # Scales the loss so that small gradients survive in float16; otherwise does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.optim.precision == "float16")
        self.average = (
            None if config.optim.ema is None else Average(self.detector, config.optim.ema)
        )
        self.best_ap, self.best_epoch = -1.0, 0
        if resume:
            self._restore(resume)
        master = None if teacher is None else place(load_checkpoint(teacher)[0], device)
        self.objective = Objective(self.detector, config, master)
        self.parallel: nn.Module = self.objective
        if self.world > 1:
            devices = [device] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                self.objective, device_ids=devices, gradient_as_bucket_view=True
            )
        # The first step whose gradient was not finite; on the device, so that no step waits.
        self.first_bad_step = torch.full((), -1, dtype=torch.long, device=device)

    @property
    def model(self) -> Detector:
        """What is evaluated and kept: the detector in training, or the average of its weights."""
        return self.detector if self.average is None else self.average.detector

    @property
    def epochs_done(self) -> int:
        """Whole epochs trained."""
        return self.step // self.batches.steps_per_epoch

    @property
    def out_of_patience(self) -> bool:
        """Whether AP has not risen for `schedule.patience` epochs."""
        patience = self.config.schedule.patience
        return patience is not None and self.epochs_done - self.best_epoch >= patience

    def note_quality(self, ap: float) -> None:
        """Remember when AP was best."""
        if ap > self.best_ap:
            self.best_ap, self.best_epoch = ap, self.epochs_done

    def train_step(self, *shares: Batch) -> Tensor:
        """Train on this worker's shares of a batch; return losses and gradient norm, (L + 1,).

        From the first gradient that is not finite on, no weight changes any more: the optimizer is
        told so on the device. Gradients are the same on all workers, hence so is the decision. In
        float16 the loss scale is lowered first, until it cannot be the reason.
        """
        self.optimizer.zero_grad()
        losses = self._backward(shares)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.detector.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        overflow = ~norm.isfinite()
        bad = overflow & (self.first_bad_step < 0)
        if self.scaler.is_enabled():
            # The public `get_scale` would wait for the device.
            scale = self.scaler._get_scale_async()
            assert scale is not None  # as it is once a loss has been scaled
            bad &= scale < 1
        self.first_bad_step = torch.where(bad, self.step, self.first_bad_step)
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm)
        # torch's fused optimizers skip their step where this is 1, as its gradient scaler has it.
        skip = overflow | (self.first_bad_step >= 0)
        self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        if self.average is not None:
            self.average.add(self.detector)
        self.scheduler.step()
        self.step += 1
        return torch.cat([losses, norm.detach().unsqueeze(0)])

    def _backward(self, shares: Sequence[Batch]) -> Tensor:
        """Add the gradients of `shares` to the parameters'; return their losses (L,).

        A share takes several passes if it does not fit into one: its loss is then the mean of
        theirs, each normalised by its own positives, and workers share their gradients after the
        last. Losses and gradients are such that their mean over workers is that over all shares.
        """
        total = torch.zeros(len(self.objective.names), device=self.device)
        weight = self.world / self.batches.total_shares
        passes = self._passes(shares)
        for number, (share, each, divisor) in enumerate(passes, start=1):
            with (
                nullcontext() if number == len(passes) else self._gradients_kept(),
                nullcontext() if share == 0 else statistics_kept(self.detector),
            ):
                taken = self.objective.prepare(each.images, each.targets)
                losses = self.parallel(*taken, divisor) * (each.weight * weight)
                self.scaler.scale(losses.sum()).backward()
            total += losses.detach()
        return total

    def _passes(self, shares: Sequence[Batch]) -> list[tuple[int, Pass, Tensor | None]]:
        """Return the passes of `shares`: the number of its share, itself, what normalises it.

        Where every worker has one share, that is None: the pass itself finds out.
        """
        cut_shares = [cut(self.detector, s, self.config.data.images_per_pass) for s in shares]
        normalisers: Sequence[Tensor | None] = [None] * len(cut_shares[0])
        if self.batches.total_shares > self.world:
            normalisers = divisors(self.objective, cut_shares, self.batches.total_shares)
        return [
            (number, each, normaliser)
            for number, passes in enumerate(cut_shares)
            for each, normaliser in zip(passes, normalisers, strict=True)
        ]

    def _gradients_kept(self) -> AbstractContextManager[None]:
        """Return a context in which workers do not share their gradients yet."""
        if isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return nullcontext()

    def snapshot(self, split: Split, metrics: dict[str, float]) -> Snapshot:
        """Return a checkpoint of this moment."""
        about = About(split.classes, split.category_ids, self.step, self.epochs_done, metrics)
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": (self.best_ap, self.best_epoch),
        }
        if self.average is not None:  # whose weights are the checkpoint's
            training["detector"] = self.detector.state_dict()
        return take_snapshot(self.model, self.config, about, training)

    def _restore(self, folder: Path) -> None:
        """Take up the state that `snapshot` kept, the model's weights apart."""
        state = read_training(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.best_ap, self.best_epoch = state["best"]
        if self.average is not None:  # which took the checkpoint's weights from the detector
            self.detector.load_state_dict(state["detector"])

    def explain_bad_step(self, step: int, folder: Path) -> NonFiniteLossError:
        """Return the error to stop with because of `step`; save what reproduces it in `folder`.

        That is its batch and the configuration. Weights are still those of that step, and samples
        can be drawn again. To be called on every worker.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(self.config))
        shares: list[Batch] = []
        names: list[str] = []
        for share in self.batches.shares:
            keys = self.batches.keys(step, share)
            shares.append(collate([self.dataset[key] for key in keys]).to(self.device))
            of_share = [str(self.train_split.records[image].path) for _, image in keys]
            targets = vars(shares[-1].targets)
            saved = {"pixels": shares[-1].pixels, **targets, "images": of_share}
            torch.save(saved, folder / f"batch-rank{share}.pt")
            names += of_share
        self.parallel.train()
        found = [(self._first_non_finite(shares), names)]
        if dist.is_initialized():
            found = found * self.world
            dist.all_gather_object(found, found[0])
        culprit, names = next(((c, n) for c, n in found if c is not None), found[0])
        return NonFiniteLossError(
            f"step {step}: NaN or infinity, first in "
            f"{culprit or 'the gradients over all workers'}; images: {', '.join(names)}; "
            f"batch and configuration saved in {folder}; check these images' boxes and lower "
            f"optim.lr (now {scaled_lr(self.config):g})"
        )

    def _first_non_finite(self, shares: Sequence[Batch]) -> str | None:
        """Return what `first_non_finite` finds; all passes run, for other workers wait for each."""
        found = [
            first_non_finite(self.objective, each.images, each.targets, divisor)
            for _, each, divisor in self._passes(shares)
        ]
        return next((culprit for culprit in found if culprit), None)


def _require_device(config: Config, device: torch.device, world: int) -> None:
    if config.model.backbone.sync_norm and world > 1 and device.type != "cuda":
        raise ConfigError(
            "model.backbone.sync_norm: BatchNorm over several workers runs on GPUs only; use one "
            "worker, or set model.backbone.sync_norm=false"
        )
