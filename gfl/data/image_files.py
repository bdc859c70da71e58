"""Annotations in one file an image, as VOC and YOLO have them, and what both share."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gfl.data.annotations import OBJECT, Annotations
from gfl.errors import DataError


class Object(NamedTuple):
    """An object of class `label` (0..C-1) with its box as in COCO: `xywh` in px."""

    label: int
    bbox: list[float]
    difficult: bool = False


class AnnotatedImage(NamedTuple):
    """An image file, its (height, width) in px, and its objects."""

    file_name: str
    size: tuple[int, int]
    objects: list[Object]


def read_files(folder: Path, suffix: str) -> dict[Path, bytes]:
    """Return the content of every file in `folder` that ends in `suffix`, sorted by name.

    Raises:
        DataError: There is no such folder, or no such file in it.
    """
    advice = "set data.train.annotations and data.val.annotations, or data.format"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a folder of {suffix} files; {advice}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == suffix)
    if not files:
        raise DataError(f"{folder}: no {suffix} file in this folder; {advice}")
    return {file: file.read_bytes() for file in files}


def digest_files(files: Mapping[Path, bytes]) -> str:
    """Return the SHA-256 of the files' names and contents."""
    total = hashlib.sha256()
    for file, content in files.items():
        total.update(f"{file.name}\n{len(content)}\n".encode() + content)
    return total.hexdigest()


def annotations_of_images(
    images: Sequence[AnnotatedImage], classes: Sequence[str], digest: str
) -> Annotations:
    """Return `images` with ids that count from 1, and areas of boxes.

    Difficult objects are ignored like crowds: neither they nor detections of them count, as in
    VOC's own evaluation (VOCevaldet.m of its devkit). The one difference is that COCO measures the
    overlap with a crowd relative to the detection alone.
    """
    objects = [
        (number, label, bbox, bbox[2] * bbox[3], int(difficult))
        for number, image in enumerate(images)
        for label, bbox, difficult in image.objects
    ]
    return Annotations(
        image_ids=list(range(1, len(images) + 1)),
        file_names=[image.file_name for image in images],
        sizes=np.array([image.size for image in images]),
        categories=list(enumerate(classes, start=1)),
        objects=np.array(objects, dtype=OBJECT),
        digest=digest,
    )


def decode_text(file: Path, content: bytes) -> str:
    """Return the content of a text file.

    Raises:
        DataError: The content is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from error
