"""What VOC and YOLO share: a folder with a file of annotations for every image."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gfl.data.errors import DataError


class Object(NamedTuple):
    """An object of class `label` (0..C-1), with COCO's box: `xywh` in px."""

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
        DataError: there is no such folder, or no such file in it.
    """
    advice = "set data.train.annotations and data.val.annotations, or data.format"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one of {suffix} files; {advice}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == suffix)
    if not files:
        raise DataError(f"{folder}: no {suffix} file in it; {advice}")
    return {file: file.read_bytes() for file in files}


def digest(files: Mapping[Path, bytes]) -> str:
    """Return the SHA-256 of names and contents."""
    total = hashlib.sha256()
    for file, content in files.items():
        total.update(f"{file.name}\n{len(content)}\n".encode() + content)
    return total.hexdigest()


def coco_dictionary(images: Iterable[AnnotatedImage], classes: Sequence[str]) -> dict[str, Any]:
    """Return `images` as COCO has them; every id counts from 1.

    Difficult objects become crowds, which are not trained on and which evaluation ignores: neither
    they nor detections of them count, as in VOC's own evaluation (VOCevaldet.m of its devkit). One
    thing differs: COCO measures overlap with a crowd relative to the detection alone.
    """
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (file_name, (height, width), objects) in enumerate(images, start=1):
        records.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for label, bbox, difficult in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": int(difficult),
                    "difficult": int(difficult),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    return {"images": records, "annotations": annotations, "categories": categories}
