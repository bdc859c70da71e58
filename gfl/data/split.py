"""A set of annotated images: read, checked and reduced to what training needs.

Every format becomes COCO's dictionary first. The checks find problems that would otherwise fail
hours later or spoil a training silently: missing files, classes that do not fit the model, boxes
that no detector can learn.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gfl.config.schema import Config, DataConfig, SplitConfig
from gfl.data.formats import (
    Faults,
    find_classes,
    is_ignored,
    read_coco,
    read_voc,
    read_yolo,
)
from gfl.data.images import FileNames, image_file, image_size
from gfl.data.synthetic import render_shapes
from gfl.errors import DataError
from gfl.structures import Id

logger = logging.getLogger(__name__)

RAREST = 8
"""Number of categories that a message lists, those with the fewest boxes first."""

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

    image_id: Id
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
    category_ids: list[Id]
    dropped: dict[str, int]
    annotations: Path
    digest: str
    truth: Path | dict[str, Any]

    @property
    def image_ids(self) -> list[Id]:
        """Id of every image, in the order of the records."""
        return [record.image_id for record in self.records]

    @cached_property
    def numbers(self) -> list[int]:
        """Number of every image, in the order of the records: the place of its id in their order.

        `gfl.structures.Rows` and the evaluation use numbers, which unlike ids are always exact.
        """
        ids = self.image_ids
        number_of = {identity: number for number, identity in enumerate(sorted(ids))}
        return [number_of[identity] for identity in ids]


def read_split(
    data: DataConfig,
    which: Literal["train", "val"],
    num_classes: int,
    classes: Sequence[str] | None = None,
) -> Split:
    """Read and check the training or the evaluation set.

    Boxes of crowds, difficult ones and those with `ignore` are left out. The training set also
    leaves out boxes under 1 px or outside of their image, and images without annotations or with a
    side under `SMALLEST_SIDE`; the evaluation set keeps every other box and every image.

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
    names, label_of = _classes(path, content, num_classes, data.classes or classes)
    if data.classes is not None:
        require_same_classes("data.classes", data.classes, str(path), names)
    by_image = _group(path, content, label_of)
    training = which == "train"
    records, dropped = _records(content["images"], by_image, label_of, folder, training=training)
    if not records or (training and not any(len(record.labels) for record in records)):
        what = "box to train on" if training else "image to evaluate"
        raise DataError(
            f"{path}: no {what} ({_left_out_text(dropped)}); expected at least one; correct the "
            "annotations"
        )
    if dropped:
        logger.info("%s: %d images; %s", path, len(records), _left_out_text(dropped))
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
            here, there = (
                "missing" if text is None else f"'{text}'" for text in (other_name, name)
            )
            raise DataError(
                f"{other}: class {label} is {here}, but {there} in {one}; list the same categories "
                "in the same order of ids"
            )


def _classes(
    path: Path, content: Mapping[str, Any], num_classes: int, known: Sequence[str] | None
) -> tuple[list[str], dict[Id, int]]:
    """Return the class names in the order of labels, and the label of every category id.

    A category without boxes whose name is not among `known` is left out where there are too many:
    exports of Roboflow have one that is named like the project.
    """
    categories = sorted(content["categories"], key=lambda category: category["id"])
    boxes = Counter(annotation["category_id"] for annotation in content["annotations"])
    if len(categories) > num_classes and known is not None:
        unknown = [c["name"] for c in categories if not boxes[c["id"]] and c["name"] not in known]
        if len(categories) - len(unknown) == num_classes:
            categories = [c for c in categories if boxes[c["id"]] or c["name"] in known]
            logger.info("%s: categories without boxes are left out: %s", path, ", ".join(unknown))
    if len(categories) != num_classes:
        rarest = sorted(categories, key=lambda category: boxes[category["id"]])[:RAREST]
        listed = ", ".join(f"{c['name']!r} {boxes[c['id']]}" for c in rarest)
        which = "those with the fewest" if len(categories) > RAREST else "their number"
        raise DataError(
            f"{path}: has {len(categories)} categories, but model.num_classes is {num_classes}; "
            f"correct a misspelt name or remove a category without boxes ({which} of boxes: "
            f"{listed}), or set model.num_classes={len(categories)}"
        )
    names = [category["name"] for category in categories]
    for name, uses in Counter(names).most_common(1):
        if uses > 1:
            raise DataError(f"{path}: {uses} categories are called {name!r}; rename or merge them")
    return names, {category["id"]: label for label, category in enumerate(categories)}


def _group(
    path: Path, content: Mapping[str, Any], label_of: Mapping[Id, int]
) -> dict[Id, list[dict[str, Any]]]:
    """Return the annotations of every image, by image id."""
    by_image: dict[Id, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    faults = Faults()
    for annotation in content["annotations"]:
        what = f"{path}: annotation {annotation['id']}"
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in by_image:
            advice = _other_type(image, by_image) or "list it or remove the annotation"
            faults.add(f"{what} belongs to image {image!r}, which is not listed; {advice}")
        elif category not in label_of:
            advice = _other_type(category, label_of) or "correct the id or add the category"
            known = f"the categories are {sorted(label_of)[:20]}"
            faults.add(f"{what} has category {category!r}, but {known}; {advice}")
        else:
            by_image[image].append(annotation)
    faults.report()
    return by_image


def _other_type(identity: Id, known: Mapping[Id, object]) -> str:
    """Return advice if `identity` is known as a number, or as a text; empty if it is not."""
    for other in known:
        if str(other) == str(identity):
            kinds = ("a text", "a number") if isinstance(identity, str) else ("a number", "a text")
            return f"{identity!r} is {kinds[0]}, the listed id {kinds[1]}; write both the same way"
    return ""


def _records(
    images: list[dict[str, Any]],
    by_image: Mapping[Id, list[dict[str, Any]]],
    label_of: Mapping[Id, int],
    folder: Path,
    *,
    training: bool,
) -> tuple[list[ImageRecord], dict[str, int]]:
    """Return the images that take part, and the number of images and boxes left out, by reason."""
    dropped: Counter[str] = Counter()
    records = []
    faults, listed = Faults(), cache(FileNames)
    for image in images:
        annotations = by_image[image["id"]]
        with faults.collected():
            path = image_file(folder, image["file_name"], listed)
            height, width = _size(image, path)
            unfit = _unfit(annotations, height, width) if training else None
            if unfit is not None:
                dropped[unfit] += 1
                continue
            reasons = [_left_out(a, height, width, training=training) for a in annotations]
            dropped.update(reason for reason in reasons if reason)
            kept = [a for a, reason in zip(annotations, reasons, strict=True) if reason is None]
            records.append(
                ImageRecord(
                    image_id=image["id"],
                    path=path,
                    size=(height, width),
                    boxes=_xyxy([annotation["bbox"] for annotation in kept]),
                    labels=np.array([label_of[a["category_id"]] for a in kept], dtype=np.int64),
                )
            )
    faults.report()
    return records, dict(dropped)


def _size(image: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Return the annotated (height, width); the image's own where a tool wrote none or zeros."""
    height, width = image.get("height"), image.get("width")
    return (height, width) if height and width else image_size(path)


def _unfit(annotations: list[dict[str, Any]], height: int, width: int) -> str | None:
    """Return why training leaves an image out; None if it does not."""
    if not annotations:
        return "images without annotations"
    if min(height, width) < SMALLEST_SIDE:
        return f"images with a side under {SMALLEST_SIDE} px"
    return None


def _left_out(
    annotation: Mapping[str, Any], height: int, width: int, *, training: bool
) -> str | None:
    """Return why a box is left out (the reference's rules); None if it is not.

    An evaluation ignores crowds and the like, as COCO does; every other box counts, even one that
    training leaves out.
    """
    if annotation.get("difficult"):
        return "difficult boxes"
    if is_ignored(annotation):
        return "crowd boxes" if annotation.get("iscrowd") else "boxes with ignore: 1"
    x, y, w, h = annotation["bbox"]
    visible_width = min(x + w, width) - max(x, 0)
    visible_height = min(y + h, height) - max(y, 0)
    if training and (w < 1 or h < 1):
        return "boxes under 1 px wide or high"
    if training and (visible_width <= 0 or visible_height <= 0):
        return "boxes outside of their image"
    return None


def _left_out_text(dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"left out: {reasons}" if reasons else "no annotations"


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
        raise DataError(
            f"{val.annotations}: no box to evaluate on ({_left_out_text(val.dropped)}); evaluate "
            "on images that have some"
        )
    return train, val
