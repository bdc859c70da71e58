"""Times a training step and a prediction beside torchvision's FCOS: medians, and their ratio.

FCOS with the same backbone (`torchvision.models.detection.fcos_resnet50_fpn`) is the nearest
detector in a library that is installed anyway. Both see the same images and boxes, in turn, in one
process; a ratio under 1 says that GFL is the faster.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.models.detection import fcos_resnet50_fpn

import gfl

REPEATS = 7
OBJECTS = 10
CLASSES = 80


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    config = gfl.load_config("configs/gfl_r50_1x.yaml")
    ours = gfl.Detector(config).to(memory_format=torch.channels_last)
    options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    theirs = fcos_resnet50_fpn(**options, min_size=256, max_size=320)
    for frozen in (theirs.backbone.body.conv1, theirs.backbone.body.layer1):  # as ours are
        frozen.requires_grad_(False)
    table = Table("what", "GFL, s", "FCOS, s", "GFL / FCOS", title="medians of alternating runs")
    images, boxes, labels = make_batch(2, 256, 320)
    for name, mine, peer in (
        ("train step, 2 x 256 x 320", train(ours, images, boxes, labels),
         train_fcos(theirs, images, boxes, labels)),
        ("predict, 1 x 256 x 320", predict(ours, images[:1]), predict_fcos(theirs, images[:1])),
    ):  # fmt: skip
        first, second = alternate(mine, peer)
        table.add_row(name, f"{first:.3f}", f"{second:.3f}", f"{first / second:.2f}")
    Console().print(table)


def make_batch(count: int, height: int, width: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return images and `OBJECTS` ground truths of each."""
    corner = torch.rand(count, OBJECTS, 2) * torch.tensor([width * 0.6, height * 0.6])
    size = 8 + torch.rand(count, OBJECTS, 2) * torch.tensor([width * 0.3, height * 0.3])
    boxes = torch.cat([corner, corner + size], dim=2)
    labels = torch.randint(0, CLASSES, (count, OBJECTS))
    return torch.randn(count, 3, height, width), list(boxes), list(labels)


def train(
    detector: gfl.Detector, images: Tensor, boxes: list[Tensor], labels: list[Tensor]
) -> Callable[[], None]:
    """Return a training step of ours: forward, losses, backward, update."""
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-6, momentum=0.9, fused=True)
    inputs = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        detector.train()
        losses = detector.losses(inputs, boxes, labels)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def train_fcos(
    detector: torch.nn.Module, images: Tensor, boxes: list[Tensor], labels: list[Tensor]
) -> Callable[[], None]:
    """Return the same of torchvision's FCOS."""
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-6, momentum=0.9, fused=True)
    targets = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]

    def step() -> None:
        detector.train()
        losses = detector(list(images), targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def predict(detector: gfl.Detector, images: Tensor) -> Callable[[], None]:
    """Return a prediction of ours, post-processing included."""
    inputs = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        detector.eval()
        detector.predict(inputs)

    return step


def predict_fcos(detector: torch.nn.Module, images: Tensor) -> Callable[[], None]:
    """Return the same of torchvision's FCOS."""

    @torch.no_grad()
    def step() -> None:
        detector.eval()
        detector(list(images))

    return step


def alternate(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Return the median seconds of each, run in turn after one warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(REPEATS + 1):
        for run, times in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
