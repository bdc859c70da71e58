"""Which images an epoch shows, how often, and in which company."""

from collections import Counter
from collections.abc import Sequence
from math import ceil, sqrt

from gfl.config.schema import Config, DataConfig
from gfl.data.split import ImageRecord
from gfl.errors import DataError


def repeats_per_epoch(records: Sequence[ImageRecord], config: DataConfig) -> list[int]:
    """Return how often an epoch shows every image.

    `data.repeat` times; with `data.oversample` = t, an image with rare classes more often: by
    `max(1, sqrt(t / f))` of its rarest class, which a share f of all images has (Gupta et al., CVPR
    2019, section 3.2), rounded up as MMDetection does.
    """
    if config.oversample is None:
        return [config.repeat] * len(records)
    classes = [set(record.labels.tolist()) for record in records]
    images_of = Counter(label for present in classes for label in present)
    factor = {
        label: max(1.0, sqrt(config.oversample * len(records) / count))
        for label, count in images_of.items()
    }
    return [
        config.repeat * ceil(max((factor[label] for label in present), default=1))
        for present in classes
    ]


def batches_of_one_group(order: Sequence[int], group: Sequence[bool], batch: int) -> list[int]:
    """Return `order` rearranged into batches whose members are of one group.

    A batch comes when it is full, so the order stays random; what is left of the groups comes last,
    together.

    Args:
        order: Indices.
        group: Of every index.
        batch: Indices a batch.
    """
    arranged: list[int] = []
    waiting: dict[bool, list[int]] = {False: [], True: []}
    for index in order:
        members = waiting[group[index]]
        members.append(index)
        if len(members) == batch:
            arranged += members
            members.clear()
    return [*arranged, *waiting[False], *waiting[True]]


def share_of_batch(config: Config, world: int) -> int:
    """Return how many images of a global batch each of `world` workers takes.

    Raises:
        DataError: it cannot be shared equally.
    """
    batch = config.data.batch
    if batch % world:
        raise DataError(
            f"data.batch: {batch} images cannot be shared equally by {world} workers; "
            f"use a multiple of {world}"
        )
    return batch // world
