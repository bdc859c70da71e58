"""Image files: their names, sizes and pixels, upright and in RGB, and a cache of decoded pixels.

Shapes: H, W = height and width in px, after the rotation that a file's EXIF orientation asks for.
"""

import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from gfl.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"})

KNOWN_SUFFIXES = IMAGE_SUFFIXES | {".heic", ".heif", ".avif", ".gif", ".jp2", ".dng"}
"""Suffixes of image files, read or not; other dots in a name belong to it."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""Pillow's names of the formats of these files; its decoders of other formats are less safe."""

DECODER_VERSION = 2
"""Version of `read_image`: raise it whenever the pixels of a file or their layout change."""


def list_images(folder: Path) -> list[Path]:
    """Return the image files in `folder`, sorted by name.

    Raises:
        DataError: There is none.
    """
    images = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DataError(f"{folder}: no images; expected files {', '.join(sorted(IMAGE_SUFFIXES))}")
    return sorted(images)


class FileNames:
    """The files of a folder, by the names that annotation tools give them.

    macOS writes names decomposed (NFD), most tools composed (NFC); here they are the same. A name
    in another case or with another suffix is another name, but a hint.
    """

    def __init__(self, folder: Path) -> None:
        """List `folder`, which may not exist."""
        self.folder = folder
        entries = os.scandir(folder) if folder.is_dir() else ()
        self._names = {entry.name for entry in entries if entry.is_file()}

    def get(self, name: str) -> str | None:
        """Return the file called `name` as the folder spells it; None if there is none."""
        return name if name in self._names else self._by_composed_name.get(composed(name))

    def hint(self, name: str) -> str:
        """Return what is there in place of `name`, and what to do about it."""
        name = composed(name).casefold()
        stem = PurePath(name).stem if PurePath(name).suffix in KNOWN_SUFFIXES else name
        for composed_name, other in sorted(self._by_composed_name.items()):
            folded = PurePath(composed_name.casefold())
            if folded.name == name:
                return f"'{other}' is there: the names differ in case; rename one of them"
            if folded.stem == stem and folded.suffix in IMAGE_SUFFIXES:
                return f"'{other}' is there; correct the name"
            if folded.stem == stem:
                return f"'{other}' is there, but this format is not read; convert it to JPEG or PNG"
        return "add the image or remove its annotations"

    @cached_property
    def _by_composed_name(self) -> dict[str, str]:
        return {composed(name): name for name in self._names}


def composed(name: str) -> str:
    """Return `name` in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


class ImageFolder:
    """A folder of images, in which the images of an annotation file are looked up.

    Folders are listed once, because asking for 100 000 files one by one takes seconds.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._listed: dict[str, FileNames] = {}

    def find(self, name: str) -> str:
        r"""Return the path of the image `name`; tools on Windows separate folders by `\`.

        Args:
            name: Name in the annotations, which may begin with names of folders.

        Raises:
            DataError: The name leads out of the folder, or there is no such file.
        """
        head, tail = os.path.split(name)
        if head not in self._listed:
            self._listed[head] = FileNames(self._within(head, name))
        names = self._listed[head]
        found = names.get(tail)
        if found is None and "\\" in name:
            return self.find(name.replace("\\", "/"))
        if found is None:
            raise DataError(
                f"{names.folder / tail}: annotated image is missing; {names.hint(tail)}"
            )
        return os.path.join(self._folder, head, found)  # noqa: PTH118 - Path is ten times as slow

    def _within(self, head: str, name: str) -> Path:
        """Return the folder `head` of the image `name`."""
        folder = Path(self._folder, head)
        if not Path(os.path.normpath(folder)).is_relative_to(os.path.normpath(self._folder)):
            raise DataError(
                f"image {name!r} leads out of {self._folder}; expected a name within this folder; "
                "correct it"
            )
        return folder


def read_image(path: Path) -> Tensor:
    """Return the RGB pixels (3, H, W), uint8, of an image file.

    Transparency is dropped; 16 bits of grey are scaled to 8, not clipped. In memory the channels of
    a pixel stay together, as decoders leave them, because that makes resizing three times as fast.

    Raises:
        DataError: The file is missing or is no image.
    """
    with _opened(path) as image:
        pixels = _rgb(_upright(image))
    return _tensor(pixels)


def pixels_of(image: bytes | Image.Image) -> Tensor:
    """Return the RGB pixels (3, H, W), uint8, of an image file's content or of a PIL image.

    Raises:
        DataError: The content is no image.
    """
    if isinstance(image, bytes):
        with _opened(BytesIO(image)) as opened:
            pixels = _rgb(_upright(opened))
    else:
        pixels = _rgb(_upright(image))
    return _tensor(pixels)


def image_size(file: Path | bytes) -> tuple[int, int]:
    """Return (H, W) of an image file, or of the content of one; only its header is read.

    Raises:
        DataError: The file is missing or is no image.
    """
    with _opened(BytesIO(file) if isinstance(file, bytes) else file) as image:
        width, height = image.size
        return (width, height) if _swaps_sides(image) else (height, width)


def is_on_its_side(path: Path) -> bool:
    """Return whether an image's EXIF orientation swaps the sides of the stored pixels.

    Raises:
        DataError: The file is missing or is no image.
    """
    with _opened(path) as image:
        return _swaps_sides(image)


@contextmanager
def _opened(path: Path | BytesIO) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Exception as error:  # a damaged or hostile file makes Pillow raise anything
        name = path if isinstance(path, Path) else f"{len(path.getbuffer())} bytes"
        reason = re.sub(r" ?<_io.BytesIO[^>]*>", "", str(error).partition("\n")[0])
        raise DataError(
            f"{name}: cannot be read as an image ({reason}); replace or remove it"
        ) from error


def _orientation(image: Image.Image) -> int:
    # The base class reads the header alone; a PNG's own `getexif` would decode all pixels to look
    # for metadata behind them.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _swaps_sides(image: Image.Image) -> bool:
    # Pillow already returns a TIFF's size after the rotation.
    return _orientation(image) in range(5, 9) and image.format != "TIFF"


def _upright(image: Image.Image) -> Image.Image:
    if _orientation(image) == 1:
        return image
    # Pillow has parsed the EXIF data by now. If left here, `exif_transpose` would write it again,
    # which fails where it is damaged.
    image.info.pop("exif", None)
    return ImageOps.exif_transpose(image)


def _tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Return pixels (H, W, 3) as a tensor (3, H, W)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the RGB pixels (H, W, 3) of an image of any mode."""
    if image.mode[0] in "IF":  # wider than 8 bits, where Pillow's own conversion clips
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError("neither 8 nor 16 bits a pixel, so its white level is unknown")
        wide = grey.astype(np.int32)
        wide += 128  # in place, because an image of 50 megapixels has 200 MB
        wide //= 257  # rounded to the nearest: 65535 becomes 255
        return np.repeat(wide.astype(np.uint8)[:, :, None], 3, axis=2)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # some palettes convert to RGB only via RGBA
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_cached(path: Path, folder: Path, *, mapped: bool = False) -> Tensor:
    """Return `read_image(path)`; decoded pixels are kept in `folder` and read from there next time.

    The key of an entry is the file's absolute path, modification time and size in bytes. Several
    processes may read and write at the same time: an entry appears complete or not at all.

    Args:
        path: The image file.
        folder: The cache.
        mapped: Whether to map the entry into memory, so that only pixels that are used are read.

    Raises:
        DataError: The file is missing or is no image.
    """
    try:
        status = path.stat()
    except OSError:
        return read_image(path)  # raises an error that says what is wrong
    key = f"{DECODER_VERSION} {path.absolute()} {status.st_mtime_ns} {status.st_size}"
    name = hashlib.sha256(key.encode()).hexdigest()
    entry = folder / name[:2] / f"{name}.npy"  # subfolders, because one would grow too large
    pixels = _load(entry, mapped=mapped)
    if pixels is None:
        pixels = read_image(path)
        _keep(pixels, entry, folder)
    return pixels


def _load(entry: Path, *, mapped: bool) -> Tensor | None:
    """Return the pixels of an entry; None where there is no entry or it is damaged."""
    if not entry.exists():
        return None
    try:
        # Mapped pixels can be changed like others: "c" copies what is written to.
        pixels = np.load(entry, "c" if mapped else None, allow_pickle=False)
        if (pixels.dtype, pixels.ndim, pixels.shape[-1]) == (np.uint8, 3, 3):
            return torch.from_numpy(pixels).permute(2, 0, 1)
    except Exception:  # a damaged header makes numpy's parsers raise anything
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
    """Warn once that decoded images are not kept; training continues without the cache."""
    logger.warning("data.cache: %s: cannot keep decoded images (%s)", folder, reason)
