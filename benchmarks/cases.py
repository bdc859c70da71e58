"""What detectors are timed at, and inputs alike for all of them. Needs nothing but torch."""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CLASSES = 80
TRAIN_OBJECTS = 10
LEVELS = (8, 16, 32, 64, 128)
EDGE_BINS = 17

CASES = (
    "train-2x256x320", "train-1x800x1344", "predict-1x800x1216",
    "loss-2x800x1344-10", "loss-2x800x1344-100",
)  # fmt: skip
"""Work, images, height and width in px, objects of an image; "-bfloat16" may follow, and of a
training step "-compiled", which is for ours alone."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    work: Literal["train", "predict", "loss"]
    batch: int
    height: int
    width: int
    objects: int
    precision: torch.dtype
    compiled: bool


def parse(name: str) -> Case:
    """Return the case of a name such as those of `CASES`."""
    form = r"(train|predict|loss)-(\d+)x(\d+)x(\d+)(?:-(\d+))?(-bfloat16)?(-compiled)?"
    found = re.fullmatch(form, name)
    if found is None or (found[7] and found[1] != "train"):
        raise ValueError(f"{name}: no case; expected something like {CASES[0]}")
    work, batch, height, width, objects, low, compiled = found.groups()
    dtype = torch.bfloat16 if low else torch.float32
    count = int(objects or TRAIN_OBJECTS)
    sizes = (int(batch), int(height), int(width))
    return Case(work, *sizes, count, dtype, compiled is not None)  # type: ignore[arg-type]


def images(case: Case) -> Tensor:
    """Return normalised images (B, 3, H, W)."""
    noise = torch.Generator().manual_seed(0)
    return torch.randn(case.batch, 3, case.height, case.width, generator=noise)


def objects(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Return boxes `xyxy` in px (G, 4), of all sizes alike, and labels (G,) of every image."""
    noise = torch.Generator().manual_seed(1)
    limits = torch.tensor([case.width, case.height] * 2)
    low, high = math.log(12), math.log(0.9 * min(case.height, case.width))
    boxes, labels = [], []
    for _ in range(case.batch):
        centre = torch.rand(case.objects, 2, generator=noise) * limits[:2]
        side = torch.exp(low + (high - low) * torch.rand(case.objects, 1, generator=noise))
        slant = torch.exp(torch.rand(case.objects, 1, generator=noise) * 1.4 - 0.7)
        half = torch.cat([side * slant, side / slant], dim=1) / 2
        corners = torch.cat([centre - half, centre + half], dim=1)
        boxes.append(corners.clamp(min=0).minimum(limits))
        labels.append(torch.randint(CLASSES, (case.objects,), generator=noise))
    return boxes, labels


def logits(case: Case, channels: int, mean: float) -> list[Tensor]:
    """Return what a head could have said, per level (B, channels, H_l, W_l)."""
    noise = torch.Generator().manual_seed(channels)
    return [
        mean + torch.randn(case.batch, channels, -(-case.height // step), -(-case.width // step),
                           generator=noise)
        for step in LEVELS
    ]  # fmt: skip
