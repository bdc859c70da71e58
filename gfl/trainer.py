"""A detector in training: one step, its checkpoints, and what to say of a step that failed."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gfl.assigner import Targets
from gfl.checkpoint import WEIGHTS, About, read_about, read_training, save_checkpoint
from gfl.config import Config
from gfl.configfile import dump_config
from gfl.data.coco import CocoSplit
from gfl.data.loading import Batch, DetectionDataset, TrainBatches, collate
from gfl.detector import LOSSES, Detector, place
from gfl.diagnosis import NonFiniteLossError, first_non_finite
from gfl.optim import build_optimizer, build_scheduler, scaled_lr
from gfl.pretrained import load_weights


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


def worker_rank() -> tuple[int, int]:
    """Return this process's rank and the number of training processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
