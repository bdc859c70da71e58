"""Generalized Focal Loss detector: the public API."""

from gfl.config import Config
from gfl.configfile import ConfigError, load_config
from gfl.detector import Detector
from gfl.mmdet import convert_mmdet, export_mmdet
from gfl.postprocess import Predictions
from gfl.predict import Model, load
from gfl.pretrained import load_weights
from gfl.results import Detections

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
