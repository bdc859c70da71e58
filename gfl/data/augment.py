"""Augmentation: the random changes of a training image and its boxes that `data.augment` names.

Every change draws from torch's CPU generator, which the dataset seeds for each sample. No step
sums in an order that threads decide, so digits do not depend on the number of threads.

Shapes: G objects of an image, H and W height and width in px.
"""

from dataclasses import dataclass
from io import BytesIO
from math import cos, exp, log, sin, tau
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from gfl.config.schema import AugmentConfig, DataConfig

DEGREES, SHEAR = 10.0, 5.0
"""Largest rotation and shear of `affine`, in degrees."""

BRIGHTNESS, CONTRAST, SATURATION = 0.25, 0.5, 0.5
"""Largest changes of the factors of `photometric`, which are 1 without any change."""

HUE = 0.05
"""Largest change of the hue of `photometric`, as a share of a full turn."""

SIGMA = (0.3, 1.5)
"""Range of the standard deviation of `blur`, in px."""

QUALITY = (30, 90)
"""Range of the quality of `jpeg`."""

GREY = (0.299, 0.587, 0.114)
"""Shares of RGB in the luma of a pixel (ITU-R BT.601)."""


class Labelled(NamedTuple):
    """An image and its objects.

    Attributes:
        image: RGB in 0..255, (3, H, W), uint8.
        boxes: `xyxy` in px, (G, 4).
        labels: Classes, (G,), int64.
    """

    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor


@dataclass(frozen=True)
class Step:
    """A change that is made with a probability.

    Attributes:
        name: What it does, for a reader of a picture.
        probability: How often it does it.
        transform: The change.
    """

    name: str
    probability: float
    transform: v2.Transform


class Augmentation:
    """The changes of one image: geometry, pixels, the size for the network, flips.

    Pixels change first, or last in images that are larger than the size for the network.
    """

    def __init__(self, config: DataConfig, fit: v2.Transform) -> None:
        """Prepare the changes of `config.augment`; `fit` scales to the size for the network."""
        self._geometry = [s for s in geometric_steps(config.augment) if s.probability]
        self._pixels = [s for s in pixel_steps(config.augment) if s.probability]
        self._flips = [s for s in flip_steps(config.augment) if s.probability]
        self._fit = Step("", 1, fit)
        self._cuts = bool(self._geometry) or config.augment.mosaic > 0 or config.augment.mixup > 0
        self._visible = config.augment.visible
        self._area = config.short_side * config.long_side

    def __call__(self, sample: Labelled) -> tuple[Labelled, list[str]]:
        """Return the changed sample, its boxes clipped to the image, and what was done to it."""
        height, width = sample.image.shape[-2:]
        steps = [*self._geometry, self._fit]
        if height * width > self._area:
            steps += self._pixels
        else:
            steps = [*self._pixels, *steps]
        image, boxes, labels = sample
        done: list[str] = []
        if self._cuts:
            boxes = whole(boxes)
        for step in [*steps, *self._flips]:
            if step is self._fit or torch.rand(1) < step.probability:
                image, boxes = step.transform(image, boxes)
                done.append(step.name)
        done = [name for name in done if name]
        if self._cuts:
            return without_cut_objects(Labelled(image, boxes, labels), self._visible), done
        return Labelled(image, functional.clamp_bounding_boxes(boxes), labels), done


def geometric_steps(config: AugmentConfig) -> list[Step]:
    """Return the changes that may cut objects; those that make a larger canvas come first."""
    steps = [
        Step("zoom-out", config.zoom_out, ZoomOut((1, 2))),
        Step("affine", config.affine, Affine()),
        Step("IoU crop", config.iou_crop, IoUCrop()),
    ]
    if config.scale_jitter:
        steps.append(Step("scale jitter", 1, ScaleJitter(*config.scale_jitter)))
    return steps


def pixel_steps(config: AugmentConfig) -> list[Step]:
    """Return the changes of pixels alone."""
    return [
        Step("colours", config.photometric, Photometric()),
        Step("blur", config.blur, Blur()),
        Step("JPEG", config.jpeg, Jpeg()),
    ]


def flip_steps(config: AugmentConfig) -> list[Step]:
    """Return flips and rotations by quarters, which keep every pixel."""
    return [
        Step("horizontal flip", config.flip, v2.RandomHorizontalFlip(1)),
        Step("vertical flip", config.flip_vertical, v2.RandomVerticalFlip(1)),
        Step("quarter turn", config.quarter_turn, QuarterTurn()),
    ]


def whole(boxes: tv_tensors.BoundingBoxes) -> tv_tensors.BoundingBoxes:
    """Return boxes clipped to their image once, and by no later transform."""
    return tv_tensors.wrap(functional.clamp_bounding_boxes(boxes), like=boxes, clamping_mode=None)


def visible_share(boxes: Tensor, region: Tensor) -> Tensor:
    """Return the share of the area of every box that lies in a region `xyxy`, (G,)."""
    sides = (boxes[:, 2:].minimum(region[2:]) - boxes[:, :2].maximum(region[:2])).clamp(min=0)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return sides.prod(dim=1) / area.clamp(min=torch.finfo(area.dtype).tiny)


def without_cut_objects(sample: Labelled, visible: float) -> Labelled:
    """Return the objects of which the image shows a share of at least `visible`, clipped to it.

    Objects that are less than 1 px wide or high in the image are left out, too.
    """
    image, boxes, labels = sample
    height, width = image.shape[-2:]
    kept = visible_share(boxes.as_subclass(Tensor), boxes.new_tensor([0, 0, width, height]))
    taught = kept >= visible
    clipped = functional.clamp_bounding_boxes(
        tv_tensors.wrap(boxes[taught], like=boxes), clamping_mode="hard"
    )
    sanitize = v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs[2])
    return Labelled(*sanitize(image, clipped, labels[taught]))


def cut(image: Tensor, top: int, left: int, height: int, width: int) -> tv_tensors.Image:
    """Return a window of an image, black beyond it, with the channels of a pixel together."""
    canvas = torch.zeros(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    rows = range(max(0, -top), min(height, image.shape[1] - top))
    columns = range(max(0, -left), min(width, image.shape[2] - left))
    if rows and columns:
        canvas[:, rows.start : rows.stop, columns.start : columns.stop] = image[
            :, top + rows.start : top + rows.stop, left + columns.start : left + columns.stop
        ]
    return tv_tensors.Image(canvas)


class Window(v2.Transform):
    """A window of the image as the new image; subclasses draw its place.

    Parameters are those of `cut`; none leave the sample as it is.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut an image or move boxes."""
        place = {name: params[name] for name in ("top", "left", "height", "width") if params}
        if not place:
            return inpt
        if isinstance(inpt, tv_tensors.Image):
            return cut(inpt, **place)
        return functional.crop(inpt, **place)


class ScaleJitter(Window):
    """A zoom by a factor: the window has 1 / factor of the image's sides, anywhere."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.range = log(low), log(high)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factor, its logarithm uniformly, and the place."""
        height, width = flat_inputs[0].shape[-2:]
        factor = exp(uniform(*self.range))
        new_height, new_width = max(1, round(height / factor)), max(1, round(width / factor))
        top, left = uniform(0, height - new_height), uniform(0, width - new_width)
        return {"top": round(top), "left": round(left), "height": new_height, "width": new_width}


class ZoomOut(Window):
    """A larger black canvas with the image anywhere on it."""

    def __init__(self, sides: tuple[float, float]) -> None:
        super().__init__()
        self.sides = sides

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factor of the sides and the place."""
        height, width = flat_inputs[0].shape[-2:]
        factor = uniform(*self.sides)
        new_height, new_width = int(height * factor), int(width * factor)
        top, left = uniform(0, new_height - height), uniform(0, new_width - width)
        return {"top": -int(top), "left": -int(left), "height": new_height, "width": new_width}


class IoUCrop(Window):
    """torchvision's crop by IoU, but with `visible` to decide which objects are taught."""

    def __init__(self) -> None:
        super().__init__()
        self._places = v2.RandomIoUCrop()

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the window; without objects there is none."""
        image, boxes = flat_inputs
        return self._places.make_params([image, boxes]) if len(boxes) else {}


class Affine(v2.Transform):
    """A rotation and a shear about the centre; black where there was no image."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the angles."""
        shear = [uniform(-SHEAR, SHEAR), uniform(-SHEAR, SHEAR)]
        return {"angle": uniform(-DEGREES, DEGREES), "shear": shear}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Warp an image or boxes."""
        is_image = isinstance(inpt, tv_tensors.Image)
        warped = functional.affine(
            to_pillow(inpt) if is_image else inpt,
            translate=[0, 0],
            scale=1.0,
            angle=params["angle"],
            shear=params["shear"],
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        return from_pillow(warped) if is_image else warped


class QuarterTurn(v2.Transform):
    """A rotation by 90, 180 or 270 degrees, counter-clockwise; every pixel is kept."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the number of quarters."""
        return {"quarters": int(torch.randint(1, 4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn an image or boxes."""
        quarters = params["quarters"]
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.Image(inpt.as_subclass(Tensor).rot90(quarters, dims=(1, 2)))
        height, width = inpt.canvas_size
        boxes = inpt.as_subclass(Tensor)
        for _ in range(quarters):
            left, top, right, bottom = boxes.unbind(dim=1)
            boxes = torch.stack([top, width - right, bottom, width - left], dim=1)
            height, width = width, height
        return tv_tensors.wrap(boxes, like=inpt, canvas_size=(height, width))


class PixelChange(v2.Transform):
    """A change of pixels alone, by Pillow; boxes stay as they are."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change an image."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return from_pillow(self.changed(to_pillow(inpt), params))

    def changed(self, image: Image.Image, params: dict[str, Any]) -> Image.Image:
        """Return the changed image."""
        raise NotImplementedError


class Photometric(PixelChange):
    """Other brightness, contrast, saturation and hue: one linear map of colours.

    The hue turns in the plane of constant luma (YIQ).
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the map, rows of (R, G, B, constant)."""
        strengths = (BRIGHTNESS, CONTRAST, SATURATION)
        brightness, contrast, saturation = (uniform(1 - s, 1 + s) for s in strengths)
        colours = colour_map(brightness * contrast, saturation, uniform(-HUE, HUE))
        constant = torch.full((3, 1), 128 * brightness * (1 - contrast))
        return {"matrix": tuple(torch.cat([colours, constant], dim=1).flatten().tolist())}

    def changed(self, image: Image.Image, params: dict[str, Any]) -> Image.Image:
        """Return the image with other colours."""
        return image.convert("RGB", params["matrix"])


class Blur(PixelChange):
    """Gaussian blur."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the standard deviation."""
        return {"sigma": uniform(*SIGMA)}

    def changed(self, image: Image.Image, params: dict[str, Any]) -> Image.Image:
        """Return the blurred image."""
        return image.filter(ImageFilter.GaussianBlur(params["sigma"]))


class Jpeg(PixelChange):
    """Compression as JPEG."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the quality."""
        return {"quality": int(torch.randint(QUALITY[0], QUALITY[1] + 1, ()))}

    def changed(self, image: Image.Image, params: dict[str, Any]) -> Image.Image:
        """Return the image as it was compressed."""
        content = BytesIO()
        image.save(content, "JPEG", quality=params["quality"])
        return Image.open(content)


def colour_map(factor: float, saturation: float, turn: float) -> Tensor:
    """Return the map (3, 3) of RGB: a factor of all, one of the saturation, a turn of the hue."""
    to_yiq = torch.tensor([GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    c, s = saturation * cos(tau * turn), saturation * sin(tau * turn)
    turned = torch.tensor([[1.0, 0, 0], [0, c, -s], [0, s, c]])
    return factor * to_yiq.inverse() @ turned @ to_yiq


def uniform(low: float, high: float) -> float:
    """Draw a number from low to high."""
    return low + (high - low) * float(torch.rand(()))


def to_pillow(image: Tensor) -> Image.Image:
    """Return an image (3, H, W), uint8, as Pillow's."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pillow(image: Image.Image) -> tv_tensors.Image:
    """Return Pillow's image as (3, H, W), uint8, with the channels of a pixel together."""
    return tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def as_sample(pixels: Tensor, boxes: Tensor) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]:
    """Return `pixels` (3, H, W) and `xyxy` `boxes` (G, 4) as the types that transforms expect."""
    height, width = pixels.shape[-2:]
    wrapped = tv_tensors.BoundingBoxes(
        boxes.reshape(-1, 4), format="XYXY", canvas_size=(height, width)
    )
    return tv_tensors.Image(pixels), wrapped
