"""Pictures of samples and predictions: boxes, classes, and the uncertainty of edges."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from gfl.data.dataset import DetectionDataset
from gfl.structures import Predictions, Rows

DPI = 120
"""Resolution of pictures, in px per inch."""

PANEL_INCHES = 3.0
"""Side of one image in a picture of several, in inches."""

COLUMNS = 4
"""Largest number of images in a row."""

SMALLEST_SAMPLE = 640
"""Smallest longer side of a drawn sample in px: captions need room."""

CAPTION_SHARE = 0.05
"""Height of a caption, as a share of the image's height."""

SHADE = 0.35
"""Opacity of the band that shows an edge's uncertainty."""


def draw_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Predictions],
    classes: Sequence[str],
    path: Path,
    min_score: float = 0.3,
) -> None:
    """Draw the detections of several images into one PNG.

    A band around each edge spans one standard deviation of its learned distribution to either side:
    the wider the band, the less certain the edge. With `model.edges: dirac`, which learns no
    distribution, there is no band.

    Args:
        images: RGB pixels (3, H, W), uint8.
        predictions: Detections of each image.
        classes: Class names by label.
        path: The PNG file.
        min_score: Smallest score of the detections that are drawn.
    """
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(PANEL_INCHES * columns, PANEL_INCHES * rows), layout="constrained")
    for number, (pixels, detected) in enumerate(zip(images, predictions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, number)
        _show(axes, pixels)
        for index in np.flatnonzero(detected.scores.numpy() >= min_score):
            _draw_detection(axes, detected, int(index), classes)
    _save(figure, path)


def draw_pairs(
    images: Sequence[Tensor],
    detections: Sequence[Sequence[Rows]],
    classes: Sequence[str],
    titles: Sequence[str],
    path: Path,
    min_score: float = 0.3,
) -> None:
    """Draw the detections of several detectors in the same images, side by side, into one PNG.

    Args:
        images: RGB pixels (3, H, W), uint8.
        detections: Rows (N, 7) of each detector and image, as `gfl.structures.Rows` describes.
        classes: Class names of the detectors.
        titles: Name of each detector.
        path: The PNG file.
        min_score: Smallest score of the detections that are drawn.
    """
    columns = len(detections) * (2 if len(images) > 1 else 1)  # two images in a row
    rows = -(-len(images) * len(detections) // columns)
    figure = Figure(figsize=(PANEL_INCHES * columns, PANEL_INCHES * rows), layout="constrained")
    for number, pixels in enumerate(images):
        for place, title in enumerate(titles):
            axes = figure.add_subplot(rows, columns, number * len(detections) + place + 1)
            axes.set_title(title, fontsize=8)
            _show(axes, pixels)
            for _, x, y, w, h, score, label in detections[place][number]:
                if score >= min_score:
                    box = torch.tensor([x, y, x + w, y + h])
                    caption = f"{classes[int(label)]} {score:.2f}"
                    _draw_box(axes, box, int(label), caption)
    _save(figure, path)


def draw_samples(dataset: DetectionDataset, folder: Path, count: int) -> None:
    """Draw at most `count` evenly spaced images of `dataset` with boxes and classes, a PNG each.

    A picture shows what training sees in its first epoch, at the same size or larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for image in range(0, len(dataset), ceil(len(dataset) / count)):
        sample = dataset[0, image]
        height, width = sample.pixels.shape[1:]
        scale = max(1.0, SMALLEST_SAMPLE / max(height, width)) / DPI
        figure = Figure(figsize=(width * scale, height * scale))
        axes = figure.add_axes((0, 0, 1, 1))
        _show(axes, sample.pixels)
        for box, label in zip(sample.boxes, sample.labels.tolist(), strict=True):
            _draw_box(axes, box, label, dataset.split.classes[label])
        _save(figure, folder / f"{image:06d}-{dataset.records[image].path.stem}.png")


def draw_augmentation(dataset: DetectionDataset, path: Path) -> None:
    """Draw a grid into one file: a row for each of a few images, a column for each of its epochs.

    A caption above each sample says what augmentation did to it. Epochs are the first ones, in
    which mosaic and mixup take part.
    """
    images = range(0, len(dataset), ceil(len(dataset) / COLUMNS))
    figure = Figure(figsize=(PANEL_INCHES * COLUMNS, PANEL_INCHES * len(images)))
    figure.set_layout_engine("constrained")
    for row, image in enumerate(images):
        for column in range(COLUMNS):
            sample = dataset[column, image]
            axes = figure.add_subplot(len(images), COLUMNS, row * COLUMNS + column + 1)
            axes.set_title(fill(", ".join(sample.changes) or "unchanged", 40), fontsize=8)
            _show(axes, sample.pixels)
            for box, label in zip(sample.boxes, sample.labels.tolist(), strict=True):
                _draw_box(axes, box, label, dataset.split.classes[label])
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)


def _show(axes: Axes, pixels: Tensor) -> None:
    axes.imshow(pixels.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    # Later drawings may extend beyond the image, the picture does not.
    axes.set_xlim(-0.5, pixels.shape[2] - 0.5)
    axes.set_ylim(pixels.shape[1] - 0.5, -0.5)


def _draw_detection(axes: Axes, detected: Predictions, index: int, classes: Sequence[str]) -> None:
    label = int(detected.labels[index])
    colour = _colour(label)
    left, top, right, bottom = _in_pixels(detected.boxes[index])
    std = detected.edge_std[index].tolist()
    for x, width in ((left, std[0]), (right, std[2])):
        band = Rectangle((x - width, top), 2 * width, bottom - top)
        band.set(facecolor=colour, alpha=SHADE, linewidth=0)
        axes.add_patch(band)
    for y, height in ((top, std[1]), (bottom, std[3])):
        band = Rectangle((left, y - height), right - left, 2 * height)
        band.set(facecolor=colour, alpha=SHADE, linewidth=0)
        axes.add_patch(band)
    _draw_box(axes, detected.boxes[index], label, f"{classes[label]} {detected.scores[index]:.2f}")


def _draw_box(axes: Axes, box: Tensor, label: int, caption: str) -> None:
    colour = _colour(label)
    left, top, right, bottom = _in_pixels(box)
    axes.add_patch(
        Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5
        )
    )
    # The caption stands above the box, which may be smaller, unless that is beyond the image.
    above = top > CAPTION_SHARE * axes.get_ylim()[0]
    axes.text(
        left,
        top if above else max(top, 0) + 1,
        caption,
        fontsize=7,
        color="white",
        va="bottom" if above else "top",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85},
    )


def _colour(label: int) -> tuple[float, float, float, float]:
    return colormaps["tab10"](label % 10)


def _in_pixels(box: Tensor) -> list[float]:
    """Return a box `xyxy` in matplotlib's coordinates, where pixel centres are whole numbers."""
    return (box - 0.5).tolist()
