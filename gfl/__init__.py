"""Generalized Focal Loss detector: the public API."""

from gfl.config import Config
from gfl.configfile import ConfigError, load_config
from gfl.detector import Detector
from gfl.postprocess import Predictions
from gfl.pretrained import convert_mmdet, load_weights

__all__ = [
    "Config",
    "ConfigError",
    "Detector",
    "Predictions",
    "convert_mmdet",
    "load_config",
    "load_weights",
]
