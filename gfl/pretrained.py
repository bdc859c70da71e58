"""Reading weights: our own, MMDetection's GFL and torchvision's ImageNet classifiers."""

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gfl.detector import Detector

logger = logging.getLogger(__name__)

# The reference's names and ours; a name that no rule matches is refused.
MMDET_RULES = [
    (r"backbone\.((?:conv1|bn1|layer\d)\..+)", r"backbone.\1"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"fpn.levels.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.([012])\.conv\.(weight|bias)", r"fpn.levels.layer_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.3\.conv\.(weight|bias)", r"fpn.levels.extra_blocks.p6.\1"),
    (r"neck\.fpn_convs\.4\.conv\.(weight|bias)", r"fpn.levels.extra_blocks.p7.\1"),
    (r"bbox_head\.gfl_(cls|reg)\.(weight|bias)", r"head.\1_logits.\2"),
    (r"bbox_head\.scales\.(\d)\.scale", r"head.scales.\1"),
]
MMDET_TOWER = re.compile(r"bbox_head\.(cls|reg)_convs\.(\d+)\.(conv|gn)\.(weight|bias)")
MMDET_BINS = "bbox_head.integral.project"
TOWER_LAYERS = 3
"""Modules of our towers per convolution: the convolution, its GroupNorm and the ReLU."""


def load_weights(detector: Detector, source: str | Path | Mapping[str, Tensor]) -> str:
    """Load weights into `detector`.

    All of its entries are loaded, or, of an ImageNet classifier, all of its backbone's.

    Args:
        detector: Changed in place.
        source: A state dict, or a local file of one: `.safetensors`, or what `torch.save` wrote.
            Ours, MMDetection's and torchvision's names are told apart by themselves.

    Returns:
        One line on what was recognised and loaded.

    Raises:
        ValueError: a file that is missing or needs pickle, entries missing, left over or of another
            shape.
    """
    name = "weights" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else read_state_dict(Path(source))
    if "bbox_head.gfl_cls.weight" in state:
        kind, state = "MMDetection GFL", convert_mmdet(state)
    elif "conv1.weight" in state:
        kind = "torchvision classifier"
        state = {
            f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")
        }
    else:
        kind = "GFL"
    expected = detector.state_dict()
    if kind == "torchvision classifier":
        expected = {key: value for key, value in expected.items() if key.startswith("backbone.")}
    _require_same_entries(name, expected, state)
    detector.load_state_dict(dict(state), strict=False)
    report = f"{name}: {kind}, {len(state)} entries, all loaded"
    logger.info(report)
    return report


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a local file, without unpickling anything but tensors."""
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds Python objects beside tensors, which could run code when read; "
            "save its state_dict alone"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: not a readable weights file ({error})") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, or one under 'state_dict'")
    return state


def convert_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return MMDetection's GFL `state_dict` under our names.

    Raises:
        ValueError: an entry that has no place in ours, an entry without which ours would be
            incomplete.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for key, value in state_dict.items():
        if key == MMDET_BINS:
            _require_unit_bins(value)
        elif (ours := _our_name(key)) is not None:
            converted[ours] = value
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"not entries of MMDetection's GFL with a ResNet: {_list(unknown)}")
    missing = sorted(_required_siblings(state_dict) - set(state_dict))
    if missing:
        raise ValueError(f"entries missing from MMDetection's GFL: {_list(missing)}")
    return converted


def _our_name(key: str) -> str | None:
    if tower := MMDET_TOWER.fullmatch(key):
        branch, depth, layer, leaf = tower.groups()
        return f"head.{branch}_tower.{TOWER_LAYERS * int(depth) + (layer == 'gn')}.{leaf}"
    for pattern, ours in MMDET_RULES:
        if (match := re.fullmatch(pattern, key)) is not None:
            return match.expand(ours)
    return None


def _require_unit_bins(bins: Tensor) -> None:
    if not torch.equal(bins.cpu(), torch.arange(len(bins), dtype=bins.dtype)):
        raise ValueError(f"{MMDET_BINS}: expected bins 0, 1, ..., got {bins.tolist()}")


def _required_siblings(state_dict: Mapping[str, Tensor]) -> set[str]:
    """Return the entries that must exist beside those of `state_dict`, whatever its backbone."""
    required = {MMDET_BINS, "backbone.conv1.weight"}
    required |= {
        f"bbox_head.gfl_{branch}.{leaf}" for branch in ("cls", "reg") for leaf in ("weight", "bias")
    }
    required |= {f"bbox_head.scales.{level}.scale" for level in range(5)}
    for convs, count in (("lateral", 3), ("fpn", 5)):
        for level in range(count):
            required |= {f"neck.{convs}_convs.{level}.conv.{leaf}" for leaf in ("weight", "bias")}
    depth = 1 + max(
        (int(m[2]) for key in state_dict if (m := MMDET_TOWER.fullmatch(key))), default=0
    )
    for branch in ("cls", "reg"):
        for index in range(depth):
            stem = f"bbox_head.{branch}_convs.{index}"
            required |= {f"{stem}.conv.weight", f"{stem}.gn.weight", f"{stem}.gn.bias"}
    norm = re.compile(r"(backbone\..*(?:bn\d|downsample\.1))\.\w+")
    for stem in {m[1] for key in state_dict if (m := norm.fullmatch(key))}:
        leaves = ("weight", "bias", "running_mean", "running_var")
        required |= {f"{stem}.{leaf}" for leaf in leaves}
        conv = stem.replace("downsample.1", "downsample.0")
        required.add(f"{re.sub(r'bn(?=[0-9]$)', 'conv', conv)}.weight")
    return required


def _require_same_entries(
    name: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - set(state) - counters)
    if missing:
        raise ValueError(f"{name}: entries missing: {_list(missing)}")
    if left_over := sorted(set(state) - set(expected)):
        raise ValueError(f"{name}: entries that the model has no place for: {_list(left_over)}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{name}: {key}: shape {tuple(value.shape)}, but the model has "
                f"{tuple(expected[key].shape)}; check model.num_classes, reg_max and channels"
            )


def _list(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
