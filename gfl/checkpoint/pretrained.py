"""Loading weights of our own models, MMDetection's and GFocal's GFL, and ImageNet classifiers."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gfl.checkpoint.mmdet import rename_mmdet
from gfl.checkpoint.state_dict import (
    differences,
    infer_model,
    read_state_dict,
    require_same_entries,
)
from gfl.model.detector import Detector

logger = logging.getLogger(__name__)

CLASSIFIER = ("head.cls_logits.weight", "head.cls_logits.bias")
"""Entries whose shapes depend on the number of classes."""


def load_weights(
    detector: Detector, source: str | Path | Mapping[str, Tensor], *, reset_classifier: bool = False
) -> str:
    """Load weights into `detector`.

    Weights of a detector fill all of its entries. Those of an ImageNet classifier fill the backbone
    alone, where deformable offsets, which a classifier lacks, stay at zero.

    Args:
        detector: The detector, changed in place.
        source: A state dict or a local file of one: `.safetensors`, or a file of `torch.save`. The
            names may be ours, MMDetection's (2.x and 3.x, GFocal's) or torchvision's.
        reset_classifier: Whether to keep the last layer of the classification as it is, so that
            weights for other classes can be loaded.

    Returns:
        One line about the recognised origin and the number of entries loaded.

    Raises:
        ValueError: The file is missing or needs pickle, the weights belong to another architecture
            or number of classes, or entries are missing or left over.
    """
    name = "weights" if isinstance(source, Mapping) else str(source)
    entries = source if isinstance(source, Mapping) else read_state_dict(Path(source))
    try:
        kind, state = _recognise({key.removeprefix("module."): v for key, v in entries.items()})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    expected = detector.state_dict()
    if kind == "torchvision classifier":
        expected = {
            key: value
            for key, value in expected.items()
            if key.startswith("backbone.") and "conv_offset" not in key
        }
    else:
        _require_same_model(name, detector, state, reset_classifier)
        if reset_classifier:
            expected = _without_classifier(expected)
            state = _without_classifier(state)
    require_same_entries(name, expected, state)
    detector.load_state_dict(state, strict=False)
    left = len(detector.state_dict()) - len(state)
    report = f"{name}: {kind}, all its {len(state)} entries loaded"
    report += f"; {left} of the model's stay as initialised" if left else ""
    logger.info(report)
    return report


def _without_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in CLASSIFIER}


def _recognise(state: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return the origin of the names in `state`, and the same entries under our names."""
    if any(key.startswith("bbox_head.") for key in state):
        return "MMDetection GFL", rename_mmdet(state)
    if "conv1.weight" in state:
        body = {f"backbone.{key}": v for key, v in state.items() if not key.startswith("fc.")}
        return "torchvision classifier", body
    return "GFL", state


def _require_same_model(
    name: str, detector: Detector, state: Mapping[str, Tensor], reset_classifier: bool
) -> None:
    """Check that weights have the detector's architecture; otherwise many entries would differ."""
    try:
        weights = infer_model(state)
    except LookupError:
        return  # an entry is missing; `require_same_entries` reports all of them
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    differing = differences(weights, detector.config.model)
    only_classes = all(line.startswith("model.num_classes") for line in differing)
    if not differing or (only_classes and reset_classifier):
        return
    if only_classes:
        raise ValueError(
            f"{name}: {differing[0]}: set model.num_classes={weights.num_classes}, or train a new "
            "classifier with model.reset_classifier=true (reset_classifier=True)"
        )
    raise ValueError(
        f"{name}: weights of another model: {'; '.join(differing)}; change these keys, or use "
        "weights of this model"
    )
