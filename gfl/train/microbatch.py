"""Gradient accumulation: micro-batches of a global batch go through the network in turn.

A step has one global batch. It is cut into equal *shards*, one for each worker, or several for each
when a training goes on with fewer workers than it began with. A worker cuts a shard into
*micro-batches* if `data.images_per_pass` is smaller than the shard. Here are the micro-batches, the
module that computes the losses of one (which DDP wraps and the compiler compiles), and the search
for the first tensor of a micro-batch that is NaN or infinite.

Shapes: B images of a micro-batch, L losses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gfl.config.schema import Config
from gfl.data.dataset import Batch
from gfl.distributed import world_size
from gfl.model.criterion import DISTILLATION, loss_names, loss_normalizers
from gfl.model.detector import Detector
from gfl.structures import Targets
from gfl.train.torch_private import mark_dynamic

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The data type of the network's computations for each value of `optim.precision`."""


class LossModule(nn.Module):
    """A detector and its criterion as one module: images and targets in, losses out.

    The network computes in the chosen precision, the criterion in float32.

    Attributes:
        detector: The detector in training.
        names: Names of the losses, in the order in which they are returned.
    """

    def __init__(self, detector: Detector, config: Config, teacher: Detector | None = None) -> None:
        """Wrap `detector`.

        Args:
            detector: The detector in training.
            config: Its precision and its compilation are used, and what a teacher must agree with.
            teacher: Detector whose edge distributions are learned (`loss.distillation`), on the
                same device.

        Raises:
            ValueError: the teacher's distributions have other bins, or its images are normalised
                differently.
        """
        super().__init__()
        self.detector = detector
        self.names = loss_names(config.model) + (() if teacher is None else (DISTILLATION,))
        self._precision = PRECISIONS[config.optim.precision]
        if teacher is not None:
            _require_same_bins(teacher.config, config)
            teacher.eval().requires_grad_(False)
        # A submodule would be trained, saved and broadcast to other workers; a tuple hides it.
        self._teacher = (teacher,)
        self._compiled = config.optim.compile
        if self._compiled:
            self.compile(fullgraph=True)

    def mark_sizes(self, images: Tensor, targets: Targets) -> None:
        """Mark the sizes of a call's arguments that change, so that one compilation serves all."""
        if self._compiled:
            mark_dynamic(images, 2, 3)
            for padded in (targets.boxes, targets.labels, targets.mask):
                mark_dynamic(padded, 1)

    def forward(
        self, images: Tensor, targets: Targets, normalizers: Tensor | None = None
    ) -> Tensor:
        """Return the weighted, normalised losses (L,) of normalised `images` (B, 3, H, W).

        Args:
            images: Normalised, (B, 3, H, W).
            targets: Their ground truths.
            normalizers: The loss normalizers (2,); by default they are computed from the images of
                this call on all workers.
        """
        (teacher,) = self._teacher
        teacher_logits = None
        with self._autocast(images):
            outputs = self.detector(images)
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(images)[1]
        losses = self.detector.criterion.losses(outputs, targets, teacher_logits, normalizers)
        return torch.stack([losses[name] for name in self.names])

    @torch.no_grad()
    def normalizer_sums(self, images: Tensor, targets: Targets) -> Tensor:
        """Return what `images` add to the loss normalizers, (2,)."""
        with self._autocast(images):
            outputs = self.detector(images)
        return self.detector.criterion.normalizer_sums(outputs, targets)

    def _autocast(self, images: Tensor) -> torch.autocast:
        dtype = self._precision
        return torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)


def _require_same_bins(teacher: Config, student: Config) -> None:
    keys = (("model", "edges"), ("model", "reg_max"), ("model", "bin_width"), ("data", "mean"),
            ("data", "std"))  # fmt: skip
    for section, key in keys:
        theirs, ours = (getattr(getattr(c, section), key) for c in (teacher, student))
        if theirs != ours:
            raise ValueError(
                f"loss.distillation.teacher: {section}.{key} is {theirs} in the teacher, but "
                f"{ours} here; a student takes its teacher's"
            )


@dataclass(frozen=True)
class MicroBatch:
    """Images of one shard that go through the network together.

    Attributes:
        images: Normalised, (B, 3, H, W).
        targets: Ground truths of these images.
        shard: Index of the shard among this worker's shards.
        weight: Weight of the micro-batch's losses in those of its shard, its part of the images.
        normalizers: Loss normalizers (2,), or None where the micro-batch's own call computes them.
    """

    images: Tensor
    targets: Targets
    shard: int
    weight: float
    normalizers: Tensor | None = None


def micro_batches(
    module: LossModule, shards: Sequence[Batch], images_per_pass: int | None, total_shards: int
) -> list[MicroBatch]:
    """Return the micro-batches of this worker's shards, shard by shard.

    The n-th micro-batches of all shards of the global batch are normalised together, as if they ran
    at once on as many workers as there are shards. Where every worker has one shard, the call of
    the `LossModule` does that. Where some have several, the normalizers are computed here, which
    takes one more forward pass of each micro-batch.

    Args:
        module: The module in training.
        shards: This worker's shards.
        images_per_pass: Most images of a micro-batch; None for whole shards.
        total_shards: Number of shards of all workers.
    """
    of_shards = [
        _cut(module.detector, shard, number, images_per_pass) for number, shard in enumerate(shards)
    ]
    if total_shards == world_size():
        return of_shards[0]
    with frozen_statistics(module.detector):
        sums = [
            torch.stack([module.normalizer_sums(part.images, part.targets) for part in parts])
            for parts in of_shards
        ]
    normalizers = loss_normalizers(torch.stack(sums).sum(dim=0), total_shards)
    return [
        replace(part, normalizers=pair)
        for parts in of_shards
        for part, pair in zip(parts, normalizers, strict=True)
    ]


def _cut(
    detector: Detector, shard: Batch, number: int, images_per_pass: int | None
) -> list[MicroBatch]:
    """Return the micro-batches of one shard, without normalizers."""
    images = detector.normalize(shard.pixels, shard.targets.sizes)
    images = images.contiguous(memory_format=torch.channels_last)
    count = len(images)
    size = min(images_per_pass or count, count)
    parts = [slice(start, start + size) for start in range(0, count, size)]
    return [
        MicroBatch(
            images=images[part],
            targets=Targets(**{name: value[part] for name, value in vars(shard.targets).items()}),
            shard=number,
            weight=len(images[part]) / count,
        )
        for part in parts
    ]


@contextmanager
def frozen_statistics(detector: Detector) -> Iterator[None]:
    """Keep the running statistics of BatchNorm as they are.

    They follow the first shard of the first worker alone, whatever the number of workers.
    """
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def first_non_finite(module: LossModule, micro_batch: MicroBatch) -> str | None:
    """Repeat a micro-batch; return the name of its first tensor with NaN or infinity, if any.

    The inputs are searched first, then the parameters, the output of every module in the order of
    execution, the losses, and the gradients. The host waits for the device at each of them, so this
    is for the one step that failed. It always runs the whole forward pass: other workers wait for
    this one in the all-reduce of the normalizers.
    """
    detector, targets = module.detector, micro_batch.targets
    tensors = {"input images": micro_batch.images, "input boxes": targets.boxes}
    tensors |= {f"parameter {name}": p for name, p in detector.named_parameters()}
    culprits = [name for name, tensor in tensors.items() if not _finite(tensor)]
    hooks = [
        submodule.register_forward_hook(_note_non_finite(name, culprits))
        for name, submodule in detector.named_modules()
        if name
    ]
    try:
        # `forward` and not a call, which may be compiled: compiled code runs no hooks.
        losses = module.forward(micro_batch.images, targets, micro_batch.normalizers)
    finally:
        for hook in hooks:
            hook.remove()
    for name, loss in zip(module.names, losses, strict=True):
        if not _finite(loss):
            culprits.append(f"loss {name}")
    detector.zero_grad()
    losses.sum().backward()  # on every worker: SyncBatchNorm waits for all of them
    if culprits:
        return culprits[0]
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    # Backpropagation runs from the head to the stem.
    for name, gradient in reversed(gradients.items()):
        if not _finite(gradient):
            return f"gradient of {name}"
    return None


def _note_non_finite(
    name: str, culprits: list[str]
) -> Callable[[nn.Module, tuple[Tensor], object], None]:
    def hook(_module: nn.Module, _inputs: tuple[Tensor], output: object) -> None:
        maps = output if isinstance(output, list) else [output]
        if not all(_finite(one) for one in maps if isinstance(one, Tensor)):
            culprits.append(f"output of {name}")

    return hook


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
