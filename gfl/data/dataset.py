"""Samples and batches: images and boxes transformed, padded, and moved to a device.

Augmentation draws from a generator seeded by (seed, epoch, image), so neither the number of workers
nor an interruption changes a sample.

Shapes: B images of a batch, G objects of an image, H and W height and width in px.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from gfl.config.schema import Config, DataConfig
from gfl.data.augment import Augmentation, Labelled, as_sample
from gfl.data.images import is_on_its_side, read_cached, read_image
from gfl.data.mosaic import Combination
from gfl.data.samplers import Key, combining_draws, mix_seeds
from gfl.data.split import ImageRecord, Split, Window
from gfl.data.tiles import sample_records
from gfl.errors import DataError
from gfl.structures import Targets, pad_targets

SIZE_MULTIPLE = 32
"""Sides of a batch are padded, right and bottom, to a multiple of this many px."""


def fitted_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Return the (height, width) of an image scaled to fit within (long, short), all in px.

    Both are at least 1, however thin the image.
    """
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


class FitWithin(v2.Transform):
    """Scale to fit within (long, short), keeping the aspect ratio: bilinear, without antialiasing.

    torchvision's `Resize` rounds sizes down and antialiases; the published weights were trained
    without either. With `shorts` = (low, high) the short side is drawn from low to high, inclusive.
    """

    def __init__(self, shorts: tuple[int, int], long: int) -> None:
        super().__init__()
        self.shorts = shorts
        self.long = long

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the new size, from the first image or box of the sample."""
        height, width = v2.functional.get_size(flat_inputs[0])
        low, high = self.shorts
        short = low if low == high else int(torch.randint(low, high + 1, ()))
        return {"size": list(fitted_size(height, width, short, self.long))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image or boxes."""
        resize = v2.functional.resize
        return self._call_kernel(resize, inpt, size=params["size"], antialias=False)


def fit_within(config: DataConfig, *, training: bool) -> FitWithin:
    """Return the scaling to the size for the network."""
    shorts = (config.short_side, config.short_side)
    if training and config.multi_scale is not None:
        shorts = config.multi_scale
    return FitWithin(shorts, config.long_side)


def build_transforms(config: DataConfig) -> v2.Transform:
    """Return the transforms from an image and its boxes to a sample that is not augmented."""
    return v2.Compose([fit_within(config, training=False), v2.ClampBoundingBoxes()])


@dataclass(frozen=True)
class Sample:
    """One transformed image.

    Attributes:
        pixels: RGB in 0..255, (3, H, W), uint8.
        boxes: `xyxy` in px of `pixels`, (G, 4).
        labels: Classes, (G,), int64.
        image: Index of the image in the records of its dataset.
        original_size: (height, width) in px before any transform.
        changes: What augmentation did, in order.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    image: int
    original_size: tuple[int, int]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Padded images with their ground truths.

    Attributes:
        pixels: RGB in 0..255, (B, 3, H, W), uint8, padded with 0; channels last in memory.
        targets: Ground truths in px of `pixels`.
        images: Index of every image in the records of its dataset, (B,).
        original_sizes: (height, width) of every image in px before any transform, (B, 2).
    """

    pixels: Tensor
    targets: Targets
    images: Tensor
    original_sizes: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; the copy does not block where memory is pinned."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by the DataLoader)."""
        return _map_tensors(self, Tensor.pin_memory)


class DetectionDataset(Dataset[Sample]):
    """The samples of a split, by (draw, image) as samplers give it.

    Attributes:
        split: The split.
        records: The images of the split, or their tiles with `data.tiles`.
    """

    def __init__(self, split: Split, config: Config, *, training: bool) -> None:
        self.split = split
        self.records = sample_records(split.records, config.data, training=training)
        self._seed = config.seed
        self._cache = Path(config.data.cache) if config.data.cache else None
        self._latest: tuple[Path, Tensor] | None = None
        self._training = training
        self._transforms = build_transforms(config.data)
        self._augment = Augmentation(config.data, fit_within(config.data, training=True))
        self._combine = Combination(config.data.augment, self._load, len(self.records))
        self._combining_draws = combining_draws(self.records, config) if training else 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> Sample:
        draw, image = key
        loaded = self._load(image)
        height, width = loaded.image.shape[-2:]
        with _seeded(self._seed, draw, image):
            sample, changes = self._changed(loaded, draw)
        return Sample(
            sample.image.as_subclass(Tensor),
            sample.boxes.as_subclass(Tensor),
            sample.labels,
            image,
            (height, width),
            tuple(changes),
        )

    def _load(self, image: int) -> Labelled:
        """Return an image of the set and its objects, before any change."""
        record = self.records[image]
        pixels, boxes = as_sample(self._read(record), torch.tensor(record.boxes))
        return Labelled(pixels, boxes, torch.tensor(record.labels))

    def _changed(self, sample: Labelled, draw: int) -> tuple[Labelled, list[str]]:
        """Return an image as the network takes it, and what augmentation did to it."""
        if not self._training:
            image, boxes = self._transforms(sample.image, sample.boxes)
            return Labelled(image, boxes, sample.labels), []
        combined: list[str] = []
        if draw < self._combining_draws:
            sample, combined = self._combine(sample)
        sample, changes = self._augment(sample)
        return sample, [*combined, *changes]

    def _read(self, record: ImageRecord) -> Tensor:
        """Return the pixels of an image or a tile."""
        path, tile = record.path, record.tile
        pixels = self._decoded(path, is_tile=tile is not None)
        size = tuple(pixels.shape[-2:])
        height, width = tile.image_size if tile else record.size
        if size == (height, width):
            return cut_window(pixels, tile.window) if tile else pixels
        problem = (
            f"{path}: is {pixels.shape[-1]} x {pixels.shape[-2]} px, but its annotations say "
            f"{width} x {height}"
        )
        advice = f"correct {self.split.annotations}"
        if size == (width, height) and is_on_its_side(path):
            problem += ", as before the rotation by its EXIF orientation"
            advice = f"remove the orientation or {advice}"
        raise DataError(f"{problem}; {advice}")

    def _decoded(self, path: Path, *, is_tile: bool) -> Tensor:
        """Return the pixels of an image file, for a tile without reading what is not needed.

        A cached file is mapped. Otherwise the image of the last tile is kept, because tiles of one
        image follow each other in an evaluation.
        """
        if self._cache:
            return read_cached(path, self._cache, mapped=is_tile)
        if not is_tile:
            return read_image(path)
        if self._latest is None or self._latest[0] != path:
            self._latest = (path, read_image(path))
        return self._latest[1]


def cut_window(pixels: Tensor, window: Window) -> Tensor:
    """Return a copy of the pixels (3, H, W) in a window, with the channels of a pixel together."""
    x1, y1, x2, y2 = window
    part = pixels[:, y1:y2, x1:x2].permute(1, 2, 0)
    return part.clone(memory_format=torch.contiguous_format).permute(2, 0, 1)


def require_batch_statistics(config: Config, records: Sequence[ImageRecord], images: int) -> None:
    """Check that BatchNorm, if it trains, has more than one value of each channel in every batch.

    Args:
        config: The configuration of the training.
        records: The images to train on.
        images: Number of images of a worker's shard.

    Raises:
        DataError: There may be a micro-batch of one image that is one cell of the last stage.
    """
    backbone, data = config.model.backbone, config.data
    per_pass = min(data.images_per_pass or images, images)
    if backbone.norm_eval or backbone.sync_norm or (per_pass > 1 and images % per_pass != 1):
        return
    short = min(data.multi_scale or (data.short_side,))
    for record in records:
        if max(fitted_size(*record.size, short, data.long_side)) <= SIZE_MULTIPLE:
            raise DataError(
                f"{record.path}: alone in a pass and at most {SIZE_MULTIPLE} px wide and high, it "
                "gives BatchNorm one value of each channel; set a larger data.batch or "
                "data.short_side, or model.backbone.norm_eval=true"
            )


def build_loader(
    dataset: DetectionDataset, batches: Sampler[list[Key]], workers: int, *, pin: bool
) -> DataLoader[Batch]:
    """Return a loader of `batches`.

    Args:
        dataset: The samples.
        batches: Yields the keys of each batch.
        workers: Number of processes that load ahead; 0 loads in this process.
        pin: Whether batches lie in page-locked memory, from which copies to a GPU do not block.
    """
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
    )


def collate(samples: list[Sample]) -> Batch:
    """Return `samples` as a batch, padded right and bottom to multiples of `SIZE_MULTIPLE` px."""
    height = _round_up(max(sample.pixels.shape[1] for sample in samples))
    width = _round_up(max(sample.pixels.shape[2] for sample in samples))
    pixels = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for image, sample in zip(pixels, samples, strict=True):
        image[:, : sample.pixels.shape[1], : sample.pixels.shape[2]] = sample.pixels
    sizes = torch.tensor([sample.pixels.shape[1:] for sample in samples])
    return Batch(
        pixels=pixels,
        targets=pad_targets([s.boxes for s in samples], [s.labels for s in samples], sizes),
        images=torch.tensor([sample.image for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
    )


def _round_up(side: int) -> int:
    return ceil(side / SIZE_MULTIPLE) * SIZE_MULTIPLE


def _map_tensors(batch: Batch, convert: Callable[[Tensor], Tensor]) -> Batch:
    def converted(part: Batch | Targets) -> dict[str, Tensor]:
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        return {name: convert(v) for name, v in values.items() if isinstance(v, Tensor)}

    targets = replace(batch.targets, **converted(batch.targets))
    return replace(batch, targets=targets, **converted(batch))


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seed torch's CPU generator, from which transforms draw, and restore it afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(mix_seeds(*numbers))
    try:
        yield
    finally:
        torch.set_rng_state(state)
