"""Counts of a piece of work, which do not jitter: operations, host waits, bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique",
    "is_nonzero", "equal",
    "lift_fresh",  # a tensor of Python numbers, which the host copies to the device
    "repeat_interleave.Tensor", "bincount", "histc", "_assert_async", "argwhere",
)  # fmt: skip
"""Operations whose result the host needs before it can go on."""


@dataclass
class Counts(TorchDispatchMode):
    """What happens within `with Counts() as counts`, backward passes included.

    Attributes:
        operations: Dispatched, views included.
        kernels: Those that compute something: no views.
        waits: Names of the operations for which the host waits for the device.
        bytes: Allocated for results, over all operations.
    """

    operations: int = 0
    kernels: int = 0
    waits: list[str] = field(default_factory=list)
    bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.operations += 1
        by_mask = name.startswith(("aten.index.", "aten.index_put")) and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if by_mask or any(f"aten.{waiting}" in name for waiting in WAITING):
            self.waits.append(name)
        taken = {_storage(tensor) for tensor in _tensors(args)}
        made = {s: t for t in _tensors(result) if (s := _storage(t)) not in taken}
        self.kernels += not func.is_view and "detach" not in name
        self.bytes += sum(t.untyped_storage().nbytes() for t in made.values())
        return result


def count(work: Callable[[], Any]) -> dict[str, int]:
    """Return what a call of `work` takes."""
    with Counts() as counts:
        work()
    return {
        "operations": counts.operations,
        "kernels": counts.kernels,
        "waits": len(counts.waits),
        "bytes": counts.bytes,
    }


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
