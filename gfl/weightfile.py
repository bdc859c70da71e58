"""Reading a file of weights without running any code that it may carry."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

FOREIGN_NAME = re.compile(r"Unsupported global: GLOBAL (\S+) was not an allowed global")


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a local file: `.safetensors`, or what `torch.save` wrote.

    Objects of foreign classes beside it, as OpenMMLab's `meta`, `message_hub` and `optimizer` hold
    them, are skipped, not built: their classes are neither imported nor called.

    Raises:
        ValueError: a file that is missing, damaged, or cannot be read without running its code.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file")
    try:
        content = (
            safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _load(path)
        )
    except pickle.UnpicklingError as error:
        raise _needs_pickle(path, str(error).splitlines()[-1]) from error
    except (
        SafetensorError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path}: not a readable weights file ({error})") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    # A pickled module is inert, or empty as its class was not built.
    if isinstance(state, _Inert) or (isinstance(state, Mapping) and not state):
        raise _needs_pickle(path)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a state dict of tensors, or one under 'state_dict'")
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"{path}: '{strange[0]}' is no tensor; expected a state dict of tensors, or one under "
            "'state_dict'"
        )
    return state


def _needs_pickle(path: Path, reason: str = "") -> ValueError:
    return ValueError(
        f"{path}: the weights are inside or beside Python objects, which could run code when read"
        f"{f' ({reason})' if reason else ''}; save the state dict alone: "
        "torch.save(model.state_dict(), FILE)"
    )


class _InertType(type):
    def __call__(cls, *_: object) -> Any:
        return object.__new__(cls)  # type: ignore[arg-type]


class _Inert(metaclass=_InertType):
    """Takes the place of every class and function that a file names beyond torch's own list.

    Called as a function it gives an object that ignores its state; made by `__new__`, as pickle
    does with plain classes and mappings, an ordered dictionary that takes any.
    """

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()

    def __setstate__(self, state: object) -> None:
        pass


def _empty_list(*_: object) -> list[object]:
    return []


def _mapping(*_: object) -> OrderedDict[object, object]:
    return OrderedDict()


CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.deque": _empty_list,
    "collections.defaultdict": _mapping,
}
"""What these are filled like."""


def _load(path: Path) -> Any:
    """Return the content of a file of `torch.save`, every foreign object replaced."""
    foreign: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            with torch.serialization.safe_globals(
                [(inert, name) for name, inert in foreign.items()]
            ):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch names one at a time, a builtin without its module.
            named = FOREIGN_NAME.search(str(error))
            if named is None or named[1] in foreign:
                raise
            inert = CONTAINERS.get(named[1], _Inert)
            foreign |= {named[1]: inert, f"builtins.{named[1]}": inert}
