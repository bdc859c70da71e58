"""A synthetic set to learn from in minutes: rectangles, ellipses and triangles in COCO format.

    folder = render(Path("data/shapes/train"), count=2000, size=128, seed=0)

Later shapes are painted over earlier ones. Boxes and areas are those of the *visible* pixels: an
edge hidden behind another shape is nowhere in the image, so no detector could learn to place it.
Everything painted is annotated: a shape that would hide too much of an earlier one is moved or
left out. A shape may extend beyond the border by a tenth of its box. Backgrounds are muted, shapes
are saturated. Each category has its own range of hues, so that a few hundred training steps suffice
and AP measures the boxes rather than the recognition of forms.

Shapes: H = W = `size` pixels.
"""

import colorsys
import errno
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gfl.config.schema import Config


def render_shapes(config: Config) -> None:
    """Render the synthetic set that `data.shapes` describes, unless it exists already."""
    shapes = config.data.shapes
    if shapes is not None:
        folder = Path(shapes.folder)
        # Held-out images come from another seed.
        render(folder / "train", count=shapes.train, size=shapes.size, seed=2 * shapes.seed)
        render(folder / "val", count=shapes.val, size=shapes.size, seed=2 * shapes.seed + 1)


RENDERER_VERSION = 1
"""Version of `render`: raise it whenever its pixels or annotations change."""

CATEGORIES = ("rectangle", "ellipse", "triangle")
"""Category names; the COCO id is the position plus one."""

MIN_IMAGE_SIZE = 32
"""Smallest side of a rendered image in px."""

MIN_SIDE_PX = 8.0
"""Smallest longer side of a shape's box in px, before occlusion."""

MAX_SIDE_SHARE = 0.85
"""Largest longer side of a shape's box, as a share of the image's side."""

MIN_VISIBLE = 0.7
"""Smallest visible share of a shape's area: with less, its class would be a guess."""

HUE_SPREAD = 0.3
"""Largest deviation of a shape's hue from its category's, in distances between categories."""

_MAX_SHAPES = 8
"""Largest number of shapes in an image."""

_EMPTY_SHARE = 0.04
"""Share of images without any shape."""

_MEAN_SHARE = 0.25
"""Mean number of shapes beyond the first, as a share of the largest number beyond the first."""

_ANY_SIZE_SHARE = 0.1
"""Share of shapes whose sizes are spread evenly on a logarithmic scale; the others are larger."""

_PLACEMENTS = 4
"""Attempts to place a shape before it is left out."""

_NOISE_STD = 4.0
"""Standard deviation of the pixels' noise, in 0..255."""

_JPEG_QUALITY = 92

_AREAS = {"rectangle": 4.0, "ellipse": math.pi, "triangle": 2.0}
"""Area of each shape whose box has sides of 2."""

_logger = logging.getLogger(__name__)


def render(folder: Path, *, count: int, size: int, seed: int) -> Path:
    """Render a set into `folder`, unless it exists already, and return `folder`.

    Writes `images/000000.jpg` ... and `annotations.json`. An image depends on (seed, index, size)
    only, not on `count`. Several processes may render the same set at the same time: it appears
    complete or not at all.

    Args:
        folder: Folder of the set: absent, empty, or holding the same set.
        count: Number of images, at least 1.
        size: Side of the square images in px, at least `MIN_IMAGE_SIZE`.
        seed: Non-negative; give training and validation sets different ones.

    Raises:
        ValueError: A parameter is out of range, or `folder` holds anything else than this set.
    """
    if count < 1 or size < MIN_IMAGE_SIZE or seed < 0:
        raise ValueError(
            f"cannot render shapes with count={count}, size={size}, seed={seed}: "
            f"use count >= 1, size >= {MIN_IMAGE_SIZE} and seed >= 0"
        )
    parameters = {"count": count, "size": size, "seed": seed, "renderer_version": RENDERER_VERSION}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _verify(folder, parameters)
        return folder
    _logger.info("rendering %d images of %d px into %s", count, size, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        # One level down, because a temporary directory itself is closed to other users.
        ours = Path(scratch) / folder.name
        _write_set(ours, parameters)
        try:
            ours.rename(folder)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
            _verify(folder, parameters)  # another process was faster
    return folder


def _verify(folder: Path, parameters: dict[str, int]) -> None:
    """Check that `folder` holds the set with these parameters."""
    try:
        info = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))["info"]
        present = {key: info[key] for key in parameters}
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        content = "something that is no set of shapes"
    else:
        if present == parameters:
            return
        content = f"shapes with {_as_text(present)}"
    raise ValueError(
        f"{folder} holds {content}, but expected shapes with {_as_text(parameters)}: "
        "choose another folder, delete this one, or configure the shapes that it holds"
    )


def _as_text(parameters: dict[str, int]) -> str:
    return ", ".join(f"{key}={value}" for key, value in parameters.items())


def _write_set(folder: Path, parameters: dict[str, int]) -> None:
    (folder / "images").mkdir(parents=True)
    size = parameters["size"]
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(parameters["count"]):
        name = f"{index:06d}.jpg"
        pixels, objects = _draw(np.random.default_rng([parameters["seed"], index]), size)
        # No chroma subsampling: a shape's edge is where the colour changes, to the pixel.
        Image.fromarray(pixels).save(folder / "images" / name, quality=_JPEG_QUALITY, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for annotation in objects:
            identity = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append(identity | annotation | {"iscrowd": 0})
    content = {
        "info": {"description": "shapes rendered by gfl.data.synthetic", **parameters},
        "licenses": [],
        "categories": [
            {"id": identity, "name": name, "supercategory": "shape"}
            for identity, name in enumerate(CATEGORIES, 1)
        ],
        "images": images,
        "annotations": annotations,
    }
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")


def _draw(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], list[dict[str, object]]]:
    """Return the pixels (H, W, 3) of an image and the annotations of its objects."""
    pixels = _background(rng, size)
    shapes, owner = _arrange(rng, size)
    annotations: list[dict[str, object]] = []
    for index, shape in enumerate(shapes):
        visible = owner == index
        category = CATEGORIES.index(shape.name)
        hue = (category + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) / len(CATEGORIES)
        colour = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.75, 1), rng.uniform(0.65, 1))
        pixels[visible] = np.multiply(colour, 255)
        annotations.append(
            {
                "category_id": category + 1,
                "bbox": _extent(visible),
                "area": float(visible.sum()),
            }
        )
    pixels += rng.normal(0, _NOISE_STD, pixels.shape)
    return pixels.round().clip(0, 255).astype(np.uint8), annotations


def _background(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Return a gradient, stripes or smooth noise between two muted colours, (H, W, 3) in 0..255."""
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-1, 1, size)
    ramp = (math.cos(angle) * line + math.sin(angle) * line[:, None]) / math.sqrt(2)
    kind = rng.choice(["gradient", "stripes", "noise"])
    if kind == "gradient":
        pattern = ramp
    elif kind == "stripes":
        pattern = np.sin(ramp * rng.uniform(8, 40))
    else:
        cells = int(rng.integers(3, 12))
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        pattern = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    grey = rng.uniform(60, 200)
    colour = grey + rng.uniform(-12, 12, 3)
    contrast = rng.uniform(-40, 40) + rng.uniform(-8, 8, 3)
    return colour + pattern[:, :, None] * contrast


@dataclass(frozen=True)
class _Shape:
    """An upright shape: its centre and half the sides of its box, (x, y) in px each."""

    name: str
    centre: tuple[float, float]
    half: tuple[float, float]

    @property
    def area(self) -> float:
        return _AREAS[self.name] * self.half[0] * self.half[1]

    def mask(self, size: int) -> NDArray[np.bool_]:
        """Return which pixels (H, W) have their centre inside."""
        pixels = np.arange(size) + 0.5
        u = (pixels - self.centre[0]) / self.half[0]
        v = ((pixels - self.centre[1]) / self.half[1])[:, None]
        if self.name == "rectangle":
            return (abs(u) <= 1) & (abs(v) <= 1)
        if self.name == "ellipse":
            return u**2 + v**2 <= 1
        return (v <= 1) & (2 * abs(u) <= 1 + v)


def _arrange(rng: np.random.Generator, size: int) -> tuple[list[_Shape], NDArray[np.int64]]:
    """Return an image's shapes and the index of the one visible in each pixel (H, W), or -1."""
    shapes: list[_Shape] = []
    owner = np.full((size, size), -1)
    # Few images are crowded, and some are empty.
    count = 0 if rng.random() < _EMPTY_SHARE else 1 + rng.binomial(_MAX_SHAPES - 1, _MEAN_SHARE)
    for _ in range(count):
        # Most shapes are large on a logarithmic scale, and some have any size.
        exponent = rng.random() ** (1 if rng.random() < _ANY_SIZE_SHARE else 1 / 4)
        side = MIN_SIDE_PX * (MAX_SIDE_SHARE * size / MIN_SIDE_PX) ** exponent
        for _ in range(_PLACEMENTS):
            shape = _random_shape(rng, size, side)
            mask = shape.mask(size)
            covered = {shapes[index].name for index in np.unique(owner[mask]) if index >= 0}
            painted = np.where(mask, len(shapes), owner)
            visible = np.bincount(painted.ravel() + 1, minlength=len(shapes) + 2)[1:]
            areas = [other.area for other in (*shapes, shape)]
            # Two shapes of a category have similar colours: no edge would show between them.
            if shape.name not in covered and np.all(visible >= MIN_VISIBLE * np.array(areas)):
                shapes.append(shape)
                owner = painted
                break
    return shapes, owner


def _random_shape(rng: np.random.Generator, size: int, side: float) -> _Shape:
    """Return a shape whose box has `side` px as its longer side and lies (nearly) in the image."""
    name = str(rng.choice(CATEGORIES))
    half = np.array([1, rng.uniform(0.6, 1)])[:: rng.choice([1, -1])] * side / 2
    x, y = rng.uniform(0.8 * half, size - 0.8 * half)
    return _Shape(name, (x, y), (half[0], half[1]))


def _extent(mask: NDArray[np.bool_]) -> list[float]:
    """Return (x, y, width, height) in px of the smallest box around the true pixels (H, W)."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = float(columns[0]), float(rows[0])
    return [x, y, float(columns[-1]) + 1 - x, float(rows[-1]) + 1 - y]
