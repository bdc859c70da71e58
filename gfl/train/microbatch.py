"""The training objective as one forward pass: what workers share and the compiler compiles."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gfl.config.schema import Config
from gfl.data.dataset import Batch
from gfl.model.criterion import DISTILLATION, loss_names, mean_amounts
from gfl.model.detector import Detector
from gfl.structures import Targets

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Objective(nn.Module):
    """A detector's losses: the network in the chosen precision, everything after it in float32.

    Attributes:
        detector: What is trained.
        names: Of the losses, in the order in which they are returned.
    """

    def __init__(self, detector: Detector, config: Config, teacher: Detector | None = None) -> None:
        """Train `detector` as `config` says.

        Args:
            detector: What is trained.
            config: What counts are its precision and its compilation.
            teacher: Whose edge distributions to learn (`loss.distillation`), on the same device.

        Raises:
            ValueError: a teacher whose distributions are over other bins, or that sees other
                pixels.
        """
        super().__init__()
        self.detector = detector
        self.names = loss_names(config.model) + (() if teacher is None else (DISTILLATION,))
        self._precision = PRECISIONS[config.optim.precision]
        if teacher is not None:
            _require_same_bins(teacher.config, config)
            teacher.eval().requires_grad_(False)
        # In a tuple: a submodule would be trained, saved and shared between workers.
        self._teacher = (teacher,)
        self._compiled = config.optim.compile
        if self._compiled:
            self.compile(fullgraph=True)

    def prepare(self, images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """Return the arguments of a call, marked so that one compilation serves every size."""
        if self._compiled:
            torch._dynamo.maybe_mark_dynamic(images, [2, 3])
            for padded in (targets.boxes, targets.labels, targets.mask):
                torch._dynamo.maybe_mark_dynamic(padded, 1)
        return images, targets

    def forward(self, images: Tensor, targets: Targets, divisors: Tensor | None = None) -> Tensor:
        """Return the losses (L,), weighted and normalised, of normalised `images` (B, 3, H, W).

        They are normalised by `divisors` (2,), or by what all workers' images give.
        """
        (teacher,) = self._teacher
        with self._cast(images):
            outputs = self.detector(images)
            if teacher is not None:
                with torch.no_grad():
                    lesson = teacher(images)[1]
        lessons = None if teacher is None else lesson
        losses = self.detector.objective(outputs, targets, lessons, divisors)
        return torch.stack([losses[name] for name in self.names])

    @torch.no_grad()
    def amounts(self, images: Tensor, targets: Targets) -> Tensor:
        """Return what `images` add to the divisors, (2,): see `Detector.amounts`."""
        with self._cast(images):
            outputs = self.detector(images)
        return self.detector.amounts(outputs, targets)

    def _cast(self, images: Tensor) -> torch.autocast:
        dtype = self._precision
        return torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)


def _require_same_bins(teacher: Config, student: Config) -> None:
    for section, key in (("model", "edges"), ("model", "reg_max"), ("model", "bin_width"),
                         ("data", "mean"), ("data", "std")):  # fmt: skip
        theirs, ours = (getattr(getattr(c, section), key) for c in (teacher, student))
        if theirs != ours:
            raise ValueError(
                f"loss.distillation.teacher: {section}.{key} is {theirs} in the teacher, but "
                f"{ours} here; a student takes its teacher's"
            )


@dataclass(frozen=True)
class Pass:
    """Images of a share that go through the network together.

    Attributes:
        images: Normalised, (B, 3, H, W).
        targets: Of these images.
        weight: How much its losses count in those of its share.
    """

    images: Tensor
    targets: Targets
    weight: float


def cut(detector: Detector, share: Batch, images_per_pass: int | None) -> list[Pass]:
    """Return a share in passes of `images_per_pass` images; in one by default."""
    images = detector.normalize(share.pixels, share.targets.sizes)
    images = images.contiguous(memory_format=torch.channels_last)
    count = len(images)
    size = min(images_per_pass or count, count)
    parts = [slice(start, start + size) for start in range(0, count, size)]
    return [
        Pass(images[part], _select(share.targets, part), len(images[part]) / count)
        for part in parts
    ]


def divisors(objective: Objective, shares: Sequence[list[Pass]], total: int) -> list[Tensor]:
    """Return what normalises the first pass of every share, the second, and so on: (2,) each.

    That is `mean_amounts` over these passes of all shares, as if they ran at once on as many
    workers. Takes a forward pass of each.

    Args:
        objective: What is trained.
        shares: This worker's.
        total: Shares of all workers.
    """
    with statistics_kept(objective.detector):
        amounts = [
            torch.stack([objective.amounts(each.images, each.targets) for each in share])
            for share in shares
        ]
    return list(mean_amounts(torch.stack(amounts).sum(dim=0), total))


@contextmanager
def statistics_kept(detector: Detector) -> Iterator[None]:
    """Leave the running statistics of BatchNorm as they are.

    Training takes those of the first worker; hence of its first share.
    """
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _select(targets: Targets, part: slice) -> Targets:
    """Return the targets of some of the images."""
    chosen = {name: value[part] for name, value in vars(targets).items()}
    return replace(targets, **chosen)


def first_non_finite(
    objective: Objective, images: Tensor, targets: Targets, divisors: Tensor | None = None
) -> str | None:
    """Repeat one training step; return the name of its first tensor with NaN or infinity, if any.

    Looks at the inputs, the parameters, every module's output in the order of execution, the losses
    and at last the gradients. Waits for the device all along: meant for the one step that failed.
    """
    detector = objective.detector
    tensors = {"input images": images, "input boxes": targets.boxes}
    tensors |= {f"parameter {name}": p for name, p in detector.named_parameters()}
    # Go on even so: workers that found nothing wait for this one in the objective's all-reduce.
    culprits = [name for name, tensor in tensors.items() if not _finite(tensor)]
    hooks = [
        module.register_forward_hook(_watch(name, culprits))
        for name, module in detector.named_modules()
        if name
    ]
    try:
        # A compiled call would pass by the hooks.
        losses = objective.forward(images, targets, divisors)
    finally:
        for hook in hooks:
            hook.remove()
    named = zip(objective.names, losses, strict=True)
    culprits += [f"loss {name}" for name, loss in named if not _finite(loss)]
    if culprits:
        return culprits[0]
    detector.zero_grad()
    losses.sum().backward()
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    # Backpropagation runs from the head to the stem.
    for name, gradient in reversed(gradients.items()):
        if not _finite(gradient):
            return f"gradient of {name}"
    return None


def _watch(name: str, culprits: list[str]) -> Callable[[nn.Module, tuple[Tensor], object], None]:
    def hook(_module: nn.Module, _inputs: tuple[Tensor], output: object) -> None:
        if isinstance(output, Tensor) and not _finite(output):
            culprits.append(f"output of {name}")

    return hook


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
