"""Image files: which they are, their sizes and their pixels, upright and in RGB.

Shapes: H, W = height and width in px, after the turn that a file's EXIF orientation asks for.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from gfl.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
import hashlib
import logging
from functools import cache
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""Of these files, as Pillow calls them: it knows many more, some with faults of their own."""

DECODER_VERSION = 2
"""To be raised whenever `read_image` gives other pixels of the same file, or lays them out anew."""


def list_images(folder: Path) -> list[Path]:
    """Return the image files in `folder`, sorted by name.

    Raises:
        DataError: it holds none.
    """
    found = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise DataError(f"{folder}: no images; expected files {', '.join(sorted(IMAGE_SUFFIXES))}")
    return sorted(found)


def read_image(path: Path) -> "Tensor":
    """Return the RGB pixels (3, H, W), uint8, of an image file.

    Transparency is dropped; 16 bits of grey are scaled to 8, not clipped. In memory the channels of
    a pixel stay together, as decoders leave them: resizing is three times as fast that way.

    Raises:
        DataError: a file that is missing or no image.
    """
    with _opened(path) as image:
        pixels = _rgb(_upright(image))
    return _tensor(pixels)


def pixels_of(image: bytes | Image.Image) -> "Tensor":
    """Return the RGB pixels (3, H, W), uint8, of an image file's content or of a PIL image.

    Raises:
        DataError: it is no image.
    """
    if isinstance(image, bytes):
        with _opened(BytesIO(image)) as opened:
            pixels = _rgb(_upright(opened))
    else:
        pixels = _rgb(_upright(image))
    return _tensor(pixels)


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) of an image file, from its header alone.

    Raises:
        DataError: a file that is missing or no image.
    """
    with _opened(path) as image:
        width, height = image.size
        return (width, height) if _swaps_sides(image) else (height, width)


def is_on_its_side(path: Path) -> bool:
    """Return whether an image's EXIF orientation swaps the sides of the stored pixels.

    Raises:
        DataError: a file that is missing or no image.
    """
    with _opened(path) as image:
        return _swaps_sides(image)


@contextmanager
def _opened(path: Path | BytesIO) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Exception as error:  # whatever Pillow makes of a damaged or hostile file
        name = path if isinstance(path, Path) else f"{len(path.getbuffer())} bytes"
        reason = re.sub(r" ?<_io.BytesIO[^>]*>", "", str(error).partition("\n")[0])
        raise DataError(
            f"{name}: cannot be read as an image ({reason}); replace or remove it"
        ) from error


def _orientation(image: Image.Image) -> int:
    # Of the header alone, in `image_size` as in `read_image`: a PNG's own `getexif` would decode
    # all of its pixels to look behind them.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _swaps_sides(image: Image.Image) -> bool:
    # Pillow gives a TIFF's size as after its turn already.
    return _orientation(image) in range(5, 9) and image.format != "TIFF"


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    # Pillow has parsed it by now; left here, it would be written anew, which fails on damaged ones.
    image.info.pop("exif", None)
    return ImageOps.exif_transpose(image)


def _tensor(pixels: NDArray[np.uint8]) -> "Tensor":
    import torch  # late, for who only wants sizes

    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return pixels (H, W, 3)."""
    if image.mode[0] in "IF":  # wider than 8 bits, where Pillow's own conversion clips
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError("neither 8 nor 16 bits a pixel, so that its white is unknown")
        narrow = np.round(grey / 257).astype(np.uint8)  # 65535 becomes 255
        return np.repeat(narrow[:, :, None], 3, axis=2)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow wants this detour for some palettes
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


logger = logging.getLogger(__name__)


def read_cached(path: Path, folder: Path) -> Tensor:
    """Return `read_image(path)`, from `folder` if it was decoded before; keep it there if not.

    An entry belongs to a file's absolute path, time of change and size in bytes. Processes may read
    and write at once: an entry appears complete, or not at all.

    Raises:
        DataError: a file that is missing or no image.
    """
    try:
        status = path.stat()
    except OSError:
        return read_image(path)  # says what is wrong
    key = f"{DECODER_VERSION} {path.absolute()} {status.st_mtime_ns} {status.st_size}"
    name = hashlib.sha256(key.encode()).hexdigest()
    entry = folder / name[:2] / f"{name}.npy"  # no folder of a hundred thousand files
    pixels = _load(entry)
    if pixels is None:
        pixels = read_image(path)
        _keep(pixels, entry, folder)
    return pixels


def _load(entry: Path) -> Tensor | None:
    """Return the pixels of an entry, None where there is none or it is damaged."""
    if not entry.exists():
        return None
    try:
        pixels = np.load(entry, allow_pickle=False)
        if (pixels.dtype, pixels.ndim, pixels.shape[-1]) == (np.uint8, 3, 3):
            return torch.from_numpy(pixels).permute(2, 0, 1)
    except Exception:  # a damaged header makes numpy raise whatever its parsers meet
        logger.debug("%s: damaged", entry, exc_info=True)
    return None


def _keep(pixels: Tensor, entry: Path, folder: Path) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=entry.parent) as scratch:
            whole = Path(scratch) / entry.name
            np.save(whole, pixels.permute(1, 2, 0).numpy())
            whole.replace(entry)
    except OSError as error:
        _warn(folder, error.strerror)


@cache
def _warn(folder: Path, reason: str) -> None:
    """Say once that images are not kept; training goes on without."""
    logger.warning("data.cache: %s: cannot keep decoded images (%s)", folder, reason)
