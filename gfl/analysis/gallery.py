"""Images in the report: cut out around what they show, with boxes as shapes over the pixels.

Shapes are drawn by the browser, so that class names in any script are shown.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from gfl.analysis.analysis import Analysis
from gfl.analysis.distributions import examples
from gfl.analysis.error_types import KINDS
from gfl.data.images import read_image
from gfl.data.split import Split
from gfl.evaluation.coco_eval import CERTAIN
from gfl.structures import Predictions

Floats = npt.NDArray[np.float64]

EXAMPLES = 4
"""Number of examples of each kind."""

WORST = 6
"""Number of images with the lowest F1."""

LONGEST_SIDE = 420
"""Longer side of a picture in px."""

CONTEXT = 1.0
"""Margin around an object, in sides of its box."""

SMALLEST_CUT = 96
"""Smallest side of what is cut out, in px of the image."""

JPEG_QUALITY = 80

EDGES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Shape:
    """A box in a picture.

    Attributes:
        role: `truth` for an annotated object, `right` or `wrong` for a detection.
        box: `xyxy` in px of the picture.
        caption: Class, and the score of a detection.
        sigma: Standard deviation of each edge in px of the picture, if it is to be shown.
    """

    role: Literal["truth", "right", "wrong"]
    box: tuple[float, float, float, float]
    caption: str
    sigma: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
        caption: What is shown.
        source: The pixels as a URL.
        size: (width, height) in px.
        shapes: The boxes over the pixels.
        distribution: Probabilities of the bins of an edge, if they are shown.
    """

    caption: str
    source: str
    size: tuple[int, int]
    shapes: list[Shape]
    distribution: list[float] = field(default_factory=list)


class _Cut:
    """A part of an image, scaled to the size of a picture."""

    def __init__(self, path: Path, around: Floats | None) -> None:
        pixels = read_image(path)
        height, width = pixels.shape[1:]
        self._part = np.array([0, 0, width, height])
        if around is not None:
            self._part = _around(around, width, height)
        left, top, right, bottom = self._part.tolist()
        part = Image.fromarray(pixels[:, top:bottom, left:right].permute(1, 2, 0).numpy())
        self._scale = LONGEST_SIDE / max(part.size)
        self.size = (round(part.width * self._scale) or 1, round(part.height * self._scale) or 1)
        content = io.BytesIO()
        part.resize(self.size).save(content, "JPEG", quality=JPEG_QUALITY)
        self.source = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"

    def place(self, box: Floats) -> tuple[float, float, float, float]:
        """Return a box of the image in px of the picture."""
        left, top, right, bottom = ((box - np.tile(self._part[:2], 2)) * self._scale).tolist()
        return left, top, right, bottom

    def scaled(self, lengths: Floats) -> tuple[float, float, float, float]:
        """Return four lengths in the image in px of the picture."""
        left, top, right, bottom = (lengths * self._scale).tolist()
        return left, top, right, bottom

    def shows(self, box: Floats) -> bool:
        """Return whether a box of the image lies in the picture, at least in part."""
        low, high = np.maximum(box[:2], self._part[:2]), np.minimum(box[2:], self._part[2:])
        return bool((low < high).all())


def _around(box: Floats, width: int, height: int) -> npt.NDArray[np.int64]:
    """Return a box with its surroundings within an image, `xyxy` in whole px."""
    centre, sides = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    half = np.maximum(sides * (0.5 + CONTEXT), SMALLEST_CUT / 2)
    limit = np.array([width, height])
    low = np.clip(np.floor(centre - half), 0, limit - 1)
    high = np.clip(np.ceil(centre + half), low + 1, limit)
    return np.concatenate([low, high]).astype(np.int64)


def pictures_of_errors(
    analysis: Analysis, split: Split, classes: Sequence[str]
) -> dict[str, list[Picture]]:
    """Return examples of each kind of error: the surest wrong detections, the largest missed."""
    matches = analysis.matches
    sides = matches.object_box[:, 2:] - matches.object_box[:, :2]
    pictures = {}
    for kind in KINDS:
        if kind == "Miss":
            missed = matches.missed
            order = missed[np.argsort(-sides[missed].prod(axis=1), kind="stable")]
            pictures[kind] = [
                _picture_of_miss(analysis, split, classes, place)
                for place in order[:EXAMPLES].tolist()
            ]
        else:
            wrong = np.flatnonzero(analysis.kinds == kind)
            order = wrong[np.argsort(-matches.score[wrong], kind="stable")]
            pictures[kind] = [
                _picture_of_detection(analysis, split, classes, place)
                for place in order[:EXAMPLES].tolist()
            ]
    return {kind: examples for kind, examples in pictures.items() if examples}


def pictures_of_worst(analysis: Analysis, split: Split, classes: Sequence[str]) -> list[Picture]:
    """Return the images with the lowest F1, with all objects and all certain detections."""
    matches = analysis.matches
    pictures = []
    for place in analysis.worst_images[:WORST].tolist():
        number = split.numbers[place]
        cut = _Cut(split.records[place].path, None)
        shapes = _truth(analysis, cut, number, classes)
        certain = (matches.image == number) & (matches.score >= CERTAIN)
        for detection in np.flatnonzero(certain).tolist():
            shapes.append(_shape(analysis, cut, detection, classes))
        caption = f"{split.records[place].path.name}, F1 {analysis.image_f1[place]:.2f}"
        pictures.append(Picture(caption, cut.source, cut.size, shapes))
    return pictures


def pictures_of_edges(
    images: Sequence[Path], predictions: Sequence[Predictions], classes: Sequence[str]
) -> dict[str, list[Picture]]:
    """Return examples of each form of edge distributions, from the certain detections.

    Args:
        images: The image files.
        predictions: Detections in each image, at least one image's.
        classes: Class names, by label.
    """
    certain = [detected.select(detected.scores >= CERTAIN) for detected in predictions]
    places = [(image, n) for image, detected in enumerate(certain) for n in range(len(detected))]
    distributions = np.concatenate([detected.distributions.double() for detected in certain])
    return {
        form: [
            _picture_of_edge(
                images[places[example.detection][0]],
                certain[places[example.detection][0]],
                places[example.detection][1],
                example.edge,
                classes,
            )
            for example in chosen
        ]
        for form, chosen in examples(distributions, EXAMPLES).items()
    }


def _picture_of_edge(
    path: Path, detected: Predictions, place: int, edge: int, classes: Sequence[str]
) -> Picture:
    box, sigma = detected.boxes[place].double().numpy(), detected.edge_std[place].double().numpy()
    cut = _Cut(path, box)
    caption = f"{classes[int(detected.labels[place])]} {float(detected.scores[place]):.2f}"
    shape = Shape("right", cut.place(box), caption, cut.scaled(sigma))
    return Picture(
        f"{EDGES[edge]} edge, sigma {sigma[edge]:.1f} px",
        cut.source,
        cut.size,
        [shape],
        detected.distributions[place, edge].tolist(),
    )


def _picture_of_detection(
    analysis: Analysis, split: Split, classes: Sequence[str], detection: int
) -> Picture:
    matches = analysis.matches
    number, box = int(matches.image[detection]), matches.box[detection]
    path = split.records[split.numbers.index(number)].path
    cut = _Cut(path, box)
    shapes = [*_truth(analysis, cut, number, classes), _shape(analysis, cut, detection, classes)]
    return Picture(path.name, cut.source, cut.size, shapes)


def _picture_of_miss(
    analysis: Analysis, split: Split, classes: Sequence[str], place: int
) -> Picture:
    matches = analysis.matches
    number, box = int(matches.object_image[place]), matches.object_box[place]
    path = split.records[split.numbers.index(number)].path
    cut = _Cut(path, box)
    shape = Shape("truth", cut.place(box), classes[matches.object_label[place]])
    return Picture(path.name, cut.source, cut.size, [shape])


def _truth(analysis: Analysis, cut: _Cut, number: int, classes: Sequence[str]) -> list[Shape]:
    """Return the objects of an image that a picture shows."""
    matches = analysis.matches
    return [
        Shape("truth", cut.place(box), classes[label])
        for box, label, image in zip(
            matches.object_box, matches.object_label, matches.object_image, strict=True
        )
        if image == number and cut.shows(box)
    ]


def _shape(analysis: Analysis, cut: _Cut, detection: int, classes: Sequence[str]) -> Shape:
    matches = analysis.matches
    name, score = classes[matches.label[detection]], matches.score[detection]
    role: Literal["right", "wrong"] = "right" if matches.correct[detection] else "wrong"
    return Shape(role, cut.place(matches.box[detection]), f"{name} {score:.2f}")
