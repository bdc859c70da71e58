"""The data doctor: statistics of the training and evaluation sets, and what is wrong with them.

    files = dict(check_files([record.path for record in train.records]))
    for finding in inspect_data(config, train, val, files).findings:
        print(finding)

A finding is an error where it stops training sooner or later, otherwise a warning.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gfl.config.schema import Config, DataConfig, ModelConfig
from gfl.data.dataset import fitted_size, require_batch_statistics
from gfl.data.images import read_image
from gfl.data.split import ImageRecord, Split
from gfl.data.tiles import sample_records, windows
from gfl.errors import DataError
from gfl.inspection.regression_range import (
    ACCEPTED_SHARE,
    RegressionRange,
    measure_regression_range,
    network_boxes,
    training_scales,
)
from gfl.model.boxes import box_area

EXAMPLES = 3
"""Number of cases that a finding names."""

TOLERATED_SHARE = 0.01
"""Share of clipped edges, or of objects never learned, above which there is a warning."""

SAMPLE = 1000
"""Largest number of images that the check before training measures."""

OVERHANG_PX = 1.0
"""How far a box may extend beyond its image without a warning: annotations are rounded."""

DARKEST = 32
"""Value of the brightest pixel below which an image uses a small part of its range."""

SIZES = {"small": 0.0, "medium": 32.0, "large": 96.0}
"""COCO's sizes of objects, by the least square root of their area in px."""


@dataclass(frozen=True)
class ImageFile:
    """The result of decoding an image file.

    Attributes:
        digest: SHA-256 of the file; empty if it cannot be decoded.
        size: (height, width) in px; None if it cannot be decoded.
        brightest: Largest value of its pixels, 0..255; 255 if it cannot be decoded.
        problem: Why the file cannot be decoded; empty if it can.
    """

    digest: str
    size: tuple[int, int] | None
    brightest: int
    problem: str


@dataclass(frozen=True)
class Finding:
    """One kind of problem in one set.

    Attributes:
        error: Whether the problem stops training.
        split: Name of the set, `train` or `val`.
        count: Number of cases.
        what: Description of the cases, a noun in the plural.
        details: The first few cases, or how they were measured and what helps.
    """

    error: bool
    split: str
    count: int
    what: str
    details: list[str]

    def __str__(self) -> str:
        details = f" ({'; '.join(self.details)})" if self.details else ""
        return f"{self.split}: {self.what}: {self.count}{details}"


@dataclass(frozen=True)
class Spread:
    """The smallest, the median and the largest of some values."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class SplitStatistics:
    """The content of a set.

    Attributes:
        images: Number of images that take part.
        height: Spread of the images' heights in px.
        width: Spread of the images' widths in px.
        aspect: Spread of the images' width divided by height.
        boxes: Number of boxes in all images.
        boxes_per_image: Spread of the number of boxes in an image.
        sizes: Number of boxes of each of COCO's `SIZES`, as scaled for the network.
        classes: Number of boxes of each class, by name.
        dropped: Number of images and boxes that do not take part, by reason.
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
    """Everything that is known of a configuration's data.

    Attributes:
        files: Number of image files that were decoded.
        splits: Statistics of `train` and `val`.
        regression_ranges: Regression range at each scale of training.
        findings: Problems, errors first.
    """

    files: int
    splits: dict[str, SplitStatistics]
    regression_ranges: list[RegressionRange]
    findings: list[Finding]


def inspect_data(
    config: Config, train: Split, val: Split, files: Mapping[Path, ImageFile]
) -> Inspection:
    """Return statistics of `train` and `val`, and everything that is wrong with them.

    Args:
        config: The configuration whose data this is.
        train: The training set.
        val: The evaluation set.
        files: Results of `check_files`; empty to inspect the annotations alone.
    """
    ranges = _regression_ranges(sample_records(train.records, config.data, training=True), config)
    return Inspection(
        files=len(files),
        splits={"train": describe(train, config.data), "val": describe(val, config.data)},
        regression_ranges=ranges,
        findings=find_all(config, train, val, files, ranges),
    )


def describe(split: Split, data: DataConfig) -> SplitStatistics:
    """Return the statistics of `split`."""
    records = split.records
    height, width = torch.tensor([record.size for record in records]).double().unbind(1)
    counts = torch.tensor([len(record.boxes) for record in records])
    areas = torch.cat([_network_areas(record, data) for record in records])
    size = torch.bucketize(areas.sqrt(), torch.tensor(list(SIZES.values())), right=True)
    boxes_of_size = torch.bincount(size - 1, minlength=len(SIZES))
    return SplitStatistics(
        images=len(records),
        height=_spread(height),
        width=_spread(width),
        aspect=_spread(width / height),
        boxes=int(counts.sum()),
        boxes_per_image=_spread(counts),
        sizes=dict(zip(SIZES, boxes_of_size.tolist(), strict=True)),
        classes=boxes_of_classes(split),
        dropped=split.dropped,
    )


def _network_areas(record: ImageRecord, data: DataConfig) -> Tensor:
    """Return the areas of an image's boxes, (G,), in px of the network's input.

    With tiles that is the scale of a tile, but no box is cut.
    """
    short, long = data.short_side, data.long_side
    boxes, of_image = network_boxes(record, short, long)
    _, _, width, height = windows(*record.size, data.tiles)[0].tolist()
    of_tile = fitted_size(height, width, short, long)
    zoom = (prod(of_tile) / (height * width)) / (prod(of_image) / prod(record.size))
    return box_area(boxes) * zoom


def boxes_of_classes(split: Split) -> dict[str, int]:
    """Return the number of boxes of every class, by name."""
    labels = np.concatenate([record.labels for record in split.records])
    counts = np.bincount(labels, minlength=len(split.classes))
    return dict(zip(split.classes, counts.tolist(), strict=True))


def _spread(values: Tensor) -> Spread:
    return Spread(float(values.min()), float(values.double().quantile(0.5)), float(values.max()))


def check_files(paths: Collection[Path]) -> Iterator[tuple[Path, ImageFile]]:
    """Decode every image file and yield the results in the order of `paths`."""
    # Threads suffice: Pillow decodes and hashlib digests without the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        yield from zip(paths, pool.map(_check_file, paths), strict=True)


def _check_file(path: Path) -> ImageFile:
    try:
        pixels = read_image(path)
    except DataError as error:
        return ImageFile("", None, 255, str(error))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ImageFile(digest, (pixels.shape[1], pixels.shape[2]), int(pixels.max()), "")


def find_all(
    config: Config,
    train: Split,
    val: Split,
    files: Mapping[Path, ImageFile],
    ranges: Sequence[RegressionRange],
) -> list[Finding]:
    """Return everything that is wrong with `train` and `val`, errors first.

    Args:
        config: The configuration whose data this is.
        train: The training set.
        val: The evaluation set.
        files: Results of `check_files`, if there are any.
        ranges: Regression range on `train` at each scale of training.
    """
    findings = [
        *_file_findings("train", train, files),
        *_file_findings("val", val, files),
        *_same_images(train, val, files),
        *_clipped_edges(ranges, config.model, max(measured.images for measured in ranges)),
        *_unlearned_objects(ranges),
        *_single_values(config, train),
        *_crowded_images("train", train, config),
        *_crowded_images("val", val, config),
        *_box_findings("train", train),
        *_box_findings("val", val),
    ]
    return sorted(findings, key=lambda finding: not finding.error)


def find_cheaply(config: Config, train: Split, val: Split) -> list[Finding]:
    """Return those problems that take about a second to find, even in COCO.

    These are clipped edges in at most `SAMPLE` evenly spaced images of `train`, classes without
    boxes, and images with more objects than an evaluation counts.
    """
    records = sample_records(train.records, config.data, training=True)
    ranges = _regression_ranges(records[:: ceil(len(records) / SAMPLE)], config)
    return [
        *_clipped_edges(ranges, config.model, len(records)),
        *_empty_classes("train", train),
        *_crowded_images("val", val, config),
    ]


def _regression_ranges(records: Sequence[ImageRecord], config: Config) -> list[RegressionRange]:
    scales = training_scales(config.data)
    return [measure_regression_range(records, config, short_side) for short_side in scales]


def _file_findings(name: str, split: Split, files: Mapping[Path, ImageFile]) -> Iterator[Finding]:
    decoded = [(record, files[record.path]) for record in split.records if record.path in files]
    unreadable = [file.problem for _, file in decoded if file.size is None]
    yield from _finding(name, "files that cannot be read", unreadable, error=True)
    resized = [
        f"{record.path.name} is {_wide(file.size)} px, annotated as {_wide(record.size)}"
        for record, file in decoded
        if file.size and file.size != record.size
    ]
    yield from _finding(name, "images of another size than annotated", resized, error=True)
    dark = [
        f"{record.path.name}: {file.brightest}"
        for record, file in decoded
        if file.brightest < DARKEST
    ]
    what = f"images whose brightest pixel is below {DARKEST} of 255, as of 12 bits kept in 16"
    yield from _finding(name, what, dark)


def _finding(split: str, what: str, cases: list[str], *, error: bool = False) -> Iterator[Finding]:
    """Yield the finding that lists `cases`, if there is any case."""
    if cases:
        more = [f"{len(cases) - EXAMPLES} more"] if len(cases) > EXAMPLES else []
        yield Finding(error, split, len(cases), what, cases[:EXAMPLES] + more)


def _wide(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _same_images(train: Split, val: Split, files: Mapping[Path, ImageFile]) -> Iterator[Finding]:
    """Yield images with the same content, or without `files` the same path."""
    trained = _by_content(train, files)
    evaluated = _by_content(val, files)
    for name, groups in (("train", trained), ("val", evaluated)):
        copies = [f"{copy} = {first}" for first, *rest in groups.values() for copy in rest]
        yield from _finding(name, "copies of another image", copies)
    both = [f"{evaluated[key][0]} = {trained[key][0]}" for key in evaluated if key in trained]
    yield from _finding("val", "images that are trained on, too", both)


def _by_content(split: Split, files: Mapping[Path, ImageFile]) -> dict[str, list[str]]:
    """Return file names, grouped by equal content."""
    groups = defaultdict(list)
    for record in split.records:
        file = files.get(record.path)
        key = file.digest if file and file.size else str(record.path)
        groups[key].append(record.path.name)
    return groups


def _clipped_edges(
    ranges: Sequence[RegressionRange], model: ModelConfig, images: int
) -> Iterator[Finding]:
    worst = max(ranges, key=lambda measured: measured.total.share)
    if worst.total.share > TOLERATED_SHARE:
        sample = f" in {worst.images} of {images} images" if worst.images < images else ""
        sufficient = max(measured.reg_max for measured in ranges)
        details = [
            f"{worst.total.share:.1%} of edges{sample} at short side {worst.short_side}",
            f"{worst.clipped_objects} of {worst.objects} objects",
            f"model.reg_max={sufficient} clips under {ACCEPTED_SHARE:.1%}",
        ]
        what = f"edges beyond the regression range of model.reg_max {model.reg_max}, hence clipped"
        yield Finding(False, "train", worst.total.clipped, what, details)


def _unlearned_objects(ranges: Sequence[RegressionRange]) -> Iterator[Finding]:
    worst = max(ranges, key=lambda measured: measured.unlearned_objects)
    if worst.unlearned_objects > TOLERATED_SHARE * worst.objects:
        details = [
            f"of {worst.objects} at short side {worst.short_side}",
            "too small, or hidden by others",
            "a larger data.short_side helps",
        ]
        what = "objects that no location learns"
        yield Finding(False, "train", worst.unlearned_objects, what, details)


def _single_values(config: Config, train: Split) -> Iterator[Finding]:
    try:
        records = sample_records(train.records, config.data, training=True)
        require_batch_statistics(config, records, config.data.batch)
    except DataError as error:
        yield Finding(True, "train", 1, "batches with one value of each channel", [str(error)])


def _crowded_images(name: str, split: Split, config: Config) -> Iterator[Finding]:
    """Yield the images that have more objects than detections count."""
    limit = min(config.postprocess.detections_per_image, max(config.evaluation.max_detections))
    counts = np.array([len(record.boxes) for record in split.records])
    crowded = int((counts > limit).sum())
    if crowded:
        most = int(counts.max())
        share = np.minimum(counts, limit).sum() / counts.sum()
        details = [
            f"up to {most} objects, so that recall is at most {share:.2f} and AP about that",
            f"postprocess.detections_per_image={most} and "
            f"evaluation.max_detections=[1,10,{most}] count all",
        ]
        what = f"images with more objects than the {limit} detections that are kept"
        yield Finding(False, name, crowded, what, details)


def _box_findings(name: str, split: Split) -> Iterator[Finding]:
    for reason, count in sorted(split.dropped.items()):
        yield Finding(False, name, count, f"{reason}, left out", [])
    empty = [record.path.name for record in split.records if not len(record.boxes)]
    yield from _finding(name, "images without boxes", empty)
    overhanging = [
        record.path.name for record in split.records for _ in range(_overhanging(record))
    ]
    yield from _finding(name, "boxes that extend beyond their image, clipped to it", overhanging)
    yield from _empty_classes(name, split)


def _overhanging(record: ImageRecord) -> int:
    """Return the number of boxes that extend beyond their image."""
    height, width = record.size
    low, high = -OVERHANG_PX, np.array([width, height]) + OVERHANG_PX
    outside = (record.boxes[:, :2] < low) | (record.boxes[:, 2:] > high)
    return int(outside.any(axis=1).sum())


def _empty_classes(name: str, split: Split) -> Iterator[Finding]:
    empty = [label for label, count in boxes_of_classes(split).items() if not count]
    yield from _finding(name, "classes without boxes", empty)
