"""A synthetic set to learn from in minutes: rectangles, ellipses and triangles in COCO format.

    folder = render(Path("data/shapes/train"), count=2000, size=128, seed=0)

Later shapes are painted over earlier ones. Boxes and areas are those of the *visible* pixels: an
edge hidden behind another shape is nowhere in the image, so no detector could learn to place it.
Everything painted is annotated: a shape that would hide too much of an earlier one is moved or
left out. A shape may hang over the border by a tenth of its box. Backgrounds are muted, shapes are
saturated. Each category has its own range of hues: a few hundred training steps are to suffice, so
that AP here says more of boxes than of telling forms apart.

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
    """Render the synthetic set that `data.shapes` asks for, if any, unless it is there already."""
    wanted = config.data.shapes
    if wanted is not None:
        folder = Path(wanted.folder)
        # Held-out images come from another seed.
        render(folder / "train", count=wanted.train, size=wanted.size, seed=2 * wanted.seed)
        render(folder / "val", count=wanted.val, size=wanted.size, seed=2 * wanted.seed + 1)


RENDERER_VERSION = 1
"""To be raised whenever the same parameters would give other pixels or annotations."""

CATEGORIES = ("rectangle", "ellipse", "triangle")
"""Category names; the COCO id is the position plus one."""

MIN_IMAGE_SIZE = 32

MIN_SIDE_PX = 8.0
"""Least longer side of a shape's box, before occlusion."""

MAX_SIDE_SHARE = 0.85
"""Greatest longer side of a shape's box, as a share of the image's side."""

MIN_VISIBLE = 0.7
"""Least share of a shape's area that stays visible: with less, its class is a guess."""

HUE_SPREAD = 0.3
"""How far a shape's hue strays from its category's, in units of the distance between categories."""

_MAX_SHAPES = 8

_EMPTY_SHARE = 0.04

_MEAN_SHARE = 0.25

_ANY_SIZE_SHARE = 0.1

_PLACEMENTS = 4

_NOISE_STD = 4.0

_JPEG_QUALITY = 92

_AREAS = {"rectangle": 4.0, "ellipse": math.pi, "triangle": 2.0}

_logger = logging.getLogger(__name__)


def render(folder: Path, *, count: int, size: int, seed: int) -> Path:
    """Render a set into `folder`, unless it is there already, and return `folder`.

    Writes `images/000000.jpg` ... and `annotations.json`. An image depends on (seed, index, size)
    only, not on `count`. Processes may call it at once: the set appears complete, or not at all.

    Args:
        folder: Where the set goes; absent, empty, or holding the same set.
        count: Number of images, at least 1.
        size: Side of the square images in px, at least `MIN_IMAGE_SIZE`.
        seed: Non-negative; give training and validation sets different ones.

    Raises:
        ValueError: If a parameter is out of range, or `folder` holds anything else than this set.
    """
    if count < 1 or size < MIN_IMAGE_SIZE or seed < 0:
        raise ValueError(
            f"cannot render shapes with count={count}, size={size}, seed={seed}: "
            f"use count >= 1, size >= {MIN_IMAGE_SIZE} and seed >= 0"
        )
    wanted = {"count": count, "size": size, "seed": seed, "renderer_version": RENDERER_VERSION}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _verify(folder, wanted)
        return folder
    _logger.info("rendering %d images of %d px into %s", count, size, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        # One level down, because a temporary directory itself is closed to other users.
        ours = Path(scratch) / folder.name
        _write_set(ours, wanted)
        try:
            ours.rename(folder)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
            _verify(folder, wanted)  # Another process was faster.
    return folder


def _verify(folder: Path, wanted: dict[str, int]) -> None:
    try:
        info = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))["info"]
        found = {key: info[key] for key in wanted}
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        there = "something that is no set of shapes"
    else:
        if found == wanted:
            return
        there = f"shapes with {_as_text(found)}"
    raise ValueError(
        f"{folder} holds {there}, but shapes with {_as_text(wanted)} were asked for: "
        "choose another folder, delete this one, or ask for what it holds"
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
        # Without chroma subsampling: colour is what tells a shape's edge, to the pixel.
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
    """An upright shape: its centre and half its box, (x, y) in px each."""

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
    # Few crowded images, and an image now and then with nothing in it.
    wanted = 0 if rng.random() < _EMPTY_SHARE else 1 + rng.binomial(_MAX_SHAPES - 1, _MEAN_SHARE)
    for _ in range(wanted):
        # On a logarithmic scale: mostly large, and some of every size.
        exponent = rng.random() ** (1 if rng.random() < _ANY_SIZE_SHARE else 1 / 4)
        side = MIN_SIDE_PX * (MAX_SIDE_SHARE * size / MIN_SIDE_PX) ** exponent
        for _ in range(_PLACEMENTS):
            shape = _random_shape(rng, size, side)
            mask = shape.mask(size)
            covered = {shapes[index].name for index in np.unique(owner[mask]) if index >= 0}
            painted = np.where(mask, len(shapes), owner)
            visible = np.bincount(painted.ravel() + 1, minlength=len(shapes) + 2)[1:]
            areas = [other.area for other in (*shapes, shape)]
            # Two of a category have like colours: no edge would show between them.
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
