"""From pixels and boxes to a sample: the transforms of training and evaluation."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from gfl.config.schema import DataConfig


def fitted_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Return the (height, width) of an image scaled to fit within `short` and `long`, all in px.

    Neither is less than 1, however thin the image.
    """
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


class FitWithin(v2.Transform):
    """Scale to fit within (long, short), keeping the aspect ratio: bilinear, without antialiasing.

    torchvision's `Resize` rounds sizes down and antialiases; the published weights were trained
    without either. With `shorts` = (low, high) the short side is drawn from them, both included.
    """

    def __init__(self, shorts: tuple[int, int], long: int) -> None:
        super().__init__()
        self.shorts = shorts
        self.long = long

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the new size, from the first image or box of the sample."""
        height, width = v2.functional.get_size(flat_inputs[0])
        low, high = self.shorts
        short = low if low == high else int(torch.randint(low, high + 1, ()))
        return {"size": list(fitted_size(height, width, short, self.long))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image or boxes."""
        resize = v2.functional.resize
        return self._call_kernel(resize, inpt, size=params["size"], antialias=False)


def build_transforms(config: DataConfig, *, training: bool) -> v2.Transform:
    """Return what turns an image and its boxes into a sample, on `tv_tensors`."""
    shorts = (config.short_side, config.short_side)
    if training and config.multi_scale is not None:
        shorts = config.multi_scale
    steps: list[v2.Transform] = [FitWithin(shorts, config.long_side)]
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
