"""What is wrong with a set of images: files, annotations, and edges that the model cannot reach.

An error stops training sooner or later; a warning does not.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gfl.config.schema import Config, DataConfig, ModelConfig
from gfl.data.images import read_image
from gfl.data.split import ImageRecord, Split
from gfl.errors import DataError
from gfl.inspection.regression_range import (
    ENOUGH,
    Reach,
    measure_reach,
    network_boxes,
    training_scales,
)
from gfl.model.boxes import box_area

SHOWN = 3
"""How many cases of a finding are named."""

MANY = 0.01
"""Share of edges clipped, or of objects never learned, above which there is a warning."""

SAMPLE = 1000
"""Images that the check before training looks at, at most."""

OVERHANG_PX = 1.0
"""How far a box may reach beyond its image without a warning: annotations are rounded."""


@dataclass(frozen=True)
class ImageFile:
    """What a file holds: a digest and the (height, width) in px, or why it cannot be read."""

    digest: str
    size: tuple[int, int] | None
    problem: str


@dataclass(frozen=True)
class Finding:
    """One kind of trouble in one set.

    Attributes:
        error: Whether it stops training.
        split: `train` or `val`.
        count: How often.
        what: A noun in the plural.
        details: The first few, or how it is measured.
    """

    error: bool
    split: str
    count: int
    what: str
    details: list[str]

    def __str__(self) -> str:
        details = f" ({'; '.join(self.details)})" if self.details else ""
        return f"{self.split}: {self.what}: {self.count}{details}"


def find_all(
    model: ModelConfig,
    train: Split,
    val: Split,
    files: Mapping[Path, ImageFile],
    reach: Sequence[Reach],
) -> list[Finding]:
    """Return all that is wrong with `train` and `val`, errors first.

    Args:
        model: Whose edges these are to become.
        train: To train on.
        val: To evaluate on.
        files: What `check_files` found, if anything.
        reach: Of `train`, at every scale.
    """
    findings = [
        *_file_findings("train", train, files),
        *_file_findings("val", val, files),
        *_same_images(train, val, files),
        *_clipped_edges(reach, model, len(train.records)),
        *_unlearned_objects(reach),
        *_box_findings("train", train),
        *_box_findings("val", val),
    ]
    return sorted(findings, key=lambda finding: not finding.error)


def find_cheaply(config: Config, train: Split) -> list[Finding]:
    """Return what is wrong with `train` as far as it takes a second to find, even in COCO.

    These are edges out of reach in evenly spaced images, `SAMPLE` at most, and empty classes.
    """
    sample = train.records[:: ceil(len(train.records) / SAMPLE)]
    reach = [measure_reach(sample, config, side) for side in training_scales(config.data)]
    return [
        *_clipped_edges(reach, config.model, len(train.records)),
        *_empty_classes("train", train),
    ]


def check_files(paths: Collection[Path]) -> Iterator[tuple[Path, ImageFile]]:
    """Read and decode every file, in the order of `paths`."""
    # Threads suffice: Pillow decodes and hashlib digests without the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        yield from zip(paths, pool.map(_check_file, paths), strict=True)


def boxes_of_classes(split: Split) -> dict[str, int]:
    """Return how many boxes every class has."""
    labels = np.concatenate([record.labels for record in split.records])
    counts = np.bincount(labels, minlength=len(split.classes))
    return dict(zip(split.classes, counts.tolist(), strict=True))


def _check_file(path: Path) -> ImageFile:
    try:
        _, height, width = read_image(path).shape
    except DataError as error:
        return ImageFile("", None, str(error))
    return ImageFile(hashlib.sha256(path.read_bytes()).hexdigest(), (height, width), "")


def _listed(
    split: str, what: str, cases: Iterable[str], *, error: bool = False
) -> Iterator[Finding]:
    """Give the finding that `cases` are, if there is any."""
    if found := list(cases):
        more = [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else []
        yield Finding(error, split, len(found), what, found[:SHOWN] + more)


def _file_findings(name: str, split: Split, files: Mapping[Path, ImageFile]) -> Iterator[Finding]:
    read = [(r, files[r.path]) for r in split.records if r.path in files]
    unreadable = [file.problem for _, file in read if file.size is None]
    yield from _listed(name, "files that cannot be read", unreadable, error=True)
    other = [
        f"{r.path.name} is {_wide(file.size)} px, annotated as {_wide(r.size)}"
        for r, file in read
        if file.size and file.size != r.size
    ]
    yield from _listed(name, "images of another size than annotated", other, error=True)


def _wide(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _same_images(train: Split, val: Split, files: Mapping[Path, ImageFile]) -> Iterator[Finding]:
    """Give images that come twice: the same content, or without `files` the same path."""
    trained = _by_content(train, files)
    evaluated = _by_content(val, files)
    for name, groups in (("train", trained), ("val", evaluated)):
        copies = [f"{copy} = {first}" for first, *rest in groups.values() for copy in rest]
        yield from _listed(name, "copies of another image", copies)
    both = [f"{evaluated[key][0]} = {trained[key][0]}" for key in evaluated if key in trained]
    yield from _listed("val", "images that are trained on, too", both)


def _by_content(split: Split, files: Mapping[Path, ImageFile]) -> dict[str, list[str]]:
    """Return the names of images that are the same."""
    groups = defaultdict(list)
    for record in split.records:
        file = files.get(record.path)
        key = file.digest if file and file.size else str(record.path)
        groups[key].append(record.path.name)
    return groups


def _clipped_edges(reach: Sequence[Reach], model: ModelConfig, images: int) -> Iterator[Finding]:
    worst = max(reach, key=lambda r: r.total.share)
    if worst.total.share > MANY:
        sample = f" in {worst.images} of {images} images" if worst.images < images else ""
        details = [
            f"{worst.total.share:.1%} of edges{sample} at short side {worst.short_side}",
            f"{worst.clipped_objects} of {worst.objects} objects",
            f"model.reg_max={max(r.reg_max for r in reach)} clips under {ENOUGH:.1%}",
        ]
        what = f"edges that model.reg_max {model.reg_max} cannot reach, hence clipped"
        yield Finding(False, "train", worst.total.clipped, what, details)


def _unlearned_objects(reach: Sequence[Reach]) -> Iterator[Finding]:
    worst = max(reach, key=lambda r: r.unlearned_objects)
    if worst.unlearned_objects > MANY * worst.objects:
        details = [
            f"of {worst.objects} at short side {worst.short_side}",
            "too small, or hidden by others",
            "a larger data.short_side helps",
        ]
        what = "objects that no location learns"
        yield Finding(False, "train", worst.unlearned_objects, what, details)


def _box_findings(name: str, split: Split) -> Iterator[Finding]:
    for reason, count in sorted(split.dropped.items()):
        yield Finding(False, name, count, f"{reason}, left out", [])
    empty = [record.path.name for record in split.records if not len(record.boxes)]
    yield from _listed(name, "images without boxes", empty)
    over = [r.path.name for r in split.records for _ in range(_overhanging(r))]
    yield from _listed(name, "boxes that reach beyond their image, clipped to it", over)
    yield from _empty_classes(name, split)


def _overhanging(record: ImageRecord) -> int:
    height, width = record.size
    low, high = -OVERHANG_PX, np.array([width, height]) + OVERHANG_PX
    outside = (record.boxes[:, :2] < low) | (record.boxes[:, 2:] > high)
    return int(outside.any(axis=1).sum())


def _empty_classes(name: str, split: Split) -> Iterator[Finding]:
    empty = [label for label, count in boxes_of_classes(split).items() if not count]
    yield from _listed(name, "classes without boxes", empty)


SIZES = {"small": 0.0, "medium": 32.0, "large": 96.0}
"""COCO's sizes of objects: the least square root of the area, in px."""


@dataclass(frozen=True)
class Spread:
    """The least, the middle and the largest of some values."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class SplitStatistics:
    """What a set consists of.

    Attributes:
        images: That take part.
        height: Of the images in px.
        width: Likewise.
        aspect: Width by height.
        boxes: Of all images.
        boxes_per_image: Likewise, of each.
        sizes: Boxes by COCO's `SIZES`, as the network sees them at `data.short_side`.
        classes: Boxes of every class.
        dropped: What does not take part, by reason.
    """

    images: int
    height: Spread
    width: Spread
    aspect: Spread
    boxes: int
    boxes_per_image: Spread
    sizes: dict[str, int]
    classes: dict[str, int]
    dropped: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """All that is known of a configuration's data.

    Attributes:
        files: How many were read.
        splits: `train` and `val`.
        reach: At every scale of training.
        findings: Errors first.
    """

    files: int
    splits: dict[str, SplitStatistics]
    reach: list[Reach]
    findings: list[Finding]


def inspect_data(
    config: Config, train: Split, val: Split, files: Mapping[Path, ImageFile]
) -> Inspection:
    """Return what is in `train` and `val`, and all that is wrong there.

    Args:
        config: Whose data this is.
        train: To train on.
        val: To evaluate on.
        files: What `check_files` found; empty to look at the annotations alone.
    """
    reach = [measure_reach(train.records, config, side) for side in training_scales(config.data)]
    return Inspection(
        files=len(files),
        splits={"train": describe(train, config.data), "val": describe(val, config.data)},
        reach=reach,
        findings=find_all(config.model, train, val, files, reach),
    )


def describe(split: Split, data: DataConfig) -> SplitStatistics:
    """Return the statistics of `split`."""
    records = split.records
    height, width = torch.tensor([record.size for record in records]).double().unbind(1)
    counts = torch.tensor([len(record.boxes) for record in records])
    boxes = [network_boxes(r, data.short_side, data.long_side)[0] for r in records]
    size = torch.bucketize(
        box_area(torch.cat(boxes)).sqrt(), torch.tensor(list(SIZES.values())), right=True
    )
    of_size = torch.bincount(size - 1, minlength=len(SIZES))
    return SplitStatistics(
        images=len(records),
        height=_spread(height),
        width=_spread(width),
        aspect=_spread(width / height),
        boxes=int(counts.sum()),
        boxes_per_image=_spread(counts),
        sizes=dict(zip(SIZES, of_size.tolist(), strict=True)),
        classes=boxes_of_classes(split),
        dropped=split.dropped,
    )


def _spread(values: Tensor) -> Spread:
    return Spread(float(values.min()), float(values.double().quantile(0.5)), float(values.max()))
