"""Frames per second under a recorded protocol.

As GFocal measured it: one image at a time, post-processing included, loading excluded, the device
synchronised, after warm-up.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gfl.config import Config
from gfl.data.loading import Batch, DetectionDataset, collate
from gfl.data.split import Split
from gfl.detector import Detector

WARM_UP = 5


def measure_fps(
    detector: Detector, split: Split, config: Config, device: torch.device, images: int = 200
) -> tuple[float, dict[str, Any]]:
    """Return frames per second over the first `images` of `split`, and the protocol."""
    dataset = DetectionDataset(split, config, training=False)
    count = min(images, len(dataset))
    batches = [collate([dataset[0, image]]).to(device) for image in range(count)]
    detector.eval()
    _time(detector, batches[:WARM_UP], device)
    seconds = _time(detector, batches, device)
    protocol = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": "float32",
        "batch": 1,
        "images": count,
        "annotations": split.digest,
        "short_side": config.data.short_side,
        "long_side": config.data.long_side,
        "postprocess": config.postprocess.model_dump(),
    }
    return count / seconds, protocol


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Return what tells protocols apart: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return where two protocols differ, "key this -> that" each."""
    keys = sorted(one.keys() | other.keys())
    return [f"{k} {one.get(k)} -> {other.get(k)}" for k in keys if one.get(k) != other.get(k)]


def _time(detector: Detector, batches: Sequence[Batch], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for batch in batches:
        sizes = batch.targets.sizes
        detector.predict(detector.normalize(batch.pixels, sizes), sizes, batch.original_sizes)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
