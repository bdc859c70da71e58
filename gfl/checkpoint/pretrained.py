"""Loading weights: our own, MMDetection's and GFocal's GFL, torchvision's ImageNet classifiers."""

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
"""What depends on the classes."""


def load_weights(
    detector: Detector, source: str | Path | Mapping[str, Tensor], *, reset_classifier: bool = False
) -> str:
    """Load weights into `detector`.

    All of its entries are loaded, or, of an ImageNet classifier, all of its backbone's; only
    deformable offsets, which a classifier lacks, stay at zero.

    Args:
        detector: Changed in place.
        source: A state dict, or a local file of one: `.safetensors`, or what `torch.save` wrote.
            Ours, MMDetection's (2.x, 3.x; GFocal's) and torchvision's names are told apart by
            themselves.
        reset_classifier: Leave the last layer of the classification as it is, so that weights for
            other classes can be loaded.

    Returns:
        One line on what was recognised and loaded.

    Raises:
        ValueError: a file that is missing or needs pickle; weights of another architecture or
            number of classes; entries missing or left over.
    """
    name = "weights" if isinstance(source, Mapping) else str(source)
    read = source if isinstance(source, Mapping) else read_state_dict(Path(source))
    kind, state = _recognise({key.removeprefix("module."): value for key, value in read.items()})
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
            expected, state = ({k: v for k, v in entries.items() if k not in CLASSIFIER}
                               for entries in (expected, state))  # fmt: skip
    require_same_entries(name, expected, state)
    detector.load_state_dict(state, strict=False)
    left = len(detector.state_dict()) - len(state)
    report = f"{name}: {kind}, all its {len(state)} entries loaded"
    report += f"; {left} of the model's stay as initialised" if left else ""
    logger.info(report)
    return report


def _recognise(state: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Return whose names `state` has, and the same under ours."""
    if any(key.startswith("bbox_head.") for key in state):
        return "MMDetection GFL", rename_mmdet(state)
    if "conv1.weight" in state:
        body = {f"backbone.{key}": v for key, v in state.items() if not key.startswith("fc.")}
        return "torchvision classifier", body
    return "GFL", state


def _require_same_model(
    name: str, detector: Detector, state: Mapping[str, Tensor], reset_classifier: bool
) -> None:
    """Refuse weights of another architecture, which would differ in many entries at once."""
    try:
        weights = infer_model(state)
    except LookupError:
        return  # something is missing: which entries, the comparison will say
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    found = differences(weights, detector.config.model)
    classes = [line for line in found if line.startswith("model.num_classes")]
    if found == classes and reset_classifier:
        return
    if found == classes and found:
        raise ValueError(
            f"{name}: {found[0]}: set model.num_classes={weights.num_classes}, or give the model a "
            "new classifier with model.reset_classifier=true (reset_classifier=True)"
        )
    if found:
        raise ValueError(f"{name}: weights of another model: {'; '.join(found)}")
