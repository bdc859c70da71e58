"""The training objective as one forward pass: what workers share and the compiler compiles."""

import torch
from torch import Tensor, nn

from gfl.config.schema import Config
from gfl.model.assigner import Targets
from gfl.model.detector import DISTILLATION, Detector, loss_names

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
