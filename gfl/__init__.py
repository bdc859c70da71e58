"""Generalized Focal Loss detector: the public API.

Names are looked up when they are first used: who needs a configuration does not wait for torch.
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
    from gfl.model.postprocess import Predictions

_MODULES = {
    "config": ("Config",),
    "configfile": ("ConfigError", "load_config"),
    "detector": ("Detector",),
    "mmdet": ("convert_mmdet", "export_mmdet"),
    "postprocess": ("Predictions",),
    "predict": ("Model", "load"),
    "pretrained": ("load_weights",),
    "results": ("Detections",),
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
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"gfl.{module}"), name)
    raise AttributeError(f"module 'gfl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
