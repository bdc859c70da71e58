"""Mosaic and mixup: samples that are combined of several images of the training set.

Shapes: G objects of an image, H and W height and width in px.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from gfl.config.schema import AugmentConfig
from gfl.data.augment import (
    Labelled,
    as_sample,
    cut,
    from_pillow,
    to_pillow,
    uniform,
    visible_share,
    whole,
)

CENTRE = (0.25, 0.75)
"""Range of the place where the four images of a mosaic meet, as a share of its sides."""

PART_SCALE = (0.5, 1.0)
"""Range of the side of an image in a mosaic, as a share of the mosaic's."""

OPACITY = (0.3, 0.7)
"""Range of the opacity of the second image of a mixup."""


class Combination:
    """Mosaic and mixup with the probabilities of `data.augment`."""

    def __init__(self, config: AugmentConfig, load: Callable[[int], Labelled], images: int) -> None:
        """Combine images of a set.

        Args:
            config: The probabilities.
            load: Returns an image of the set.
            images: Number of images of the set, from which the others are drawn.
        """
        self._config = config
        self._load = load
        self._images = images

    def __call__(self, first: Labelled) -> tuple[Labelled, list[str]]:
        """Return a combination that begins with the image `first`, and what was done to it."""
        done = []
        if torch.rand(1) < self._config.mosaic:
            others = [self._load(self._another()) for _ in range(3)]
            first = mosaic([first, *others], self._config.visible)
            done.append("mosaic")
        if torch.rand(1) < self._config.mixup:
            first = mixup(first, self._load(self._another()))
            done.append("mixup")
        return first, done

    def _another(self) -> int:
        return int(torch.randint(self._images, ()))


def mosaic(parts: Sequence[Labelled], visible: float) -> Labelled:
    """Return a picture of four images whose corners meet in it, as large as the first.

    An object is taught if its cell shows a share of its box of at least `visible`.
    """
    height, width = parts[0].image.shape[-2:]
    x, y = round(width * uniform(*CENTRE)), round(height * uniform(*CENTRE))
    cells = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    canvas = cut(parts[0].image[:, :0], 0, 0, height, width)
    boxes, labels = [], []
    for part, cell in zip(parts, cells, strict=True):
        left, top, right, bottom = cell
        image, moved = scaled_within(part, height, width, uniform(*PART_SCALE))
        # The image touches the place where the four meet with the corner of its cell.
        x1 = x - image.shape[2] if left == 0 else x
        y1 = y - image.shape[1] if top == 0 else y
        shown = cut(image, top - y1, left - x1, bottom - top, right - left)
        canvas[:, top:bottom, left:right] = shown
        region = torch.tensor([float(side) for side in cell])
        moved = moved + torch.tensor([x1, y1, x1, y1])
        taught = visible_share(moved, region) >= visible
        moved[:, 0::2] = moved[:, 0::2].clamp(left, right)
        moved[:, 1::2] = moved[:, 1::2].clamp(top, bottom)
        boxes.append(moved[taught])
        labels.append(part.labels[taught])
    return Labelled(*as_sample(canvas, torch.cat(boxes)), torch.cat(labels))


def mixup(first: Labelled, second: Labelled) -> Labelled:
    """Return the blend of two images, with the size of the first and the objects of both."""
    height, width = first.image.shape[-2:]
    image, boxes = scaled_within(second, height, width, 1.0)
    layer = cut(image, 0, 0, height, width)
    blend = Image.blend(to_pillow(first.image), to_pillow(layer), uniform(*OPACITY))
    both = torch.cat([first.boxes.as_subclass(Tensor), boxes])
    return Labelled(*as_sample(from_pillow(blend), both), torch.cat([first.labels, second.labels]))


def scaled_within(
    part: Labelled, height: int, width: int, share: float
) -> tuple[tv_tensors.Image, Tensor]:
    """Return an image scaled to fit within a share of the given sides, and its boxes (G, 4)."""
    tall, wide = part.image.shape[-2:]
    factor = share * min(height / tall, width / wide)
    size = [max(1, round(tall * factor)), max(1, round(wide * factor))]
    resize = v2.Resize(size, antialias=False)
    image, boxes = resize(part.image, whole(part.boxes))
    return image, boxes.as_subclass(Tensor)
