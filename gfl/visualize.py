"""Pictures of predictions: boxes, classes, scores, and how sure the model is of every edge."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from gfl.postprocess import Predictions

PANEL_INCHES = 3.0
COLUMNS = 4
SHADE = 0.35
"""Opacity of an edge's uncertainty."""


def draw_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Predictions],
    classes: Sequence[str],
    path: Path,
    min_score: float = 0.3,
) -> None:
    """Draw the detections of several images into one PNG.

    A band around each edge spans one standard deviation of its learned distribution to either side:
    the wider, the less sure the model is of where the edge lies.

    Args:
        images: RGB pixels (3, H, W), uint8.
        predictions: Of each image.
        classes: Names by label.
        path: The PNG file.
        min_score: Detections below are not drawn.
    """
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(PANEL_INCHES * columns, PANEL_INCHES * rows), layout="constrained")
    for number, (pixels, found) in enumerate(zip(images, predictions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.imshow(pixels.permute(1, 2, 0).numpy())
        axes.set_axis_off()
        for index in np.flatnonzero(found.scores.numpy() >= min_score):
            _draw_detection(axes, found, int(index), classes)
        # Bands may reach beyond the image; the picture need not.
        axes.set_xlim(-0.5, pixels.shape[2] - 0.5)
        axes.set_ylim(pixels.shape[1] - 0.5, -0.5)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)


def _draw_detection(axes: Axes, found: Predictions, index: int, classes: Sequence[str]) -> None:
    label = int(found.labels[index])
    colour = colormaps["tab10"](label % 10)
    # A pixel's centre has whole coordinates in matplotlib, its corner in ours.
    left, top, right, bottom = (found.boxes[index] - 0.5).tolist()
    std = found.edge_std[index].tolist()
    for x, width in ((left, std[0]), (right, std[2])):
        band = Rectangle((x - width, top), 2 * width, bottom - top)
        band.set(facecolor=colour, alpha=SHADE, linewidth=0)
        axes.add_patch(band)
    for y, height in ((top, std[1]), (bottom, std[3])):
        band = Rectangle((left, y - height), right - left, 2 * height)
        band.set(facecolor=colour, alpha=SHADE, linewidth=0)
        axes.add_patch(band)
    axes.add_patch(
        Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5
        )
    )
    axes.text(
        left,
        max(top, 0) + 1,
        f"{classes[label]} {found.scores[index]:.2f}",
        fontsize=7,
        color="white",
        va="top",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85},
    )
