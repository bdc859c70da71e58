"""A set of annotated images: read, checked and reduced to what training needs.

Every format becomes COCO's dictionary first. The checks find problems that would otherwise fail
hours later or spoil a training silently: missing files, classes that do not fit the model, boxes
that no detector can learn.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gfl.config.schema import Config, DataConfig, SplitConfig
from gfl.data.formats import find_classes, read_coco, read_voc, read_yolo
from gfl.data.synthetic import render_shapes
from gfl.errors import DataError

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 32
"""Smallest side in px of an image that training uses (the reference's value)."""


@dataclass(frozen=True)
class ImageRecord:
    """An image and its objects.

    Attributes:
        image_id: The id in the annotation file.
        path: The image file.
        size: (height, width) in px.
        boxes: `xyxy` in px, (G, 4), float32, as annotated: not clipped to the image.
        labels: Classes 0..C-1, (G,), int64, in the order of category ids.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """A checked set of images.

    Attributes:
        records: Every image that takes part.
        classes: Class names; the index is the label.
        category_ids: COCO's id of every class.
        dropped: Number of boxes and images that do not take part, by reason.
        annotations: The COCO JSON file, or the folder of annotation files.
        digest: SHA-256 of the annotations.
        truth: Ground truth that average precision is measured against: a COCO JSON file, or the
            content of one where the annotations have another format.
    """

    records: list[ImageRecord]
    classes: list[str]
    category_ids: list[int]
    dropped: dict[str, int]
    annotations: Path
    digest: str
    truth: Path | dict[str, Any]


def read_split(
    data: DataConfig,
    which: Literal["train", "val"],
    num_classes: int,
    classes: Sequence[str] | None = None,
) -> Split:
    """Read and check the training or the evaluation set.

    The training set leaves out crowd, difficult and degenerate boxes, and images without
    annotations or with a side under `SMALLEST_SIDE`. The evaluation set keeps every image.

    Args:
        data: Places and format of images and annotations.
        which: The set to read.
        num_classes: Number of classes of the model.
        classes: Names in the order of labels, used where neither the annotations nor
            `data.classes` define them.

    Raises:
        DataError: The set cannot be used.
    """
    section = data.train if which == "train" else data.val
    path, folder = Path(section.annotations), Path(section.images)
    content, digest = _read(data, section, classes)
    names, label_of = _classes(path, content, num_classes, data.classes)
    by_image = _group(path, content, label_of)
    _require_files(folder, [image["file_name"] for image in content["images"]])
    training = which == "train"
    records, dropped = _records(content["images"], by_image, label_of, folder, training=training)
    if not records:
        raise DataError(f"{path}: no image to {'train on' if training else 'evaluate'} ({dropped})")
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        logger.info("%s: %d images; left out: %s", path, len(records), reasons)
    truth = path if data.format == "coco" else content
    return Split(records, names, list(label_of), dropped, path, digest, truth)


def digest_images(split: Split) -> str:
    """Return the SHA-256 of the image files' content, which takes seconds for some thousand."""
    total = hashlib.sha256()
    for record in split.records:
        with record.path.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _read(
    data: DataConfig, section: SplitConfig, classes: Sequence[str] | None
) -> tuple[dict[str, Any], str]:
    """Return the annotations as COCO's dictionary, and their SHA-256."""
    if not Path(section.images).is_dir():
        raise DataError(
            f"{section.images}: no such folder of images; set data.train.images and data.val.images"
        )
    match data.format:
        case "coco":
            return read_coco(Path(section.annotations))
        case "voc":
            return read_voc(section, data.classes or classes)
        case "yolo":
            names = data.classes or find_classes(Path(section.annotations)) or classes
            return read_yolo(section, names)


def require_same_classes(
    one: str, classes: Sequence[str], other: str, others: Sequence[str]
) -> None:
    """Check that two lists of classes give every label the same name.

    Args:
        one: What error messages call the first list.
        classes: The first list.
        other: What error messages call the second list.
        others: The second list.

    Raises:
        DataError: The lists differ; the message has the first class that does.
    """
    for label, (name, other_name) in enumerate(zip_longest(classes, others)):
        if name != other_name:
            raise DataError(
                f"{other}: class {label} is '{other_name}', but '{name}' in {one}; give both the "
                "same categories in the order of their ids"
            )


def _classes(
    path: Path, content: Mapping[str, Any], num_classes: int, required: Sequence[str] | None
) -> tuple[list[str], dict[int, int]]:
    """Return the class names in the order of labels, and the label of every category id."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    if len(categories) != num_classes:
        raise DataError(
            f"{path}: has {len(categories)} categories, but model.num_classes is {num_classes}; "
            f"set model.num_classes={len(categories)}"
        )
    names = [category["name"] for category in categories]
    if required is not None:
        require_same_classes("data.classes", required, str(path), names)
    return names, {category["id"]: label for label, category in enumerate(categories)}


def _group(
    path: Path, content: Mapping[str, Any], label_of: Mapping[int, int]
) -> dict[int, list[dict[str, Any]]]:
    """Return the annotations of every image, by image id."""
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        what = f"{path}: annotation {annotation['id']}"
        if annotation["image_id"] not in by_image:
            raise DataError(
                f"{what} belongs to image {annotation['image_id']!r}, "
                "which is not listed; list it or remove the annotation"
            )
        if annotation["category_id"] not in label_of:
            raise DataError(
                f"{what} has category {annotation['category_id']!r}, "
                f"but the categories are {sorted(label_of)}; correct the id or add the category"
            )
        box = annotation["bbox"]
        is_numeric = isinstance(box, list) and all(isinstance(side, int | float) for side in box)
        if not is_numeric or len(box) != 4:
            raise DataError(
                f"{what}: bbox: got {box!r}; expected [x, y, width, height] in px; correct it"
            )
        by_image[annotation["image_id"]].append(annotation)
    return by_image


def _require_files(folder: Path, names: Iterable[str]) -> None:
    present = {path.name for path in folder.iterdir()}
    absent = [name for name in names if name not in present and not (folder / name).is_file()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(
            f"{folder / absent[0]}: annotated image is missing{more}; complete the folder or "
            "remove it from the annotations"
        )


def _records(
    images: list[dict[str, Any]],
    by_image: Mapping[int, list[dict[str, Any]]],
    label_of: Mapping[int, int],
    folder: Path,
    *,
    training: bool,
) -> tuple[list[ImageRecord], dict[str, int]]:
    """Return the images that take part, and the number of images and boxes left out, by reason."""
    dropped: Counter[str] = Counter()
    records = []
    for image in images:
        annotations = by_image[image["id"]]
        height, width = image["height"], image["width"]
        unfit = _unfit(annotations, height, width) if training else None
        if unfit is not None:
            dropped[unfit] += 1
            continue
        reasons = [_untrainable(annotation, height, width) for annotation in annotations]
        dropped.update(reason for reason in reasons if reason)
        kept = [
            annotation
            for annotation, reason in zip(annotations, reasons, strict=True)
            if reason is None
        ]
        records.append(
            ImageRecord(
                image_id=image["id"],
                path=folder / image["file_name"],
                size=(height, width),
                boxes=_xyxy([annotation["bbox"] for annotation in kept]),
                labels=np.array([label_of[a["category_id"]] for a in kept], dtype=np.int64),
            )
        )
    return records, dict(dropped)


def _unfit(annotations: list[dict[str, Any]], height: int, width: int) -> str | None:
    """Return why training leaves an image out; None if it does not."""
    if not annotations:
        return "images without annotations"
    if min(height, width) < SMALLEST_SIDE:
        return f"images with a side under {SMALLEST_SIDE} px"
    return None


def _untrainable(annotation: Mapping[str, Any], height: int, width: int) -> str | None:
    """Return why training leaves a box out (the reference's rules); None if it does not."""
    if annotation.get("iscrowd", 0):
        return "difficult boxes" if annotation.get("difficult", 0) else "crowd boxes"
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


def _xyxy(xywh: list[list[float]]) -> npt.NDArray[np.float32]:
    boxes = np.array(xywh, dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def load_splits(config: Config) -> tuple[Split, Split]:
    """Return the checked training and evaluation sets of `config`.

    Raises:
        DataError: A set cannot be used.
    """
    render_shapes(config)
    data, count = config.data, config.model.num_classes
    train = read_split(data, "train", count)
    val = read_split(data, "val", count, train.classes)
    require_same_classes(str(train.annotations), train.classes, str(val.annotations), val.classes)
    if not any(len(record.labels) for record in val.records):
        raise DataError(f"{val.annotations}: no annotations; evaluate on images that have some")
    return train, val
