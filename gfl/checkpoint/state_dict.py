"""State dicts: read from a file without running its code, recognised, and compared.

`infer_model(read_state_dict(Path("weights.pth")))` is the `ModelConfig` of the detector in a file.
"""

import pickle
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
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
"""Backbones by their blocks: whether they are bottlenecks, whether grouped, how many per stage."""

CONVOLUTION = re.compile(r"_logits\.weight|conv2\.weight|conv_offset\.weight|predictor.*\.weight")
"""Names of weights from whose shapes an architecture is inferred."""

ZIP_SIGNATURE = b"PK\x03\x04"
"""First bytes of a file of `torch.save` since torch 1.6."""

PICKLE_SIGNATURE = b"\x80"
"""First byte of a pickle, with which files of older torch begin."""

LEGACY_PICKLES = 5
"""Pickles at the beginning of a file of older torch: number, version, machine, content, storages.

They are followed by the bytes of the storages.
"""


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a local file: `.safetensors`, or a file of `torch.save`.

    Objects of foreign classes beside it, such as OpenMMLab's `meta`, `message_hub` and `optimizer`,
    are skipped: their classes are neither imported nor called.

    Raises:
        ValueError: The file is missing, is damaged, or cannot be read without running its code.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file; expected a local file")
    is_pickled = _require_weights(path)
    foreign: list[str] = []
    try:
        if is_pickled:
            foreign = _foreign_globals(path)
            content = _load(path, foreign)
        else:
            content = safetensors.torch.load_file(path)
    except pickle.UnpicklingError as error:
        raise _needs_pickle(path, str(error).splitlines()[-1]) from error
    except Exception as error:  # a damaged or hostile file makes the readers raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path}: not a readable weights file ({reason}); expected .safetensors, or a state "
            "dict written by torch.save"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    is_empty = isinstance(state, Mapping) and not state
    # A pickled module is inert, or empty because its class was not built.
    if isinstance(state, _Inert) or (is_empty and foreign):
        raise _needs_pickle(path)
    if is_empty:
        raise ValueError(f"{path}: the state dict is empty; expected the entries of a model")
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path}: got {type(state).__name__}; expected a state dict of tensors, or one under "
            "'state_dict'"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = "tensor" if isinstance(key, str) else "name of a tensor"
            raise ValueError(
                f"{path}: {key!r} is no {what}; expected a state dict of tensors, or one under "
                "'state_dict'"
            )
    return state


def _require_weights(path: Path) -> bool:
    """Return whether a file is one of `torch.save`, or of safetensors, by its first bytes.

    Raises:
        ValueError: It is neither; the message says what it is.
    """
    with path.open("rb") as file:
        start = file.read(200)
    if start.startswith((ZIP_SIGNATURE, PICKLE_SIGNATURE)):
        return True
    if start[8:9] == b"{":  # after the length of the header, which is JSON
        return False
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        what = "is empty; fetch it again"
    elif text.startswith(b"version https://git-lfs"):
        what = "is a pointer of git LFS, not weights; fetch the file itself with `git lfs pull`"
    elif text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        what = "is a web page, not weights; download the file that the page is about"
    else:
        what = (
            f"is no weights file (begins with {start[:16]!r}); expected .safetensors, or a state "
            "dict written by torch.save"
        )
    raise ValueError(f"{path}: {what}")


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
    """A stand-in for every class and function in a file that torch does not know as safe.

    Called as a function, it returns an object that ignores its state. Created by `__new__`, as
    pickle creates plain classes and mappings, it returns an ordered dictionary that accepts any
    state.
    """

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()

    def __setstate__(self, state: object) -> None:
        pass


def _empty_list(*_: object) -> list[object]:
    return []


def _empty_mapping(*_: object) -> OrderedDict[object, object]:
    return OrderedDict()


_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.deque": _empty_list,
    "collections.defaultdict": _empty_mapping,
}
"""Stand-ins of containers that pickle fills after it created them."""


def _load(path: Path, foreign: list[str]) -> Any:
    """Return the content of a file of `torch.save`, objects of `foreign` classes replaced."""
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_CONTAINERS.get(name, _Inert), name) for name in foreign
    ]
    # Given a path, torch takes the format from its suffix.
    with torch.serialization.safe_globals(stand_ins), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _foreign_globals(path: Path) -> list[str]:
    """Return the classes and functions, `module.name`, that a file of `torch.save` refers to."""
    with path.open("rb") as file:
        if file.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE:
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
        file.seek(0)
        references = [
            str(argument)
            for _ in range(LEGACY_PICKLES)
            for opcode, argument, _ in pickletools.genops(file)
            if opcode.name == "GLOBAL"
        ]
    return [_python_3_name(*reference.split(" ")) for reference in references]


def _python_3_name(module: str, name: str) -> str:
    """Return the present name of a global: pickle's protocol 2 writes that of Python 2."""
    return ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))


def infer_model(state: Mapping[str, Tensor]) -> ModelConfig:
    """Return the architecture of a detector with the entries `state` (our names).

    Raises:
        ValueError: No detector of ours has such entries.
        LookupError: An entry that determines the architecture is missing; the argument is its name.
    """
    for key, value in state.items():
        if CONVOLUTION.search(key) and (value.ndim != 4 or not value.numel()):
            raise ValueError(f"{key}: shape {tuple(value.shape)} is not that of a convolution")
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
        reg_max=bins - 1 or 1,  # Dirac edges have no reg_max
        quality="centerness" if "head.centerness_logits.weight" in state else "joint",
        quality_predictor=None
        if quality is None
        else QualityPredictorConfig(topk=quality.shape[1] // 4 - 1, hidden=len(quality)),
    )


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
            f"no known backbone has stages of {blocks} blocks; known: "
            f"{', '.join(BACKBONES.values())}"
        )
    offset = re.compile(r"backbone\.layer(\d)\.\d+\.conv2\.conv_offset\.weight")
    channels = {int(m[1]) + 1: len(v) for k, v in state.items() if (m := offset.fullmatch(k))}
    deformable = None
    if channels:
        version = 2 if 27 in channels.values() else 1
        deformable = {"version": version, "stages": tuple(sorted(channels))}
    return BackboneConfig.model_validate({"name": BACKBONES[kind], "deformable": deformable})


def differences(weights: ModelConfig, model: ModelConfig) -> list[str]:
    """Return each key of two architectures that differs: `model.channels 64, the model has 32`."""
    both_have_bins = weights.edges == model.edges == "distribution"
    keys = [
        "backbone.name", "backbone.deformable", "num_classes", "channels", "tower_convs",
        "edges", *(["reg_max"] if both_have_bins else []), "quality", "quality_predictor",
    ]  # fmt: skip
    return [
        f"model.{key} {_value(weights, key)}, the model has {_value(model, key)}"
        for key in keys
        if _value(weights, key) != _value(model, key)
    ]


def _value(model: ModelConfig, key: str) -> object:
    section, _, leaf = key.rpartition(".")
    value = getattr(model.backbone if section else model, leaf)
    if isinstance(value, DeformableConfig):
        return {"version": value.version, "stages": sorted(set(value.stages))}
    return value.model_dump() if isinstance(value, QualityPredictorConfig) else value


def require_whole(
    source: str, state: Mapping[str, Tensor], name_in_source: Callable[[str], str]
) -> None:
    """Check that a `state` dict (our names) has all entries of the detector that it describes.

    Args:
        source: What error messages call the state dict.
        state: The state dict.
        name_in_source: Returns the name of one of our entries in the source.

    Raises:
        ValueError: Entries are missing or left over; the message has their names in the source.
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
    """Check that a `state` dict has the `expected` names and shapes.

    Args:
        source: What error messages call the state dict.
        expected: Entries of the right names and shapes.
        state: The state dict.
        name_in_source: Returns the name of one of our entries in the source.

    Raises:
        ValueError: Entries are missing, left over, or of another shape.
    """
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - set(state) - counters)
    if missing:
        raise ValueError(f"{source}: entries missing: {_listed(missing, name_in_source)}")
    left_over = sorted(set(state) - set(expected))
    if left_over:
        raise ValueError(
            f"{source}: entries that the model has no place for: "
            f"{_listed(left_over, name_in_source)}"
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{source}: {name_in_source(key)}: shape {tuple(value.shape)}, but the model has "
                f"{tuple(expected[key].shape)}"
            )
        if not torch.can_cast(value.dtype, torch.float64):  # complex numbers, for example
            raise ValueError(
                f"{source}: {name_in_source(key)}: has {value.dtype}, but the model has "
                f"{expected[key].dtype}"
            )


def _listed(keys: list[str], name_in_source: Callable[[str], str]) -> str:
    names = ", ".join(name_in_source(key) for key in keys[:5])
    return names + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
