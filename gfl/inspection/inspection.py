"""The data doctor: what is in a set of images, and what is wrong with it, all in one go.

    train, val = load_splits(config)
    files = dict(check_files({record.path for record in [*train.records, *val.records]}))
    report = inspect_data(config, train, val, files)

An error stops training sooner or later; a warning does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gfl.config.schema import Config, DataConfig
from gfl.data.split import Split
from gfl.inspection.findings import Finding, ImageFile, boxes_of_classes, find_all
from gfl.inspection.regression_range import Reach, measure_reach, network_boxes, training_scales
from gfl.model.boxes import box_area

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
