"""COCO annotations: read, checked and reduced to what training needs.

The checks answer what otherwise fails hours later or trains silently: files that are not there,
categories that do not fit the model, boxes that no detector can learn.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfl.config import SplitConfig

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 32
"""Images with a shorter side, in px, are not trained on (the reference's value)."""

FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
"""What every entry of a COCO file has."""


class DataError(ValueError):
    """A dataset that cannot be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class ImageRecord:
    """An image and its objects.

    Attributes:
        image_id: The id in the annotation file.
        path: The image file.
        size: (height, width) in px.
        boxes: `xyxy` in px, (G, 4), as annotated: not clipped to the image.
        labels: Classes 0..C-1, (G,), in the order of category ids.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class CocoSplit:
    """A checked set of images.

    Attributes:
        records: Every image that takes part.
        classes: Class names; the index is the label.
        category_ids: The annotation file's id of every class.
        dropped: How many boxes and images do not take part, by reason.
        annotations: The COCO JSON file.
        digest: SHA-256 of the annotation file.
    """

    records: list[ImageRecord]
    classes: list[str]
    category_ids: list[int]
    dropped: dict[str, int]
    annotations: Path
    digest: str


def read_coco(split: SplitConfig, num_classes: int, *, training: bool) -> CocoSplit:
    """Read and check COCO annotations.

    Args:
        split: Where images and annotations are.
        num_classes: What the model was built for.
        training: Leave out what is not trained on: crowd and degenerate boxes, images without
            annotations or with a side under `SMALLEST_SIDE`. Evaluation takes every image.

    Raises:
        DataError: see the class.
    """
    path = Path(split.annotations)
    content, digest = _read_json(path)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    if len(categories) != num_classes:
        raise DataError(
            f"{path}: has {len(categories)} categories, but model.num_classes is {num_classes}; "
            f"set model.num_classes={len(categories)}"
        )
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    by_image = _group(path, content, label_of)
    _require_files(Path(split.images), [image["file_name"] for image in content["images"]])
    dropped: Counter[str] = Counter()
    records = []
    for image in content["images"]:
        annotations = by_image[image["id"]]
        height, width = image["height"], image["width"]
        if training and (reason := _unfit(annotations, height, width)):
            dropped[reason] += 1
            continue
        kept = [a for a in annotations if not (reason := _untrainable(a, height, width))
                or dropped.update([reason])]  # fmt: skip
        records.append(
            ImageRecord(
                image_id=image["id"],
                path=Path(split.images) / image["file_name"],
                size=(height, width),
                boxes=_xyxy([annotation["bbox"] for annotation in kept]),
                labels=torch.tensor([label_of[a["category_id"]] for a in kept], dtype=torch.long),
            )
        )
    if not records:
        raise DataError(
            f"{path}: no image to {'train on' if training else 'evaluate'} ({dict(dropped)})"
        )
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        logger.info("%s: %d images; left out: %s", path, len(records), reasons)
    names = [category["name"] for category in categories]
    return CocoSplit(records, names, list(label_of), dict(dropped), path, digest)


def require_same_classes(
    one: str, classes: Sequence[str], other: str, others: Sequence[str]
) -> None:
    """Refuse two lists of classes that give a label two meanings; `one` and `other` name them.

    Raises:
        DataError: names the first class that differs.
    """
    for label, (name, other_name) in enumerate(zip_longest(classes, others)):
        if name != other_name:
            raise DataError(
                f"{other}: class {label} is '{other_name}', but '{name}' in {one}; give both the "
                "same categories in the order of their ids"
            )


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: annotations cannot be read ({error.strerror}); set data.train.annotations "
            "and data.val.annotations to COCO JSON files"
        ) from error
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    for section in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise DataError(f"{path}: no list '{section}'; expected COCO JSON")
    if not content["images"]:
        raise DataError(f"{path}: lists no image")
    _require_complete(path, content)
    return content, hashlib.sha256(raw).hexdigest()


def _group(
    path: Path, content: Mapping[str, Any], label_of: Mapping[int, int]
) -> dict[int, list[dict[str, Any]]]:
    """Return the annotations of every image."""
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        what = f"{path}: annotation {annotation['id']}"
        if annotation["image_id"] not in by_image:
            raise DataError(
                f"{what} belongs to image {annotation['image_id']}, "
                "which is not listed; list it or remove the annotation"
            )
        if annotation["category_id"] not in label_of:
            raise DataError(
                f"{what} has category {annotation['category_id']}, "
                f"but the categories are {sorted(label_of)}; correct the id or add the category"
            )
        box = annotation["bbox"]
        numbers = isinstance(box, list) and all(isinstance(side, int | float) for side in box)
        if not numbers or len(box) != 4:
            raise DataError(f"{what}: bbox: expected [x, y, width, height] in px, got {box!r}")
        by_image[annotation["image_id"]].append(annotation)
    return by_image


def _require_complete(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse entries that lack a field, and ids that are used twice."""
    for section, wanted in FIELDS.items():
        for entry in content[section]:
            absent = [name for name in wanted if not isinstance(entry, dict) or name not in entry]
            if absent:
                shown = str(entry)[:80]
                raise DataError(f"{path}: {section}: {shown} has no '{absent[0]}'; add it")
        ids = Counter(entry["id"] for entry in content[section])
        if ids and (twice := ids.most_common(1)[0])[1] > 1:
            raise DataError(
                f"{path}: {section}: id {twice[0]} is used {twice[1]} times; ids name one"
            )


def _require_files(folder: Path, names: Iterable[str]) -> None:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder of images; set data.train.images and data.val.images"
        )
    present = {path.name for path in folder.iterdir()}
    absent = [name for name in names if name not in present and not (folder / name).is_file()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(
            f"{folder / absent[0]}: annotated image is missing{more}; complete the folder or "
            "remove it from the annotations"
        )


def _unfit(annotations: list[dict[str, Any]], height: int, width: int) -> str | None:
    """Return why an image is not trained on, if so."""
    if not annotations:
        return "images without annotations"
    if min(height, width) < SMALLEST_SIDE:
        return f"images with a side under {SMALLEST_SIDE} px"
    return None


def _untrainable(annotation: Mapping[str, Any], height: int, width: int) -> str | None:
    """Return why a box is not trained on, if so (the reference's rules)."""
    if annotation.get("iscrowd", 0):
        return "crowd boxes"
    x, y, w, h = annotation["bbox"]
    visible_width = min(x + w, width) - max(x, 0)
    visible_height = min(y + h, height) - max(y, 0)
    if not all(map(isfinite, (x, y, w, h))):
        return "boxes with NaN or infinity"
    area = annotation.get("area")
    if w < 1 or h < 1 or (area is not None and area <= 0):
        return "degenerate boxes"
    if visible_width <= 0 or visible_height <= 0:
        return "boxes outside of their image"
    return None


def _xyxy(xywh: list[list[float]]) -> Tensor:
    boxes = torch.tensor(xywh, dtype=torch.float32).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
