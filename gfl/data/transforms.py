"""From an image file to a sample: decoding, and the transforms of training and evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from gfl.config import DataConfig
from gfl.data.coco import DataError


def read_image(path: Path) -> Tensor:
    """Return the RGB pixels (3, H, W), uint8, of an image file.

    Raises:
        DataError: a file that is missing or no image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: cannot be read as an image ({reason}); replace or remove it"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def fitted_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Return the (height, width) of an image scaled to fit within `short` and `long`, all in px."""
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


class FitWithin(v2.Transform):
    """Scale to fit within (long, short), keeping the aspect ratio: bilinear, without antialiasing.

    torchvision's `Resize` rounds sizes down and antialiases; the published weights were trained
    without either.
    """

    def __init__(self, short: int, long: int) -> None:
        super().__init__()
        self.short = short
        self.long = long

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the new size, from the first image or box of the sample."""
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"size": list(fitted_size(height, width, self.short, self.long))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image or boxes."""
        resize = v2.functional.resize
        return self._call_kernel(resize, inpt, size=params["size"], antialias=False)


def build_transforms(config: DataConfig, *, training: bool) -> v2.Transform:
    """Return what turns an image and its boxes into a sample, on `tv_tensors`."""
    steps: list[v2.Transform] = [FitWithin(config.short_side, config.long_side)]
    if training:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    return v2.Compose([*steps, v2.ClampBoundingBoxes()])


def as_sample(pixels: Tensor, boxes: Tensor) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]:
    """Return `pixels` (3, H, W) and `xyxy` `boxes` (G, 4) as types that transforms recognise."""
    height, width = pixels.shape[-2:]
    wrapped = tv_tensors.BoundingBoxes(
        boxes.reshape(-1, 4), format="XYXY", canvas_size=(height, width)
    )
    return tv_tensors.Image(pixels), wrapped
