"""Conversion between MMDetection's GFL state dicts and ours, in both directions.

MMDetection 2.x, MMDetection 3.x and GFocal use the same names.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gfl.checkpoint.state_dict import require_whole
from gfl.model.detector import Detector
from gfl.model.head import TOWER_LAYERS

# Pairs of their pattern and ours, where {n} is a number, {branch} is cls or reg, and {rest} is
# anything. The first match counts.
RULES = [
    ("backbone.{rest}", "backbone.{rest}"),
    ("neck.lateral_convs.{n}.conv.{rest}", "fpn.levels.inner_blocks.{n}.0.{rest}"),
    ("neck.fpn_convs.3.conv.{rest}", "fpn.levels.extra_blocks.p6.{rest}"),
    ("neck.fpn_convs.4.conv.{rest}", "fpn.levels.extra_blocks.p7.{rest}"),
    ("neck.fpn_convs.{n}.conv.{rest}", "fpn.levels.layer_blocks.{n}.0.{rest}"),
    ("bbox_head.gfl_{branch}.{rest}", "head.{branch}_logits.{rest}"),
    ("bbox_head.scales.{n}.scale", "head.scales.{n}"),
    ("bbox_head.reg_conf.{n}.{rest}", "head.quality_predictor.layers.{n}.{rest}"),
]

for _depth in range(16):
    RULES += [
        (f"bbox_head.{{branch}}_convs.{_depth}.{layer}.{{rest}}",
         f"head.{{branch}}_tower.{TOWER_LAYERS * _depth + offset}.{{rest}}")
        for offset, layer in enumerate(("conv", "gn"))
    ]  # fmt: skip

BINS = "bbox_head.integral.project"
"""Their entry with the values of the bins: a constant, which our models compute."""

GROUPS = {"n": r"(?P<n>\d+)", "branch": r"(?P<branch>cls|reg)", "rest": r"(?P<rest>.+)"}


def convert_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `state_dict` of a whole MMDetection GFL under our names.

    Raises:
        ValueError: An entry is unknown, or entries of our model are missing.
    """
    converted = rename_mmdet(state_dict)
    if BINS not in state_dict:
        raise ValueError(f"MMDetection's GFL: entries missing: {BINS}")
    require_whole("MMDetection's GFL", converted, reference_name)
    return converted


def rename_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state_dict` under our names, whether or not it is a whole model.

    Raises:
        ValueError: A name is unknown in MMDetection's GFL, or the bins are not 0, 1, 2, ...
    """
    converted, unknown = {}, []
    for key, value in state_dict.items():
        # Before mmcv 1.0, offsets were entries beside their convolution.
        ours = _translate(key.replace(".conv2_offset.", ".conv2.conv_offset."), RULES)
        if key == BINS:
            _require_unit_bins(value)
        elif ours is None:
            unknown.append(key)
        else:
            converted[ours] = value
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"not entries of MMDetection's GFL: {', '.join(unknown[:5])}{more}")
    return converted


def _require_unit_bins(bins: Tensor) -> None:
    if bins.ndim != 1 or bins.tolist() != list(range(len(bins))):
        raise ValueError(f"{BINS}: expected bins 0, 1, ..., got {bins.tolist()}")


def export_mmdet(detector: Detector) -> dict[str, Tensor]:
    """Return the state dict of `detector` under MMDetection's names, for `torch.save`.

    Raises:
        ValueError: The model has edges or a quality that MMDetection's GFL lacks, or its bins are
            not 0, 1, ..., from which the reference would decode other boxes.
    """
    model = detector.config.model
    if (model.edges, model.quality) != ("distribution", "joint"):
        raise ValueError(
            f"model.edges is {model.edges!r}, model.quality is {model.quality!r}: MMDetection's "
            "GFL supports only 'distribution' and 'joint'"
        )
    if model.bin_width != 1:
        raise ValueError(
            f"model.bin_width is {model.bin_width:g}: MMDetection's bins are 1 wide, so it would "
            "decode other boxes from these weights"
        )
    theirs = {reference_name(key): value for key, value in detector.state_dict().items()}
    bins = torch.arange(model.bins, dtype=torch.float32)
    return {**theirs, BINS: bins}


def reference_name(key: str) -> str:
    """Return the name in MMDetection of our entry `key`."""
    name = _translate(key, [(ours, theirs) for theirs, ours in RULES])
    assert name is not None, key
    return name


def _translate(key: str, rules: list[tuple[str, str]]) -> str | None:
    for source, target in rules:
        if match := re.fullmatch(re.sub(r"\\\{(\w+)\\\}", _group, re.escape(source)), key):
            return target.format(**match.groupdict())
    return None


def _group(placeholder: re.Match[str]) -> str:
    return GROUPS[placeholder[1]]
