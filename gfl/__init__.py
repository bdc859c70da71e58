"""Generalized Focal Loss detector: the public API."""

from gfl.config import Config
from gfl.configfile import ConfigError, load_config
from gfl.detector import Detector
from gfl.mmdet import convert_mmdet, export_mmdet
from gfl.postprocess import Predictions
from gfl.pretrained import load_weights

__all__ = [
    "Config",
    "ConfigError",
    "Detector",
    "Predictions",
    "convert_mmdet",
    "export_mmdet",
    "load_config",
    "load_weights",
]
