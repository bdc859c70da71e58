"""Samplers: which images a batch holds, for any number of workers and from any step on."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from math import ceil, sqrt

import numpy as np
import torch
from torch.utils.data import Sampler

from gfl.config.schema import Config, DataConfig
from gfl.data.split import ImageRecord
from gfl.errors import DataError

Key = tuple[int, int]
"""(draw, image): key of a sample. An epoch of training draws an image once or several times."""


class TrainBatches(Sampler[list[Key]]):
    """This worker's shards of every global batch, from `start_step` to the end of training.

    Every epoch is a permutation of the images; its last batch is filled up from its beginning.

    Attributes:
        total_shards: Number of equal shards into which a global batch is cut.
        shards: Indices of this worker's shards, each of which is a batch to load.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        config: Config,
        rank: int,
        world: int,
        start_step: int,
        shards: int | None = None,
    ) -> None:
        """Cut global batches into `shards`, by default as many as there are workers (`world`).

        Each worker takes every `world`-th.
        """
        self.total_shards = shards or world
        self.shards = range(rank, self.total_shards, world)
        self._size = shard_size(config, self.total_shards)
        self.batch = config.data.batch
        self._seed = config.seed
        self._start_step = start_step
        repeats = repeats_per_epoch(records, config.data)
        self._draws = max(repeats)
        self._shown = [(draw, i) for i, times in enumerate(repeats) for draw in range(times)]
        tall = [height > width for height, width in (record.size for record in records)]
        self._tall = [config.data.group_by_aspect and tall[image] for _, image in self._shown]
        self.steps_per_epoch = ceil(len(self._shown) / self.batch)
        self.total_steps = self.steps_per_epoch * config.schedule.epochs

    def __len__(self) -> int:
        return (self.total_steps - self._start_step) * len(self.shards)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self._start_step, self.total_steps):
            for shard in self.shards:
                yield self.keys(step, shard)

    def keys(self, step: int, shard: int | None = None) -> list[Key]:
        """Return the samples of a shard, by default the worker's first, at global `step`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        number = self.shards[0] if shard is None else shard
        start = batch * self.batch + number * self._size
        order = self._order(epoch)[start : start + self._size]
        shown = (self._shown[index] for index in order)
        return [(epoch * self._draws + draw, image) for draw, image in shown]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(mix_seeds(self._seed, epoch))
            order = torch.randperm(len(self._shown), generator=generator).tolist()
            order = batches_of_one_group(order, self._tall, self.batch)
            missing = self.steps_per_epoch * self.batch - len(order)
            self._epoch = epoch
            self._order_of_epoch = [*order, *islice(cycle(order), missing)]
        return self._order_of_epoch


class EvaluationBatches(Sampler[list[Key]]):
    """This worker's part of the batches of a split, in order.

    No sample comes twice and none is left out, even where `world` does not divide their number. The
    batches do not depend on `world`, so detections do not either. The tiles of an image follow each
    other and belong to one worker.
    """

    def __init__(self, counts: Sequence[int], batch: int, rank: int, world: int) -> None:
        """Deal out groups of whole images, each `batch` samples or more, to workers in turn.

        Args:
            counts: Number of samples of every image: 1, or that of its tiles.
            batch: Largest number of samples in a batch.
            rank: Rank of this worker.
            world: Number of workers.
        """
        groups, start, end = [], 0, 0
        for number, count in enumerate(counts, start=1):
            end += count
            if end - start >= batch or number == len(counts):
                groups.append(range(start, end))
                start = end
        self._batches = [
            [(0, sample) for sample in group[first : first + batch]]
            for group in groups[rank::world]
            for first in range(0, len(group), batch)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self._batches)


def mix_seeds(*numbers: int) -> int:
    """Return one seed that depends on all `numbers`."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def repeats_per_epoch(records: Sequence[ImageRecord], config: DataConfig) -> list[int]:
    """Return how often an epoch shows every image.

    It is `data.repeat`, times a factor for images with rare classes where `data.oversample` = t is
    set: `max(1, sqrt(t / f))` of the image's rarest class, which a share f of all images has (Gupta
    et al., CVPR 2019, section 3.2), rounded up as MMDetection does.
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


def combining_draws(records: Sequence[ImageRecord], config: Config) -> int:
    """Return the number of first draws of an image in which mosaic and mixup take part."""
    augment, schedule = config.data.augment, config.schedule
    if not augment.mosaic and not augment.mixup:
        return 0
    draws_per_epoch = max(repeats_per_epoch(records, config.data))
    return draws_per_epoch * max(0, schedule.epochs - augment.close_epochs)


def batches_of_one_group(order: Sequence[int], group: Sequence[bool], batch: int) -> list[int]:
    """Return `order` rearranged into batches whose members belong to one group.

    Batches follow each other as they become full, so the order stays random. The remainders of both
    groups come last, together.

    Args:
        order: Indices.
        group: Group of every index.
        batch: Number of indices in a batch.
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


def shard_size(config: Config, world: int) -> int:
    """Return the number of images of a global batch that each of `world` workers takes.

    Raises:
        DataError: The workers cannot take equal numbers.
    """
    batch = config.data.batch
    if batch % world:
        raise DataError(
            f"data.batch: {batch} images cannot be shared equally by {world} workers; "
            f"use a multiple of {world}"
        )
    return batch // world
