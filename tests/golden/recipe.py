"""How the inputs behind the golden numbers are made: weights, images, ground truths. CPU generators, torch 2.14.

`weight(key, shape)` gives every entry of a reference state_dict (names and shapes in `*.keys.json`); `batch(step)` the
two normalised images and their ground truths used at that step of the trajectory (step 0 is the single-step case).
"""

import math
import zlib

import torch
from torch import Tensor

HEIGHT, WIDTH = 256, 320


def weight(key: str, shape: list[int]) -> Tensor:
    """Return the deterministic value of the state_dict entry `key`."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    leaf = key.rsplit(".", 1)[-1]

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.long)
    if key == "bbox_head.integral.project":
        return torch.arange(shape[0], dtype=torch.float32)
    if leaf == "scale":
        return uniform(0.7, 1.3)
    if leaf == "running_mean":
        return normal(0.1)
    if leaf == "running_var":
        return uniform(0.7, 1.4)
    if "gfl_cls" in key:
        return normal(0.02) if leaf == "weight" else normal(0.3) - 4.0
    if "gfl_reg" in key:
        return (
            normal(0.03)
            if leaf == "weight"
            else normal(0.4) + torch.linspace(1.5, -1.5, shape[0] // 4).repeat(4)
        )
    if "conv_offset" in key:
        return normal(0.5) if leaf == "bias" else normal(0.6 / math.sqrt(math.prod(shape[1:])))
    if len(shape) == 1 and leaf == "weight":
        return uniform(0.1, 0.3) if ".bn3." in key else uniform(0.6, 1.4)
    if leaf == "bias":
        return normal(0.05)
    return normal(math.sqrt(2.0 / math.prod(shape[1:])))


def image(index: int) -> Tensor:
    """Return normalised network input number `index`, (3, HEIGHT, WIDTH): smooth noise under six flat rectangles."""
    generator = torch.Generator().manual_seed(1000 + index)
    low = torch.randn(1, 3, 9, 11, generator=generator) * 1.2
    pixels = torch.nn.functional.interpolate(
        low, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=False
    )[0]

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(6):
        x, y = draw(0, WIDTH - 20), draw(0, HEIGHT - 20)
        width, height = draw(10, WIDTH // 2), draw(10, HEIGHT // 2)
        pixels[:, y : y + height, x : x + width] = torch.randn(3, 1, 1, generator=generator) * 1.2
    return pixels


def ground_truth(step: int, index: int) -> tuple[Tensor, Tensor]:
    """Return `xyxy` boxes (G, 4) in pixels and labels (G,) in 0..79 of image `index` (0 or 1) at `step`."""
    if step == 0 and index == 0:
        boxes = [
            [10.0, 12.0, 60.0, 80.0],
            [12.0, 15.0, 64.0, 84.0],
            [100.0, 100.0, 104.0, 103.0],
            [5.0, 3.0, 316.0, 250.0],
            [150.0, 60.0, 310.0, 200.0],
            [200.5, 40.25, 206.75, 46.5],
        ]
        return torch.tensor(boxes), torch.tensor([0, 17, 79, 56, 2, 33])
    if step == 0:
        boxes = [[30.0, 20.0, 120.0, 190.0], [60.5, 33.25, 90.125, 71.75], [1.0, 1.0, 140.0, 150.0]]
        return torch.tensor(boxes), torch.tensor([5, 5, 60])
    generator = torch.Generator().manual_seed(5000 + 2 * step + index)
    count = int(torch.randint(1, 8, (), generator=generator))
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([220.0, 170.0])
    size = torch.rand(count, 2, generator=generator) * torch.tensor([100.0, 86.0])
    size = size * torch.rand(count, 1, generator=generator) + 6.0
    far = torch.minimum(corner + size, torch.tensor([float(WIDTH), float(HEIGHT)]))
    return torch.cat([corner, far], 1), torch.randint(0, 80, (count,), generator=generator)


def batch(step: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return images (2, 3, HEIGHT, WIDTH), and per image the boxes and labels."""
    images = torch.stack([image(2 * step + index) for index in range(2)])
    truths = [ground_truth(step, index) for index in range(2)]
    return images, [boxes for boxes, _ in truths], [labels for _, labels in truths]
