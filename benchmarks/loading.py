"""Images a second of one core, from file to sample: ours by preset, and torchvision's reference.

All decode with Pillow and scale to fit 800/1333 as for training. The reference then flips with
torchvision's first transforms, on PIL images, and normalises; ours normalises on the device.
"""

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import functional

import gfl
from gfl.config.schema import PRESETS, DataConfig
from gfl.data.dataset import DetectionDataset, fitted_size
from gfl.data.split import load_splits

IMAGES = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def compare(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Return images a second of all on the images in `folder`, in turns.

    Args:
        folder: Images, with their annotations in `../annotations/instances.json`.
        rounds: Number of turns.
    """
    ours = {preset: _dataset(folder, preset) for preset in PRESETS}
    data, records = gfl.load_config("configs/gfl_r50_1x.yaml").data, ours["coco"].records[:IMAGES]
    # Every turn makes the same samples, so the shortest time is that of the least disturbed turn.
    contenders: dict[str, Callable[[int], Any]] = {
        preset: partial(_sample, dataset) for preset, dataset in ours.items()
    }
    contenders["torchvision"] = lambda image: _reference(records[image].path, data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, load in contenders.items():
            seconds[name].append(_time(load, len(records)))
    torch.set_num_threads(threads)
    found = {name: _figures(each[1:], len(records)) for name, each in seconds.items()}
    for figures in found.values():
        figures["time_of_coco"] = found["coco"]["best"] / figures["best"]
        figures["times_torchvision"] = figures["best"] / found["torchvision"]["best"]
    return {"processor": {"name": processor()}, **found}


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _dataset(folder: Path, preset: str) -> DetectionDataset:
    annotations = folder.parent / "annotations" / "instances.json"
    places = f"{{images: {folder}, annotations: {annotations}}}"
    changes = [f"data.train={places}", f"data.val={places}", f"data.augment.preset={preset}"]
    config = gfl.load_config("configs/gfl_r50_1x.yaml", changes)
    return DetectionDataset(load_splits(config)[0], config, training=True)


def _sample(dataset: DetectionDataset, image: int) -> Any:
    return dataset[0, image]


def _reference(path: Path, data: DataConfig) -> Any:
    image = Image.open(path).convert("RGB")
    size = fitted_size(image.height, image.width, data.short_side, data.long_side)
    scaled = functional.hflip(functional.resize(image, list(size)))
    return functional.normalize(functional.to_tensor(scaled), MEAN, STD)


def _figures(seconds: list[float], images: int) -> dict[str, Any]:
    """Return images a second of the fastest turn and of the median turn."""
    return {"best": images / min(seconds), "median": images / statistics.median(seconds)}


def _time(load: Callable[[int], Any], images: int) -> float:
    start = time.perf_counter()
    for image in range(images):
        load(image)
    return time.perf_counter() - start
