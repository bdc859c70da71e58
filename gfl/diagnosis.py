"""What to say when a loss turns NaN: which tensor was the first, in which images."""

from collections.abc import Callable

from torch import Tensor, nn

from gfl.model.assigner import Targets
from gfl.train.microbatch import Objective


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
