"""A set of annotated images: read, checked and reduced to what training needs.

The checks find problems that would otherwise fail hours later or spoil a training silently: missing
files, classes that do not fit the model, boxes that no detector can learn. Images and boxes are
arrays: a million Python objects would cost every process of a node a gigabyte.

Shapes: I images, A objects, G objects of an image, C classes.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from gfl.config.schema import Config, DataConfig, SplitConfig
from gfl.data.annotations import IGNORED, Annotations
from gfl.data.coco import read_coco
from gfl.data.faults import Faults
from gfl.data.images import ImageFolder, image_size
from gfl.data.synthetic import render_shapes
from gfl.data.voc import read_voc
from gfl.data.yolo import find_classes, read_yolo
from gfl.errors import DataError
from gfl.structures import Id

logger = logging.getLogger(__name__)

RAREST = 8
"""Number of categories that a message lists, those with the fewest boxes first."""

SMALLEST_SIDE = 32
"""Smallest side in px of an image that training uses (the reference's value)."""

CACHE = "~/.cache/gfl"
"""Folder in which the processes of a node share large annotation files, without `data.cache`."""

SMALL, OUTSIDE = "boxes under 1 px wide or high", "boxes outside of their image"
LEFT_OUT = (*IGNORED, SMALL, OUTSIDE)
"""Reasons for which boxes are left out; those that training adds come last."""


Window = tuple[int, int, int, int]
"""A part of an image: `xyxy` in px."""


@dataclass(frozen=True)
class Tile:
    """The place of a tile in its image.

    Attributes:
        image: Index of the image in its split.
        window: Part of the image that the tile shows.
        image_size: (height, width) of the image in px.
    """

    image: int
    window: Window
    image_size: tuple[int, int]


@dataclass(frozen=True)
class ImageRecord:
    """An image, or a tile of one, and its objects.

    Attributes:
        image_id: The id in the annotation file.
        path: The image file.
        size: (height, width) in px.
        boxes: `xyxy` in px, (G, 4), float32, as annotated: not clipped to the image.
        labels: Classes 0..C-1, (G,), int64, in the order of category ids.
        tile: Place in the image `path`, of which this is a tile; None for a whole image. Size and
            boxes are those of the tile, and its boxes are clipped to it.
    """

    image_id: Id
    path: Path
    size: tuple[int, int]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    tile: Tile | None = None


class Records(Sequence[ImageRecord]):
    """Images that are made from arrays when they are asked for."""

    def __init__(
        self,
        image_ids: list[Id],
        paths: list[str],
        sizes: npt.NDArray[np.int64],
        objects: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]],
    ) -> None:
        """Keep the arrays.

        Args:
            image_ids: Id of every image, (I,).
            paths: File of every image, (I,).
            sizes: (height, width) of every image in px, (I, 2).
            objects: Position of every object's image, in order, (A,); boxes, `xyxy` in px,
                (A, 4); labels, (A,).
        """
        self.image_ids = image_ids
        self._paths, self._sizes = paths, sizes
        images, self._boxes, self._labels = objects
        counts = np.bincount(images, minlength=len(image_ids))
        self._ends = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.image_ids)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[image] for image in range(len(self))[index]]
        image = range(len(self))[index]  # counts negative ones from the end, and refuses others
        objects = slice(self._ends[image], self._ends[image + 1])
        height, width = self._sizes[image].tolist()
        return ImageRecord(
            self.image_ids[image],
            Path(self._paths[image]),
            (height, width),
            self._boxes[objects],
            self._labels[objects],
        )


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
        truth: Ground truth that average precision is measured against.
    """

    records: Sequence[ImageRecord]
    classes: list[str]
    category_ids: list[Id]
    dropped: dict[str, int]
    annotations: Path
    digest: str
    truth: Annotations

    @cached_property
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
    path, training = Path(section.annotations), which == "train"
    truth = _read(data, section, classes)
    positions = _classes(path, truth, num_classes, data.classes or classes)
    category_ids = [truth.categories[position][0] for position in positions]
    names = [truth.categories[position][1] for position in positions]
    if data.classes is not None:
        require_same_classes("data.classes", data.classes, str(path), names)
    records, dropped = _records(truth, positions, section.images, training=training)
    if not records or (training and not any(len(record.labels) for record in records)):
        what = "box to train on" if training else "image to evaluate"
        raise DataError(
            f"{path}: no {what} ({_left_out_text(dropped)}); expected at least one; correct the "
            "annotations"
        )
    if dropped:
        logger.info("%s: %d images; %s", path, len(records), _left_out_text(dropped))
    return Split(records, names, category_ids, dropped, path, truth.digest, truth)


def digest_images(split: Split) -> str:
    """Return the SHA-256 of the image files' content, which takes seconds for some thousand."""
    total = hashlib.sha256()
    for record in split.records:
        with record.path.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _read(data: DataConfig, section: SplitConfig, classes: Sequence[str] | None) -> Annotations:
    if not Path(section.images).is_dir():
        raise DataError(
            f"{section.images}: no such folder of images; set data.train.images and data.val.images"
        )
    match data.format:
        case "coco":
            cache = Path(data.cache or CACHE).expanduser() / "annotations"
            return read_coco(Path(section.annotations), cache)
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
    path: Path, truth: Annotations, num_classes: int, known: Sequence[str] | None
) -> list[int]:
    """Return the position of every class among the categories, in the order of labels.

    A category without boxes whose name is not among `known` is left out where there are too many:
    exports of Roboflow have one that is named like the project.
    """
    names = [name for _, name in truth.categories]
    boxes = np.bincount(truth.objects["category"], minlength=len(names)).tolist()
    positions = list(range(len(names)))
    if len(names) > num_classes and known is not None:
        unknown = [n for n in positions if not boxes[n] and names[n] not in known]
        if len(names) - len(unknown) == num_classes:
            positions = [n for n in positions if n not in unknown]
            listed = ", ".join(names[n] for n in unknown)
            logger.info("%s: categories without boxes are left out: %s", path, listed)
    if len(positions) != num_classes:
        rarest = sorted(positions, key=boxes.__getitem__)[:RAREST]
        listed = ", ".join(f"{names[n]!r} {boxes[n]}" for n in rarest)
        which = "those with the fewest" if len(positions) > RAREST else "their number"
        raise DataError(
            f"{path}: has {len(positions)} categories, but model.num_classes is {num_classes}; "
            f"correct a misspelt name or remove a category without boxes ({which} of boxes: "
            f"{listed}), or set model.num_classes={len(positions)}"
        )
    for name, uses in Counter(names[n] for n in positions).most_common(1):
        if uses > 1:
            raise DataError(f"{path}: {uses} categories are called {name!r}; rename or merge them")
    return positions


def _records(
    truth: Annotations, positions: list[int], folder: str, *, training: bool
) -> tuple[Records, dict[str, int]]:
    """Return the images that take part, and the number of images and boxes left out, by reason."""
    paths, sizes = _files(truth, folder)
    objects = truth.objects
    images = objects["image"].astype(np.int64)
    keep = np.ones(len(paths), bool)
    dropped: Counter[str] = Counter()
    if training:
        empty = np.bincount(images, minlength=len(paths)) == 0
        small = ~empty & (sizes.min(axis=1) < SMALLEST_SIDE)
        dropped["images without annotations"] = int(empty.sum())
        dropped[f"images with a side under {SMALLEST_SIDE} px"] = int(small.sum())
        keep = ~(empty | small)
    reasons = _left_out(objects, sizes[images], training=training)
    counts = np.bincount(reasons[keep[images]], minlength=len(LEFT_OUT)).tolist()
    dropped.update(dict(zip(LEFT_OUT[1:], counts[1:], strict=True)))
    kept = keep[images] & (reasons == 0)
    place, label_of = np.cumsum(keep) - 1, np.zeros(len(truth.categories), np.int64)
    label_of[positions] = np.arange(len(positions))
    boxes = objects["bbox"][kept].astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    chosen = np.flatnonzero(keep).tolist()
    records = Records(
        [truth.image_ids[image] for image in chosen],
        [paths[image] for image in chosen],
        sizes[keep],
        (place[images[kept]], boxes, label_of[objects["category"][kept]]),
    )
    return records, {reason: count for reason, count in dropped.items() if count}


def _files(truth: Annotations, folder: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the file of every image, and its size, which is read where none is annotated."""
    faults, files, paths, sizes = Faults(), ImageFolder(folder), [], truth.sizes.copy()
    for image, name in enumerate(truth.file_names):
        try:
            paths.append(files.find(name))
            if not sizes[image].all():
                sizes[image] = image_size(Path(paths[-1]))
        except DataError as error:
            faults.add(str(error))
    faults.report()
    return paths, sizes


def _left_out(
    objects: npt.NDArray[np.void], sizes: npt.NDArray[np.int64], *, training: bool
) -> npt.NDArray[np.uint8]:
    """Return why every object is left out (the reference's rules), as an index of `LEFT_OUT`.

    An evaluation ignores crowds and the like, as COCO does; every other box counts, even one that
    training leaves out.

    Args:
        objects: The objects, (A,).
        sizes: (height, width) of every object's image in px, (A, 2).
        training: Whether the set is trained on.
    """
    reasons = objects["ignored"].copy()
    if training:
        low, sides = objects["bbox"][:, :2], objects["bbox"][:, 2:]
        visible = np.minimum(low + sides, sizes[:, ::-1]) - np.maximum(low, 0)
        small, outside = (sides < 1).any(axis=1), (visible <= 0).any(axis=1)
        reasons[(reasons == 0) & small] = LEFT_OUT.index(SMALL)
        reasons[(reasons == 0) & outside] = LEFT_OUT.index(OUTSIDE)
    return reasons


def _left_out_text(dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"left out: {reasons}" if reasons else "no annotations"


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
