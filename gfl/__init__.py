"""Generalized Focal Loss detector: the public API.

Names are looked up when they are first used: who needs a configuration does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gfl.config import Config
    from gfl.configfile import ConfigError, load_config
    from gfl.detector import Detector
    from gfl.mmdet import convert_mmdet, export_mmdet
    from gfl.postprocess import Predictions
    from gfl.predict import Model, load
    from gfl.pretrained import load_weights
    from gfl.results import Detections

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
