"""Generalized Focal Loss detector: the public API.

A name is imported when it is first used, so that `import gfl` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gfl.checkpoint.mmdet import convert_mmdet, export_mmdet
    from gfl.checkpoint.pretrained import load_weights
    from gfl.config.loader import ConfigError, load_config
    from gfl.config.schema import Config
    from gfl.inference.detections import Detections
    from gfl.inference.predictor import Model, load
    from gfl.model.detector import Detector
    from gfl.structures import Predictions

_MODULE_OF = {
    "Config": "gfl.config.schema",
    "ConfigError": "gfl.config.loader",
    "Detections": "gfl.inference.detections",
    "Detector": "gfl.model.detector",
    "Model": "gfl.inference.predictor",
    "Predictions": "gfl.structures",
    "convert_mmdet": "gfl.checkpoint.mmdet",
    "export_mmdet": "gfl.checkpoint.mmdet",
    "load": "gfl.inference.predictor",
    "load_config": "gfl.config.loader",
    "load_weights": "gfl.checkpoint.pretrained",
}

__all__ = [
    "Config",
    "ConfigError",
    "Detections",
    "Detector",
    "Model",
    "Predictions",
    "convert_mmdet",
    "export_mmdet",
    "load",
    "load_config",
    "load_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gfl' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
