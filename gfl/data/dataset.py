"""Samples, batches and who gets which: the same for any number of workers, and from any step on.

A global step has one global batch; each worker takes its share of it. Augmentation draws from a
generator seeded by (seed, epoch, image), so neither the number of workers nor an interruption
changes a sample.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from gfl.config.schema import Config, DataConfig
from gfl.data.images import is_on_its_side, read_cached, read_image
from gfl.data.samplers import Key, _mix
from gfl.data.split import ImageRecord, Split
from gfl.errors import DataError
from gfl.structures import Targets, pad_targets


def fitted_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Return the (height, width) of an image scaled to fit within `short` and `long`, all in px.

    Neither is less than 1, however thin the image.
    """
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


class FitWithin(v2.Transform):
    """Scale to fit within (long, short), keeping the aspect ratio: bilinear, without antialiasing.

    torchvision's `Resize` rounds sizes down and antialiases; the published weights were trained
    without either. With `shorts` = (low, high) the short side is drawn from them, both included.
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


def build_transforms(config: DataConfig, *, training: bool) -> v2.Transform:
    """Return what turns an image and its boxes into a sample, on `tv_tensors`."""
    shorts = (config.short_side, config.short_side)
    if training and config.multi_scale is not None:
        shorts = config.multi_scale
    steps: list[v2.Transform] = [FitWithin(shorts, config.long_side)]
    if training:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    return v2.Compose([*steps, v2.ClampBoundingBoxes()])


def as_sample(pixels: Tensor, boxes: Tensor) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]:
    """Return `pixels` (3, H, W) and `xyxy` `boxes` (G, 4) as types that transforms recognise."""
    height, width = pixels.shape[-2:]
    wrapped = tv_tensors.BoundingBoxes(
        boxes.reshape(-1, 4), format="XYXY", canvas_size=(height, width)
    )
    return tv_tensors.Image(pixels), wrapped


SIZE_MULTIPLE = 32
"""Batches are padded right and bottom to a multiple of this many px."""


@dataclass(frozen=True)
class Sample:
    """One image, ready to be batched; boxes `xyxy` in px of `pixels`."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    image: int
    original_size: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Padded images with their ground truths.

    Attributes:
        pixels: RGB in 0..255, (B, 3, H, W), uint8, padded with 0; channels last in memory.
        targets: Ground truths in px of `pixels`.
        images: Index of every image in its split, (B,).
        original_sizes: (height, width) in px before any transform, (B, 2).
    """

    pixels: Tensor
    targets: Targets
    images: Tensor
    original_sizes: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`, copied without waiting where memory is pinned."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by the DataLoader)."""
        return _map_tensors(self, Tensor.pin_memory)


class DetectionDataset(Dataset[Sample]):
    """The samples of a split."""

    def __init__(self, split: Split, config: Config, *, training: bool) -> None:
        self.split = split
        self._seed = config.seed
        self._cache = Path(config.data.cache) if config.data.cache else None
        self._transforms = build_transforms(config.data, training=training)

    def __len__(self) -> int:
        return len(self.split.records)

    def __getitem__(self, key: Key) -> Sample:
        epoch, image = key
        record = self.split.records[image]
        pixels = self._read(record)
        with _seeded(self._seed, epoch, image):
            pixels, boxes = self._transforms(*as_sample(pixels, torch.tensor(record.boxes)))
        labels = torch.tensor(record.labels)
        return Sample(
            pixels.as_subclass(Tensor), boxes.as_subclass(Tensor), labels, image, record.size
        )

    def _read(self, record: ImageRecord) -> Tensor:
        path, cache = record.path, self._cache
        pixels = read_cached(path, cache) if cache else read_image(path)
        found = tuple(pixels.shape[-2:])
        if found == record.size:
            return pixels
        height, width = record.size
        wrong = (
            f"{path}: is {pixels.shape[-1]} x {pixels.shape[-2]} px, but its annotations say "
            f"{width} x {height}"
        )
        if found == (width, height) and is_on_its_side(path):
            wrong += ", as before the turn of its EXIF orientation; remove the orientation or"
        else:
            wrong += ";"
        raise DataError(f"{wrong} correct {self.split.annotations}")


def build_loader(
    dataset: DetectionDataset, batches: Sampler[list[Key]], workers: int, *, pin: bool
) -> DataLoader[Batch]:
    """Return a loader of `batches`; `workers` processes load ahead, `pin` page-locks for a GPU."""
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
    """Seed torch's CPU generator, which the transforms draw from, and put it back afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(_mix(*numbers))
    try:
        yield
    finally:
        torch.set_rng_state(state)
