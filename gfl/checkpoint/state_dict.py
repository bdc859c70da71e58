"""What model a state dict belongs to, read off its names and shapes, and whether it is whole."""

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

from gfl.config.schema import (
    BackboneConfig,
    Config,
    DeformableConfig,
    ModelConfig,
    QualityPredictorConfig,
)
from gfl.model.detector import Detector
from gfl.model.head import TOWER_LAYERS

BACKBONES = {
    (False, False, (2, 2, 2, 2)): "resnet18",
    (False, False, (3, 4, 6, 3)): "resnet34",
    (True, False, (3, 4, 6, 3)): "resnet50",
    (True, False, (3, 4, 23, 3)): "resnet101",
    (True, True, (3, 4, 23, 3)): "resnext101_32x4d",
}
"""By whether blocks are bottlenecks and grouped, and how many each stage has."""


def infer_model(state: Mapping[str, Tensor]) -> ModelConfig:
    """Return the architecture of a detector with the entries `state` (our names).

    Raises:
        ValueError: no detector of ours has such entries.
        LookupError: an entry that tells the architecture is missing: its name.
    """
    classes, channels = state["head.cls_logits.weight"].shape[:2]
    tower = {int(m[1]) for key in state if (m := re.match(r"head\.\w+_tower\.(\d+)\.", key))}
    quality = state.get("head.quality_predictor.layers.0.weight")
    bins = len(state["head.reg_logits.weight"]) // 4
    return ModelConfig(
        backbone=_infer_backbone(state),
        num_classes=classes,
        channels=channels,
        tower_convs=1 + max(tower, default=0) // TOWER_LAYERS,
        edges="dirac" if bins == 1 else "distribution",
        reg_max=bins - 1 or 1,  # of Dirac edges it means nothing
        quality="centerness" if "head.centerness_logits.weight" in state else "joint",
        quality_predictor=None
        if quality is None
        else QualityPredictorConfig(topk=quality.shape[1] // 4 - 1, hidden=len(quality)),
    )


def require_whole(
    source: str, state: Mapping[str, Tensor], name_in_source: Callable[[str], str]
) -> None:
    """Refuse a `state` dict (our names) that is not all of the detector that it is a part of.

    Raises:
        ValueError: names, as the source has them, what is missing or too much.
    """
    try:
        model = infer_model(state)
    except LookupError as error:
        raise ValueError(f"{source}: entries missing: {name_in_source(error.args[0])}") from error
    with torch.device("meta"):
        expected = Detector(Config(model=model)).state_dict()
    require_same_entries(source, expected, state, name_in_source)


def require_same_entries(
    source: str,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    name_in_source: Callable[[str], str] = str,
) -> None:
    """Refuse a `state` dict whose names and shapes are not those `expected`.

    Raises:
        ValueError: names, as the source has them, what is missing, too much, or of another shape.
    """
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - set(state) - counters)
    if missing:
        raise ValueError(f"{source}: entries missing: {_list(missing, name_in_source)}")
    if left_over := sorted(set(state) - set(expected)):
        raise ValueError(
            f"{source}: entries that the model has no place for: {_list(left_over, name_in_source)}"
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{source}: {name_in_source(key)}: shape {tuple(value.shape)}, but the model has "
                f"{tuple(expected[key].shape)}"
            )


def differences(weights: ModelConfig, model: ModelConfig) -> list[str]:
    """Return which keys of the architecture differ, and how: `num_classes 80, the model has 3`."""
    both = weights.edges == model.edges == "distribution"
    return [
        f"model.{key} {_read(weights, key)}, the model has {_read(model, key)}"
        for key in (
            "backbone.name", "backbone.deformable", "num_classes", "channels", "tower_convs",
            "edges", *(["reg_max"] if both else []), "quality", "quality_predictor",
        )
        if _read(weights, key) != _read(model, key)
    ]  # fmt: skip


def _read(model: ModelConfig, key: str) -> object:
    section, _, leaf = key.rpartition(".")
    value = getattr(model.backbone if section else model, leaf)
    if isinstance(value, DeformableConfig):
        return {"version": value.version, "stages": sorted(set(value.stages))}
    return value.model_dump() if isinstance(value, QualityPredictorConfig) else value


def _infer_backbone(state: Mapping[str, Tensor]) -> BackboneConfig:
    blocks = [
        len({m[1] for key in state if (m := re.match(rf"backbone\.layer{n}\.(\d+)\.", key))})
        for n in (1, 2, 3, 4)
    ]
    middle = state["backbone.layer1.0.conv2.weight"]
    bottleneck = any(re.match(r"backbone\.layer\d\.\d+\.conv3\.", key) for key in state)
    kind = (bottleneck, middle.shape[0] != middle.shape[1], tuple(blocks))
    if kind not in BACKBONES:
        raise ValueError(
            f"no backbone of ours has stages of {blocks} blocks; known: "
            f"{', '.join(BACKBONES.values())}"
        )
    offset = re.compile(r"backbone\.layer(\d)\.\d+\.conv2\.conv_offset\.weight")
    channels = {int(m[1]) + 1: len(v) for k, v in state.items() if (m := offset.fullmatch(k))}
    deformable = None
    if channels:
        version = 2 if 27 in channels.values() else 1
        deformable = {"version": version, "stages": tuple(sorted(channels))}
    return BackboneConfig.model_validate({"name": BACKBONES[kind], "deformable": deformable})


def _list(keys: list[str], name_in_source: Callable[[str], str]) -> str:
    names = ", ".join(name_in_source(key) for key in keys[:5])
    return names + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


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
