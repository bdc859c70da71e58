"""Images a second of one core, from file to sample: ours, and torchvision's reference pipeline.

Both decode with Pillow and scale to fit 800/1333 as for training. The reference then flips with
torchvision's first transforms, on PIL images, and normalises; ours normalises on the device.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import functional

import gfl
from gfl.data.augment import as_sample
from gfl.data.dataset import build_transforms, fitted_size
from gfl.data.images import list_images, read_image

IMAGES = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def compare(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median images a second of both on the images in `folder`, in turns."""
    paths = list_images(folder)[:IMAGES]
    data = gfl.load_config("configs/gfl_r50_1x.yaml").data
    transforms = build_transforms(data)
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0]])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def ours(path: Path) -> Any:
        return transforms(*as_sample(read_image(path), boxes))

    def reference(path: Path) -> Any:
        image = Image.open(path).convert("RGB")
        size = fitted_size(image.height, image.width, data.short_side, data.long_side)
        scaled = functional.hflip(functional.resize(image, list(size)))
        return functional.normalize(functional.to_tensor(scaled), MEAN, STD)

    seconds: dict[str, list[float]] = {"GFL": [], "torchvision": []}
    for _ in range(rounds + 1):
        for name, load in (("GFL", ours), ("torchvision", reference)):
            seconds[name].append(_time(load, paths))
    torch.set_num_threads(threads)
    return {
        name: {"images_per_second": len(paths) / statistics.median(each[1:])}
        for name, each in seconds.items()
    }


def _time(load: Callable[[Path], Any], paths: Sequence[Path]) -> float:
    start = time.perf_counter()
    for path in paths:
        load(path)
    return time.perf_counter() - start
